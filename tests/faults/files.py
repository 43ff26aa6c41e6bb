"""Promise 9: files that are damaged, huge, unusual or no images are replaced, named, and stop nothing."""

import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from faults.evaluation import on_two_ranks, ready
from faults.suite import Child, Fault, Guard, Outcome, Tally, fork, many, stage
from PIL import Image

from mff_data import crops, decode, sources, views
from mff_data.decode import MAX_PIXELS, PIXEL_BYTES, open_image
from mff_data.sources import ImageFolder
from mff_data.views import Views, make_loader
from mff_min.errors import UserError
from mff_min.stream import Stream
from mff_run.log import BadSamples
from mff_run.world import start_world

SECOND = 1.0                                                            # of a processor, for one file
MEGABYTE = 2 ** 20

# ---------------------------------------------------------------- mutants


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def originals():
    """{format: files} of small images, of each format several kinds."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    colour = Image.fromarray(np.kron(blocks, np.ones((5, 5, 1), np.uint8)))
    grey, two, few = colour.convert("L"), colour.convert("1"), colour.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    more = [few.rotate(90), few.rotate(180)]
    plain = b"P3\n4 4\n255\n" + b" ".join(b"%d" % (5 * i) for i in range(48))
    return {
        "JPEG": [encoded(colour, "JPEG"), encoded(colour, "JPEG", progressive=True), encoded(grey, "JPEG"),
                 encoded(colour.convert("CMYK"), "JPEG")],
        "PNG": [encoded(image, "PNG") for image in (colour, few, deep, two, colour.convert("RGBA"))],
        "WEBP": [encoded(colour, "WEBP"), encoded(colour, "WEBP", lossless=True),
                 encoded(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])],
        "BMP": [encoded(image, "BMP") for image in (colour, few, two)],
        "TIFF": [encoded(deep, "TIFF"), encoded(two, "TIFF", compression="group4"),
                 *(encoded(colour, "TIFF", compression=name)
                   for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"))],
        "GIF": [encoded(few, "GIF"), encoded(few, "GIF", save_all=True, append_images=more)],
        "PPM": [encoded(colour, "PPM"), encoded(deep, "PPM"), encoded(two, "PPM"), plain],
    }


def newer():
    """originals of formats that came later: those that this Pillow has, and arrays."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    pixels = np.kron(blocks, np.ones((5, 5, 1), np.uint8))
    colour, arrays = Image.fromarray(pixels), []
    for values in (pixels, pixels.astype(np.uint16) * 257, pixels[..., 0]):
        file = io.BytesIO()
        np.save(file, values)
        arrays.append(file.getvalue())
    known = [kind for kind in ("AVIF", "JPEG2000") if kind in decode.formats()]
    return {kind: [encoded(colour, kind), encoded(colour.convert("L"), kind)] for kind in known} | {
        ".npy": arrays}


def mutant(whole, draws):
    """A file with one kind of damage: flipped bits, an end, a run of one byte, a header, a swap, a number."""
    file, kind = bytearray(whole), draws.randrange(6)
    if kind == 0:
        for _ in range(draws.randint(1, 8)):
            file[draws.randrange(len(file))] ^= 1 << draws.randrange(8)
    elif kind == 1:
        del file[draws.randrange(len(file)):]
    elif kind == 2:
        at, length = draws.randrange(len(file)), draws.randint(1, 32)
        file[at:at + length] = bytes([draws.choice([0, 255, draws.randrange(256)])]) * length
    elif kind == 3:
        for _ in range(draws.randint(1, 4)):
            file[draws.randrange(min(64, len(file)))] = draws.randrange(256)
    elif kind == 4:
        at, length = sorted(draws.randrange(len(file)) for _ in range(2)), draws.randint(1, 16)
        a, b = (slice(place, place + length) for place in at)
        file[a], file[b] = file[b], file[a]
    else:
        at = draws.randrange(len(file) - 4)
        file[at:at + 4] = draws.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
                                        b"\0\0\0\1", b"\1\0\0\0"])
    return bytes(file)


