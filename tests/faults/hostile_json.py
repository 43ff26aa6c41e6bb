"""Promise 10, of JSON that nobody wrote: every file of it that a run or a tool leaves, altered from a seed.

Each trial alters one file in one way and starts what reads it. That ends in a line and code 2 (3 where a pack
seems to have bad images), or it does its work; where a line was added to a log, the line stays. A new seed
each day: HOSTILE_SEED=... makes one again.
"""

import contextlib
import io
import json
import os
import random
import shutil
from types import SimpleNamespace

from faults.evaluation import ready
from faults.hostile import SEED
from faults.killed import command, uninterrupted
from faults.suite import ROOT, Fault, Guard, Tally, fork, prepared, share_out
from PIL import Image

from mff_data import packed
from mff_data.sources import open_data
from mff_min.config import parse
from mff_min.vit import MODELS
from mff_run import jsonfile
from mff_run.process import run
from tools import analyze, convert, pack, records, study

# ---------------------------------------------------------------- what is done to a file

DEEP = "[" * 100_000
VALUES = ["null", "true", "-1", "0", "0.5", "1e29", "1e400", "9" * 400, "9" * 5000, "NaN", "-Infinity", '""',
          '"x"', r'"\u0000"', r'"\u001b[31m"', r'"a\nerror: b"', r'"\ud800"', "[]", "{}", "[[]]", '{"a": 1}',
          "[" * 99 + "]" * 99]
CONTENTS = [b"", b"\n", b"null", b"[]", b"{}", b"[1, 2]", DEEP.encode(), b'{"a":' * 100_000, b"9" * 5000,
            b"\xff\xfe{\0}\0", b"\0" * 4096, b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\n"]
LINES = [b"looks good", b"[1]", b'{"note": "looks good"}', b'{"step": "four"}', b'{"step": 1e400, "lr": 1}',
         b'{"step": 2, "step": 3}', b'{"step": -7, "lr": NaN, "loss": []}', b"\xff\xfe", DEEP.encode(),
         b"9" * 5000, b'{"step": 1, "lr": 0.1, "fusion_weights": "x"}',
         b'{"step": 1, "lr": 0.1, "fusion_weights": [1, 2]}']


def places(value):
    """(dict or list, key) of all that is nested in a value."""
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inside, dict | list):
            yield from places(inside)


def alter_value(text, draw):
    """JSON text with another value in one place, one that is gone, or one that is there twice."""
    found = json.loads(text)
    holder, key = draw.choice(list(places(found)))
    what, mark = draw.random(), "the place of a hostile value"
    if what < 0.2:
        del holder[key]
        return json.dumps(found), f"{key} is gone"
    if what < 0.3 and isinstance(holder, dict):
        holder[mark] = holder[key]
        return json.dumps(found).replace(f'"{mark}"', json.dumps(key)), f"{key} is there twice"
    holder[key], value = mark, draw.choice(VALUES)
    return json.dumps(found).replace(f'"{mark}"', value), f"{key} is {value[:20]}"


def alter(path, draw):
    """Alter a file of JSON or of JSON lines in one way. (What was done, a line that is to stay or b"")."""
    lines, what, added = path.read_bytes().splitlines(keepends=True), draw.random(), b""
    single = path.suffix == ".json"
    if what < 0.45 and path.suffix != ".txt":
        number = 0 if single else draw.randrange(len(lines))
        text, what = alter_value(b"".join(lines) if single else lines[number], draw)
        lines = [text.encode()] if single else [*lines[:number], text.encode() + b"\n", *lines[number + 1:]]
    elif what < 0.7 and not single:
        number, added = draw.randrange(len(lines) + 1), draw.choice(LINES)
        lines.insert(number, added + b"\n")
        what = f"line {number} is {added[:30]}"
    elif what < 0.75 and not single:
        draw.shuffle(lines)
        what = "its lines are in another order"
    elif what < 0.8:
        content = b"".join(lines)
        lines, what = [content[:draw.randrange(len(content))]], "it is torn"
    elif what < 0.85:
        lines, what = [b"\xef\xbb\xbf", *lines], "it begins with a mark of UTF-8"
    elif what < 0.93:
        lines = [draw.choice(CONTENTS)]
        what = f"it is {lines[0][:20]}"
    else:
        path.unlink()
        return draw.choice([pipe, link, device, folder_there, sparse])(path), b""
    path.write_bytes(b"".join(lines))
    return what, added


