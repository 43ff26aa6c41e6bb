"""MATLAB files: written here byte by byte, and by SciPy where it is installed; and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest

from mff_data import mat
from mff_data.mat import read_mat
from mff_min.errors import UserError

# Of each type of NumPy: MATLAB's class, and the type in the file.
CLASSES = {"f8": (6, 9), "f4": (7, 7), "i1": (8, 1), "u1": (9, 2), "i2": (10, 3), "u2": (11, 4),
           "i4": (12, 5), "u4": (13, 6), "i8": (14, 12), "u8": (15, 13)}


def element(kind, data, order="<"):
    """Tag and data: inside the tag where there are at most four bytes, else padded to eight."""
    if 0 < len(data) <= 4:
        return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(value, name="", order="<", flags=0, shape=None, stored=17, encoding="utf-16"):
    """A matrix: of an array, a str, a list of dicts (a struct array), or another list (a cell array)."""
    if isinstance(value, np.ndarray):
        kind, stored = CLASSES[value.dtype.str[1:]]
        shape, body = shape or value.shape, value.astype(value.dtype.newbyteorder(order)).tobytes(order="F")
        body = element(stored, body, order)
    elif isinstance(value, str):
        encoding += {"<": "-le", ">": "-be"}[order] if encoding == "utf-16" else ""
        kind, shape, body = 4, shape or (1, len(value)), element(stored, value.encode(encoding), order)
    elif value and isinstance(value[0], dict):
        names = b"".join(field.encode().ljust(32, b"\0") for field in value[0])
        body = element(5, struct.pack(order + "i", 32), order) + element(1, names, order)
        body += b"".join(matrix(item, "", order) for entry in value for item in entry.values())
        kind, shape = 2, shape or (1, len(value))
    else:
        kind, shape, body = 1, shape or (1, len(value)), b"".join(matrix(item, "", order) for item in value)
    head = element(6, struct.pack(order + "II", kind | flags, 0), order)
    head += element(5, struct.pack(f"{order}{len(shape)}i", *shape), order) + element(1, name.encode(), order)
    return struct.pack(order + "II", 14, len(head + body)) + head + body


def mat_file(variables, order="<", compressed=True):
    """The bytes of a file of {name: value}; a value in bytes is a matrix already."""
    file = b"MATLAB 5.0 MAT-file".ljust(124) + (b"\0\1IM" if order == "<" else b"\1\0MI")
    for name, value in variables.items():
        body = value if isinstance(value, bytes) else matrix(value, name, order)
        packed = zlib.compress(body)
        file += struct.pack(order + "II", 15, len(packed)) + packed if compressed else body
    return file


def annotations(count):
    """Variables as in the devkit of Stanford Cars, with text beyond ASCII and a long text."""
    entries = [{"bbox_x1": np.array([[3.0 + i]]), "class": np.array([[i % 3 + 1]], np.uint8),
                "fname": f"{i:05d}.jpg"} for i in range(count)]
    return {"annotations": entries, "class_names": ["AM General Hummer SUV 2000", "Citroën", ""]}


def same(a, b):
    """Whether two values of read_mat are equal, arrays in their types too."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [True, False])
def test_what_is_written_is_read_in_both_byte_orders_compressed_or_not(tmp_path, order, compressed):
    wanted = annotations(4) | {name: np.arange(12).astype(name).reshape(3, 4) for name in CLASSES}
    wanted |= {"empty": np.zeros((0, 3)), "volume": np.arange(24.0).reshape(2, 3, 4)}
    wanted["nested"] = [np.ones((1, 1)), ["a", [{"b": "c"}]]]
    (tmp_path / "x.mat").write_bytes(mat_file(wanted, order, compressed))
    found = read_mat(tmp_path / "x.mat")
    assert list(found) == list(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)


def plain(value):
    """What SciPy reads, in the terms of read_mat."""
    if value.dtype.names:
        return [{field: plain(entry[field]) for field in value.dtype.names} for entry in value.flatten("F")]
    if value.dtype == object:
        return [plain(item) for item in value.flatten("F")]
    if value.dtype.kind == "U":
        return str(value[0]) if value.size else ""
    return value.astype(value.dtype.newbyteorder("="))


