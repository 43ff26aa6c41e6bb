"""Image files of strangers: told by their content, and opened only where decoding them is no danger.

What is refused here, or fails while it is decoded, raises one of DECODE_ERRORS, and the image counts as one
that cannot be read. Images come out with 8 bits per value: what is white in files that have more is said by
the file, by its format or by --white.

Shapes: H W C.
"""

import ast
import contextlib
import io
import logging
import math
import os
import stat
import struct
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from mff_min.config import opt
from mff_min.errors import UserError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")      # by content
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}     # where Pillow was built with them
MAX_PIXELS = 89_478_485                                                 # Pillow's limit: it warns above it
PIXEL_BYTES = 8                                                         # four channels of 16 bits
# What bounds the time that a file takes: docs/data.md, "Large images"
PARTS = 6_000                                                           # reads until the pixels are found
PART_BYTES = 64                                                         # of the file, for each later read
STRIPS = 100_000                                                        # of a TIFF, or tiles
SLOW_BYTES = 5_000_000                                                  # of what Pillow decodes in Python
SLOW = ("ppm_plain", "bmp_rle")                                         # its decoders that are such
logging.getLogger("PIL").addHandler(logging.NullHandler())              # else its errors reach stderr

# Tags of TIFF 6.0
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT = 258, 262, 322, 323
SAMPLE_FORMAT, SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE = 339, 340, 341
SIGNIFICANT_BITS, MAXVAL = "sBIT", "maxval"                             # in info: of a PNG and a PGM

# What Pillow raises on damaged files, seen by feeding it mutated ones: anything but OSError alone.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
                 OverflowError, ZeroDivisionError, RuntimeError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Reading:
    """How files become images: levels, the (black, white) of --white or None, and the most pixels decoded."""
    levels: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS


AS_THEY_ARE = Reading()


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The flags of every stage and tool that opens image files; both change its result."""
    white: str | None = opt(None, "value of white in images of more than 8 bits, or BLACK:WHITE; not given: "
                                  "the format's")
    max_pixels: int | None = opt(None, f"pixels of the largest image that is decoded; not given: {MAX_PIXELS}"
                                       f", Pillow's limit", above=0)


def reading_of(cfg):
    """The Reading that DataFlags ask for. Raises UserError where --white is no level."""
    return Reading(levels_of_flag(cfg.white), cfg.max_pixels or MAX_PIXELS)


def levels_of_flag(text):
    """(black, white) of "4095" or "-1000:3000"; None of None. Raises UserError."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        values = [float(part) for part in text.split(":")]
        black, white = [0.0, *values][-2:]
        if len(values) <= 2 and black != white and math.isfinite(black) and math.isfinite(white):
            return black, white
    raise UserError(f"--white {printable(text)}: expected the value that is white, such as 4095, or two that "
                    f"differ, --white=BLACK:WHITE")


