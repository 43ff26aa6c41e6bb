"""Files of which parts are read while a run lasts, and which nothing may change meanwhile: packs, caches."""

import math
import os
import stat
from functools import cached_property

import numpy as np

from mff_min.errors import Fault, UserError, printable


class UnchangedFile:
    """A file, open to be read. UserError where it cannot be, or is no plain file: a pipe never ends.

    Parts of it are read, and not mapped: where a mapped file is cut short, the system ends the process
    without a word. path is how a message names it.
    """

    def __init__(self, path):
        self.name, self.path = os.fspath(path), printable(os.fspath(path))
        try:
            status = os.fstat(self.handle.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): expected a plain file") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.path} is no plain file: expected one")
        self.size, self.seen = status.st_size, self.identity()

    @cached_property
    def handle(self):
        """The open file. Workers of fork share it; others open it, and it must be the same one."""
        return open(self.name, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def identity(self):
        """What stays the same while nothing writes to the file, or puts another in its place."""
        status = os.fstat(self.handle.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, start, size):
        """The bytes from start. Raises Fault where the file has changed; the system's OSError names it."""
        try:
            found = os.pread(self.handle.fileno(), size, start)
            while len(found) < size and (more := os.pread(self.handle.fileno(), size - len(found),
                                                          start + len(found))):
                found += more                                           # Linux gives 2 GB at once
            if len(found) == size and self.identity() == self.seen:     # asked after it was read
                return found
        except OSError as error:
            error.filename = self.name
            self.__dict__.pop("handle", None)                           # after an outage it may be stale
            raise
        raise Fault(f"{self.path} was cut short, written to or replaced while it was read: expected a file "
                    f"that nothing changes; put it back as it was, and --resume auto goes on")


class Rows:
    """The rows of an array that is mapped, read from its file one at a time."""

    def __init__(self, mapped):
        self.file, self.offset = UnchangedFile(mapped.filename), mapped.offset
        self.shape, self.dtype = mapped.shape, mapped.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        row = self.file.read(self.offset + int(i) * size, size)
        return np.frombuffer(row, self.dtype).reshape(self.shape[1:])
