"""Promise 9, of data that nobody has laid out: folders, lists and packs are altered, by a new seed each day.

A failing case is printed with the seed that makes it again:
HOSTILE_SEED=... python tests/faults --only "hostile data"
"""

import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import socket
import stat
import types
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
from faults import suite
from faults.files import is_clean, npy_of
from faults.packs import images_in, packs_of
from faults.suite import Fault, Guard, Tally, fork, many, prepared, share_out, stage
from PIL import Image

from mff_data import decode, packed

LIMIT = 30                                                              # s: whatever lasts longer hangs
# What an alteration meets where one before it has left nothing to alter.
SPOILT = (OSError, ValueError, IndexError, KeyError, OverflowError, TypeError, zipfile.BadZipFile)

# ---------------------------------------------------------------- what is altered


def encoded(kind, size=(24, 21)):
    """An image file of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(7).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


NAMES = [b"a\nerror: all is well", b"\x1b[2Ja", b"\xff\xfe", b"-rf", b"n" * 250, b" ", b"%s{}", b"*?[a]",
         b"a:b", "\u202ecba".encode(), "e\u0301".encode(), "\N{GRINNING FACE}".encode(), b"a\\b", b"a\r",
         b"~", b"'\"`$(x)", b"nul\x01", b"test", b"Train", b"validation", b"@eaDir", b"A"]
LINKS = ["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/nowhere", ".", "..", "/", "/proc",
         "self", "../../../../etc/passwd"]
HEADERS = [("|u1", (10 ** 9, 10 ** 9, 3)), ("|O", (24, 21, 3)), ("|u1", (24, 21, 5)), ("<f4", (24, 21)),
           ("|u1", (0, 21, 3)), ("|u1", "(" * 400), ("<u2", (24, 21, 3))]
CONTENTS = {"empty": b"", "a text": b"no image\n", "a page": b"<!DOCTYPE html><html></html>",
            "noise": random.Random(1).randbytes(3_000), "half a PNG": encoded("PNG")[:300],
            "a PNG of 60,000 x 60,000": encoded("PNG").replace(b"IHDR\0\0\0\x15\0\0\0\x18",
                                                              b"IHDR\0\0\xea\x60\0\0\xea\x60"),
            "HEIC": b"\0\0\0\x18ftypheic" + bytes(99), "JSON": b'{"a": 1}', "zeros": bytes(9_999),
            "a program": b"\x7fELF" + bytes(200), "an archive": b"PK\3\4" + bytes(99)}


def read(path):
    """The bytes of a file. OSError where an alteration before this one has made it something else."""
    if not is_own(path):
        raise OSError("it is none any more")
    return path.read_bytes()


def is_own(path):
    """Whether a path is a small file, and no link: whoever follows links here alters the machine."""
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_size < 2 ** 24


def copy_tree(path, new):
    shutil.copytree(path, new, symlinks=True)


def image_of(root, draw):
    """One of the images below a folder."""
    return draw.choice(sorted(filter(is_own, root.rglob("*.png"))))


def class_of(root, draw):
    return image_of(root, draw).parent


def other_content(root, draw):
    path, (what, content) = image_of(root, draw), draw.choice(sorted(CONTENTS.items()))
    path.write_bytes(content)
    return f"{path.name} is {what}", path


def other_array(root, draw):
    path, (kind, shape) = image_of(root, draw), draw.choice(HEADERS)
    path.unlink()
    path = path.with_suffix(".npy")
    path.write_bytes(npy_of(kind, shape, bytes(draw.choice([0, 24 * 21 * 3, 24 * 21 * 4]))))
    return f"an array of {kind} {shape}", None


def other_format(root, draw):
    path, kind = image_of(root, draw), draw.choice(["GIF", "BMP", "TIFF", "WEBP", "JPEG", "PPM"])
    path.write_bytes(encoded(kind))
    return f"{path.name} is a {kind}", None


def odd_image(root, draw, kind=None):
    """What opens as no file does, in the place of an image."""
    path = image_of(root, draw)
    path.unlink()
    kind = kind or draw.choice(["a pipe", "a socket", "a folder", "a device", "sparse", "a link"])
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        os.chdir(path.parent)                                           # its path is short then
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))      # /dev/zero
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.write_bytes(encoded("PNG")[:60])
        os.truncate(path, draw.choice([2 ** 20, 2 ** 33, 2 ** 40]))
    else:
        target = draw.choice(LINKS)
        path.symlink_to(path.name if target == "self" else target)
        kind = f"a link to {target}"
    is_file = kind not in ("a folder", *(f"a link to {target}" for target in (".", "..", "/", "/proc")))
    return f"{path.name} is {kind}", path if is_file else None


def odd_class(root, draw):
    """A link, a pipe or a file beside class folders, or in the place of one."""
    path = class_of(root, draw)
    if draw.random() < 0.5:
        shutil.rmtree(path)
    else:
        path = path.with_name("odd")
    kind = draw.choice(["a file", "a pipe", "empty", *LINKS])
    if kind == "a file":
        path.write_bytes(b"text")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.mkdir()
    else:
        target = path.name if kind == "self" else kind
        path.symlink_to(root.parent / "small" if target in ("/", "/proc") else target)
    return f"class {path.name} is {kind}", None


def odd_name(root, draw):
    """A class or an image by a name that one does not think of."""
    name = draw.choice(NAMES)
    path = draw.choice([image_of, class_of])(root, draw)
    if path.suffix:
        name += b".png"
    new = os.path.join(os.fsencode(path.parent), name)
    if draw.random() < 0.5 and not os.path.lexists(new):
        (copy_tree if path.is_dir() else shutil.copy)(path, os.fsdecode(new))
    elif not os.path.isdir(new):
        os.rename(path, new)
    return f"{path.name} is called {name}", None


def twins(root, draw):
    """Names that are the same to some systems."""
    path = class_of(root, draw)
    accents = [unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD")]
    for name in draw.choice([("Q", "q"), accents]):
        copy_tree(path, path.with_name(name))
    return "two classes of the same name", None


def closed(root, draw):
    path = draw.choice([image_of, class_of, lambda *given: root])(root, draw)
    path.chmod(0)
    return f"nobody may read {path.name}", None


def deep(root, draw):
    path, levels = class_of(root, draw), draw.choice([5, 60, 150])
    picture, here = encoded("PNG"), os.getcwd()
    os.chdir(path)
    for _ in range(levels):
        os.mkdir("d" * 30)
        os.chdir("d" * 30)
    Path("deep.png").write_bytes(picture)
    os.chdir(here)
    return f"an image {levels} folders further down", None


def hidden(root, draw):
    path, name = class_of(root, draw), draw.choice([".x.png", "._0.png", ".git", "Thumbs.db", "x.json"])
    (path / name).write_bytes(draw.choice([b"", encoded("PNG")]))
    return f"{name} beside images", None


def bare(root, draw):
    """No image is left in a class or a split."""
    path = class_of(root, draw)
    for image in (path if draw.random() < 0.5 else path.parent).rglob("*.png"):
        image.unlink()
    return f"no images in {path.name}", None


def other_splits(root, draw):
    kind = draw.choice(["no val", "no train", "Train", "training", "test", "a file", "a link", "loose",
                        "twice"])
    train, val = root / "train", root / "val"
    if not train.is_dir() or not val.is_dir() or train.is_symlink() or val.is_symlink():
        return "nothing", None
    if kind == "no val":
        shutil.rmtree(val)
    elif kind == "no train":
        shutil.rmtree(train)
    elif kind in ("Train", "training", "test"):
        copy_tree(train, root / kind)
        if draw.random() < 0.5:
            shutil.rmtree(train)
    elif kind == "a file":
        shutil.rmtree(val)
        val.write_bytes(b"")
    elif kind == "a link":
        shutil.rmtree(val)
        val.symlink_to(draw.choice(["train", "val", "nowhere", "."]))
    elif kind == "loose":
        (train / "loose.png").write_bytes(encoded("PNG"))
    else:
        copy_tree(train, root / "more" / "train")
        copy_tree(train, root / "more" / "val")
    return f"splits: {kind}", None


FOLDERS = [other_content, other_content, odd_image, odd_image, odd_class, odd_name, odd_name, twins, closed,
           deep, hidden, bare, other_array, other_format, other_splits]

# ---------------------------------------------------------------- lists


LINES = [b"../outside.png 1", b"/etc/passwd 1", b"train/a/0.png", b"\0 1", b"train/a/0.png 1 2 3 4",
         b"\xff\xfe\xff 1", b'"train/a/0.png 1', b"train/a/0.png\t\x1b[2J", b"train/a/0.png\t" + b"9" * 5_000,
         b"train/a/0.png,", b", 1", b"train/a 1", b"\t\t\t", b"train/./a/../a/0.png 1", b"-1 -1", b"nan inf",
         "train/a/0.png \u0663".encode(), b"train//a//2.png 0", b"~/x.png 1", b"x" * 10 ** 6,
         b"train/a/" + b"n" * 300 + b".png 1"]


def other_list(root, draw):
    """A list with other lines, or in another form."""
    path = root / draw.choice(["train.txt", "val.txt"])
    lines = read(path).splitlines()
    kind = draw.choice(["a line", "a line", "a line", "UTF-16", "empty", "a link", "a pipe", "a folder",
                        "closed", "gone", "twice", "carriage returns", "noise"])
    if kind == "a line":
        line = draw.choice(LINES)
        lines.insert(draw.randrange(len(lines) + 1), line)
        kind = f"a line {line[:60]}"
    elif kind == "twice":
        lines.append(lines[0])
    path.write_bytes(b"\n".join(lines))
    if kind == "UTF-16":
        path.write_text(path.read_text(), "utf-16")
    elif kind == "carriage returns":
        path.write_bytes(b"\r\n".join(lines))
    elif kind == "noise":
        path.write_bytes(draw.randbytes(3_000))
    elif kind == "closed":
        path.chmod(0)
    elif kind in ("empty", "a link", "a pipe", "a folder", "gone"):
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "a link":
            path.symlink_to(draw.choice(["/dev/zero", "/nowhere", path.name, "/dev/null"]))
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            path.mkdir()
    return f"{path.name}: {kind}", None


# ---------------------------------------------------------------- packs

VALUES = [None, True, -1, 0, 10 ** 400, 2 ** 62, 1.5, "", "\x1b[2J", [], {}, [None], ["a"] * 99, {"0": {}},
          "a" * 9_999]
ARRAYS = {"negative": lambda x: -x - 1, "huge": lambda x: x * 0 + 2 ** 62, "zeros": lambda x: x * 0,
          "shorter": lambda x: x[:-1], "empty": lambda x: x[:0], "twofold": lambda x: np.stack([x, x]),
          "floats": lambda x: x.astype(float), "NaN": lambda x: x * np.nan, "backwards": lambda x: x[::-1],
          "one more": lambda x: x + 1, "twice as much": lambda x: x * 2, "unsigned": lambda x: x.astype("u8"),
          "text": lambda x: x.astype(str), "true": lambda x: x > 0, "objects": lambda x: x.astype(object),
          "complex": lambda x: x.astype(complex), "a number": lambda x: x[0]}


def index_of(file):
    """(where the index of a pack begins, header, index)."""
    length = int.from_bytes(file[-48:-40], "little")
    with np.load(io.BytesIO(file[-48 - length:-48])) as arrays:
        index = dict(arrays)
    return len(file) - 48 - length, json.loads(index.pop("header").tobytes()), index


def with_index(file, stop, header, index):
    """The records of a pack with another index, whose SHA-256 is right."""
    content = io.BytesIO()
    np.savez(content, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **index)
    content = content.getvalue()
    end = len(content).to_bytes(8, "little") + hashlib.sha256(content).digest() + packed.START[:8]
    return file[:stop] + content + end


def other_header(root, draw):
    path = root / draw.choice(["train.pack", "val.pack"])
    stop, header, index = index_of(read(path))
    key, value = draw.choice([*header, "more"]), draw.choice(VALUES)
    header[key] = value
    path.write_bytes(with_index(read(path), stop, header, index))
    return f"{path.name}: {key} is {str(value)[:40]}", None


def other_index(root, draw):
    path = root / draw.choice(["train.pack", "val.pack"])
    stop, header, index = index_of(read(path))
    key, kind = draw.choice(sorted(index)), draw.choice(sorted(ARRAYS))
    fits = key != "path" or kind in ("shorter", "empty", "backwards", "objects", "text", "twofold")
    index[key] = ARRAYS[kind](index[key] if fits else np.arange(len(index[key])))
    path.write_bytes(with_index(read(path), stop, header, index))
    return f"{path.name}: {key} is {kind}", None


def without_classes(root, draw):
    path = root / "train.pack"
    stop, header, index = index_of(read(path))
    path.write_bytes(with_index(read(path), stop, header | dict(classes=None), index))
    return "train.pack: classes is None", None


def other_bytes(root, draw):
    """Some bytes of a pack are others, are gone, or are there twice."""
    path = root / draw.choice(["train.pack", "val.pack"])
    file, kind = bytearray(read(path)), draw.choice(["altered", "gone", "twice", "cut", "longer"])
    at, length = draw.randrange(len(file)), draw.choice([1, 8, 1000])
    if kind == "altered":
        file[at:at + length] = draw.randbytes(len(file[at:at + length]))
    elif kind == "gone":
        del file[at:at + length]
    elif kind == "twice":
        file[at:at] = file[at:at + length]
    else:
        file = file[:at] if kind == "cut" else file + draw.randbytes(length)
    path.write_bytes(file)
    return f"{path.name}: {length} bytes at {at} are {kind}", None


def odd_pack(root, draw):
    path = root / draw.choice(["train.pack", "val.pack"])
    kind = draw.choice(["gone", "a link", "a pipe", "a folder", "empty", "sparse", "closed", "partial",
                        "text"])
    if not is_own(path):
        raise OSError("it is none any more")
    if kind == "closed":
        path.chmod(0)
    elif kind == "partial":
        path.rename(f"{path}.partial")
    elif kind == "sparse":
        os.truncate(path, 2 ** 40)
    else:
        path.unlink()
        if kind == "a link":
            path.symlink_to(draw.choice(["/dev/zero", "/nowhere", path.name, "val.pack", "train.pack"]))
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            path.mkdir()
        elif kind != "gone":
            path.write_bytes(b"" if kind == "empty" else b"mff_min pack 001" * 9)
    return f"{path.name}: {kind}", None


PACKS = [other_header, other_header, other_index, other_index, other_index, other_bytes, odd_pack]
LAYOUTS = {"folder": ("", FOLDERS), "flat": ("", FOLDERS[:-3]), "list": ("list:", [other_list, odd_image]),
           "pack": ("", PACKS)}
# These come first, so that a control has what it needs: (layout, what is altered).
KNOWN = [("pack", without_classes), ("flat", functools.partial(odd_image, kind="a pipe")),
         ("flat", functools.partial(odd_image, kind="a device")), ("folder", deep)]

# ---------------------------------------------------------------- a run on it


def state_of(root):
    """{path: kind, size, time} of all below a folder, links as links."""
    found = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError as error:
                assert error.errno == errno.ENAMETOOLONG
                continue
            found[path] = status.st_mode, status.st_size, status.st_mtime_ns, os.path.islink(path)
    return found


def wrong_with(end, run, bad):
    """What is wrong with how a stage ended on hostile data; bad is an image that nothing can read."""
    errors = [line for line in end.said.splitlines() if line.startswith("error: ")]
    if end.code not in (0, 2, 3) or not is_clean(end.said) or "Traceback" in end.said:
        return f"code {end.code}, {end.said[-400:]!r}"
    if len(errors) != bool(end.code) or end.code and end.last != errors[0]:
        return f"code {end.code}, it says {errors} and ends with {end.last[-200:]!r}"
    if end.code:
        return ""
    named = run / "bad_samples.jsonl"
    lines = [json.loads(line) for line in named.read_text().splitlines()] if named.exists() else []
    if not all(is_clean(str(line)) for line in lines):
        return f"bad_samples.jsonl holds {lines}"
    unnamed = bad and not any(os.path.basename(bad) in str(line) for line in lines)
    return f"{bad} is not named in bad_samples.jsonl" if unnamed else ""


def hostile_data(folder, quick):
    """A stage trains by the rules of docs/data.md, or refuses in a line, and writes nothing to the folder."""
    for path in (folder, prepared()):
        path.chmod(0o755)
    sound = images_in(folder / "sound", 12)
    (folder / "runs").mkdir()
    (folder / "runs").chmod(0o777)
    for split in ("train", "val"):
        lines = [f"{split}/{'ab'[i % 2]}/{i}.png {i % 2}\n" for i in range(12)]
        (sound / f"{split}.txt").write_text("".join(lines))
    packs = packs_of(sound, folder / "packs")

    def trial(number):
        draw = random.Random(suite.SEED * 100_000 + number)
        layout, alter = KNOWN[number] if number < len(KNOWN) else (draw.choice(sorted(LAYOUTS)), None)
        spec, choices = LAYOUTS[layout]
        case, run = folder / f"case{number}", folder / "runs" / str(number)
        root = case / "data"
        shutil.copytree(sound / "val" / "a", case / "small")
        shutil.copytree({"pack": packs, "flat": sound / "train"}.get(layout, sound), root)
        texts, bad, name = [], None, draw.choice(["pretrain", "pretrain", "probe", "finetune"])
        for i in range(1 if alter else draw.choice([1, 1, 2, 3])):
            try:
                text, path = (alter or draw.choice(choices))(root, draw)
            except SPOILT:
                continue
            texts.append(text)
            bad = path if i == 0 and "val" not in str(path) else None
        user, workers = draw.choice([(0, 0), (0, 2), (65534, 0)])       # nobody cannot import all
        more = ["--max-bad", draw.choice([0.01, 1])] if not alter else ["--max-bad", 1]
        name = "pretrain" if alter or layout == "flat" else name
        work = stage(name, run, "--data", f"{spec}{root}", "--workers", workers, "--steps", 5, *more)
        before = state_of(case)

        def as_user():
            if user and not os.geteuid():
                os.setuid(user)
            work()
        end = fork(as_user, limit=LIMIT)
        problem = wrong_with(end, run, bad)
        if not problem and state_of(case) != before:
            problem = "the data's folder has changed"
        shutil.rmtree(case)
        where = f"HOSTILE_SEED={suite.SEED}, {number}, {name}, {layout}, {'; '.join(texts)}, user {user}"
        yield f"{where}: {problem}" if problem else "", 0
    tally, count = Tally(), many(len(KNOWN), 150, quick)
    share_out([functools.partial(trial, number) for number in range(count)], tally)
    return tally.outcome()


def open_what_is_there():
    decode.stat = types.SimpleNamespace(S_ISREG=lambda mode: True)


def trust_the_index():
    packed.is_sound = lambda *given: True


FAULTS = [Fault("hostile data of a run", 9, hostile_data)]
GUARDS = [Guard("plain-files-alone", "hostile data of a run", open_what_is_there),
          Guard("index-of-a-pack-checked", "hostile data of a run", trust_the_index)]
