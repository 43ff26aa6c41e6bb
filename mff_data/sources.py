"""Image sources: where images, their labels and the names of their classes come from.

A source has `len(source)`, `source.open(i)` (a Pillow image, or its pixels, an array (H, W, C) of uint8 that
is only read), `source.label(i)`, `source.name(i)`, `source.classes`, `source.short_side` (of all its images,
where they were resized and packed; else 0), and `source.labels`, the labels of all images by what they are
about: {"class": (n,)}, or {"shape": (n,), "texture": (n,)} of the embedded images. `label(i)` is the first of
them, which classes names. `source.spellings(i)` are the names by which a list may call image i, and
`source.paths` (n,) the bytes of its name below the data's folder.

Shapes: n images, H W.
"""

import bisect
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from mff_data.cifar import read_cifar
from mff_data.decode import (
    AS_THEY_ARE,
    DECODE_ERRORS,
    UnknownLevels,
    is_deep,
    is_deep_colour,
    levels_of_flag,
    open_file,
    open_image,
    range_of,
    suffixes,
)
from mff_data.lists import read_cars, read_lines
from mff_data.packed import open_packed
from mff_data.shapes import SHAPES, load_shapes
from mff_min.errors import UserError, listed, printable

# Files that lie beside images, and are not missed among them.
SIDECARS = (".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".yaml", ".yml", ".log", ".xmp", ".aae",
            "thumbs.db", "desktop.ini")


class ImageFiles:
    """Image files at paths below a folder, with labels (n,); is_split says whether the split was found.

    left_out names the suffixes of other files that lie there.
    """

    short_side = 0

    def __init__(self, root, paths, labels, classes, is_split=True, reading=AS_THEY_ARE, left_out=""):
        # One array of bytes: millions of Python strings would be copied into every worker, touch by touch.
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes, self.is_split = {"class": labels}, classes, is_split
        self.reading, self.left_out = reading, left_out

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        return open_image(self.name(i), self.reading)

    def label(self, i):
        return int(self.labels["class"][i])

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def spellings(self, i):
        path = os.fsdecode(self.paths[i])
        return {path, os.path.basename(path)}


class ImageFolder(ImageFiles):
    """Image files below a folder: ROOT/<split>/<class>/*, or ROOT/train or ROOT where there is no such split.

    Without class folders every label is 0, and the class's name is empty. Raises UserError when there is no
    image, or none but in val/, and where a folder cannot be read.
    """

    def __init__(self, root, split, reading=AS_THEY_ARE):
        root = Path(root)
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data folder {root} {problem}: expected a folder of images, with or without "
                            f"train/ and val/")
        top = next(path for path in (root / split, root / "train", root) if path.is_dir())
        if top == root and (root / "val").is_dir():
            raise UserError(f"data folder {root} has val/ but no train/: expected both, or images alone")
        found = files_below(top)
        paths, others = [], []
        for path in found:
            (paths if path.lower().endswith(suffixes()) else others).append(path)
        paths, left_out = sorted(paths), counted_suffixes(others)
        if not paths:
            raise UserError(f"data folder {top} holds no images ({len(found)} other files"
                            f"{': ' * bool(left_out)}{left_out}): expected files that end in "
                            f"{' '.join(suffixes())}")
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        classes = sorted(set(tops))
        labels = np.array([bisect.bisect_left(classes, top) for top in tops])
        super().__init__(top, paths, labels, classes, (root / split).is_dir(), reading, left_out)


def counted_suffixes(paths):
    """"12 .heic, 3 .psd, 1 without a suffix" of files, the most frequent first; sidecars do not count."""
    counts = Counter(os.path.splitext(path)[1].lower() for path in paths
                     if not path.lower().endswith(SIDECARS))
    return ", ".join(f"{count} {printable(suffix) or 'without a suffix'}"
                     for suffix, count in counts.most_common())


