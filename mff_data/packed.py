"""Packed images: a split of an image folder as one file, written by tools.pack.

    16 bytes    mff_min pack 001: what this is, and its version
    records     one behind the other: the pixels (H, W, C) of an image
    index       an .npz: header (JSON), and of n images offsets (n + 1,), height, width, label, crc, bytes and
                path (n,), which stand in the order of the folder
    48 bytes    the index's length, eight of them, and its SHA-256; then the first 8 bytes again

When it is opened, the first and last bytes, the length of the file and the SHA-256 of the index are checked:
a pack that was cut short is refused there. A record's CRC-32 is checked when a process first reads it, and
one that was altered counts as an image that cannot be read; `tools.pack --verify` checks them all. Records
are read, not mapped: unchanged.py.

A pack grows in NAME.partial, beside a NAME.journal that says of each block of images, once it is on the disk,
what its records are. So packing goes on after a crash, and the file takes its name when it is whole.

Shapes: n images, C H W.
"""

import hashlib
import io
import json
import mmap
import os
import stat
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mff_data.crops import BICUBIC, BILINEAR, resize_to_cover, to_array, to_mode
from mff_data.decode import MAX_PIXELS
from mff_data.unchanged import UnchangedFile
from mff_min.config import check_reachable
from mff_min.errors import UserError, printable

NAME, VERSION = b"mff_min pack ", 1
START = NAME + b"%03d" % VERSION
END = 8 + 32 + 8                                                        # bytes behind the index
FILTERS = {"bicubic": BICUBIC, "bilinear": BILINEAR}
# Settings that packs of older versions do not name, and what they were.
OLDER = {"in_chans": 3, "white": None, "max_pixels": None}


class Packed:
    """A source of packed images; is_split says whether the pack is of the split that was asked for.

    Raises UserError where the file is no pack, or another version's, or is truncated or altered, and where an
    image has more than `most` pixels.
    """

    notes = ()

    def __init__(self, path, split, most=MAX_PIXELS):
        self.path, self.file = Path(path), UnchangedFile(path)
        self.header, self.index, self.content = read_index(self.file)
        self.classes, self.short_side = self.header["classes"], self.header["short_side"]
        self.labels, self.paths = {"class": self.index["label"]}, self.index["path"]
        self.is_split, self.origin = self.header["split"] == split, os.fspath(path)
        pixels = int(np.diff(self.index["offsets"]).max()) // self.header["in_chans"]
        if pixels > most:
            raise UserError(f"{self.file.path} has an image of {pixels} pixels: expected {most} at "
                            f"most, or --max-pixels {pixels}")
        # Which records were read before: by this process, or by the workers that it forks, who share this.
        self.checked = np.frombuffer(mmap.mmap(-1, len(self)), bool)     # /dev/shm may be full

    def __len__(self):
        return len(self.index["label"])

    def open(self, i):
        shape = self.index["height"][i], self.index["width"][i], self.header["in_chans"]
        return np.frombuffer(self.record(i), np.uint8).reshape(shape)

    def record(self, i):
        """The bytes of image i. ValueError where there are none, or they were altered; else as file.read."""
        start, stop = self.index["offsets"][i:i + 2].tolist()
        if start == stop:
            raise ValueError(f"could not be read when it was packed: {self.header['bad'][str(i)]}")
        record = self.file.read(start, stop - start)
        if not self.checked[i]:
            if zlib.crc32(record) != self.index["crc"][i]:
                raise ValueError("its bytes in the pack have been altered: their checksum differs")
            self.checked[i] = True
        return record

    def label(self, i):
        return int(self.labels["class"][i])

    def name(self, i):
        return os.path.join(self.path, os.fsdecode(self.index["path"][i]))

    def spellings(self, i):
        path = os.fsdecode(self.index["path"][i])
        return {path, os.path.basename(path)}


def open_packed(spec, split, most=MAX_PIXELS):
    """The pack that --data names, for a split: a file, or a folder of tools.pack; None where it is none.

    An image may have `most` pixels.
    As with folders of images, where there is no val.pack there is train.pack.
    """
    path = Path(spec)
    check_reachable("data", path)
    if path.is_dir():
        found = {name for name in ("train", "val") if (path / f"{name}.pack").is_file()}
        begun = found or any(path.glob("*.pack.partial"))
        if begun and "train" not in found:                              # it is written last
            raise UserError(f"{path} holds a pack that was not finished: give tools.pack the same line again")
        name = f"{split if split in found else 'train'}.pack"
        return Packed(path / name, split, most) if found else None
    return Packed(path, split, most) if path.is_file() and path.suffix == ".pack" else None