def pipe(path):
    os.mkfifo(path)
    return "it is a pipe"


def link(path):
    path.symlink_to(path.parent / "nowhere" / "at-all")
    return "it is a link to nothing"


def device(path):
    path.symlink_to("/dev/zero")
    return "it is a link to an endless device"


def folder_there(path):
    path.mkdir()
    return "it is a folder"


def sparse(path):
    path.touch()
    os.truncate(path, 2 ** 42)
    return "it is sparse and huge"


# ---------------------------------------------------------------- what reads it


def of_tool(module, *flags):
    """work for fork: a tool as its command line runs it."""
    return lambda: run(module.main, parse(module.Config, list(map(str, flags))))


def goes_on(folder):
    return command("pretrain", folder, "--steps", 5, "--allow-change", "steps")


def begins_anew(folder):
    return command("pretrain", folder, "--resume", "")


def is_drawn(folder):
    return of_tool(analyze, folder, "--figures", "weights,curves", "--output-dir", folder / "figures")


def is_recorded(folder):
    return of_tool(analyze, folder, "--record", folder / "new.json")


def record_is_drawn(name):
    return lambda folder: of_tool(analyze, folder / name, "--output-dir", folder / "figures")


def is_reported(folder):
    work = of_tool(study, "--report", "--output-dir", folder, "--device", "cpu", "--figures", folder / "new")
    return lambda: MODELS.update(vit_test=VIT_TEST) or work()


def is_gathered(folder):
    """What a study reads in its folder before it runs a unit, and of a unit that has ended."""
    def main(cfg):
        unit = study.Unit("MAE", 0, "pretrain")
        with study.held(folder, KIND):
            study.what_is_left(parse(study.Config, []), [unit], folder, set(), lambda *_: False)
            study.read_record(unit, "", study.folder_of(folder, unit), 1.0)
            study.measure(parse(study.Config, ["--minutes", "1"]), [], {"records": []}, folder, 2)
    return lambda: run(main, SimpleNamespace())


def is_packed(folder):
    return of_tool(pack, folder / "photos", folder / "pack", "--short-side", 8)


def is_converted(folder):
    return of_tool(convert, folder / "hf", folder / "new.pt")


VIT_TEST = MODELS["vit_test"]                                           # before ready() makes it smaller
KIND = dict(preset="minutes", data="shapes", device="cpu", images="shapes:10000")
# {folder of tell(): [(file in it, what reads it)]}
READERS = {
    "run": [("log.jsonl", goes_on), ("log.jsonl", is_drawn), ("log.jsonl", is_recorded),
            ("config.json", is_drawn), ("config.json", begins_anew), ("config.json", goes_on),
            ("env.json", goes_on), ("bad_samples.jsonl", goes_on), ("metrics.json", is_recorded)],
    "records": [(f"{name}.json", record_is_drawn(f"{name}.json")) for name in ("layers", "encoders", "log")],
    "results": [("study_shapes_cpu_minutes.json", is_reported)],
    "study": [(name, is_gathered) for name in (
        "study.json", "costs.json", "MAE/seed0/pretrain/metrics.json", "MAE/seed0/pretrain/log.jsonl",
        "MAE/seed0/pretrain/flags.txt")],
    "packed": [("pack/train.pack.journal", is_packed)],
    "transformers": [("hf/config.json", is_converted), ("hf/preprocessor_config.json", is_converted)],
}


