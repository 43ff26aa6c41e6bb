"""Files that list images: a name a line, text lists with labels, and the devkit of Stanford Cars.

Paths in them were written by others: absolute ones and those that leave their folder by ".." are refused.

Shapes: n images.
"""

import os
from pathlib import PurePath

import numpy as np

from mff_data.mat import read_mat
from mff_min.errors import UserError, listed, printable

# Where the devkit of Stanford Cars keeps a split: its annotations, and the folder of its images.
DEVKIT = {"train": ("cars_train_annos.mat", "cars_train"),
          "val": ("cars_test_annos_withlabels.mat", "cars_test")}


def read_lines(path):
    """[(number, line)] of a text file, without blank lines and those that begin with #. Raises UserError."""
    try:
        lines = os.fsdecode(path.read_bytes()).split("\n")
    except OSError as error:
        raise UserError(f"the list {path} cannot be read: {error.strerror}") from None
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def read_list(path):
    """[(path, label)] of a text list: a path, a space and a label a line; a tab where labels have spaces."""
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

    From train.txt and val.txt or test.txt where there is a train.txt, else from the devkit's .mat files.
    Raises UserError where there is neither, nor train/, and for files that are missing or damaged.
    """
    if (root / "train.txt").is_file():
        return read_text_lists(root, split)
    if find_in_devkit(root, DEVKIT["train"][0]).is_file():
        return read_devkit(root, split)
    if (root / "train").is_dir():
        return None
    raise UserError(f"{root} has neither train.txt nor devkit/{DEVKIT['train'][0]} nor train/: expected "
                    f"Stanford Cars in one of these layouts")


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


def find_in_devkit(root, name):
    """The path of a file of the devkit, below root/devkit or in root itself."""
    return root / name if (root / name).is_file() else root / "devkit" / name


def read_devkit(root, split):
    """As read_cars, from the devkit; class k of its annotations, which count from 1, is label k - 1."""
    name, folder = DEVKIT[split]
    path, meta = find_in_devkit(root, name), find_in_devkit(root, "cars_meta.mat")
    for needed in (path, meta):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist: expected the devkit of Stanford Cars, with the labels "
                            f"of its test images")
    classes = read_mat(meta).get("class_names")
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise UserError(f"{meta} has no class_names: expected a cell array of text")
    annotations = read_mat(path).get("annotations")
    if not (isinstance(annotations, list) and annotations):
        raise UserError(f"{path} has no annotations: expected a struct array")
    paths, labels = [], []
    for number, entry in enumerate(annotations, 1):
        image, label = (entry.get(field) if isinstance(entry, dict) else None for field in ("fname", "class"))
        if not (isinstance(image, str) and isinstance(label, np.ndarray) and label.size == 1
                and label.item() in range(1, len(classes) + 1)):
            raise UserError(f"{path}, image {number}: expected a struct of fname, text, and class, a number "
                            f"of 1 to {len(classes)}")
        paths.append(image)
        labels.append(int(label.item()) - 1)
    check_paths(root / folder, paths, path)
    return [f"{folder}/{image}" for image in paths], np.array(labels), classes