def read_index(file):
    """(header, index, SHA-256 of both) of a pack, open; all that needs no record is checked."""
    path, size = file.path, file.size
    damaged = UserError(f"{path} is damaged or was cut short: delete it, and pack the images again")
    try:
        start = file.read(0, min(len(START), size))
        if not start.startswith(NAME):
            raise UserError(f"{path} is no pack: expected a file that tools.pack wrote")
        if start != START:
            raise UserError(f"{path} is a pack of version {printable(start[len(NAME):].decode('latin-1'))}: "
                            f"expected {VERSION:03d}; delete it, and pack the images again")
        end = file.read(max(size - END, 0), min(size, END))
        length = int.from_bytes(end[:8], "little")
        if len(end) != END or end[40:] != START[:8] or length > size - END - len(START):
            raise damaged
        content = file.read(size - END - length, length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a pack") from None
    except MemoryError:
        raise damaged from None
    if hashlib.sha256(content).digest() != end[8:40]:
        raise damaged
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packs = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            index = {} if packs else dict(arrays)                       # it may inflate to anything
        header = json.loads(index.pop("header").tobytes())
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, MemoryError, RecursionError):
        raise damaged from None
    header = OLDER | header if isinstance(header, dict) else header
    if not is_sound(header, index, size - END - length):
        raise damaged
    if header.get("jpeg"):                                              # tools.pack --jpeg wrote them once
        raise UserError(f"{path} holds JPEG files, which are not read from packs any more: expected pixels; "
                        f"pack the images again, or give --data their folder")
    return header, index, end[8:40]


def is_sound(header, index, stop):
    """Whether Journal.finish could have written this header and index, of records that end at stop.

    A checksum tells what was altered by chance, and a stranger's is right too.
    """
    kinds = dict(split=str, classes=list, bad=dict, short_side=int, resample=str, in_chans=int)
    lengths = dict.fromkeys(("height", "width", "label", "crc", "bytes", "path"), 0) | {"offsets": 1}
    is_dict = isinstance(header, dict)
    if not is_dict or any(type(header.get(name)) is not kind for name, kind in kinds.items()):
        return False
    if not 0 < header["in_chans"] < 2 ** 31 or not isinstance(header["white"], str | None):
        return False
    if index.keys() != lengths.keys() or not all(isinstance(name, str) for name in header["classes"]):
        return False
    for name, array in index.items():
        if array.dtype.kind not in ("S" if name == "path" else "iu") or array.ndim != 1:
            return False
        if len(array) != index["label"].size + lengths[name]:
            return False
    offsets, label = index["offsets"], index["label"]
    if not len(label) or (label < 0).any() or (label >= len(header["classes"])).any():
        return False
    sizes = np.diff(offsets.astype(float))                              # exact, and products do not wrap
    height, width = (index[name].astype(float) for name in ("height", "width"))
    fits = (sizes == height * width * header["in_chans"]) & (height > 0) & (width > 0) | (sizes == 0)
    return bool(offsets[0] == len(START) and offsets[-1] == stop and (header.get("jpeg") or fits.all()))


# ---------------------------------------------------------------- writing


def files_of(source):
    """[(path, bytes)] of a folder's images: what a pack remembers of it, to see whether it has changed."""
    names = (source.name(i) for i in range(len(source)))
    sizes = (os.stat(name).st_size if os.path.exists(name) else 0 for name in names)    # a link may be broken
    return [[os.fsdecode(path), size] for path, size in zip(source.paths, sizes, strict=True)]


def encode(source, i, settings):
    """(record, height, width) of an image of a folder, its shorter side resized to short_side unless 0."""
    image, side = to_mode(source.open(i), settings["in_chans"]), settings["short_side"]
    if side:
        image = resize_to_cover(image, (side, side), FILTERS[settings["resample"]])
    pixels = to_array(image)                                            # (H, W, C)
    return pixels.tobytes(), *pixels.shape[:2]


