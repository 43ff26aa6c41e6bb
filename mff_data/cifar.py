"""CIFAR-10 and CIFAR-100 from the files of cs.toronto.edu/~kriz/cifar.html, binary version or python version.

The python version is pickled. A pickle is a program that may call anything that its reader finds for it, so
`PixelUnpickler` finds stand-ins for the few names that these files need, and nothing else. And it may fill
the memory, so `check_code` looks through it first.

Shapes: n images.
"""

import pickle
import pickletools
from io import BytesIO
from pathlib import Path

import numpy as np

from mff_min.errors import UserError

FILES = {("cifar10", "train"): [f"data_batch_{i}" for i in range(1, 6)], ("cifar10", "val"): ["test_batch"],
         ("cifar100", "train"): ["train"], ("cifar100", "val"): ["test"]}
FOLDERS = {"cifar10": ("", "cifar-10-batches-bin", "cifar-10-batches-py"),      # as the archives unpack
           "cifar100": ("", "cifar-100-binary", "cifar-100-python")}
PIXELS = 3 * 32 * 32

# What unpickling raises on damaged files, seen by feeding it mutated ones.
DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError,
          OverflowError)


def read_cifar(folder, split, kind):
    """Images (n, 32, 32, 3) uint8, fine labels (n,) and the names of the classes, in the order of the labels.

    kind is "cifar10" or "cifar100"; the files stand in folder or in the archive's own folder below it.
    Without the file that names the classes their names are "0", "1", ... Raises UserError for a file that is
    missing, of another size, damaged, or asks for more than arrays.
    """
    num_classes, files = int(kind.removeprefix("cifar")), FILES[kind, split]
    folder, suffix = find_version(Path(folder), kind, files)
    missing = [file + suffix for file in files if not (folder / f"{file}{suffix}").is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}: expected all of CIFAR-{num_classes}'s files")
    read = read_records if suffix else read_pickled
    parts = [read(folder / f"{file}{suffix}", num_classes) for file in files]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)        # (n, 32, 32, 3)
    return np.ascontiguousarray(images), labels, read_class_names(folder, num_classes, suffix)


def find_version(folder, kind, files):
    """(the folder with the files, what their names end in: ".bin", or "" where they are pickled)."""
    for suffix in (".bin", ""):                                         # binary first: it needs no pickle
        for below in FOLDERS[kind]:
            if any((folder / below / f"{file}{suffix}").is_file() for file in files):
                return folder / below, suffix
    raise UserError(f"{folder / files[0]}.bin does not exist, nor does {files[0]}: expected the binary or "
                    f"the python version of CIFAR-{kind.removeprefix('cifar')}")


def read_records(path, num_classes):
    """Pixels (n, 3072) and labels (n,) of a file of the binary version, a row of bytes an image."""
    label_bytes = 2 if num_classes == 100 else 1                        # CIFAR-100: coarse, then fine
    record, size = label_bytes + PIXELS, path.stat().st_size
    if size % record or not size:
        raise UserError(f"{path} has {size} bytes: expected a multiple of {record}, CIFAR-{num_classes}'s "
                        f"record")
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def read_pickled(path, num_classes):
    """Pixels (n, 3072) and labels (n,) of a file of the python version: a dict of an array and a list."""
    batch = unpickle(path)
    key = b"fine_labels" if num_classes == 100 else b"labels"
    pixels, labels = getattr(batch.get(b"data"), "array", None), batch.get(key)
    whole = pixels is not None and pixels.ndim == 2 and pixels.shape[1] == PIXELS and len(pixels) > 0
    if not whole:
        found = "nothing" if pixels is None else f"{pixels.size} bytes in the shape {pixels.shape}"
        raise UserError(f"{path} has {found} as its data: expected n images of {PIXELS} bytes")
    if not (isinstance(labels, list) and all(type(label) is int and 0 <= label < 256 for label in labels)
            and len(labels) == len(pixels)):
        raise UserError(f"{path} has no {key.decode()} for {len(pixels)} images: expected a list of "
                        f"{len(pixels)} numbers, CIFAR-{num_classes}'s")
    return pixels, np.array(labels)


def read_class_names(folder, num_classes, suffix):
    """The names of the classes, from the file beside the images; numbers where there is none."""
    key = b"fine_label_names" if num_classes == 100 else b"label_names"
    text = folder / ("fine_label_names.txt" if num_classes == 100 else "batches.meta.txt")
    pickled = folder / ("meta" if num_classes == 100 else "batches.meta")
    if suffix and text.is_file():
        path, names = text, text.read_bytes().split()
    elif not suffix and pickled.is_file():
        path, names = pickled, unpickle(pickled).get(key)
    else:
        return [str(i) for i in range(num_classes)]
    if not (isinstance(names, list) and all(isinstance(name, bytes) for name in names)
            and len(set(names)) == len(names) == num_classes):
        raise UserError(f"{path} does not name {num_classes} different classes, CIFAR-{num_classes}'s")
    return [name.decode(errors="replace") for name in names]


# ---------------------------------------------------------------- pickles


class PickledArray:
    """Stands for numpy.ndarray: its state becomes a uint8 array by our own hands."""
    array = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, PickledType):
            raise ValueError("an array without a type")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class PickledType:
    """Stands for numpy.dtype, of which uint8 is all there is to know."""

    def __init__(self, code, *flags):
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of {str(code)[:20]}: expected u1, bytes")

    def __setstate__(self, state):
        pass


def empty_array(*of_what):
    """Stands for numpy's _reconstruct, which makes an array whose state comes after it."""
    return PickledArray()


STAND_INS = {("numpy.core.multiarray", "_reconstruct"): empty_array,    # numpy 1 and Python 2
             ("numpy._core.multiarray", "_reconstruct"): empty_array,   # numpy 2
             ("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): PickledType}


class PixelUnpickler(pickle.Unpickler):
    """Unpickles plain values and uint8 arrays; a file that asks for any other name is a UserError."""

    def __init__(self, path, data):
        super().__init__(BytesIO(data), encoding="bytes")
        self.path, self.left = path, len(data)

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        if (module, name) not in STAND_INS:
            asked = ascii(f"{module}.{name}")[1:-1][:100]
            raise UserError(f"{self.path} is refused: it asks for {asked}, and CIFAR's files need numpy's "
                            f"arrays alone")
        return STAND_INS[module, name]

    def encode(self, text, encoding):
        """Stands for _codecs.encode, by which Python 3 pickles bytes for Python 2."""
        self.left -= len(text)
        if self.left < 0:                                               # each is stored and encoded once
            raise ValueError("it encodes more text than it has")
        return text.encode("latin1")


def check_code(data):
    """Raise ValueError for a pickle whose opcodes take more memory than it has bytes."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.proto > 4:
            raise ValueError(f"opcode {opcode.name}, of protocol {opcode.proto}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise ValueError(f"place {argument} of the memo")           # all below it would be allocated


def unpickle(path):
    """The dict in a pickle of the python version. UserError where it is damaged or asks for other names."""
    try:
        data = path.read_bytes()
        check_code(data)
        found = PixelUnpickler(path, data).load()
    except DAMAGE as error:
        reason = ascii(f"{type(error).__name__}: {error}")[1:-1][:200]
        raise UserError(f"{path} has {path.stat().st_size} bytes and cannot be read ({reason}): expected a "
                        f"whole file of CIFAR's python version") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}: expected the dict of CIFAR's python version")
    return found