def put(path, *values):
    """Write values as lines of JSON to a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def tell(folder):
    """Make a folder of each kind of READERS, whole."""
    whole, images = folder / "run", folder / "packed" / "photos"
    shutil.copytree(uninterrupted("pretrain", folder / "pretrain-whole"), whole)
    config = json.loads((whole / "config.json").read_text()) | dict(model="vit_t", out_indices="0,11")
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    lines = [line | dict(fusion_weights=[0.5, 0.5]) if "lr" in line else line for line in lines]
    put(whole / "config.json", config)
    put(whole / "log.jsonl", *lines)
    put(whole / "bad_samples.jsonl", dict(name="a.png", reason="torn"), dict(name="b.png", reason="torn"))

    rows = [dict(label="shape", kind=kind, layer=layer, acc1=20.0, acc1_error=1.0, val_images=60)
            for kind, layer in (("trained", "block 0"), ("trained", "block 1"), ("random", "block 0"),
                                ("pixels", "pixels"), ("chance", "chance"))]
    taps = {tap: [0.0, 1.0] for tap in ("normed", "block 0", "block 1")}
    encoder = dict(name="a", model="vit_test", grid=[4, 4], patch_size=4, distances=[[1.0, 2.0]] * 2,
                   amplitudes=taps)
    found = dict(data="x", images=8, batch_size=8, encoders=[encoder],
                 cka=[dict(across="a", up="a", values=[[1.0, 0.5], [0.5, 1.0]])])
    put(folder / "records" / "log.json", dict(config=config, log=lines))
    put(folder / "records" / "layers.json", dict(config=config, margins={}, rows=rows))
    put(folder / "records" / "encoders.json", found)

    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "study_shapes_cpu_minutes.json", folder / "results")
    unit = study.Unit("MAE", 0, "pretrain")
    place = study.folder_of(folder / "study", unit)
    put(folder / "study" / "study.json", KIND)
    put(folder / "study" / "costs.json", {f"2 jobs on {os.cpu_count()} cores": {"pretrain": 9.0}})
    place.mkdir(parents=True)
    for name in ("metrics.json", "log.jsonl"):
        shutil.copy(whole / name, place)
    (place / "flags.txt").write_text(study.flags_of(study.PRESETS["minutes"], unit))

    (images / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(images / "a" / f"{i}.png")
    assert fork(is_packed(folder / "packed")).code == 0
    path = folder / "packed" / "pack" / "train.pack"
    source, plan = open_data(str(images), "train", "", str), packed.plan_of(path)
    path.unlink()
    packed.Journal(path, plan).add([pack.Records(source, plan["settings"])[0]])
    flags = ("--to", "hf", "--part", "encoder")
    (folder / "transformers").mkdir()
    assert fork(of_tool(convert, prepared() / "pretrain", folder / "transformers" / "hf", *flags)).code == 0


def hostile_json(folder, quick):
    """What reads a hostile file says so in a line and ends, or does its work."""
    ready()
    tell(folder)
    with contextlib.redirect_stdout(io.StringIO()):                     # matplotlib is slow to begin
        is_drawn(folder / "run")()
    kinds = [(kind, name, reader) for kind, readers in READERS.items() for name, reader in readers]

    def trial(number):
        kind, name, reader = kinds[number % len(kinds)]
        place, draw = folder / f"trial{number}", random.Random(SEED * 1000 + number)
        shutil.copytree(folder / kind, place)
        # At first all is as it was, so that no reader refuses whatever comes.
        what, line = alter(place / name, draw) if number >= len(kinds) else ("as it was", b"")
        ended = fork(reader(place), 60)
        errors = [text for text in ended.said.splitlines() if text.startswith("error: ")]
        refused, problem = ended.code in (2, 3) and len(errors) == 1, ""
        if not (refused or ended.code == 0) or "\x1b" in ended.said or "Traceback" in ended.said:
            problem = f"code {ended.code}, {ended.last[:300]}"
        elif what == "as it was" and refused and reader is not begins_anew:
            problem = f"refused: {ended.last[:300]}"
        elif reader is goes_on and line and not refused and line + b"\n" not in (place / name).read_bytes():
            problem = "a line of another is lost"
        shutil.rmtree(place)
        at = f"HOSTILE_SEED={SEED}, {number}, {reader.__name__} {name}"
        yield f"{at}: {what}: {problem}" if problem else "", 0
    tally, count = Tally(), len(kinds) * (2 if quick else 6)
    share_out([lambda number=number: trial(number) for number in range(count)], tally)
    return tally.outcome()


def believe_json():
    """What is JSON is what a run has written, and JSON is what Python reads."""
    jsonfile.parse_json = json.loads
    jsonfile.misfit = study.misfit = pack.misfit = records.misfit = lambda *_: ""


FAULTS = [Fault("hostile JSON", 10, hostile_json)]
GUARDS = [Guard("json-compared", "hostile JSON", believe_json)]