def files_below(top):
    """The paths of the files below a folder, as seen from it. Hidden files and folders are skipped.

    Links are followed, wherever they lead, but one to a folder that it lies in. Raises UserError where a
    folder cannot be read: its images would be missing in silence.
    """
    def refuse(error):
        raise UserError(f"folder {printable(error.filename)} cannot be read: {error.strerror}")
    found, ways = [], {os.fspath(top): {os.path.realpath(top)}}         # the true folders on the way to each
    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        way = ways.pop(folder)
        for name in list(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if name[0] == "." or real in way:
                folders.remove(name)
            else:
                ways[path] = way | {real}
        below = os.path.relpath(folder, top)
        found += [os.path.normpath(os.path.join(below, name)) for name in files if name[0] != "."]
    return found


def describe_files(say, *sources):
    """Say what was left out of the folder of each source, and look at some images of the first."""
    folders = {str(source.root): source for source in sources if isinstance(source, ImageFiles)}
    for root, source in folders.items():
        if source.left_out:
            say(f"{root}: {len(source)} images; left out, since docs/data.md does not have their format: "
                f"{source.left_out}")
    if isinstance(sources[0], ImageFiles):
        warn_of_levels(sources[0], say)


def warn_of_levels(source, say):
    """Say where none of some images of more than 8 bits uses the upper half of its range, or some leave it.

    Raises UserError where nothing tells what is white in any of them.
    """
    levels, unknown, found, colours = source.reading.levels, "", [], 0  # found: (least, most, black, white)
    for i in spread(len(source)):
        name = source.name(i)
        try:
            image = open_file(name, source.reading)
            if is_deep(image):
                found.append(range_of(image, levels)[1:])
            elif is_deep_colour(image):                                 # Pillow has its upper 8 bits
                pixels, colours = np.asarray(image).astype(int), colours + 1
                found.append((256 * pixels.min(), 256 * pixels.max() + 255, 0, 65535))
        except UnknownLevels as error:
            unknown = unknown or f"{printable(name)}: {error}"
        except DECODE_ERRORS:                                           # the run counts and names it
            pass
    if unknown and not found:
        raise UserError(unknown)
    if not found:
        return
    least, most = min(row[0] for row in found), max(row[1] for row in found)
    black, white = sorted(found[0][2:])
    about = f"{len(found)} images of more than 8 bits in {source.root} hold values of {least:g} to {most:g}"
    if levels and (least < black or most > white):
        say(f"{about}: those outside {black:g} to {white:g}, which --white says, become black or white")
    elif all(row[1] - min(row[2:]) < abs(row[3] - row[2]) / 2 for row in found):
        guess = 2 ** int(most).bit_length() - 1 if most >= 2 else f"{most:g}"
        way = "save them as .npy arrays of uint16, with " if colours else ""
        say(f"warning: {about}, and {white:g} is white: few greys are left of them; {way}--white {guess}, or "
            f"--white=BLACK:WHITE, says what white (and black) is")


def spread(count, most=16):
    """Indices of at most so many of count items, evenly spread."""
    return range(0, count, -(-count // most)) if count else ()


class ImageArray:
    """Images in one uint8 array (n, H, W, 3), with labels {name: (n,)}; classes names those of the first."""

    short_side = 0

    def __init__(self, images, labels, classes, kind):
        self.images, self.labels, self.classes, self.kind, self.is_split = images, labels, classes, kind, True
        self.paths = np.arange(len(images)).astype(bytes)

    def __len__(self):
        return len(self.images)

    def open(self, i):
        return self.images[i]

    def label(self, i):
        return int(next(iter(self.labels.values()))[i])

    def name(self, i):
        return f"{self.kind} {i}"

    def spellings(self, i):
        return {str(i), self.name(i)}


class Subset:
    """The images of a source at some indices. All its classes stay, whether or not they have images left."""

    def __init__(self, source, indices):
        self.source, self.indices = source, indices
        self.classes, self.is_split = source.classes, source.is_split
        self.short_side, self.paths = source.short_side, source.paths[indices]
        self.labels = {name: np.asarray(values)[indices] for name, values in source.labels.items()}

    def __len__(self):
        return len(self.indices)

    def open(self, i):
        return self.source.open(self.indices[i])

    def label(self, i):
        return self.source.label(self.indices[i])

    def name(self, i):
        return self.source.name(self.indices[i])

    def spellings(self, i):
        return self.source.spellings(self.indices[i])


def subset(source, path):
    """The images of a source that a file lists, as for low-shot learning (SimCLR, arXiv 2002.05709, sec. 4).

    A line names one: a path below the source's folder or a bare file name; of an array a number, or what
    name() gives. Blank lines and those that begin with # are skipped. Raises UserError for names that are
    absent, that fit several images, and for images that are listed twice.
    """
    lines = [line for _, line in read_lines(Path(path))]
    if not lines:
        raise UserError(f"--subset {path} lists no images: expected a path or a file name a line")
    found = {line: [] for line in lines}
    for i in range(len(source)):
        for spelling in source.spellings(i):
            if spelling in found:
                found[spelling].append(i)
    absent = [line for line, images in found.items() if not images]
    if absent:
        raise UserError(f"--subset {path} lists images that the data has not: {listed(absent)}; expected "
                        f"names such as {', '.join(map(printable, sorted(source.spellings(0))))}")
    several = [line for line, images in found.items() if len(images) > 1]
    if several:
        raise UserError(f"--subset {path} has names of more than one image: {listed(several)}; expected "
                        f"paths below the folder")
    counts = Counter(found[line][0] for line in lines)
    twice = [source.name(i) for i, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"--subset {path} lists images more than once: {listed(twice)}")
    return Subset(source, np.array(sorted(counts)))


def open_data(spec, split, cache_dir, say, reading=AS_THEY_ARE):
    """The source that --data names, for split "train" or "val"; say(text) is told about long work.

    reading is how files become images.

    shapes or shapes:COUNT      the embedded images, drawn once into cache_dir; val has a fifth of COUNT
    cifar10:DIR, cifar100:DIR   the binary version of CIFAR
    cars:DIR                    Stanford Cars: train.txt and val.txt or test.txt with a path and a label per
                                line, or train/<class>/* and val/<class>/* or test/<class>/*
    DIR                         a folder of images: train/<class>/* and val/<class>/*, or images alone
    PACK, FILE.pack             what tools.pack wrote: the folder, or one of its files
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
        images, labels, classes = read_cifar(argument, split, kind)
        return ImageArray(images, {"class": labels}, classes, f"CIFAR-{kind.removeprefix('cifar')} {split}")
    if kind == "cars":
        root = Path(argument)
        files = read_cars(root, split)
        if files:
            return ImageFiles(root, *files, reading=reading)
        return ImageFolder(root, "test" if split == "val" and not (root / "val").is_dir() else split, reading)
    packed = open_packed(spec, split)
    if packed and split == "train" and reading.levels not in (None, levels_of_flag(packed.header["white"])):
        say(f"warning: --white does not change a pack: {packed.path} was made with --white "
            f"{packed.header['white']}")
    return packed or ImageFolder(spec, split, reading)


def fingerprint(source):
    """A number for the path of each image, sorted (n,): it tells whether files came, went or were renamed."""
    digests = [hashlib.blake2b(path, digest_size=8).digest() for path in source.paths.tolist()]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).sort().values


def check_labels(spec, train, val):
    """Raise UserError unless both splits are there, have the same classes, and no label is outside them."""
    for split, source in (("train", train), ("val", val)):
        if not source.is_split:
            raise UserError(f"--data {spec} has no {split} folder: expected train/<class>/*, val/<class>/*")
        labels = next(iter(source.labels.values()))
        outside = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
        if len(outside):
            name = printable(source.name(outside[0]))
            raise UserError(f"label {labels[outside[0]]} of {name} is outside the {len(source.classes)} "
                            f"classes of the head")
    check_classes(train.classes, val.classes, "train", "val")
    if len(train.classes) < 2:
        raise UserError(f"--data {spec} has one class: expected train/<class>/* and val/<class>/* of two or "
                        f"more")


def check_classes(classes, wanted, have="the data", want="the checkpoint"):
    """Raise UserError unless the classes are those wanted, in the same order: a head's outputs have no names.

    have and want say whose they are.
    """
    for names, owner in ((classes, have), (wanted, want)):
        check_class_folders(names, owner)
    ours, theirs = Counter(classes), Counter(wanted)
    if ours != theirs:
        extra, missing = (listed((a - b).elements()) for a, b in ((ours, theirs), (theirs, ours)))
        raise UserError(f"the classes differ: {have} has {listed(classes)}, {want} has {listed(wanted)}; "
                        f"only {have}: {extra}; only {want}: {missing}")
    for i, (name, other) in enumerate(zip(classes, wanted, strict=True)):
        if name != other:
            raise UserError(f"the classes stand in another order: number {i} is {printable(name)} for {have} "
                            f"and {printable(other)} for {want}")


def check_class_folders(classes, owner):
    """Raise UserError where images stand outside class folders, so that they have no label."""
    if "" in classes:
        raise UserError(f"{owner} has images outside class folders: expected <class>/*, each class its own")
