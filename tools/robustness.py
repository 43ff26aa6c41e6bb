"""ImageNet-A, -R, -Sketch and -C: how a classifier of ImageNet does on other pictures of the same classes.

Their folders are named as ImageNet's are, so the place of a folder's name in the checkpoint's list of
classes says which logit is meant, and no table of numbers is needed. tools.evaluate keeps logits[:, columns]
and counts hits by the source's own labels; `summarise` makes the published metric of them.

Shapes: K folders of classes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mff_data.decode import AS_THEY_ARE
from mff_data.lists import same_name
from mff_data.sources import ImageFolder, check_class_folders, relabel
from mff_min.errors import UserError, listed
from mff_min.probe import accuracy

# Of MAE's ViT-B (README of facebookresearch/mae): top-1 accuracy, and of imagenet-c the mCE; in percent.
PUBLISHED = {"imagenet-a": 35.9, "imagenet-r": 48.3, "imagenet-sketch": 34.5, "imagenet-c": 51.7}
OF_200_CLASSES = ("imagenet-a", "imagenet-r")                           # the other logits do not compete

# Corruptions of imagenet-c by the group whose folder they stand in, each with AlexNet's error, a mean over
# five severities (ImageNet-C, arXiv 1903.12261, and its code). The group "extra" is not part of the mCE.
ALEXNET = {
    "noise": {"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    "blur": {"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
             "zoom_blur": 0.798360},
    "weather": {"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    "digital": {"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
                "jpeg_compression": 0.606500},
}
SEVERITIES = range(1, 6)


@dataclass(frozen=True)
class RobustnessSet:
    """One folder to measure: labels of its source count columns, the logits (K,) to keep, from 0."""
    name: str
    source: ImageFolder
    crop: str                                                           # "evaluation", or "center": no margin
    columns: torch.Tensor


def open_robustness(spec, classes, reading=AS_THEY_ARE):
    """The RobustnessSets that NAME:DIR stands for, one, or of imagenet-c one a corruption and severity.

    classes are those of the checkpoint, in the order of its logits. Raises UserError for folders that these
    do not name, and where there is nothing to measure.
    """
    kind, _, folder = spec.partition(":")
    folder = os.path.expanduser(folder)
    if kind not in PUBLISHED or not folder:
        raise UserError(f"--robustness {spec}: expected NAME:DIR with a NAME of {', '.join(PUBLISHED)}")
    if kind != "imagenet-c":
        return [open_set(kind, kind, Path(folder), classes, "evaluation", reading)]
    sets = []
    for group, corruptions in ALEXNET.items():
        for corruption in corruptions:
            for severity in SEVERITIES:
                places = [Path(folder, *path, corruption, str(severity)) for path in ((group,), ())]
                found = [place for place in places if place.is_dir()]
                if found:                                               # its images are 224 x 224 as they are
                    sets.append(open_set(kind, f"{corruption}/{severity}", found[0], classes, "center",
                                         reading))
    if not sets:
        raise UserError(f"--robustness {spec} has no corruptions: expected noise/gaussian_noise/1/<class>/* "
                        f"and others, with or without noise/")
    return sets


def open_set(kind, name, folder, classes, crop, reading):
    """The RobustnessSet of one folder of class folders."""
    source = ImageFolder(folder, ".", reading)
    check_class_folders(source, str(folder))
    source = relabel(source, [source.classes[i] for i in np.unique(source.labels["class"])], print)
    logits = {same_name(label): i for i, label in enumerate(classes)}
    unknown = [label for label in source.classes if label not in logits]
    if unknown:
        raise UserError(f"{folder} has classes that the checkpoint has not: {listed(unknown)}; it has "
                        f"{listed(classes)}")
    columns = [logits[label] for label in source.classes]
    if kind not in OF_200_CLASSES:
        # Published on all classes: one that has no folder here competes too, behind those that have one.
        columns += sorted(set(logits.values()) - set(columns))
    return RobustnessSet(name, source, crop, torch.tensor(columns))


def summarise(kind, found):
    """Metrics of {name of a set: (images, top-1 hits, top-5 hits)}: its accuracy, or the mCE of imagenet-c.

    Of imagenet-c, sets has each set's accuracy, ce each corruption's error as a percentage of AlexNet's, and
    mce their mean. A corruption without all five severities has no ce; where any set is missing, mce is None
    and missing names those.
    """
    if kind != "imagenet-c":
        return accuracy(*found[kind])
    sets = {name: accuracy(*counts) for name, counts in found.items()}
    ce, missing = {}, []
    for corruption, alexnet in ((name, error) for group in ALEXNET.values() for name, error in group.items()):
        names = [f"{corruption}/{severity}" for severity in SEVERITIES]
        missing += [name for name in names if name not in sets]
        if all(name in sets for name in names):
            error = sum(1 - found[name][1] / found[name][0] for name in names) / len(names)
            ce[corruption] = 100 * error / alexnet
    mce = None if missing else sum(ce.values()) / len(ce)
    return dict(mce=mce, ce=ce, missing=missing, sets=sets)


def table(kind, metrics):
    """The metrics of `summarise` as text for the terminal, beside the published number."""
    rows = [("", "here", "published, MAE ViT-B")]
    if kind != "imagenet-c":
        rows.append((f"{kind}, acc1 %", f"{metrics['acc1']:.1f}", f"{PUBLISHED[kind]:.1f}"))
    else:
        rows += [(f"{name}, CE %", f"{ce:.1f}", "-") for name, ce in metrics["ce"].items()]
        mce = "not run" if metrics["mce"] is None else f"{metrics['mce']:.1f}"
        rows.append((f"{kind}, mCE %", mce, f"{PUBLISHED[kind]:.1f}"))
    lines = [f"{name:<28}{here:>8}{published:>22}" for name, here, published in rows]
    if metrics.get("missing"):
        lines.append(f"no mCE without {listed(metrics['missing'])}")
    return "\n".join(lines)
