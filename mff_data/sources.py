"""Image sources: where images, their labels and the names of their classes come from.

A source has `len(source)`, `source.open(i)` (a Pillow image, or its pixels, an array (H, W, C) of uint8 that
is only read), `source.label(i)`, `source.name(i)`, `source.classes`, `source.short_side` (of all its images,
where they were resized and packed; else 0), and `source.labels`, the labels of all images by what they are
about: {"class": (n,)}, or {"shape": (n,), "texture": (n,)} of the embedded images. `label(i)` is the first of
them, which classes names. `source.spellings(i)` are the names by which a list may call image i, and
`source.paths` (n,) the bytes of its name below the data's folder. `source.content` is the SHA-256 of a pack's
index, which tells its pixels; else b"". `source.origin` says where it was found,
`source.is_split` whether that is the split's own place (training images may stand in for val), and
`source.notes` are warnings.

Shapes: n images, H W.
"""

import copy
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
from mff_data.lists import has_lists, read_lines, read_list, same_name
from mff_data.packed import open_packed
from mff_data.shapes import SHAPES, load_shapes
from mff_data.splits import (
    folder_of_split,
    folders_in,
    is_leftover,
    is_of_runs,
    like_training,
    like_validation,
    refuse_deeper_splits,
)
from mff_data.unchanged import Rows
from mff_min.errors import UserError, listed, printable

# Files that lie beside images, and are not missed among them.
SIDECARS = (".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".yaml", ".yml", ".log", ".xmp", ".aae",
            "thumbs.db", "desktop.ini")


