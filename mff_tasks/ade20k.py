"""Images with index masks: ADE20K, one's own in the same layout, and the embedded scenes.

A source is one of mff_data's that also has open_mask(i): the label of each pixel, (H, W) uint8, in which 255
(IGNORED) is no class. `classes` names the labels. For a damaged or wrong mask open_mask raises one of
DECODE_ERRORS, whose `file` names it.

Shapes: n images, H W.
"""

import os
import time
import unicodedata
from pathlib import Path

import numpy as np

from mff_data import crops
from mff_data.decode import AS_THEY_ARE, DECODE_ERRORS, open_file, reason_of, suffixes
from mff_data.lists import read_lines
from mff_data.scenes import load_scenes
from mff_data.shapes import SHAPES
from mff_data.sources import ImageArray, ImageFiles, counted_suffixes, files_below, open_embedded, spread
from mff_data.splits import folders_in
from mff_data.unchanged import Rows
from mff_min.errors import UserError, listed, printable

IGNORED = 255                                                           # of a mask: no class, or not known
FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}    # of a split, below images/
LAYOUT = "images/{training,validation}/* and annotations/{training,validation}/*.png"
MOST_LETTERS = 200                                                      # of the name of a class
LOOKED_AT = 64                                                          # masks, before a run

# The first name of each class in ADEChallengeData2016/objectInfo150.txt; label k of a mask is number k - 1.
ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house,
sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier,
awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
shower, radiator, glass, clock, flag"""
ADE20K_CLASSES = tuple(" ".join(name.split()) for name in ADE20K.split(","))


# ---------------------------------------------------------------- sources


class WrongMask(ValueError):
    """A file that is no mask of this data set, though it may be a sound image."""


class MaskFiles(ImageFiles):
    """Image files with a mask each; images and masks are paths below root.

    With reduce_zero_label 0 is no class, and k becomes k - 1, as in ADE20K.
    """

    def __init__(self, root, images, masks, classes, reduce_zero_label, origin, reading, left_out):
        super().__init__(root, images, np.zeros(len(images), int), classes, origin=origin, reading=reading,
                         left_out=left_out)
        self.images, self.masks = self.paths, np.array([os.fsencode(path) for path in masks])
        pairs = zip(self.images.tolist(), self.masks.tolist(), strict=True)
        self.paths = np.array([b"\t".join(pair) for pair in pairs])
        values = np.arange(256)
        self.first = int(reduce_zero_label)                             # the value of class 0
        self.known = (values < len(classes) + self.first) | (values == IGNORED)
        labels = np.where(values == IGNORED, IGNORED, values - self.first)      # -1 is 255 in 8 bits
        self.table = labels.astype(np.uint8).tolist() if reduce_zero_label else None

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.images[i]))

    def mask_name(self, i):
        return os.path.join(self.root, os.fsdecode(self.masks[i]))

    def open_mask(self, i):
        try:
            mask = open_index_mask(self.mask_name(i), self.reading)
            present = np.flatnonzero(mask.histogram())
            if not self.known[present].all():
                last = self.first + len(self.classes) - 1
                raise WrongMask(f"label {present[~self.known[present]][-1]}: expected 0 to {last}, or "
                                f"{IGNORED} for pixels of no class; of masks:DIR, --num-classes or --names "
                                f"of train_segment.py says how many classes there are")
        except DECODE_ERRORS as error:
            error.file = self.mask_name(i)
            raise
        return np.asarray(mask.point(self.table) if self.table else mask)       # (H, W)


class MaskArray(ImageArray):
    """The embedded scenes with their masks: 0 is the background, and the shapes follow."""

    def __init__(self, arrays, name, origin):
        super().__init__(Rows(arrays["images"]), {}, ["background", *SHAPES], name, origin)
        self.masks = Rows(arrays["labels"])

    def open_mask(self, i):
        return self.masks[i]                                            # (H, W)


def open_index_mask(path, reading):
    """The Pillow image, of mode L, in a PNG of 8-bit indices. Raises WrongMask for another kind of file."""
    image = open_file(path, reading)
    if isinstance(image, np.ndarray) or image.format != "PNG":
        kind = "an array" if isinstance(image, np.ndarray) else f"a {image.format} file"
        raise WrongMask(f"{kind}: expected a PNG, which keeps each label as it is")
    bits = image.tile[0][3] if image.tile else image.mode               # Pillow spreads 2 bits over 0 ... 255
    if image.mode == "P":
        raise WrongMask("a mask with a palette: expected 8-bit grey values, which are the labels; its "
                        "indices become such by Image.fromarray(numpy.array(Image.open(FILE))).save(FILE)")
    if image.mode in ("RGB", "RGBA"):
        raise WrongMask(f"a mask of mode {image.mode}: expected 8-bit grey values, which are the labels, not "
                        f"colours; write the number of each colour's class. The full ADE20K has such masks: "
                        f"ADEChallengeData2016 has labels")
    if image.mode != "L" or bits != "L":
        raise WrongMask(f"a mask of mode {image.mode}{f' ({bits})' * (bits != image.mode)}: expected 8-bit "
                        f"grey values, which are the labels; save the labels as uint8")
    return image


def open_pair(source, i):
    """(image, mask) of a source; the image may not be decoded yet. Raises WrongMask where sizes differ."""
    mask, image = source.open_mask(i), source.open(i)
    check_sizes(source, i, image, mask)
    return image, mask


def check_sizes(source, i, image, mask):
    """Raise WrongMask unless image and mask i have the same sides."""
    (H, W), sides = mask.shape, crops.sides(image)
    if sides != (H, W):
        way = "Pillow's mask.resize(image.size, Image.Resampling.NEAREST) keeps the labels"
        if sides == (W, H):
            way = "the image's EXIF orientation, which is ignored here, may be what differs: save it turned"
        error = WrongMask(f"a mask of {W} x {H} pixels for an image of {sides[1]} x {sides[0]}: expected the "
                          f"same size; {way}")
        error.file = source.mask_name(i)
        raise error


def open_masks(spec, split, cache_dir, say, num_classes=None, names="", reduce_zero_label=False,
               reading=AS_THEY_ARE, max_bad=0.01):
    """The source with masks that --data names, for split "train" or "val"; say(text) is told what was found.

    shapes or shapes:COUNT      the embedded scenes: the background and ten shapes
    ade20k:DIR                  ADEChallengeData2016: 150 classes, and 0 is none of them
    masks:DIR                   the same layout with any 8-bit masks. names is a file with a class's name per
                                line; without it there are num_classes, or as many as training labels ask for

    Raises UserError where images and masks are not pairs, and where of some masks more than a share max_bad
    are of the wrong kind; fewer are left to the run.
    """
    kind, _, argument = spec.partition(":")
    if kind not in ("shapes", "ade20k", "masks") or kind != "shapes" and not argument:
        raise UserError(f"--data {printable(spec)}: expected shapes, shapes:COUNT, ade20k:DIR or masks:DIR, "
                        f"in DIR {LAYOUT}")
    if kind != "masks" and (names or reduce_zero_label):
        flag = "--names" if names else "--reduce-zero-label"
        raise UserError(f"{flag} is for masks:DIR: --data {spec} has its own classes; expected no {flag}")
    if kind == "shapes":
        source = MaskArray(open_embedded(load_scenes, spec, split, cache_dir, say), f"scene {split}", spec)
    else:
        source = open_tree(kind, Path(os.path.expanduser(argument)), split, say, num_classes, names,
                           reduce_zero_label or kind == "ade20k", reading, max_bad)
    if num_classes and num_classes != len(source.classes):
        whose = f"--names {names}" if names else f"--data {spec}"
        raise UserError(f"--num-classes {num_classes}: {whose} has {len(source.classes)} classes; expected "
                        f"that number, or no --num-classes")
    if isinstance(source, MaskFiles):
        look_at_masks(source, max_bad, say)
    say(f"{split}: {len(source)} image{'s' * (len(source) > 1)} with masks of {len(source.classes)} classes "
        f"in {printable(source.origin)}")
    return source


def open_tree(kind, root, split, say, num_classes, names, reduce_zero_label, reading, max_bad):
    """The MaskFiles of a split of ade20k:DIR or masks:DIR. Raises UserError."""
    unpacked = root / "ADEChallengeData2016"
    root = unpacked if not (root / "images").is_dir() and unpacked.is_dir() else root
    images, left_out, places = pick(root, "images", split, suffixes())
    masks, others, more = pick(root, "annotations", split, (".png",))
    pairs = pair(root, images, masks, others)
    origin = os.path.join(root, *pairs[0][0].split(os.sep)[:2])
    numbered = [str(i) for i in range(num_classes or 0)]
    classes = list(ADE20K_CLASSES) if kind == "ade20k" else named(names) if names else numbered
    if num_classes is not None and classes is numbered and not 2 <= num_classes <= IGNORED:
        raise UserError(f"--num-classes {num_classes}: expected 2 to {IGNORED}, the most that 8 bits hold "
                        f"beside {IGNORED}, which is no class")

    def files(classes):
        source = MaskFiles(root, *zip(*pairs, strict=True), classes, reduce_zero_label, origin, reading,
                           left_out)
        source.folders = set(map(os.fsencode, places | more))           # no place for a run: check_output
        return source
    if not classes:
        for part in ("images", "annotations"):
            split_folder(root / part, "val")                            # before all masks are read
        every = files([str(i) for i in range(IGNORED)])
        look_at_masks(every, max_bad, say)
        classes = [str(i) for i in range(count_classes(every, say))]
    return files(classes)


def named(path):
    """The names in a file, one per line, without blank lines. Raises UserError where they are no classes."""
    lines = read_lines(Path(path))
    for number, line in lines:
        if not is_name(line):
            raise UserError(f"--names {path}, line {number}, is {printable(line[:40])}: expected a name in "
                            f"UTF-8 of at most {MOST_LETTERS} letters, without tabs or other control "
                            f"characters")
    classes = [line for _, line in lines]
    twice = {name for name in classes if classes.count(name) > 1}
    if twice:
        raise UserError(f"--names {path} has names more than once: {listed(twice)}; expected a name of its "
                        f"own for each class")
    if not 2 <= len(classes) <= IGNORED:
        raise UserError(f"--names {path} has {len(classes)} lines: expected 2 to {IGNORED}, a name per class")
    return classes


def is_name(text):
    """Whether a text can stand in a list with a name per line, and in a legend."""
    letters = {unicodedata.category(letter) for letter in text}
    return 0 < len(text) <= MOST_LETTERS and not letters & {"Cc", "Cs", "Zl", "Zp"}


def split_folder(top, split):
    """The name of the folder of a split in images/ or annotations/. Raises UserError unless there is one."""
    found = folders_in(top) if top.is_dir() else []
    fitting = [name for name in FOLDERS[split] if name in found]
    if len(fitting) != 1:
        has = f"has {listed(found)}" if found else "is no folder" if not top.is_dir() else "holds no folder"
        raise UserError(f"{printable(os.fspath(top))} {has}: expected one of "
                        f"{'/ and '.join(FOLDERS[split])}/; --data needs {LAYOUT}")
    return fitting[0]


def pick(root, kind, split, endings):
    """(paths of a split's files with these endings, the suffixes of its others, the folders looked into).

    Paths are sorted, and as seen from root. Folders of runs are left out. UserError where there is no file.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"data folder {root} {problem}: expected one with {LAYOUT}")
    folder = os.path.join(kind, split_folder(root / kind, split))
    found, places, _ = files_below(root / folder)
    paths = [os.path.join(folder, path) for path in found]
    chosen = sorted(path for path in paths if path.lower().endswith(endings))
    left_out = counted_suffixes(path for path in paths if not path.lower().endswith(endings))
    if not chosen:
        raise UserError(f"{root / folder} holds no file that ends in {' '.join(endings)} ({len(paths)} others"
                        f"{': ' * bool(left_out)}{left_out}): --data needs {LAYOUT}")
    return chosen, left_out, places


