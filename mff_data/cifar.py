"""CIFAR-10 and CIFAR-100 from the binary files of cs.toronto.edu/~kriz/cifar.html.

The python version there is pickled, and a pickle is a program: it is refused.

Shapes: n images.
"""

from pathlib import Path

import numpy as np

from mff_min.errors import UserError

FILES = {("cifar10", "train"): [f"data_batch_{i}" for i in range(1, 6)], ("cifar10", "val"): ["test_batch"],
         ("cifar100", "train"): ["train"], ("cifar100", "val"): ["test"]}
# As the archives unpack: of the binary and of the python version.
FOLDERS = {"cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
           "cifar100": ("cifar-100-binary", "cifar-100-python")}
PIXELS, MOST = 3 * 32 * 32, 50_000                                      # of an image; images of a file


def read_cifar(folder, split, kind):
    """Images (n, 32, 32, 3) uint8, fine labels (n,) and the names of the classes, in the order of the labels.

    kind is "cifar10" or "cifar100"; the files lie in folder or in the archive's own folder below it.
    Without the file that names the classes their names are "0", "1", ... Raises UserError for a file that is
    missing or of another size, and for the python version.
    """
    num_classes, files = int(kind.removeprefix("cifar")), FILES[kind, split]
    folder = find_binary(Path(folder), kind, files)
    missing = [f"{file}.bin" for file in files if not (folder / f"{file}.bin").is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}: expected all of CIFAR-{num_classes}'s files")
    parts = [read_records(folder / f"{file}.bin", num_classes) for file in files]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)        # (n, 32, 32, 3)
    return np.ascontiguousarray(images), labels, read_class_names(folder, num_classes)


def find_binary(folder, kind, files):
    """The folder with the binary files: folder, or the archive's own below it. UserError without them."""
    binary, python = FOLDERS[kind]
    for place in (folder, folder / binary):
        if any((place / f"{file}.bin").is_file() for file in files):
            return place
    number = kind.removeprefix("cifar")
    expected = f"expected the binary version, cifar-{number}-binary.tar.gz"
    for place in (folder, folder / python):
        if (place / files[0]).is_file():
            raise UserError(f"{place / files[0]} is of CIFAR-{number}'s python version, whose files are "
                            f"programs (pickles): {expected}")
    raise UserError(f"{folder / files[0]}.bin does not exist: {expected}, unpacked")


def read_records(path, num_classes):
    """Pixels (n, 3072) and labels (n,) of a file, a row of bytes per image."""
    label_bytes = 2 if num_classes == 100 else 1                        # CIFAR-100: coarse, then fine
    record, size = label_bytes + PIXELS, path.stat().st_size
    if size % record or not 0 < size <= MOST * record:
        raise UserError(f"{path} has {size} bytes: expected {record} for each of at most {MOST} images of "
                        f"CIFAR-{num_classes}")
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def read_class_names(folder, num_classes):
    """The names of the classes, from the text file beside the images; numbers where there is none."""
    path = folder / ("fine_label_names.txt" if num_classes == 100 else "batches.meta.txt")
    if not path.is_file():
        return [str(i) for i in range(num_classes)]
    with open(path, "rb") as file:
        names = file.read(2 ** 16).split()
    if not len(set(names)) == len(names) == num_classes:
        raise UserError(f"{path} does not name {num_classes} different classes, CIFAR-{num_classes}'s")
    return [name.decode(errors="replace") for name in names]
