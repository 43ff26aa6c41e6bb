"""MATLAB level-5 files, as far as annotations need them (MAT-File Format, MathWorks, chapter 1).

A file is a header and elements: a tag of type and size, then data, padded to 8 bytes. An element is a matrix
or a zlib stream that inflates to one; a matrix is made of elements again.
"""

import math
import zlib

import numpy as np

from mff_min.errors import UserError

MOST_BYTES = 32 * 2 ** 20                                               # ten times what annotations need
DEEPEST = 8                                                             # cells and structs inside one another

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}           # uint8 and uint16 hold text too
INT32, UINT32, MATRIX, COMPRESSED = 5, 6, 14, 15
CELL, STRUCT, CHAR = 1, 2, 4
NUMERIC = range(6, 16)                                                  # double, single, int8 ... uint64
IS_COMPLEX = 0x0800                                                     # a flag beside the class
REFUSED = {3: "an object", 5: "a sparse matrix", 16: "a function", 17: "an opaque object"}


def read_mat(path):
    """The variables of a file, {name: value}, with `path` a Path.

    A numeric array stays one, of its shape; a row of characters is a str; a cell array is a list and a struct
    array a list of dicts, both in MATLAB's order, down the columns first. Raises UserError where the file is
    damaged, holds anything else, or has more than MOST_BYTES, as it stands or inflated.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        data = path.read_bytes()
        if data[:19] == b"MATLAB 7.3 MAT-file" or data[:4] == b"\x89HDF":
            raise ValueError("version 7.3, which is HDF5")
        order = {b"IM\0\1": "<", b"MI\1\0": ">"}.get(data[126:128] + data[124:126])
        if order is None:
            raise ValueError("no header of level 5")
        return dict(Elements(memoryview(data)[128:], order).variables())
    except (ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): expected a MATLAB level-5 file of numbers, text, "
                        f"cells and structs") from None


class Elements:
    """The elements in some bytes, one after the other. Raises ValueError for what they cannot be."""

    def __init__(self, data, order, depth=0):
        self.data, self.order, self.depth, self.at = data, order, depth, 0
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} arrays inside one another")

    def take(self, size):
        """The next bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends within {size} bytes")
        self.at += size
        return self.data[self.at - size:self.at]

    def element(self):
        """(type, bytes) of the next element. One of up to four bytes may stand inside its own tag."""
        kind, size = np.frombuffer(self.take(8), self.order + "u4").tolist()
        if kind >> 16:
            if kind >> 16 > 4:
                raise ValueError(f"a small element of {kind >> 16} bytes")
            return kind & 0xFFFF, self.data[self.at - 4:self.at - 4 + (kind >> 16)]
        body = self.take(size)
        if kind != COMPRESSED:
            self.take(min(-size % 8, len(self.data) - self.at))         # the last one may have no padding
        return kind, body

    def variables(self):
        """(name, value) of each matrix of a file."""
        left = MOST_BYTES
        while self.at < len(self.data):
            kind, body = self.element()
            if kind == COMPRESSED:
                stream = zlib.decompressobj()
                inflated = stream.decompress(body, left + 1)            # 0 would be no limit
                left -= len(inflated)
                if left < 0:
                    raise ValueError(f"more than {MOST_BYTES} bytes inflated")
                if not stream.eof:
                    raise ValueError("a torn zlib stream")
                kind, body = Elements(memoryview(inflated), self.order).element()
            if kind != MATRIX:
                raise ValueError(f"type {kind} where a matrix should be")
            yield Elements(body, self.order, self.depth).matrix()

    def numbers(self, *kinds):
        """The next element as a flat array, of one of these types."""
        kind, body = self.element()
        if kind not in kinds or len(body) % np.dtype(NUMBERS[kind]).itemsize:
            raise ValueError(f"{len(body)} bytes of type {kind} where numbers should be")
        return np.frombuffer(body, self.order + NUMBERS[kind])

    def text(self):
        """The next element as a str."""
        kind, body = self.element()
        if kind not in TEXTS:
            raise ValueError(f"type {kind} where text should be")
        wide = {"<": "-le", ">": "-be"}[self.order] if TEXTS[kind] == "utf-16" else ""
        return bytes(body).decode(TEXTS[kind] + wide)

    def matrix(self):
        """(name, value) of the matrix whose data these are; a matrix of no bytes is an empty array."""
        if not len(self.data):
            return "", np.zeros((0, 0))
        flags, shape = self.numbers(UINT32).tolist(), self.numbers(INT32).tolist()
        _, name = self.element()
        kind, count = flags[0] & 0xFF if flags else 0, math.prod(shape)
        if min(shape, default=-1) < 0 or count > len(self.data):
            raise ValueError(f"an array of {' x '.join(map(str, shape))} in {len(self.data)} bytes")
        if kind == CELL:
            value = [self.inner() for _ in range(count)]
        elif kind == STRUCT:
            width, = self.numbers(INT32).tolist()
            _, names = self.element()
            if not 0 < width <= 64 or len(names) % width:
                raise ValueError(f"names of fields {width} bytes wide")
            fields = [bytes(names[i:i + width]).split(b"\0")[0].decode() for i in range(0, len(names), width)]
            value = [{field: self.inner() for field in fields} for _ in range(count)]
        elif kind == CHAR:
            value = self.text() if count else ""
            if count and (shape[0] != 1 or len(shape) > 2):
                raise ValueError(f"text of {' x '.join(map(str, shape))}: more than one row")
        elif kind in NUMERIC and not flags[0] & IS_COMPLEX:
            value = self.numbers(*NUMBERS)
            if len(value) != count:
                raise ValueError(f"{len(value)} numbers for an array of {' x '.join(map(str, shape))}")
            value = value.astype(value.dtype.newbyteorder("=")).reshape(shape, order="F")
        else:
            raise ValueError(REFUSED.get(kind, "complex numbers" if kind in NUMERIC else f"class {kind}"))
        return bytes(name).decode(), value

    def inner(self):
        """The value of the next element, a matrix in this one."""
        kind, body = self.element()
        if kind != MATRIX:
            raise ValueError(f"type {kind} where a matrix should be")
        return Elements(body, self.order, self.depth + 1).matrix()[1]