class ImageFiles:
    """Image files at paths below a folder, with labels (n,); is_split says whether the split was found.

    left_out names the suffixes of other files that lie there.
    """

    short_side, notes, content = 0, (), b""

    def __init__(self, root, paths, labels, classes, is_split=True, origin="", reading=AS_THEY_ARE,
                 left_out=""):
        # One array of bytes: millions of Python strings would be copied into every worker, touch by touch.
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes, self.is_split = {"class": labels}, classes, is_split
        self.reading, self.left_out, self.origin = reading, left_out, origin or os.fspath(root)

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

    classes are the folders at its top, also those without images, sorted as text; names that differ in
    Unicode form alone are one class. Without class folders every label is 0, and the class's name is empty.
    Raises UserError when there is no image, where no training images are to be told from others, and where a
    folder cannot be read.
    """

    def __init__(self, root, split, reading=AS_THEY_ARE):
        root = Path(root)
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data folder {root} {problem}: expected a folder of images, with or without "
                            f"train/ and val/")
        top, is_split = folder_of_split(root, split)
        found, places, runs = files_below(top)
        self.folders = np.array([os.fsencode(place) for place in places])   # check_output asks for them
        paths, others = [], []
        for path in found:
            (paths if path.lower().endswith(suffixes()) else others).append(path)
        paths, left_out = sorted(paths), counted_suffixes(others)
        if not paths:
            raise UserError(f"data folder {top} holds no images ({len(found)} other files"
                            f"{': ' * bool(left_out)}{left_out}): expected files that end in "
                            f"{' '.join(suffixes())}")
        if top == root:
            refuse_deeper_splits(root, paths)
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        folders = {*tops, *folders_in(top)} if any(tops) else {""}
        classes = sorted(set(map(same_name, folders)))
        index = {name: i for i, name in enumerate(classes)}
        labels = np.array([index[same_name(top)] for top in tops])
        super().__init__(top, paths, labels, classes, is_split, reading=reading, left_out=left_out)
        if runs:
            self.notes = (*self.notes, f"{top} holds folders of runs, whose pictures are no images: "
                          f"{listed(runs)} left out")
        if len(classes) < len(folders):
            merged = [name for name, count in Counter(map(same_name, folders)).items() if count > 1]
            self.notes = (*self.notes, f"{top} has folders whose names differ in Unicode form alone: "
                          f"{listed(merged)}; they are one class: rename one if that is not meant")
        if top == root and split == "train" and (found := like_training(folders_in(root))):
            self.notes = (*self.notes, f"{root} has {listed(found)}, read as a class like the folders "
                          f"beside it; if it holds the training images, rename it train, and the "
                          f"others val and test")


def counted_suffixes(paths):
    """"12 .heic, 3 .psd, 1 without a suffix" of files, the most frequent first; sidecars do not count."""
    counts = Counter(os.path.splitext(path)[1].lower() for path in paths
                     if not path.lower().endswith(SIDECARS))
    return ", ".join(f"{count} {printable(suffix) or 'without a suffix'}"
                     for suffix, count in counts.most_common())


def files_below(top):
    """(files below a folder, the true folders that were looked into, folders of runs, which were not).

    Files and runs are paths as seen from the folder. Hidden files and leftovers are skipped. Links are
    followed, wherever they lead, but one to a folder that it lies in. Raises UserError where a folder cannot
    be read: its images would be missing in silence.
    """
    def refuse(error):
        raise UserError(f"folder {printable(error.filename)} cannot be read: {error.strerror}")
    found, runs, places = [], [], {os.path.realpath(top)}
    ways = {os.fspath(top): {os.path.realpath(top)}}                    # the true folders on the way to each
    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        way = ways.pop(folder)
        for name in list(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if is_leftover(name) or real in way:
                folders.remove(name)
            elif is_of_runs(path):
                folders.remove(name)
                runs.append(os.path.relpath(path, top))
            else:
                ways[path] = way | {real}
                places.add(real)
        below = os.path.relpath(folder, top)
        found += [os.path.normpath(os.path.join(below, name)) for name in files if name[0] != "."]
    return found, places, runs


def check_output(path, sources):
    """Raise UserError where what is written to path would be read as images of one of the sources."""
    place = path = os.path.realpath(path)
    while place != os.path.dirname(place):
        if any(os.fsencode(place) in map(os.fsencode, getattr(source, "folders", ())) for source in sources):
            raise UserError(f"the output {printable(path)} lies in {printable(place)}, and all below that is "
                            f"read as images: expected another folder to write to, outside of it")
        if is_of_runs(place):
            return
        place = os.path.dirname(place)


def describe_files(say, *sources, output=""):
    """Say what was left out of the folder of each source, and look at some images of the first.

    Raises UserError where output, the path that is to be written to, lies among the images.
    """
    if output:
        check_output(output, sources)
    folders = {str(source.root): source for source in sources if isinstance(source, ImageFiles)}
    for root, source in folders.items():
        if source.left_out:
            say(f"{root}: {len(source)} images; left out, since docs/data.md does not have their format: "
                f"{source.left_out}")
    if isinstance(sources[0], ImageFiles):
        warn_of_levels(sources[0], say)


def warn_of_levels(source, say):
    """Say where none of some images of more than 8 bits uses the upper half of its range, or some leave it.

    Raises UserError where nothing tells what is white in any of the images, and all are such.
    """
    levels, unknown, found, colours = source.reading.levels, "", [], 0  # found: (least, most, black, white)
    readable = 0
    for i in spread(len(source)):
        name, image = source.name(i), None
        try:
            image = open_file(name, source.reading)
            readable += 1
            if is_deep(image):
                found.append(range_of(image, levels)[1:])
            elif is_deep_colour(image):                                 # Pillow has its upper 8 bits
                pixels, colours = np.asarray(image).astype(int), colours + 1
                found.append((256 * pixels.min(), 256 * pixels.max() + 255, 0, 65535))
        except UnknownLevels as error:
            unknown, readable = unknown or f"{printable(name)}: {error}", readable - (image is not None)
        except DECODE_ERRORS:                                           # the run counts and names it
            pass
    if unknown and not readable:
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
        way = "save them as .npy arrays of uint16 and give" if colours else "give"
        say(f"warning: {about}, and {white:g} is white: few greys are left of them; {way} --white {guess} or "
            f"--white=BLACK:WHITE")


def spread(count, most=16):
    """Indices of at most so many of count items, evenly spread."""
    return range(0, count, -(-count // most)) if count else ()


class ImageArray:
    """Images in one uint8 array (n, H, W, 3), with labels {name: (n,)}; classes names those of the first."""

    short_side, notes, content = 0, (), b""

    def __init__(self, images, labels, classes, kind, origin="memory"):
        self.images, self.labels, self.classes, self.kind, self.is_split = images, labels, classes, kind, True
        self.origin = origin
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
        self.classes, self.is_split, self.origin = source.classes, source.is_split, source.origin
        self.short_side, self.paths, self.content = source.short_side, source.paths[indices], source.content
        self.labels = {name: np.asarray(values)[indices] for name, values in source.labels.items()}

    def __len__(self):
        return len(self.indices)

    def open(self, i):
        return self.source.open(self.indices[i])

    def label(self, i):
        return int(next(iter(self.labels.values()))[i])

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
    lines = [same_name(line) for _, line in read_lines(Path(path))]
    if not lines:
        raise UserError(f"--subset {path} lists no images: expected a path or a file name a line")
    found = {line: [] for line in lines}
    for i in range(len(source)):
        for spelling in set(map(same_name, source.spellings(i))):
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
    """The source that --data names, for split "train" or "val"; say(text) is told what was found, and where.

    reading is how files become images.

    shapes or shapes:COUNT      the embedded images, drawn once into cache_dir; val has a fifth of COUNT
    cifar10:DIR, cifar100:DIR   the binary version of CIFAR
    list:DIR                    train.txt and val.txt or test.txt: a path and a label per line
    cars:DIR                    Stanford Cars, as list:DIR, or as DIR where there is no train.txt
    DIR                         a folder of images: train/<class>/* and val/<class>/*, or images alone
    PACK, FILE.pack             what tools.pack wrote: the folder, or one of its files
    """
    source = find_source(spec, split, cache_dir, say, reading)
    for note in source.notes:
        say(f"warning: {note}")
    images, classes = len(source), sum(map(bool, source.classes))
    what = f"{images} image{'s' * (images > 1)}"
    if classes:
        what += f" of {classes} class{'es' * (classes > 1)}"
    if source.is_split or split == "train":
        say(f"{split}: {what} in {printable(source.origin)}")
    else:
        say(f"{split}: none; {what} in {printable(source.origin)} take its place")
    return source


def find_source(spec, split, cache_dir, say, reading):
    """What open_data returns."""
    kind, _, argument = spec.partition(":")
    argument = os.path.expanduser(argument)                             # a shell leaves the ~ of cars:~/data
    if kind == "shapes":
        arrays = open_embedded(load_shapes, spec, split, cache_dir, say)
        labels = {name: np.array(arrays[name]) for name in ("shape", "texture")}
        return ImageArray(Rows(arrays["images"]), labels, list(SHAPES), f"shapes {split}", spec)
    if kind in ("cifar10", "cifar100"):
        images, labels, classes = read_cifar(argument, split, kind)
        name = f"CIFAR-{kind.removeprefix('cifar')} {split}"
        return ImageArray(images, {"class": labels}, classes, name, argument)
    if kind == "list" or kind == "cars" and has_lists(Path(argument)):
        return ImageFiles(argument, *read_list(Path(argument), split), reading=reading)
    folder = argument if kind == "cars" else os.path.expanduser(spec)
    packed = open_packed(folder, split, reading.max_pixels)
    if packed and split == "train" and reading.levels not in (None, levels_of_flag(packed.header["white"])):
        say(f"warning: --white does not change a pack: {packed.path} was made with --white "
            f"{packed.header['white']}")
    return packed or ImageFolder(folder, split, reading)


def open_embedded(load, spec, split, cache_dir, say):
    """The arrays of the embedded images that a spec, shapes or shapes:COUNT, means; load draws them."""
    argument = spec.partition(":")[2]
    if argument and not (argument.isdecimal() and len(argument) < 10 and int(argument) >= 5):
        raise UserError(f"--data {spec[:40]}: expected shapes or shapes:COUNT with COUNT of at least 5")
    count = int(argument or 10_000)
    try:
        return load(cache_dir, split, count if split == "train" else count // 5, progress=say)
    except OSError as error:
        raise UserError(f"the embedded images cannot be kept in {cache_dir}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the embedded images in {cache_dir} are damaged ({error}): delete their folder, "
                        f"{load.__name__.removeprefix('load_')}-*, and they are drawn again") from None


def fingerprint(source):
    """A number for the path of each image, sorted (n,): it tells whether files came, went or were renamed.

    Of a pack it tells the pixels too.
    """
    digests = [hashlib.blake2b(path, digest_size=8, key=source.content).digest()
               for path in source.paths.tolist()]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).sort().values


def match_labels(spec, train, val, say):
    """(train, val) with labels by train's list of classes; say(text) is warned of classes without images.

    Raises UserError unless both splits are there, train has all classes of val, and no label is outside them.
    """
    for split, source in (("train", train), ("val", val)):
        if not source.is_split:
            likes = like_validation(os.path.expanduser(spec)) if split == "val" else []
            has = f", but {listed(likes)}, which may be meant: rename one val" if likes else ""
            raise UserError(f"--data {spec} has no {split} folder{has}: expected train/<class>/*, "
                            f"val/<class>/*, or list:DIR with train.txt and val.txt")
    train = relabel(train, train.classes, say, "train", "train")
    val = relabel(val, train.classes, say, "val", "train")
    if len(train.classes) < 2:
        raise UserError(f"--data {spec} has one class: expected train/<class>/* and val/<class>/* of two or "
                        f"more")
    return train, val


def relabel(source, classes, say, have="the data", want="the checkpoint"):
    """The source with labels by this list of classes: a head's outputs have no names, but these.

    Names that differ in Unicode form alone are the same. say(text) is warned of classes that have no images
    here. have and want say whose the classes are. Raises UserError for one that is not in the list.
    """
    check_class_folders(source, have)
    kind, labels = next(iter(source.labels.items()))
    outside = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
    if len(outside):
        raise UserError(f"label {labels[outside[0]]} of {printable(source.name(outside[0]))} is outside the "
                        f"{len(source.classes)} classes of the head")
    index = {same_name(name): i for i, name in enumerate(classes)}
    has_images = np.bincount(labels, minlength=len(source.classes)) > 0     # a folder may be empty
    extra = [name for name, has in zip(source.classes, has_images, strict=True)
             if has and same_name(name) not in index]
    if extra:
        raise UserError(f"{have} has classes that {want} has not: {listed(extra)}; {want} has "
                        f"{listed(classes)}; {way_on(extra, classes, source.origin.endswith('.txt'))}")
    counts = Counter(map(same_name, classes))
    twice = [name for name in source.classes if counts[same_name(name)] > 1]
    if twice:
        raise UserError(f"{want} has several classes called {listed(twice)}, which {have} has too: expected "
                        f"a name of its own for each; rename them")
    places = np.array([index.get(same_name(name), -1) for name in source.classes])
    found = copy.copy(source)
    found.classes, found.labels = list(classes), source.labels | {kind: places[labels]}
    absent = np.bincount(found.labels[kind], minlength=len(classes)) == 0
    if absent.any():
        names = listed(classes[i] for i in np.flatnonzero(absent))
        say(f"warning: {have} has no images of {names}; labels are by {want}'s {len(classes)} classes")
    return found


def way_on(extra, classes, in_list):
    """What to do about classes that one list has more than another, or a text list (in_list) has."""
    lower = {same_name(name).casefold(): name for name in classes}
    twins = [f"{name} and {lower[same_name(name).casefold()]}" for name in extra
             if same_name(name).casefold() in lower]
    if twins:
        what = "change the labels in the list" if in_list else "rename the folders"
        return f"expected the same names, and {listed(twins)} differ in case alone: {what}"
    if in_list:
        return "expected no others: change or remove the lines that have them"
    if len(classes) == 1:
        return (f"expected <class>/* in each split: the classes may lie one folder deeper, in "
                f"{printable(classes[0])}/: move them up, or make train and val links to these folders")
    return ("expected no others: rename or remove them; if labels stand in a file, --data "
            "list:DIR reads them: docs/data.md, Labels in lists")


def check_class_folders(source, owner):
    """Raise UserError where images stand outside class folders, so that they have no label."""
    if "" in source.classes:
        outside = int(np.argmax(next(iter(source.labels.values())) == source.classes.index("")))
        raise UserError(f"{owner} has images outside class folders, such as "
                        f"{printable(source.name(outside))}: expected <class>/*, each class its own; if "
                        f"labels stand in a file, --data list:DIR reads them: docs/data.md, Labels in lists")