class Mutants:
    """A source of mutants, each a file when it is opened, and behind them as many whole images."""
    short_side = 0

    def __init__(self, count, folder, files):
        self.count, self.folder, self.kinds = count, folder, list(files.items())
        self.whole = Image.new("RGB", (40, 40))

    def __len__(self):
        return 2 * self.count

    def kind(self, i):
        return self.kinds[i % len(self.kinds)][0]

    def open(self, i):
        if i >= self.count:
            return self.whole
        (kind, files), draws = self.kinds[i % len(self.kinds)], random.Random(i)
        path = self.folder / f"mutant of {os.getpid()} in {kind}"
        path.write_bytes(mutant(files[draws.randrange(len(files))], draws))
        return open_image(str(path))

    def label(self, i):
        return 0

    def name(self, i):
        return f"mutant {i}"


def mutated_images(folder, quick, originals=originals):
    """Each mutant becomes a view or is replaced, within a second, and the process lives and says nothing."""
    count, step = many(2_100, 21_000, quick), 350 if quick else 1_500
    source = Mutants(count, folder, originals())
    views = Views(source, "random_resized", (16, 16), 3, 0, 0), Views(source, "evaluation", (16, 16), 3, 0, 0)
    tried, survived, problems, replaced, slowest, grown = 0, 0, [], Counter(), 0.0, 0

    def show(first):
        """Read a row of mutants, as a worker does, and leave a line for each in a file of its own."""
        resident = memory("VmRSS")
        with open(folder / f"{first}", "w", buffering=1) as file:
            for i in range(first, min(first + step, count)):
                began = time.process_time()
                item = views[i % 2][0, i]
                seconds = time.process_time() - began
                shown = item["image"].shape == (3, 16, 16)
                reasons = [reason for name, reason in item["bad"] if name == f"mutant {i}"]
                file.write(json.dumps([i, seconds, shown, reasons, memory("VmHWM") - resident]) + "\n")

    for first in range(0, count, step):
        if first % (2 * step) == 0:                                     # two at a time
            children = [Child(functools.partial(show, begin)) for begin in (first, first + step)]
        end, rows = children.pop(0).end(limit=300), 0
        for line in (folder / f"{first}").read_text().splitlines():
            i, seconds, shown, reasons, peak = json.loads(line)
            rows, slowest, grown = rows + 1, max(slowest, seconds), max(grown, peak)
            replaced[source.kind(i)] += len(reasons)
            short = all(reason.isprintable() and len(reason) < 1_000 for reason in reasons)
            if shown and short and seconds < SECOND and peak < PIXEL_BYTES * MAX_PIXELS:    # 2 x 4 a pixel
                survived += 1
            else:
                problems.append(f"mutant {i}: {seconds:.2f} s, {peak // MEGABYTE} MiB, {reasons}")
        tried += min(step, count - first)
        if end.code or end.said:
            survived -= rows == min(step, count - first)                # it lived, but was not to speak
            problems.append(f"mutant {first + rows} of {source.kind(first + rows)}: code {end.code}, "
                            f"{end.last[-200:]}")
    return Outcome(tried, survived, 0, dict(replaced=dict(replaced), slowest_seconds=round(slowest, 3),
                                            most_memory_mib=grown // MEGABYTE), problems[:10])


def memory(what):
    """Bytes of VmRSS, which this process has in memory, or VmHWM, the most it had."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---------------------------------------------------------------- images that would be huge


def png_of(width, height, depth, colour, rows):
    """A PNG of these rows of bytes, whatever its header says of them."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for row in rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff_of(width, height, body, *, bits=8, compression=1, **tile):
    """A little-endian TIFF of one strip, or with tile_width and tile_height of one tile."""
    start = 8 + 2 + 12 * (10 if tile else 9) + 4
    places = [(273, start), (278, height), (279, len(body))]
    if tile:
        places = [(322, tile["tile_width"]), (323, tile["tile_height"]), (324, start), (325, len(body))]
    tags = sorted([(256, width), (257, height), (258, bits), (259, compression), (262, 1), (277, 1), *places])
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body


def bombs():
    """{name: file} of small files that would be images, or need buffers, of more than MAX_PIXELS."""
    side = 10_000
    assert side ** 2 > MAX_PIXELS
    files = {kind: bytearray(variants[kind == "JPEG"]) for kind, variants in originals().items()}
    at = files["JPEG"].index(b"\xff\xc2") + 5                           # progressive: held as a whole
    files["JPEG"][at:at + 4] = struct.pack(">HH", side, side)
    files["GIF"][6:10] = struct.pack("<HH", side, side)
    files["BMP"][18:26] = struct.pack("<ii", side, side)
    at = files["WEBP"].index(b"\x9d\x01\x2a") + 3
    files["WEBP"][at:at + 4] = struct.pack("<HH", side, side)
    files["PPM"] = b"P6\n%d %d\n255\n" % (side, side) + bytes(100)
    packed = zlib.compress(bytes(side ** 2), 9)
    files["TIFF"] = tiff_of(side, side, packed, compression=8)
    # 12,000 x 8,000 of one bit, in 12 kB: Pillow would warn of it and decode it.
    files["PNG"] = png_of(12_000, 8_000, 1, 0, (bytes(1 + 12_000 // 8) for _ in range(8_000)))
    files["PNG, refused by Pillow too"] = png_of(50_000, 50_000, 8, 2, [bytes(9)])
    files["TIFF, 16 x 16, of one tile"] = tiff_of(16, 16, packed, compression=8,
                                                  tile_width=side, tile_height=side)
    # What comes after the first frame is not looked at.
    noise = np.random.default_rng(0).integers(0, 255, (2, 20, 20), np.uint8)
    frames = [Image.fromarray(pixels) for pixels in noise]
    later = bytearray(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    at = later.rindex(b"\x2c" + struct.pack("<HHHH", 0, 0, 20, 20))
    later[at + 5:at + 9] = struct.pack("<HH", side, side)
    return {name: bytes(file) for name, file in files.items()}, {"GIF, its second frame": bytes(later)}


def huge_images(folder, quick):
    """Bombs are refused by their headers, before memory is taken for their pixels; in a pack too."""
    tally, most = Tally(), 0
    refused, shown = bombs()
    whole = encoded(Image.new("RGB", (20, 20)), "PNG")
    (folder / "one").mkdir()

    def view(source, crop):
        resident, said = memory("VmRSS"), []
        for epoch in range(4):
            said += Views(source, crop, (16, 16), 3, 0, 0)[epoch, 0]["bad"]
        print(json.dumps([memory("VmHWM") - resident, said]))

    def check(name, source, bomb):
        nonlocal most
        for crop in ("random_resized", "evaluation"):                   # the first decodes a JPEG in part
            end = fork(lambda crop=crop: view(source, crop))
            if end.code:
                tally.note(f"{name}: {end.last}")
                continue
            peak, said = json.loads(end.last)
            most = max(most, peak)
            wrong = bool(said) != bomb or any("pixels" not in reason for _, reason in said)
            tally.note(f"{name}, {crop}: {peak // MEGABYTE} MiB, {said[:1]}"
                       if wrong or peak > 50 * MEGABYTE else "")

    for name, file in (refused | shown).items():
        (folder / "one" / "0.png").write_bytes(file)
        (folder / "one" / "1.png").write_bytes(whole)
        check(name, ImageFolder(folder / "one", "train"), name in refused)
    return tally.outcome(most_memory_mib=most // MEGABYTE)


# ---------------------------------------------------------------- arrays


class Planted:
    """What leaves a file in the folder where it is unpickled."""
    def __reduce__(self):
        return open, ("planted", "w")


def npy_of(kind, shape, body):
    """A .npy file of this header, whatever its body is."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body


def hostile_arrays(folder, quick):
    """Headers of terabytes, of other numbers and of pickled objects are refused unread, and nothing runs."""
    tally, place, most = Tally(), folder / "one", 2 ** 63 - 1
    place.mkdir()
    np.save(place / "1.npy", np.zeros((20, 20, 3), np.uint8))
    os.chdir(folder)                                                    # where what is planted would write

    def view():
        resident = memory("VmRSS")
        said = Views(source, "center", (16, 16), 3, 0, 0)[0, 0]["bad"]
        print(json.dumps([memory("VmHWM") - resident, said[0][1]]))

    for kind, shape, body in (("|u1", (9_000, 9_000, 99_999), b"x" * 99), ("|u1", (most, most, most), b""),
                              ("|u1", (2 ** 32, 2 ** 32), b""), ("|u1", (-1, 20, 3), bytes(1_200)),
                              ("<u2", (20, 20, 3), bytes(1_200)), ("<f8", (20, 20, 3), bytes(9_600)),
                              ("|O", (20, 20), pickle.dumps([Planted()])), ("|u1", (20, 20, 3), bytes(1_201)),
                              ("|u1", "(" * 900, b""), ("|u1", "().__class__", b"")):
        (place / "0.npy").write_bytes(npy_of(kind, shape, body))
        source = ImageFolder(place, "train")
        end = fork(view)
        wrong = end.last if end.code else ""
        if not wrong:
            peak, reason = json.loads(end.last)
            named = any(text in reason for text in ("an array of", "header", "pixels are more than"))
            wrong = "" if named and peak < 50 * MEGABYTE else f"{peak // MEGABYTE} MiB, {reason}"
        wrong = "its objects were unpickled" if (folder / "planted").exists() else wrong
        tally.note(wrong and f"{kind} {shape}: {wrong}")
    return tally.outcome()


# ---------------------------------------------------------------- unusual pixels


def unusual_images():
    """[(name, file, the pixels (H, W, 3) that they are, or None where they must be refused)]."""
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    grey = np.repeat(np.round(255 * ramp)[..., None], 3, axis=2)        # (64, 64, 3)
    deep = Image.fromarray(np.round(65535 * ramp).astype(np.uint16))
    wide = Image.fromarray(np.round(65535 * ramp).astype(np.int32))
    single = Image.fromarray(ramp.astype(np.float32))
    bits = np.unpackbits(np.round(4095 * ramp).astype(">u2").reshape(-1, 1).view(np.uint8), axis=1)[:, 4:]
    swapped = np.round(65535 * ramp).astype(">u2")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rgb, level = Image.fromarray(noise), Image.fromarray(noise[..., 0])
    alpha = Image.fromarray(noise[..., 1])
    luma = np.asarray(rgb.convert("L").convert("RGB"))
    few = rgb.quantize(64)
    turned = Image.Exif()
    turned[0x0112] = 3                                                  # Orientation: by 180 degrees
    smooth = Image.fromarray(np.round(255 * np.stack([ramp, ramp.T, 1 - ramp], axis=2)).astype(np.uint8))
    rows = [b"\0" + row.tobytes() for row in np.repeat(swapped[..., None], 3, axis=2)]
    return [
        ("PNG of 16 bits", encoded(deep, "PNG"), grey),
        ("PNG of 16 bits, RGB", png_of(64, 64, 16, 2, rows), grey),
        ("TIFF of 16 bits", encoded(deep, "TIFF"), grey),
        ("TIFF of 16 bits, LZW", encoded(deep, "TIFF", compression="tiff_lzw"), grey),
        ("TIFF of 16 bits, big-endian", encoded(as_big_endian(swapped), "TIFF"), grey),
        ("TIFF of 12 bits", tiff_of(64, 64, np.packbits(bits).tobytes(), bits=12), grey),
        ("PGM of 16 bits", encoded(deep, "PPM"), grey),
        ("PGM of 10 bits", b"P5\n64 64\n1023\n" + np.round(1023 * ramp).astype(">u2").tobytes(), grey),
        ("TIFF of floats", encoded(single, "TIFF"), grey), ("PFM", encoded(single, "PPM"), grey),
        ("TIFF of floats above 1", encoded(Image.fromarray((255 * ramp).astype(np.float32)), "TIFF"), None),
        ("TIFF of 32 bits", encoded(wide, "TIFF"), None),
        ("1 bit", encoded(rgb.convert("1"), "PNG"), np.asarray(rgb.convert("1").convert("RGB"))),
        ("grey", encoded(rgb.convert("L"), "PNG"), luma),
        ("grey with alpha", encoded(Image.merge("LA", [level, alpha]), "PNG"),
         np.asarray(level.convert("RGB"))),
        ("RGBA", encoded(Image.merge("RGBA", [*rgb.split(), alpha]), "PNG"), noise),
        ("palette", encoded(few, "PNG"), np.asarray(few.convert("RGB"))),
        ("palette with a transparent entry", encoded(few, "PNG", transparency=3),
         np.asarray(few.convert("RGB"))),
        ("CMYK", encoded(rgb.convert("CMYK"), "TIFF"), noise),
        ("CMYK as Adobe's JPEGs have it, inverted", encoded(smooth.convert("CMYK"), "JPEG", quality=100),
         np.asarray(smooth)),
        ("animated, the first frame", encoded(few, "GIF", save_all=True, append_images=[few.rotate(90)]),
         np.asarray(few.convert("RGB"))),
        ("turned by EXIF", encoded(smooth, "JPEG", quality=100, exif=turned), np.asarray(smooth)),
        ("TIFF that is turned", encoded(smooth, "TIFF", exif=turned), np.asarray(smooth)[::-1, ::-1]),
    ]


def as_big_endian(values):
    """A Pillow image of mode I;16B with these values, an array of >u2."""
    return Image.frombytes("I;16B", values.shape[::-1], values.tobytes())


def unusual_pixels(folder, quick):
    """Deep and float ramps keep their values, and other modes become the colours that they stand for."""
    tally, furthest = Tally(), 0.0
    for name, file, want in unusual_images():
        try:
            got = np.asarray(crops.to_mode(open_image(io.BytesIO(file)), 3)).astype(float)    # (64, 64, 3)
        except ValueError as error:
            tally.note("" if want is None else f"{name}: {error}")
            continue
        if want is None:
            tally.note(f"{name}: taken, with a mean of {got.mean():.1f}")
            continue
        # JPEG rounds in another colour space, and CMYK and 16 bits to 8 may round down.
        near = 4 if "CMYK" in name or "EXIF" in name else 1
        difference = np.abs(got - want).max() if got.shape == want.shape else 255
        furthest = max(furthest, abs(got.mean() - want.mean()))
        tally.note("" if difference <= near else f"{name}: {difference:.0f} off, mean {got.mean():.1f} "
                                                 f"where it is {want.mean():.1f}")
    return tally.outcome(furthest_mean=round(float(furthest), 3))


# ---------------------------------------------------------------- odd files


UNREADABLE = {"empty.jpg", "text.jpg", "link.jpg", "secret.jpg", "pipe.jpg", "socket.jpg", "zero.jpg",
              "torn.png", "a\x1b[2J\nerror: all is well.jpg", os.fsdecode(b"latin\xff.png")}


def odd_folder(root):
    """Class folders a and b of six images each, and beside those of a what is no image; returns root."""
    for split in ("train", "val"):
        for k, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (24, 24 + i), (200 * k, 40 * i, 9)).save(root / split / name / f"{i}.png")
    odd = root / "train" / "a"
    for name in UNREADABLE - {"link.jpg", "pipe.jpg", "socket.jpg", "zero.jpg"}:
        (odd / name).write_text("no image at all")
    (odd / "empty.jpg").write_bytes(b"")
    (odd / "torn.png").write_bytes((odd / "0.png").read_bytes()[:60])
    (odd / "secret.jpg").chmod(0)
    (odd / "link.jpg").symlink_to(odd / "nowhere.jpg")
    (odd / "zero.jpg").symlink_to("/dev/zero")                          # it never ends
    os.mkfifo(odd / "pipe.jpg")                                         # opening it waits for a writer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(odd / "socket.jpg"))
    (odd / "folder.jpg").mkdir()
    (odd / "._0.png").write_bytes(b"hidden")
    (odd / ".hidden").mkdir()
    (odd / ".hidden" / "0.png").write_bytes(b"hidden")
    (odd / "up").symlink_to(root / "train")                             # a loop
    return root


def as_nobody():
    """Take root's rights from this process: to root no file is unreadable."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def is_clean(text):
    """Whether nothing in some lines of text could move a terminal's cursor."""
    return text.replace("\n", "").isprintable()


def odd_files(folder, quick):
    """They are replaced by the same images on any number of ranks and workers, and each is named once."""
    folder.chmod(0o755)
    root, tally = odd_folder(folder / "data"), Tally()
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)

    def batches(rank, ranks, workers):
        views = Views(ImageFolder(root, "train"), "random_resized", (16, 16), 3, 0, 0)
        stream = Stream(22, 22, 11, 0, 0, 3, rank, ranks)
        return zip(stream, make_loader(views, stream, workers, False), strict=True)

    def read(ranks, workers):
        if not workers:                                                 # which shared memory is closed to
            as_nobody()
        shown, bad = {}, set()
        for rank in range(ranks):
            for keys, batch in batches(rank, ranks, workers):
                shown |= zip(map(str, keys), batch["image"].int().sum(dim=(1, 2, 3)).tolist(), strict=True)
                bad |= {os.path.basename(name) for name, _ in batch["bad"]}
        print(json.dumps([sorted(shown.items()), sorted(bad)]))

    alone = fork(lambda: read(1, 0))
    for ranks in (1, 2):
        for workers in (0, 2) if quick else (0, 1, 2):
            end = fork(lambda ranks=ranks, workers=workers: read(ranks, workers))
            wrong = end.last[-300:] if end.code else "others are shown" if end.last != alone.last else ""
            if not wrong and json.loads(end.last)[1] != sorted(UNREADABLE):
                wrong = f"unreadable are {json.loads(end.last)[1]}"
            tally.note(wrong and f"{ranks} ranks, {workers} workers: {wrong}")

    def report():
        as_nobody()
        with start_world("cpu") as world:
            found = BadSamples(folder / "run", world, 22, 1.0)
            for _, batch in batches(world.rank, 2, 0):
                found.add(batch["bad"])
                found.report(world.say)
    ends = on_two_ranks(report)
    tally.note(next((end.last for end in ends if end.code), ""))
    text = (folder / "run" / "bad_samples.jsonl").read_text()
    names = [os.path.basename(json.loads(line)["name"]) for line in text.splitlines()]
    tally.note("" if sorted(names) == sorted(UNREADABLE) else f"bad_samples.jsonl names {names}")
    said = "".join(end.said for end in ends)
    tally.note("" if said and is_clean(text + said) else f"control characters in {text + said!r}")
    return tally.outcome()


def odd_folders(folder, quick):
    """Layouts that cannot be meant end in one line, before any work, and too many bad files in another."""
    tally, root = Tally(), odd_folder(folder / "data")
    (root / "train" / "a" / "secret.jpg").chmod(0o644)                  # text, to root too
    folder.chmod(0o755)

    ready()

    def ends(what, code, *parts, name="probe", **changes):
        """Note whether a stage ends with this code, and unless it is 0 with a line that has these parts."""
        changes = dict(data=root, steps=2, max_bad=1) | changes
        flags = [word for flag, value in changes.items() for word in (f"--{flag}", value)]
        end = fork(stage(name, folder / what, *flags))
        absent = [part for part in parts if part not in end.last]
        whole = end.code == code and not absent and (not code or end.last.startswith("error: "))
        tally.note("" if whole and is_clean(end.said) else f"{what}: code {end.code}, {end.said[-300:]!r}")

    def write(*names):
        for name in names:
            path = root / "val" / name
            path.write_bytes((root / "val" / "a" / "0.png").read_bytes())

    ends("too many", 3, "of 34 images cannot be read", "--max-bad 0.01 allows", "bad_samples.jsonl",
         max_bad=0.01)
    ends("allowed", 0)
    ends("less than a batch", 0, name="pretrain", global_batch=64, batch_size=64)
    more = ["c", "d", "e", "f", "g", "h\x1b[2J"]
    for name in more:
        (root / "val" / name).mkdir()
    ends("empty class folders", 0)                                      # of no image: no label is lost
    write(*(f"{name}/0.png" for name in more))
    ends("classes of val alone", 2, "val has classes that train has not: c, d, e, f, g, ... (6)",
         "train has a, b (2)")
    for name in more:
        shutil.rmtree(root / "val" / name)
    write("0.png")
    ends("outside class folders", 2, "val has images outside class folders")
    (root / "val" / "0.png").unlink()
    (root / "val" / "a").rename(root / "val" / "z\x1b[2J")
    ends("renamed", 2, r"val has classes that train has not: 'z\x1b[2J' (1)", "train has a, b (2)")

    def look():
        as_nobody()
        try:
            ImageFolder(root, "val")
        except UserError as error:
            print(error)
    (root / "val" / "b").chmod(0)
    said = fork(look).said.strip()
    whole = said.endswith("val/b cannot be read: Permission denied")
    tally.note("" if whole else f"an unreadable folder: {said!r}")
    return tally.outcome()


def others_layouts(folder, quick):
    """Splits of other names, an absent class, leftovers, lists: labels and images are the right ones."""
    tally, root = Tally(), folder / "data"
    for split, names in (("Training", "abc@"), ("Validation", "bc@"), ("Testing", "abc")):
        for name in names:
            place = root / split / name.replace("@", "@eaDir")
            place.mkdir(parents=True)
            for i in range(4):
                colour = (100 * "abc@".index(name), 240 - 80 * "abc@".index(name), 9 * i)
                Image.new("RGB", (24, 24), colour).save(place / f"{i}.png")
    for split, file in (("Training", "train"), ("Validation", "val")):
        paths = sorted(root.glob(f"{split}/?/*"))
        (root / f"{file}.txt").write_text("".join(
            f"{path.relative_to(root)},{path.parent.name}\r\n" for path in paths))
    ready()
    for data in (root, f"list:{root}"):
        for flags in ((), ("--cache", 1), ("--knn", 1)):
            run = folder / f"{data == root}{flags}"
            end = fork(stage("probe", run, "--data", data, "--steps", 2, *flags))
            metrics = json.loads((run / "metrics.json").read_text()) if not end.code else {}
            right = metrics.get("val_images") == 8 and ("--knn" not in flags or metrics["acc1"] == 100)
            whole = right and "train: 12 images of 3 classes" in end.said and "no images of a (1)" in end.said
            tally.note("" if whole else f"{data} {flags}: code {end.code}, {end.said[-300:]!r}")
    return tally.outcome()


FAULTS = [
    Fault("mutated images of seven formats", 9, mutated_images),
    Fault("mutated images of newer formats, and arrays", 9,
          functools.partial(mutated_images, originals=newer)),
    Fault("images that would be huge", 9, huge_images),
    Fault("arrays that are something else", 9, hostile_arrays),
    Fault("deep, float and unusual pixels", 9, unusual_pixels),
    Fault("pipes, torn files and others named as images", 9, odd_files),
    Fault("folders that cannot be meant", 9, odd_folders),
    Fault("layouts and lists of other people", 9, others_layouts),
]


# ---------------------------------------------------------------- the guards


def catch_oserror_alone():
    views.DECODE_ERRORS = (OSError,)


def convert_to_rgb():
    decode.eight_bits = lambda image, levels=None: image


def load_arrays_as_numpy_may():
    decode.open_array = lambda path, most: np.load(path, allow_pickle=True)


def labels_by_own_classes():
    sources.relabel = lambda source, *rest: source


def all_folders_are_classes():
    sources.folder_of_split = lambda root, split: (root, False)


GUARDS = [
    Guard("every-decode-error", "mutated images of seven formats", catch_oserror_alone),
    Guard("arrays-read-without-pickle", "arrays that are something else", load_arrays_as_numpy_may),
    Guard("deep-pixels-scaled", "deep, float and unusual pixels", convert_to_rgb),
    Guard("labels-by-train", "layouts and lists of other people", labels_by_own_classes),
    Guard("splits-told-apart", "layouts and lists of other people", all_folders_are_classes),
]
