"""Promise 9, of time: files of some megabytes that would keep a decoder busy for minutes are refused.

Most are made of millions of parts, each of which Pillow reads by itself; others are decoded many times.
"""

import json
import math
import struct
import time
import zlib

import numpy as np
from faults.files import encoded, png_of, tiff_of
from faults.suite import Fault, Guard, Tally, fork
from PIL import Image

from mff_data import decode
from mff_data.sources import ImageFolder
from mff_data.views import Views

SIZE, SECONDS = 20_000_000, 10.0                                        # bytes and processor time of a file

# ---------------------------------------------------------------- files


def many(part):
    return part * (SIZE // len(part))


def segment(kind, body):
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def scans_of(side, count):
    """A progressive JPEG with so many more scans, each of which says in a few bytes that no block changes."""
    file = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    bits = "0" + "1" * 14                                               # symbol E0: 32,767 blocks
    bits *= -(-(-(-side // 8)) ** 2 // 32_767)
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = segment(0xC4, bytes([0x10, 1] + [0] * 15 + [0xE0]))         # one symbol, of one bit
    return file[:-2] + table + (segment(0xDA, bytes([1, 1, 0, 1, 1, 0])) + body) * count + file[-2:]


def strips_of(count):
    """A TIFF of one column, each pixel a strip."""
    places = 8 + 2 + 12 * 9 + 4
    at = places + 8 * count
    entries = [(256, 1, 1), (257, 1, count), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, count, places),
               (277, 1, 1), (278, 1, 1), (279, count, places + 4 * count)]
    table = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in entries)
    return (b"II*\0" + struct.pack("<IH", 8, 9) + table + bytes(4) + np.full(count, at, "<u4").tobytes()
            + np.full(count, 1, "<u4").tobytes() + b"x" * count)


def runs_of(side, body):
    """A BMP of run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def slow_files():
    """{name: function that makes the file}, the slowest first."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    jpeg, png, gif = (encoded(image, kind) for image, kind in (
        (colour, "JPEG"), (colour, "PNG"), (colour.quantize(16), "GIF")))
    data, end, first = png.index(b"IDAT") - 4, png.index(b"IEND") - 4, 13 + (3 << (gif[10] & 7) + 1)

    def in_jpeg(kind, body):
        return lambda: jpeg[:2] + many(segment(kind, body)) + jpeg[2:]

    def in_png(kind, body, at=data):
        return lambda: png[:at] + many(chunk(kind, body)) + png[at:]

    def in_gif(block):
        return lambda: gif[:first] + many(block) + gif[first:]
    packed = b"k\0\0" + zlib.compress(bytes(1_000_000), 9)
    noise = np.random.default_rng(1).bytes(4_000_000)
    files = {
        "JPEG, EXIF of 4 bytes": in_jpeg(0xE1, b"Exif\0\0" + bytes(4)),
        "JPEG, scans of a large image": lambda: scans_of(9_000, 200_000),
        "PPM, a comment between values": lambda: b"P3\n999 999\n255\n" + b"1 #\n" * 1_200_000,
        "PNG, packed profiles": in_png(b"iCCP", packed),
        "JPEG, scans": lambda: scans_of(2_000, 1_000_000),
        "TIFF, strips": lambda: strips_of(2_000_000),
        "JPEG, filling": lambda: jpeg[:2] + many(b"\xff") + jpeg[2:],
        "PGM, white is 1": lambda: b"P5\n4400 4400\n1\n" + bytes(4400 * 4400),
        "PPM, white is 254": lambda: b"P6\n2580 2580\n254\n" + bytes(3 * 2580 * 2580),
        "JPEG, EXIF of 4 kB": in_jpeg(0xE1, b"Exif\0\0" + bytes(4_000)),
        "JPEG, empty segments": in_jpeg(0xE0, b""), "JPEG, comments": in_jpeg(0xFE, b"x"),
        "JPEG, profiles": in_jpeg(0xE2, b"ICC_PROFILE\0\1\1"),
        "JPEG, tables": in_jpeg(0xDB, b"\0" + b"\1" * 64),
        "JPEG, Photoshop's": in_jpeg(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_400),
        "PNG, texts": in_png(b"tEXt", b"a\0b"), "PNG, unknown chunks": in_png(b"abCd", b""),
        "PNG, chunks of no data": in_png(b"IDAT", b""),
        "PNG, behind the pixels": in_png(b"tEXt", b"a\0b", end),
        "PNG, unknown chunks behind": in_png(b"abCd", b"", end),
        "PNG, a byte a chunk": lambda: png_of(1_000, 1_000, 8, 0, [noise[:1]])[:33] + b"".join(
            chunk(b"IDAT", noise[i:i + 1]) for i in range(SIZE // 13)),
        "GIF, comments": in_gif(b"\x21\xfe\1x\0"), "GIF, extensions": in_gif(b"\x21\xff\1x\0"),
        "GIF, one comment in bytes": lambda: gif[:first] + b"\x21\xfe" + many(b"\1x") + b"\0" + gif[first:],
        "GIF, unknown blocks": in_gif(b"\0"), "GIF, controls": in_gif(b"\x21\xf9\4\0\0\0\0\0"),
        "TIFF, tags": lambda: tiff_of(8, 8, bytes(64))[:8] + struct.pack("<H", 65_000) + b"".join(
            struct.pack("<HHII", tag, 7, 1_000_000, 8) for tag in range(65_000)) + bytes(1_000_000),
        "BMP, runs of one": lambda: runs_of(9_000, many(b"\1\5")),
        "BMP, lines": lambda: runs_of(9_000, many(b"\0\0")),
        "BMP, jumps": lambda: runs_of(9_000, many(b"\0\2\1\0")),
        "PPM, text": lambda: b"P3\n1800 1800\n255\n" + many(b"1 "),
        "PBM, comments": lambda: b"P1\n4400 4400\n" + many(b"#\n"),
        "PPM, a comment": lambda: b"P6\n#" + many(b"x") + b"\n4 4\n255\n" + bytes(48),
        "PPM, blanks": lambda: b"P6\n" + many(b" ") + b"4 4\n255\n" + bytes(48),
        ".npy, a header": lambda: b"\x93NUMPY\2\0" + struct.pack("<I", SIZE) + many(b"("),
    }
    for kind in ("JPEG2000", "AVIF", "WEBP"):
        if kind in decode.formats():
            file, box = encoded(colour, kind), b"abcd" + bytes(4) if kind == "WEBP" else b"\0\0\0\x08free"
            at = file.index(b"meta") - 4 if kind == "AVIF" else 12 if kind == "JPEG2000" else len(file)
            files[f"{kind}, boxes"] = lambda file=file, box=box, at=at: file[:at] + many(box) + file[at:]
    return files


# ---------------------------------------------------------------- the fault


def slow_images(folder, quick):
    """Each is shown or replaced in seconds of processor time, alone in its folder with a whole image."""
    tally, slowest = Tally(), 0.0
    Image.new("RGB", (20, 20)).save(folder / "1.png")
    suffixes = {"JPEG2000": "jp2", "PGM": "ppm", "PBM": "ppm", "TIFF": "tif", ".npy": "npy"}
    for name, make in list(slow_files().items())[:2 if quick else None]:
        kind = name.partition(",")[0]
        path = folder / f"0.{suffixes.get(kind, kind.lower())}"
        path.write_bytes(make())

        def show():                                                     # Views looks at some images too
            views = Views(ImageFolder(folder, "train"), "center", (16, 16), 3, 0, 0)
            began = time.process_time()
            bad = views[0, 0]["bad"]
            print(json.dumps([time.process_time() - began, bad]))
        ended = fork(show, limit=2 * SECONDS)
        seconds, bad = json.loads(ended.last) if not ended.code else (2 * SECONDS, ended.last)
        slowest = max(slowest, seconds)
        tally.note(f"{name}: {seconds:.1f} s, {bad}" if seconds > SECONDS else "")
        path.unlink()
    return tally.outcome(slowest_seconds=round(slowest, 2))


FAULTS = [Fault("images that would take minutes", 9, slow_images)]


def read_all_parts():
    """Pillow reads as many parts, and decodes as often, as a file has."""
    decode.PARTS = decode.SLOW_BYTES = decode.STRIPS = math.inf
    decode.check_time = lambda image, size: None


GUARDS = [Guard("parts-counted", "images that would take minutes", read_all_parts)]
