"""Files that list images: a name per line, and text lists with labels.

Paths in them were written by others: absolute ones and those that leave their folder by ".." are refused.

Shapes: n images.
"""

import os
from pathlib import PurePath

import numpy as np

from mff_min.errors import UserError, listed, printable


def read_lines(path):
    """[(number, line)] of a text file, without blank lines and those that begin with #. Raises UserError."""
    try:
        lines = os.fsdecode(path.read_bytes()).split("\n")
    except OSError as error:
        raise UserError(f"the list {path} cannot be read: {error.strerror}") from None
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def read_list(path):
    """[(path, label)] of a text list: path, space and label on each line; a tab where labels have spaces."""
    entries = []
    for number, line in read_lines(path):
        image, _, label = line.rpartition("\t" if "\t" in line else " ")
        if not image:
            raise UserError(f"{path}, line {number}, is {printable(line[:80])}: expected a path and a label")
        entries.append((image.strip(), label.strip()))
    return entries


def check_paths(root, paths, origin):
    """Raise UserError for the first paths of `origin` that leave root, or that are no files in it."""
    outside = [path for path in paths if os.path.isabs(path) or ".." in PurePath(path).parts]
    if outside:
        raise UserError(f"{origin} is refused: {listed(outside)} may lie outside {root}, and its paths must "
                        f"not")
    missing = [path for path in paths if not os.path.isfile(root / path)]
    if missing:
        raise UserError(f"{origin} lists images that are not in {root}: {listed(missing)}")


def read_cars(root, split):
    """(paths below root, labels (n,), classes) of a split of Stanford Cars; None where class folders hold it.

    From train.txt and val.txt or test.txt. Raises UserError where there is neither train.txt nor train/, and
    for files that are missing or damaged.
    """
    if (root / "train.txt").is_file():
        return read_text_lists(root, split)
    if (root / "train").is_dir():
        return None
    devkit = [*root.glob("*.mat"), *root.glob("devkit/*.mat")]
    found = "has the devkit's .mat files, which are not read" if devkit else "has no train.txt and no train/"
    raise UserError(f"{root} {found}: expected Stanford Cars as text lists, train.txt and test.txt, or class "
                    f"folders; docs/data.md has the lines that make the lists of the devkit")


def read_text_lists(root, split):
    """As read_cars, from text lists. The labels of train.txt are the classes, numbers in their own order."""
    train = read_list(root / "train.txt")
    names = {label for _, label in train}
    are_numbers = all(name.isdecimal() for name in names)
    classes = sorted(names, key=lambda name: (len(name), name) if are_numbers else name)
    path = root / ("train.txt" if split == "train" else
                   "val.txt" if (root / "val.txt").is_file() else "test.txt")
    entries = train if split == "train" else read_list(path)
    if not entries:
        raise UserError(f"{path} lists no images")
    unknown = {label for _, label in entries} - names
    if unknown:
        raise UserError(f"{path} has labels that {root / 'train.txt'} has not: {listed(unknown)}")
    paths, index = [image for image, _ in entries], {name: i for i, name in enumerate(classes)}
    check_paths(root, paths, path)
    return paths, np.array([index[label] for _, label in entries]), classes