@cache
def formats():
    """Those of FORMATS that the installed Pillow decodes."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN
                 and (name not in OPTIONAL or features.check(OPTIONAL[name])))


@cache
def suffixes():
    """The endings of names, in lower case, that Pillow gives to these formats; and .npy."""
    known = {*formats(), "MPO"}                                         # a JPEG, with more of them behind it
    return (*sorted(suffix for suffix, name in Image.registered_extensions().items() if name in known),
            ".npy")


# ---------------------------------------------------------------- opening


def open_image(file, reading=AS_THEY_ARE):
    """The image in a file, a path or an open one, with 8 bits per value: Pillow's, or of .npy an array.

    Pillow decodes its pixels later, but those of a TIFF and of more than 8 bits. Raises as open_file does.
    """
    return eight_bits(open_file(file, reading), reading.levels)


def open_file(file, reading):
    """The image in a file as it is: Pillow's, or of .npy an array (H, W, C).

    Raises one of DECODE_ERRORS, ValueError for what is no plain file (opening a pipe would wait for ever) and
    for more than max_pixels, of which a tile of a TIFF may have more than its image. A JPEG of more comes at
    1/2, 1/4 or 1/8 of its size, where its decoder does not hold all of it at once.
    """
    most, size = reading.max_pixels, 0
    if isinstance(file, str):
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no plain file")
        if status.st_size > PIXEL_BYTES * most:
            raise ValueError(f"{status.st_size} bytes are more than {PIXEL_BYTES} for each of {most} pixels: "
                             f"expected fewer, or a larger --max-pixels")
        if file.lower().endswith(".npy"):
            return open_array(file, most)
        file, size = Counted(file), status.st_size
    with warnings.catch_warnings(action="ignore"):                      # of files that are replaced or read
        image = open_pillow(file, most)
        if reading.levels and is_deep_colour(image):
            raise UnknownLevels("16-bit colour, of which Pillow decodes the upper 8 bits alone, so that "
                                "--white cannot hold: expected a .npy array of uint16")
        if image.format == "PNG" and is_deep(image):
            image.info[SIGNIFICANT_BITS] = significant_bits(image.fp)
        if image.format == "PPM" and image.mode == "I" and image.tile[0][0] != "raw":
            image.info[MAXVAL] = image.tile[0][3][-1]                   # Pillow scales by it to 16 bits
        is_tiff = image.format == "TIFF"
        tile = [image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_HEIGHT)] if is_tiff else (0, 0)
        if math.prod(image.size) > most and is_decoded_by_rows(image):
            scale = next((scale for scale in (2, 4, 8) if math.prod(image.size) <= most * scale ** 2), 1)
            image.draft(None, (max(image.width // scale, 1), max(image.height // scale, 1)))
        check_time(image, size)
        for width, height in (image.size, tile):                        # from the header: not decoded yet
            check_pixels(width, height, most)
        if is_tiff:
            with silent_stderr():
                image.load()
    return image


def check_pixels(width, height, most):
    """Raise ValueError for more pixels than --max-pixels allows."""
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels are more than {most}: expected fewer, or a larger "
                         f"--max-pixels")


class Counted(io.BufferedReader):
    """A file of which so many parts are read, one a call, and no more: then read raises ValueError.

    Pillow's parsers ask for a few bytes at a time, in Python: a file of millions of segments, chunks, blocks
    or boxes would take minutes. scans are a JPEG's that may be decoded, each over the whole image.
    """

    def __init__(self, path):
        super().__init__(io.FileIO(path))
        self.parts, self.scans = PARTS, math.inf

    def __del__(self):
        self.close()

    def read(self, size=-1):
        content = super().read(size)
        self.parts -= 1
        if self.scans < math.inf:
            self.scans -= content.count(b"\xff\xda")                    # start of scan; no bytes of one
        if self.parts < 0 or self.scans < 0:
            raise ValueError("it has far more parts than images have: expected one that is saved anew, "
                             "without metadata")
        return content


def check_time(image, size):
    """Raise ValueError where decoding would take minutes; bound what it may read of a file of this size."""
    codec = image.tile[0][0] if image.tile else ""
    if codec in SLOW and size > SLOW_BYTES:
        raise ValueError(f"{size} bytes of text or runs, which are decoded one by one: expected at most "
                         f"{SLOW_BYTES}, or a PNG")
    if len(image.tile) > STRIPS:
        raise ValueError(f"{len(image.tile)} strips or tiles: expected at most {STRIPS}")
    if not isinstance(image.fp, Counted):
        return
    if codec == "ppm_plain":                                            # each comment copies what follows it
        image.fp.seek(0)
        if image.fp.read().count(b"#") > PARTS:
            raise ValueError("it has far more comments than images have: expected one without")
    elif codec == "jpeg" and not is_decoded_by_rows(image):
        image.fp.scans = 50 + 4_000_000_000 // max(math.prod(image.size), 1)        # a few seconds' worth
    parts = PARTS + size // PART_BYTES + 4 * len(image.tile)
    image.fp.parts = math.inf if codec in SLOW else parts


class Levels(ImageFile.PyDecoder):
    """Pillow's decoder of a PPM whose white is neither 255 nor 65535, to the bit, without its loop."""

    _pulls_fd = True

    def decode(self, buffer):
        white = self.args[-1]
        kind, most = (">u2" if white > 255 else "u1"), 65535 if self.mode == "I" else 255
        levels = np.arange(65536 if white > 255 else 256)
        scaled = np.minimum(np.rint(levels / white * most), most).astype("<i4" if self.mode == "I" else "u1")
        count = self.state.xsize * self.state.ysize * Image.getmodebands(self.mode) * np.dtype(kind).itemsize
        values = self.fd.read(count)
        values = np.frombuffer(values[:len(values) // 2 * 2] if white > 255 else values, kind)
        self.set_as_raw(scaled[values].tobytes(), "I;32" if self.mode == "I" else self.mode)
        return -1, 0


Image.preinit()                                                         # else it would register its own later
Image.register_decoder("ppm", Levels)


def open_pillow(file, most):
    """The Pillow image in a file, which is not decoded. Raises ValueError where it is far too large."""
    Image.MAX_IMAGE_PIXELS = most                                       # Pillow refuses twice as many
    try:
        return Image.open(file, formats=formats())
    except Image.DecompressionBombError:
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file, formats=("JPEG",))                  # it may be decoded smaller
        except UnidentifiedImageError:
            raise ValueError(f"its pixels are more than twice {most}: expected fewer, or a larger "
                             f"--max-pixels") from None
    finally:
        Image.MAX_IMAGE_PIXELS = max(most, MAX_PIXELS)                  # of the parts that are cut out later


def is_decoded_by_rows(image):
    """Whether a JPEG needs memory for some rows only: one scan. Of others the decoder holds every pixel."""
    if image.format not in ("JPEG", "MPO"):
        return False
    at, file = 2, image.fp
    while True:
        file.seek(at)
        mark, kind, length = struct.unpack(">BBH", file.read(4))        # struct.error at the end
        if mark != 0xFF or kind in (0xC2, 0xC3, 0xC6, 0xCA, 0xCE):      # progressive, lossless
            return False
        if kind == 0xDA:                                                # start of scan: its channels
            return file.read(1) == bytes([image.layers])
        at += 2 + length


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


# ---------------------------------------------------------------- arrays

ARRAYS = ("u1", "u2", "i2", "f4")                                       # the last two need --white


def open_array(path, most):
    """The array in a .npy file, (H, W, C) or (H, W) as (H, W, 1); nothing is unpickled.

    It is read, not mapped: a mapped file that is cut short ends the process without a word.
    Raises ValueError for one of another kind, of more than `most` pixels, or of another size than its file.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2"):
            raise ValueError("no .npy file of version 1 or 2")
        length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
        text = file.read(min(length, 1024))
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    try:
        header = ast.literal_eval(text.decode("latin-1").strip()) if length <= 1024 else None
        kind, columns, shape = header["descr"], header["fortran_order"], header["shape"]
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("the header of the .npy file is damaged") from None
    if isinstance(kind, list) or str(kind)[1:2] == "O":
        raise ValueError(f"an array of {'records' if isinstance(kind, list) else 'Python objects'}: expected "
                         f"uint8 or uint16")
    if not isinstance(kind, str) or kind[:1] not in "<>|=" or kind[1:] not in ARRAYS:
        raise ValueError(f"an array of {printable(str(kind)[:20])}: expected uint8 (|u1) or uint16 (<u2)")
    if not isinstance(shape, tuple) or len(shape) not in (2, 3) or not all(
            type(side) is int and side > 0 for side in shape):
        raise ValueError(f"an array of shape {printable(str(shape)[:60])}: expected (H, W) or (H, W, C)")
    if columns:
        raise ValueError("an array in Fortran's order: expected C's, as numpy.ascontiguousarray has it")
    check_pixels(shape[1], shape[0], most)
    needed = math.prod(shape) * int(kind[2:])
    if size != offset + needed:
        raise ValueError(f"{size - offset} bytes of values, and its header says {needed}: the file was cut "
                         f"short, or is damaged")
    with open(path, "rb") as file:
        file.seek(offset)
        values = file.read(needed)
    if len(values) < needed:
        raise ValueError(f"{len(values)} of {needed} bytes: the file was cut short while it was read")
    return np.frombuffer(values, kind).reshape(*shape, *[1] * (3 - len(shape)))         # (H, W, C)


# ---------------------------------------------------------------- more than 8 bits


class UnknownLevels(ValueError):
    """Pixels whose black and white nothing tells: the file is as good as the others once --white does."""


def eight_bits(image, levels=None):
    """The image with 8 bits per value; levels (black, white), where they are given, overrule the file's own.

    Pillow's own conversion would saturate. Values outside levels that were given are black or white; those
    outside the file's own raise UnknownLevels.
    """
    if not is_deep(image):
        return image
    pixels, _, _, black, white = range_of(image, levels)                # (H, W) or (H, W, C)
    scaled = np.empty(pixels.shape, np.uint8)                           # (H, W) or (H, W, C)
    for first in range(0, len(pixels), 256):                            # floats of few rows at a time
        rows = pixels[first:first + 256].astype(np.float32)
        rows -= black
        rows *= 255 / (white - black)
        rows += 0.5
        scaled[first:first + 256] = rows.clip(0, 255)
    return scaled if isinstance(image, np.ndarray) else Image.fromarray(scaled)


def range_of(image, levels=None):
    """(pixels, least, most, black, white): the values of an image of more than 8 bits, and what they mean.

    Raises UnknownLevels for values outside the file's own levels, and NaN.
    """
    pixels = np.asarray(image)                                          # (H, W) or (H, W, C)
    black, white = levels_of(image, pixels, levels)
    least, most = float(pixels.min()), float(pixels.max())              # NaN where any is
    if math.isnan(least) or not (levels or min(black, white) <= least <= most <= max(black, white)):
        raise UnknownLevels(f"pixels of {least:g} to {most:g}: expected {min(black, white):g} to "
                            f"{max(black, white):g}, or --white=BLACK:WHITE")
    return pixels, least, most, black, white


def is_deep(image):
    """Whether an image has more than 8 bits per value."""
    if isinstance(image, np.ndarray):
        return image.dtype != np.uint8
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def is_deep_colour(image):
    """Whether the file of an image has colours of 16 bits, of which Pillow decodes the upper 8."""
    if isinstance(image, np.ndarray) or is_deep(image):
        return False
    if image.format == "TIFF":
        return bool((np.ravel(image.tag_v2.get(BITS_PER_SAMPLE, 8)) > 8).any())
    if image.format == "PPM" and image.mode == "RGB":                  # its tile has the value of white
        return any(isinstance(tile[3], tuple) and tile[3][-1] > 255 for tile in image.tile)
    return any(";16" in str(tile[3]) for tile in image.tile)


def levels_of(image, pixels, levels=None):
    """(black, white) of an image of more than 8 bits: the levels that are given, else the file's own.

    pixels are its values. Raises UnknownLevels where nothing tells.
    """
    if isinstance(image, np.ndarray):
        if levels is None and image.dtype.kind != "u":
            raise UnknownLevels(f"an array of {image.dtype.name}: expected uint8 or uint16, or "
                                f"--white=BLACK:WHITE")
        return levels or (0, 65535)
    tags, maxval = getattr(image, "tag_v2", {}), getattr(image, "info", {}).get(MAXVAL, 65535)
    levels = levels and tuple(level * 65535 / maxval for level in levels)
    black, white = levels or told_by_tags(tags) or told_by_format(image, tags, pixels)
    return (white, black) if tags.get(PHOTOMETRIC) == 0 else (black, white)


def told_by_tags(tags):
    """The levels that a TIFF's SMinSampleValue and SMaxSampleValue give, or None."""
    if not {SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE} & tags.keys():
        return None
    black, white = (float(np.ravel(tags.get(tag, default))[0])
                    for tag, default in ((SMIN_SAMPLE_VALUE, 0), (SMAX_SAMPLE_VALUE, math.nan)))
    if math.isnan(white) or not black < white:
        raise UnknownLevels(f"SMinSampleValue {black:g} and SMaxSampleValue {white:g}: expected two that "
                            f"differ, or --white=BLACK:WHITE")
    return black, white


def told_by_format(image, tags, pixels):
    """The levels of a file without such tags. Raises UnknownLevels for integers that are no 16 bits."""
    if image.mode == "F":
        return 0, 1
    if image.mode == "I" and image.format not in ("PNG", "PPM"):        # those hold 16 bits in it
        signed = "signed " if np.ravel(tags.get(SAMPLE_FORMAT, 1))[0] == 2 else ""
        bits = np.ravel(tags.get(BITS_PER_SAMPLE, 32))[0]
        raise UnknownLevels(f"{signed}integers of {bits} bits have no known range, here "
                            f"{pixels.min()} to {pixels.max()}: expected --white=BLACK:WHITE")
    if tags.get(BITS_PER_SAMPLE) == (12,):
        return 0, 4095
    bits = image.info.get(SIGNIFICANT_BITS, 16)
    # By the standard sBIT's values fill 16 bits, the lower ones being zero or copies: then white is 65535.
    unscaled = bits < 16 and pixels.max() < 2 ** bits and (pixels % 2 ** (16 - bits)).any()
    return 0, 2 ** bits - 1 if unscaled else 65535


def significant_bits(file):
    """What the sBIT chunk of an open PNG says of its first channel; 16 where it has none."""
    place, at = file.tell(), 8
    while True:
        file.seek(at)
        head = file.read(9)                                             # length, kind and the first byte
        if len(head) < 9 or head[4:8] in (b"sBIT", b"IDAT"):
            bits = min(max(head[8], 1), 16) if head[4:8] == b"sBIT" else 16
            break
        at += 12 + int.from_bytes(head[:4], "big")
    file.seek(place)
    return bits


# ---------------------------------------------------------------- reasons


def reason_of(error, name="", most=200):
    """Why the image of this name cannot be read, as a short line of text without control characters.

    Where the content is of another kind than the name says, the line says which.
    """
    kind, expected = kind_of(name), os.path.splitext(name)[1].lower()
    other = kind and expected not in KINDS[kind]
    if isinstance(error, UnidentifiedImageError):
        return f"{kind}, which cannot be decoded" if kind else "not an image"
    if isinstance(error, OSError) and error.strerror:                   # its text has the path too
        return error.strerror
    return printable(f"{type(error).__name__}: {error}{f'; it is {kind}' if other else ''}"[:most])


# A kind of file: the endings of names that promise it.
KINDS = {"a JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "a PNG": (".png", ".apng"),
         "a GIF": (".gif",), "a BMP": (".bmp", ".dib"), "a TIFF": (".tif", ".tiff"), "a WebP": (".webp",),
         "an AVIF": (".avif", ".avifs"), "a JPEG 2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
         "a HEIC": (".heic", ".heif"), "a .npy array": (".npy",), "a video": (".mp4",), "a PDF": (".pdf",),
         "a Photoshop file": (".psd",), "an HTML page": (".html", ".htm"),
         "an XML or SVG file": (".svg", ".xml"), "a ZIP archive": (".zip",), "a gzip archive": (".gz",),
         "a pointer of git-lfs": (), "a DICOM file": (".dcm",), "an empty file": ()}
STARTS = {b"\xff\xd8\xff": "a JPEG", b"\x89PNG": "a PNG", b"GIF8": "a GIF", b"BM": "a BMP",
          b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"\0\0\0\x0cjP  ": "a JPEG 2000",
          b"\xff\x4f\xff\x51": "a JPEG 2000", b"\x93NUMPY": "a .npy array", b"%PDF": "a PDF",
          b"8BPS": "a Photoshop file", b"<!doctype html": "an HTML page", b"<html": "an HTML page",
          b"<?xml": "an XML or SVG file", b"<svg": "an XML or SVG file", b"PK\3\4": "a ZIP archive",
          b"\x1f\x8b": "a gzip archive", b"version https://git-lfs": "a pointer of git-lfs"}
BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC")


def kind_of(path):
    """What a file is by its first bytes, one of KINDS; "" where they tell nothing, or it cannot be read."""
    if not os.path.isfile(path):                                        # a pipe would wait for its writer
        return ""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError:
        return ""
    if start[4:8] == b"ftyp":
        return BRANDS.get(start[8:12], "a video")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP"
    if start[128:] == b"DICM":
        return "a DICOM file"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "an empty file"
    return next((kind for first, kind in STARTS.items() if start.startswith(first) or text.startswith(first)),
                "")