def pair(root, images, masks, others):
    """[(image, mask)] of the paths of a split: those whose names differ in their endings alone. UserError."""
    def stems(paths, what):
        found = {}
        for path in paths:
            stem = os.path.splitext(os.path.join(*path.split(os.sep)[2:]))[0]
            if stem in found:
                raise UserError(f"{root} has two {what} called {printable(stem)}: {printable(found[stem])} "
                                f"and {printable(path)}; expected one: rename or remove the other")
            found[stem] = path
        return found
    images, masks = stems(images, "images"), stems(masks, "annotations")
    without = [path for stem, path in images.items() if stem not in masks]
    alone = [path for stem, path in masks.items() if stem not in images]
    if without or alone:
        full = "; names that end in _seg are the full ADE20K's: expected ADEChallengeData2016" * any(
            stem.endswith("_seg") for stem in masks.keys() - images.keys())
        lost = f" (other files there: {others})" * bool(others)
        found = "; ".join([f"images without an annotation: {listed(without)}{lost}"] * bool(without)
                          + [f"annotations without an image: {listed(alone)}"] * bool(alone))
        raise UserError(f"{root} has {found}; expected pairs of the same name, such as images/training/a.jpg "
                        f"and annotations/training/a.png: add or remove files{full}")
    return [(images[stem], masks[stem]) for stem in images]