class Journal:
    """What stands on the disk of a pack that grows: entries, [length, height, width, crc, reason] of images.

    Its first line holds what is packed, and how: plan, a dict with settings and files. lines are what it
    holds, (bytes, value) of each line. Raises UserError where the pack was begun with other settings, or the
    folder has changed since, and where either file is a link or not of tools.pack: nothing of others is
    written over.
    """

    def __init__(self, pack, plan, lines=()):
        self.pack, self.plan, self.entries = Path(pack), plan, []
        self.partial, self.path = Path(f"{pack}.partial"), journal_of(pack)
        if self.begun() and len(lines) > 1:
            check_same(self.pack, lines[0][1], plan)
            self.entries = [entry for _, block in lines[1:] for entry in block]
            with open_own(self.path, "r+b") as file:
                file.truncate(sum(len(text) for text, _ in lines))      # without a line that a crash tore
        else:                                                           # nothing is packed yet
            with open_own(self.partial, "wb") as file:
                file.write(START)
            with open_own(self.path, "wb"):
                pass
            self.append(plan)
        if os.path.getsize(self.partial) < self.length or len(self.entries) > len(plan["files"]):
            raise UserError(f"{self.partial} is shorter than {self.path} says: delete both to pack anew")
        with open_own(self.partial, "r+b") as file:
            file.truncate(self.length)                                  # without a block that a crash tore

    def begun(self):
        """Whether there is a partial pack that tools.pack began. UserError for files that are not its own."""
        for path in (self.partial, self.path):
            if os.path.lexists(path):
                check_own(path)
        if not self.partial.exists():
            return False
        with open_own(self.partial, "rb") as file:
            start = file.read(len(START))
        if not START.startswith(start):
            raise UserError(f"{self.partial} is damaged, or not what tools.pack writes: remove it to pack "
                            f"anew")
        return bool(start)

    @property
    def length(self):
        return len(START) + sum(entry[0] for entry in self.entries)

    def append(self, value):
        with open_own(self.path, "ab") as file:
            file.write(as_line(value))
            flush(file)

    def add(self, block):
        """Write a block of (record, height, width, reason), and then that it is written."""
        with open_own(self.partial, "ab") as file:
            file.writelines(record for record, *_ in block)
            flush(file)
        entries = [[len(record), height, width, zlib.crc32(record), reason]
                   for record, height, width, reason in block]
        self.append(entries)
        self.entries += entries

    def discard_empty(self):
        """Delete the files of a pack of which no image is written yet."""
        if not self.entries:
            self.partial.unlink()
            self.path.unlink()

    def finish(self, labels, classes, split):
        """Write the index, and give the file its name."""
        length, height, width, crc, reason = zip(*self.entries, strict=True)
        path, size = zip(*self.plan["files"], strict=True)
        header = dict(self.plan["settings"], split=split, classes=classes,
                      bad={i: text for i, text in enumerate(reason) if text})
        index = dict(header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                     offsets=np.cumsum([len(START), *length]), height=np.array(height),
                     width=np.array(width), label=np.asarray(labels), crc=np.array(crc, np.uint32),
                     bytes=np.array(size), path=np.array([os.fsencode(name) for name in path]))
        file = io.BytesIO()
        np.savez(file, **index)
        content = file.getvalue()
        with open_own(self.partial, "ab") as file:
            file.write(content)
            file.write(len(content).to_bytes(8, "little") + hashlib.sha256(content).digest() + START[:8])
            flush(file)
        os.replace(self.partial, self.pack)
        self.path.unlink()


def journal_of(pack):
    """Where the journal of a pack lies while it grows."""
    return Path(f"{pack}.journal")


def as_line(value):
    """A value as a line of JSON, in bytes."""
    return json.dumps(value).encode() + b"\n"


def flush(file):
    """Have what was written to a file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def check_own(path):
    """Raise UserError where a file that tools.pack would write is a link to another, a device or a pipe."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise UserError(f"{path} is a link, or no plain file: expected one that tools.pack wrote, or none: "
                        f"remove it to pack anew")


def open_own(path, mode):
    """Open a file that tools.pack writes, and not what a link of its name leads to."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def check_same(pack, before, now):
    """Raise UserError unless a pack's settings and files, before, are those that are asked for now."""
    for name, value in (OLDER | before["settings"]).items():
        wanted = (OLDER | now["settings"]).get(name, 0)                 # 0: of a flag that has ended
        if value != wanted:
            was = printable(f"--{name.replace('_', '-')} {value}"[:100])
            raise UserError(f"{pack} is of {was}, not {wanted}: expected the same flags, or another folder "
                            f"to write to")
    was, now = dict(before["files"]), dict(now["files"])
    changed = sorted(path for path in was.keys() | now.keys() if was.get(path) != now.get(path))
    if changed:
        first = changed[0]
        what = "is new" if first not in was else "is gone" if first not in now else (
            f"has {now[first]} bytes and had {was[first]}")
        raise UserError(f"the folder has changed since {pack} was begun: {len(changed)} of {len(was)} files, "
                        f"first {printable(first)}, which {what}; pack it into another folder")


def plan_of(pack):
    """What Journal's first line held: a finished pack's settings and files."""
    header, index, _ = read_index(UnchangedFile(pack))
    settings = {name: header[name] for name in ("short_side", "resample", *OLDER)}
    files = zip(map(os.fsdecode, index["path"]), index["bytes"].tolist(), strict=True)
    return dict(settings=settings, files=list(files))
