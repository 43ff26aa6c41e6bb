"""A disk that goes away for a while: its errors are told from those of an image, and waited for.

A decoder's errors have no errno, those of the system have one. An error of a name (no such file, permission
denied) is the file's own where another image of its folder can be read. Every other one is the folder's or
the disk's: nothing is replaced before it was tried again for as long as a run may wait.
"""

import contextlib
import errno
import os
import sys
import time

import numpy as np

from mff_data.decode import DECODE_ERRORS
from mff_data.sources import spread
from mff_min.errors import Fault, printable

OF_A_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
TRIES = (0.02, 0.1, 0.3)                                                # s until a file's own error counts
LONGEST = 5.0                                                           # s between two tries of a folder
SILENT, EVERY = 1.0, 30.0                                               # s before it is said, and said again


class Patience:
    """What reads images of a source, and waits where the disk does not answer, for at most limit seconds.

    load(index) reads what a view is made of.
    """

    def __init__(self, source, load, limit=450.0):
        self.source, self.load, self.limit = source, load, limit
        self.told = -EVERY                                              # when something was said last
        self.own = set()                                                # whose errors are known to be theirs

    def read(self, index, work):
        """work(), which reads image index; an error that leaves it is the image's own, or a Fault."""
        began, tries, others = time.monotonic(), 0, None
        while True:
            try:
                return work()
            except OSError as error:
                if not error.errno or index in self.own:
                    raise
                others = siblings(self.source, index) if others is None else others
                waited, whole = time.monotonic() - began, any(map(self.answers, others))
                if whole and (waited > self.limit or error.errno in OF_A_NAME and tries >= len(TRIES)):
                    self.own.add(index)
                    raise
                if waited > self.limit:
                    raise Fault(f"{printable(self.source.name(index))} and what lies beside it could not be "
                                f"read for {waited:.0f} s: {error.strerror}; is the disk there? --resume "
                                f"auto goes on from the last checkpoint") from None
                self.say(waited, f"waiting for {printable(os.path.dirname(self.source.name(index)))}, for "
                                 f"{self.limit:.0f} s at most: {error.strerror}")
                tries = tries + 1 if whole else 0
                pause = min(TRIES[min(tries, len(TRIES)) - 1] if whole else waited / 2 + TRIES[0], LONGEST)
            time.sleep(min(pause, max(self.limit - waited, 0) + TRIES[0]))

    def answers(self, index):
        """Whether the system reads an image, whatever is in it."""
        try:
            self.load(index)
        except DECODE_ERRORS as error:
            return not getattr(error, "errno", None)
        return True

    def say(self, waited, text):
        """Print a line where the wait is long, but not for each image; each loader process has its own."""
        if waited > SILENT and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            with contextlib.suppress(OSError, ValueError):              # a worker's stderr may be gone
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()


def siblings(source, index):
    """Some other images of the same folder; where it has no other, of all folders."""
    others, folder = np.arange(len(source)), os.path.dirname(bytes(source.paths[index]))
    if folder:
        near = np.char.startswith(source.paths, folder + b"/")
        others = others[near] if near.sum() > 1 else others
    others = others[others != index]
    return [int(others[i]) for i in spread(len(others))]
