"""Promises 1, 3 and 10 of what is no stage: tools that are killed or stopped in a save, and odd flags."""

import dataclasses
import json
import os
import random
import shutil
import signal

from faults.evaluation import ready
from faults.hostile import SEED
from faults.killed import Points
from faults.suite import STAGES, Fault, Guard, Tally, flags_of, fork, prepared, share_out

from mff_min.config import parse
from mff_run import files
from mff_run.process import run
from tools import analyze, attention, convert, evaluate, features, pack, predict, probe_layers, reconstruct

# ---------------------------------------------------------------- tools that write


def commands(folder):
    """{name: work for fork} of tools that write into a folder, which is there."""
    encoder, cache = prepared() / "pretrain", ("--cache-dir", prepared() / "cache", "--device", "cpu")
    given = {"features": (features, encoder, "shapes:20", folder / "f.npy", *cache),
             "convert": (convert, encoder, folder / "c.pt", "--to", "timm"),
             "safetensors": (convert, encoder, folder / "c.safetensors", "--to", "timm"),
             "transformers": (convert, encoder, folder / "hf", "--to", "hf", "--part", "encoder"),
             "record": (analyze, encoder, "--record", folder / "r.json"),
             "evaluate": (evaluate, "--checkpoint", prepared() / "finetune", "--data", "shapes:20",
                          "--output-dir", folder, *cache)}

    def work(module, *flags):
        return lambda: run(module.main, parse(module.Config, list(map(str, flags))))
    return {name: work(*words) for name, words in given.items()}


def stopped_at(work, folder, **how):
    """How a tool ended that something befell at a point of its writing. seen.json has the points it met."""
    def main():
        points = Points(**how)
        try:
            work()
        finally:
            (folder.parent / f"{folder.name}.seen").write_text(json.dumps(points.seen))
    return fork(main)


def begun_again(work, folder, whole):
    """What is wrong where a tool's command, given again, neither makes its files nor names one there."""
    ended = fork(work)
    left = sorted(path.name for path in folder.rglob("*.tmp.*"))
    if left:
        return f"{', '.join(left)} stays"
    if ended.code == 2 and "is there already" in ended.last:
        return ""
    there = sorted(path.name for path in folder.iterdir())
    return "" if ended.code == 0 and there == whole else f"code {ended.code}, {ended.last}, {there}"


def killed_tools(folder, quick):
    """A tool that is killed in a save, or gets a signal, leaves no half file, and the next start no other."""
    ready()
    names, tally, draw = list(commands(folder)), Tally(), random.Random(SEED)

    def trial(name, number, point, sent):
        place = folder / f"{name}-{number}"
        place.mkdir()
        work = commands(place)[name]
        ended = stopped_at(work, place, at=point, when=draw.choice(("before", "after")),
                           stop=lambda: os.kill(os.getpid(), sent))
        problem = begun_again(work, place, wholes[name])
        if sent != signal.SIGKILL and not (ended.code == 128 + sent and ended.last == "stopped: interrupted"
                                           or ended.code == 0):
            problem = problem or f"code {ended.code}, {ended.last}"
        shutil.rmtree(place)
        yield f"HOSTILE_SEED={SEED}, {name}, signal {int(sent)} at {point}: {problem}" if problem else "", 0
    wholes, trials = {}, []
    for name in names:
        place = folder / name
        place.mkdir()
        assert stopped_at(commands(place)[name], place).code == 0
        wholes[name] = sorted(path.name for path in place.iterdir())
        seen = [what for what, _ in json.loads((folder / f"{name}.seen").read_text())]
        points = [seen.index("fsync"), *([] if quick else draw.sample(range(len(seen)), min(len(seen), 4)))]
        trials += [(name, f"{point}-{int(sent)}", point, sent) for point in dict.fromkeys(points)
                   for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)]
    share_out([lambda each=each: trial(*each) for each in trials], tally)
    return tally.outcome()


