"""Image sources: where images, their labels and the names of their classes come from.

A source has `len(source)`, `source.open(i)` (a Pillow image, or its pixels, an array (H, W, 3) of uint8 that
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
from mff_data.decode import open_image
from mff_data.lists import read_cars, read_lines
from mff_data.packed import open_packed
from mff_data.shapes import SHAPES, load_shapes
from mff_min.errors import UserError, listed, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


class ImageFiles:
    """Image files at paths below a folder, with labels (n,); is_split says whether the split was found."""

    short_side = 0

    def __init__(self, root, paths, labels, classes, is_split=True):
        # One array of bytes: millions of Python strings would be copied into every worker, touch by touch.
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes, self.is_split = {"class": labels}, classes, is_split

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        return open_image(self.name(i))

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

    def __init__(self, root, split):
        root = Path(root)
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data folder {root} {problem}: expected a folder of images, with or without "
                            f"train/ and val/")
        top = next(path for path in (root / split, root / "train", root) if path.is_dir())
        if top == root and (root / "val").is_dir():
            raise UserError(f"data folder {root} has val/ but no train/: expected both, or images alone")
        found = files_below(top)
        paths = sorted(path for path in found if path.lower().endswith(SUFFIXES))
        if not paths:
            raise UserError(f"data folder {top} holds no images ({len(found)} other files): expected "
                            f"files that end in {' '.join(SUFFIXES)}")
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        classes = sorted(set(tops))
        labels = np.array([bisect.bisect_left(classes, top) for top in tops])
        super().__init__(top, paths, labels, classes, is_split=(root / split).is_dir())


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


def open_data(spec, split, cache_dir, say):
    """The source that --data names, for split "train" or "val"; say(text) is told about long work.

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
            return ImageFiles(root, *files)
        return ImageFolder(root, "test" if split == "val" and not (root / "val").is_dir() else split)
    return open_packed(spec, split) or ImageFolder(spec, split)


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