def count_classes(source, say, every=10.0):
    """One more than the largest label of all masks of a source: the number of classes, if nothing tells it.

    All masks are read, and say(text) is told how far that has come. Raises UserError where there are no two.
    """
    most, where, said = -1, "", time.monotonic()
    for i in range(len(source)):
        try:
            mask = source.open_mask(i)
        except DECODE_ERRORS:                                           # the run counts and names it
            continue
        largest = max(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORED]), default=-1)
        if largest > most:
            most, where = int(largest), source.mask_name(i)
        if time.monotonic() - said > every:
            said = time.monotonic()
            say(f"reading masks for the number of classes: {i + 1} / {len(source)}")
    if most < 1:
        raise UserError(f"the masks of {source.origin} have no label above {max(most, 0)}: expected two "
                        f"classes or more, 8-bit values of 0, 1, ... and {IGNORED} for pixels of none")
    say(f"the largest label is {most + source.first}, in {printable(where)}: {most + 1} classes; "
        f"--num-classes {most + 1} or --names saves this reading")
    return most + 1


def look_at_masks(source, max_bad, say):
    """Raise UserError where more than a share max_bad of some pairs are wrong, or where none is of use.

    say(text) is told of masks that look like black and white, whose white would be no class.
    """
    looked, wrong, damaged, seen = spread(len(source), LOOKED_AT), [], [], set()
    for i in looked:
        try:
            _, mask = open_pair(source, i)
            seen.update(np.flatnonzero(np.bincount(mask.ravel())).tolist())
        except WrongMask as error:
            wrong.append(f"{printable(error.file)}: {error}")
        except DECODE_ERRORS as error:                                  # the run counts and names it
            name = getattr(error, "file", None) or source.name(i)
            damaged.append(f"{printable(name)} cannot be read ({reason_of(error, name)})")
    chance = len(looked) < len(source)                                  # one may be the only one of them all
    if len(wrong) > max(max_bad * len(looked), chance):
        raise UserError(f"{wrong[0]} ({len(wrong)} such among {len(looked)} masks looked at, more than "
                        f"--max-bad {max_bad:g} allows)")
    if len(wrong) + len(damaged) == len(looked):
        raise UserError(f"{(damaged + wrong)[0]}; none of {len(looked)} images with masks that were "
                        f"looked at can be used: expected {LAYOUT}, PNGs of 8-bit labels")
    if seen == {0, IGNORED} and not source.first:
        say(f"warning: {len(looked)} masks looked at in {printable(source.origin)} hold 0 and {IGNORED} "
            f"alone, and {IGNORED} is no class: where it marks objects, write 1 in its place")
    if not seen - {IGNORED}:
        way = "0 is one without --reduce-zero-label" if source.first else "write their numbers into the masks"
        raise UserError(f"none of {len(looked)} masks looked at in {printable(source.origin)} has a pixel "
                        f"of a class, all are {IGNORED}{' or 0' * source.first}: expected labels of "
                        f"classes; {way}")