# ---------------------------------------------------------------- flags

VALUES = ["", "0", "-1", "nan", "inf", "-inf", "1e308", "1e-300", "1e400", "1000000", "100000000",
          str(10 ** 12), str(10 ** 30), str(2 ** 70), "9" * 5000, "0x224", "224x", ",", "0,0", "-1,5", "all",
          "last,last", "1e3", "\x1b[31m", "\udcff", "a\nerror: b", "/dev/zero", "nowhere/at/all", "\u00b2"]
ENDLESS = ("steps", "epochs", "global_batch", "cache")                   # large ones are work, and no fault


def odd_flags(folder, quick):
    """Any value of any flag is refused in a line, or the stage or tool runs with it."""
    ready()
    modules = {**STAGES, "analyze": analyze, "convert": convert, "evaluate": evaluate, "features": features,
               "pack": pack, "probe_layers": probe_layers, "attention": attention, "predict": predict,
               "reconstruct": reconstruct}
    for number in range(4):
        shutil.copytree(prepared() / "pretrain", folder / "photos" / f"{number}")   # it has a picture
    kept = ("output_dir", "target", "output")
    fields = [(name, field) for name, module in modules.items() for field in dataclasses.fields(module.Config)
              if field.type is not bool and field.name not in kept]

    def base(name, place):
        cache = ["--cache-dir", prepared() / "cache", "--device", "cpu"]
        encoder, classifier = prepared() / "pretrain", prepared() / "finetune"
        photo, own = folder / "photos/0/reconstruction.png", ["--output-dir", place, "--device", "cpu"]
        if name in STAGES:
            return flags_of(name, prepared(), place, "--steps", 1)
        return {"analyze": [encoder, "--figures", "spectrum", "--images", 8, "--output-dir", place, *cache],
                "convert": [encoder, f"{place}.pt"], "pack": [folder / "photos", place],
                "evaluate": ["--checkpoint", classifier, "--data", "shapes:20", "--output-dir", place,
                             *cache],
                "features": [encoder, "shapes:20", f"{place}.npy", *cache],
                "attention": [encoder, photo, *own], "reconstruct": [encoder, photo, *own],
                "predict": [classifier, photo, *own],
                "probe_layers": ["--checkpoint", encoder, "--data", "shapes:60", "--layers", "0",
                                 "--output-dir", place, *cache]}[name]

    def trial(number):
        draw = random.Random(SEED * 1000 + number)
        name, field = draw.choice(fields)
        value, place = draw.choice(VALUES), folder / f"trial{number}"
        if field.name in ENDLESS and value.isdecimal():
            value = "-1"
        arguments = [each.name for each in dataclasses.fields(modules[name].Config)
                     if each.default is dataclasses.MISSING]
        flags = list(map(str, base(name, place)))
        if field.name in arguments:
            flags[arguments.index(field.name)] = value
        else:
            flags.append(f"--{field.name}={value}")

        def work():
            here = folder / f"here{number}"
            here.mkdir()
            os.chdir(here)
            run(modules[name].main, parse(modules[name].Config, flags))
        ended = fork(work, 40)
        errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        good = ended.code == 0 or ended.code in (2, 3) and len(errors) == 1
        problem = "" if good and "Traceback" not in ended.said else f"code {ended.code}, {ended.last[:300]}"
        yield (f"HOSTILE_SEED={SEED}, {number}, {name} --{field.name}={value[:30]!r}: {problem}" if problem
               else ""), 0
    tally = Tally()
    share_out([lambda number=number: trial(number) for number in range(20 if quick else 120)], tally)
    return tally.outcome()


def leave_them():
    """What a killed process left stays."""
    files.remove_leftovers = convert.is_alive = lambda *_: True


FAULTS = [Fault("a tool is stopped in a save", 1, killed_tools), Fault("odd values of flags", 10, odd_flags)]
GUARDS = [Guard("leftovers-removed", "a tool is stopped in a save", leave_them)]
