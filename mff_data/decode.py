"""Image files of strangers: told by their content, and opened only where decoding them is no danger.

What is refused here, or fails while it is decoded, raises one of DECODE_ERRORS, and the image counts as one
that cannot be read.
"""

import contextlib
import logging
import os
import stat
import struct
import warnings

from PIL import Image, UnidentifiedImageError

from mff_min.errors import printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")          # by content; a name says nothing
MAX_PIXELS = 50_000_000                                                 # a header with more is not decoded
MAX_BYTES = 8 * MAX_PIXELS                                              # four channels of 16 bits
logging.getLogger("PIL").addHandler(logging.NullHandler())              # else its errors reach stderr
TILE_WIDTH, TILE_HEIGHT = 322, 323                                      # tags of TIFF 6.0

# What Pillow raises on damaged files, seen by feeding it mutated ones: anything but OSError alone.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
                 OverflowError, ZeroDivisionError, RuntimeError, struct.error, Image.DecompressionBombError)


def open_image(file):
    """The Pillow image in a file, a path or an open one; its pixels are decoded later, but those of a TIFF.

    Raises one of DECODE_ERRORS, ValueError for what is no plain file (opening a pipe would wait for ever) and
    for more than MAX_BYTES or MAX_PIXELS, of which a tile of a TIFF may have more than its image.
    """
    if isinstance(file, str):
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no plain file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes are more than {MAX_BYTES}")
    with warnings.catch_warnings(action="ignore"):                      # of files that are replaced or read
        image = Image.open(file, formats=FORMATS)
        is_tiff = image.format == "TIFF"
        tile = [image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_HEIGHT)] if is_tiff else (0, 0)
        for width, height in (image.size, tile):                        # from the header: not decoded yet
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        if is_tiff:
            with silent_stderr():
                image.load()
    return image


@contextlib.contextmanager
def silent_stderr():
    """A context in which nothing reaches the process's stderr: libtiff tells it each fault of each strip."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def reason_of(error, most=200):
    """Why an image cannot be read, as a short line of text in which no control character stands."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:                   # its text has the path too
        return error.strerror
    return printable(f"{type(error).__name__}: {error}"[:most])