@pytest.mark.parametrize("compressed", [True, False])
def test_files_of_scipy_are_read_as_scipy_reads_them(tmp_path, compressed):
    scipy_io = pytest.importorskip("scipy.io")
    entries = np.zeros((2, 3), [("bbox", object), ("class", object), ("fname", object)])
    for i, entry in enumerate(entries.flat):
        entry["bbox"], entry["class"], entry["fname"] = np.arange(4) * 300 + i, np.uint8(i), f"{i}.jpg"
    cells = np.array([["one", "zwölf"], [np.eye(3), np.int16([1, 2])]], dtype=object)
    arrays = {name: np.arange(6).astype(name).reshape(2, 3) for name in CLASSES}
    scipy_io.savemat(tmp_path / "x.mat", dict(entries=entries, cells=cells, **arrays),
                     do_compression=compressed)
    found, wanted = read_mat(tmp_path / "x.mat"), scipy_io.loadmat(tmp_path / "x.mat")
    for name in ("entries", "cells", *arrays):
        assert same(found[name], plain(wanted[name])), name


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("stored, encoding", [(2, "latin1"), (4, "utf-16"), (16, "utf-8"), (17, "utf-16")])
def test_text_is_read_from_each_type_that_it_is_stored_in(tmp_path, order, stored, encoding):
    texts = {"long": "Citroën", "short": "a"}
    file = {name: matrix(text, name, order, stored=stored, encoding=encoding) for name, text in texts.items()}
    (tmp_path / "x.mat").write_bytes(mat_file(file, order))
    assert read_mat(tmp_path / "x.mat") == texts


@pytest.mark.parametrize("order", ["<", ">"])
def test_files_of_this_test_are_read_by_scipy(order):
    scipy_io = pytest.importorskip("scipy.io")
    found = scipy_io.loadmat(io.BytesIO(mat_file(annotations(4), order)))
    assert all(same(plain(found[name]), value) for name, value in annotations(4).items())


def deep(levels):
    return [deep(levels - 1)] if levels else "x"


WHOLE = mat_file(annotations(3))
ONE, HUGE = np.ones((1, 1)), (2 ** 31 - 1, 2 ** 31 - 1)
SPARSE = matrix(ONE).replace(struct.pack("<II", 6, 0), struct.pack("<II", 5, 0))


@pytest.mark.parametrize("data, message", [
    (b"", "no header of level 5"), (b"\0" * 300, "no header of level 5"),
    (b"MATLAB 7.3 MAT-file" + WHOLE[19:], "version 7.3, which is HDF5"),
    (b"\x89HDF\r\n\x1a\n" + WHOLE, "version 7.3, which is HDF5"),
    (WHOLE[:-9], "it ends within"), (WHOLE[:140], "it ends within"), (WHOLE[:131], "it ends within 8 bytes"),
    (WHOLE[:128] + struct.pack("<II", 15, 9) + zlib.compress(bytes(99))[:9], "a torn zlib stream"),
    (WHOLE[:128] + struct.pack("<II", 15, 9) + b"plain text", "while decompressing"),
    (WHOLE[:128] + element(9, bytes(16)), "type 9 where a matrix should be"),
    (mat_file({"x": SPARSE}), "a sparse matrix"), (mat_file({"x": deep(9)}), "more than 8 arrays inside"),
    (mat_file({"x": matrix(ONE, flags=0x0800)}), "complex numbers"),
    (mat_file({"x": matrix(ONE, shape=(2, 1))}), "1 numbers for an array of 2 x 1"),
    (mat_file({"x": matrix(ONE, shape=HUGE)}), "an array of 2147483647 x 2147483647 in "),
    (mat_file({"x": matrix(ONE, shape=(-1, -1))}), "an array of -1 x -1 in "),
    (mat_file({"x": matrix("abcd", shape=(2, 2))}), "text of 2 x 2: more than one row"),
    (mat_file({"x": matrix([""], shape=(1, 3))}), "it ends within 8 bytes"),
])
def test_other_files_are_refused_with_the_reason(tmp_path, data, message):
    (tmp_path / "x.mat").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_mat(tmp_path / "x.mat")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("expected a MATLAB level-5 file of numbers, text, cells and structs")


def test_a_file_inflates_to_a_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(mat, "MOST_BYTES", 100_000)
    one = {name: np.zeros((6, 1000)) for name in "ab"}
    (tmp_path / "x.mat").write_bytes(mat_file({"a": one["a"]}))
    assert read_mat(tmp_path / "x.mat")["a"].nbytes == 48_000
    for variables in ({"x": np.zeros((200, 1000))}, one | {"c": one["a"]}):     # one that is large, many
        (tmp_path / "x.mat").write_bytes(mat_file(variables))
        assert (tmp_path / "x.mat").stat().st_size < 3000
        with pytest.raises(UserError, match="more than 100000 bytes inflated"):
            read_mat(tmp_path / "x.mat")
    (tmp_path / "x.mat").write_bytes(mat_file(one, compressed=False) + bytes(10_000))
    with pytest.raises(UserError, match="more than 100000 bytes"):
        read_mat(tmp_path / "x.mat")


@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, compressed):
    whole, rng = bytearray(mat_file(annotations(3), compressed=compressed)), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = whole.copy()
        for position in rng.integers(120, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        end = rng.integers(1, len(data) + 1) if rng.random() < 0.2 else len(data)
        (tmp_path / "x.mat").write_bytes(data[:end])
        try:
            read_mat(tmp_path / "x.mat")
        except UserError:
            refused += 1
    assert refused > 40
