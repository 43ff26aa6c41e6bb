"""What a process prints: it may be lost, and it breaks nothing."""

import contextlib
import os
import select
import sys

ERASE = "\r\033[K"                                                      # what is on a terminal's line


def escaped(text):
    """The text without what would steer a terminal, but for lines, tabs and an ERASE at its start."""
    start = ERASE if text.startswith(ERASE) else ""
    return start + "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
                           for letter in text.removeprefix(start))


class Steady:
    """A text stream that drops what cannot be written: its reader has left, its disk is full.

    Names and values of others reach the terminal through it alone: control characters are escaped.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text if text.isprintable() else escaped(text))
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def steady_output():
    """From here on nothing that this process prints can end it.

    A standard stream that was closed leads nowhere, else the next file to be opened takes its number. What
    an encoding lacks is escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                              # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")            # None: it was closed
        if not isinstance(stream, Steady):
            with contextlib.suppress(AttributeError, OSError):          # of no file; of one that is gone
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Steady(stream))


def whisper(text):
    """Write a line to stderr, from a signal handler or a thread, unless that would wait or fail."""
    with contextlib.suppress(OSError, ValueError):                      # ValueError: stderr is closed
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"\n{text}\n".encode())
