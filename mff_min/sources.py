"""Image sources: where images, their labels and the names of their classes come from.

A source has `len(source)`, `source.open(i)` (a Pillow image), `source.label(i)`, `source.name(i)`,
`source.classes`, and `source.labels`, the labels of all images by what they are about: {"class": (n,)}, or
{"shape": (n,), "texture": (n,)} of the embedded images. `label(i)` is the first of them, which classes names.

Shapes: n images, H W.
"""

import bisect
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mff_min.config import UserError
from mff_min.shapes import SHAPES, load_shapes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")          # by content; a name says nothing
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
MAX_PIXELS = 50_000_000                                                 # a header with more is not decoded


class ImageFolder:
    """Image files below a folder: ROOT/<split>/<class>/*, or ROOT/train or ROOT where there is no such split.

    is_split says whether the split was found. Without class folders every label is 0. Hidden files and
    folders are skipped, links are followed. Raises UserError when there is no image, or none but in val/.
    """

    def __init__(self, root, split):
        root = Path(root)
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data folder {root} {problem}: expected a folder of images, with or without "
                            f"train/ and val/")
        self.is_split = (root / split).is_dir()
        self.root = next(path for path in (root / split, root / "train", root) if path.is_dir())
        if self.root == root and (root / "val").is_dir():
            raise UserError(f"data folder {root} has val/ but no train/: expected both, or images alone")
        found = []
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = os.path.relpath(folder, self.root)
            found += [os.path.normpath(os.path.join(below, name)) for name in files if name[0] != "."]
        paths = sorted(path for path in found if path.lower().endswith(SUFFIXES))
        if not paths:
            raise UserError(f"data folder {self.root} holds no images ({len(found)} other files): expected "
                            f"files that end in {' '.join(SUFFIXES)}")
        # One array of bytes: millions of Python strings would be copied into every worker, touch by touch.
        self.paths = np.array([os.fsencode(path) for path in paths])
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        self.classes = sorted(set(tops))
        self.labels = {"class": np.array([bisect.bisect_left(self.classes, top) for top in tops])}

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        image = Image.open(self.name(i), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:                     # from the header: not decoded yet
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        return image

    def label(self, i):
        return int(self.labels["class"][i])

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.paths[i]))


class ImageArray:
    """Images in one uint8 array (n, H, W, 3), with labels {name: (n,)}; classes names those of the first."""

    def __init__(self, images, labels, classes, kind):
        self.images, self.labels, self.classes, self.kind, self.is_split = images, labels, classes, kind, True

    def __len__(self):
        return len(self.images)

    def open(self, i):
        return Image.fromarray(self.images[i])

    def label(self, i):
        return int(next(iter(self.labels.values()))[i])

    def name(self, i):
        return f"{self.kind} {i}"


def read_cifar(folder, split, fine_labels):
    """CIFAR-10 or, with fine_labels, CIFAR-100 as an ImageArray.

    From the binary files of cs.toronto.edu/~kriz/cifar.html.
    """
    label_bytes, classes = (2, 100) if fine_labels else (1, 10)
    if fine_labels:
        files = ["train.bin" if split == "train" else "test.bin"]
    else:
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = []
    for path in (Path(folder) / file for file in files):
        if not path.is_file():
            raise UserError(f"{path} does not exist: expected the binary version of CIFAR-{classes}")
        record = label_bytes + 3072
        if path.stat().st_size % record or not path.stat().st_size:
            raise UserError(f"{path} has {path.stat().st_size} bytes: expected a multiple of {record}, "
                            f"CIFAR-{classes}'s record")
        records.append(np.fromfile(path, np.uint8).reshape(-1, record))
    records = np.concatenate(records)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels, names = {"class": records[:, label_bytes - 1]}, [str(i) for i in range(classes)]
    return ImageArray(np.ascontiguousarray(images), labels, names, f"CIFAR-{classes} {split}")


def open_data(spec, split, cache_dir, say):
    """The source that --data names, for split "train" or "val".

    "shapes" or "shapes:COUNT" (the embedded images, drawn once into cache_dir; val has a fifth of COUNT),
    "cifar10:DIR", "cifar100:DIR", or a folder. say(text) is told about long work.
    """
    kind, _, argument = spec.partition(":")
    if kind == "shapes":
        if argument and not (argument.isdecimal() and int(argument) >= 5):
            raise UserError(f"--data {spec}: expected shapes or shapes:COUNT with COUNT of at least 5")
        count = int(argument or 10_000)
        try:
            arrays = load_shapes(cache_dir, split, count if split == "train" else count // 5, progress=say)
        except OSError as error:
            raise UserError(f"the embedded images cannot be kept in {cache_dir}: {error.strerror}") from None
        labels = {"shape": arrays["shape"], "texture": arrays["texture"]}
        return ImageArray(arrays["images"], labels, list(SHAPES), f"shapes {split}")
    if kind in ("cifar10", "cifar100"):
        return read_cifar(argument, split, fine_labels=kind == "cifar100")
    return ImageFolder(spec, split)


def check_labels(spec, train, val):
    """Raise UserError unless both splits are there, have the same classes, and no label is outside them."""
    for split, source in (("train", train), ("val", val)):
        if not source.is_split:
            raise UserError(f"--data {spec} has no {split} folder: expected train/<class>/*, val/<class>/*")
        labels = next(iter(source.labels.values()))
        outside = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
        if len(outside):
            raise UserError(f"label {labels[outside[0]]} of {source.name(outside[0])} is outside the "
                            f"{len(source.classes)} classes of the head")
    if train.classes != val.classes:
        missing, extra = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
        raise UserError(f"the class folders differ: train has {listed(train.classes)}, val has "
                        f"{listed(val.classes)}; only train: {listed(missing)}; only val: {listed(extra)}")
    if len(train.classes) < 2:
        raise UserError(f"--data {spec} has one class: expected train/<class>/* and val/<class>/* of two or "
                        f"more")


def listed(names, most=5):
    """Names as text, at most five of them: "cat, dog (2)"."""
    names = sorted(names)
    more = ", ..." if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} ({len(names)})" if names else "none"
