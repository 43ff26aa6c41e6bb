"""Compare MAE, PixMIM and MFF on equal terms: the same seeds, data, recipe and probes (arXiv 2308.00261).

    python -m tools.study --preset minutes                          embedded images, two CPU cores
    python -m tools.study --preset minutes --data IMAGENETTE        a folder with train/ and val/
    python -m tools.study --preset cpu                              larger images, hours
    python -m tools.study --preset gpu --data IMAGENETTE --minutes 8 --workers 12   a part at a time, on a GPU

A unit is one stage of one method from one seed, and runs as the stage's script would in a process of its own.
The same command goes on with a study that was stopped in whatever way: finished units are in the results
file, cut ones resume. With --minutes the units of one method and seed, a chain, run one after the other, and
a chain that does not fit into the time left is not begun. Every method gets the same recipe (docs/results.md
says where each number is from).

    MAE, MFF_MAE                paired, seed by seed, before anything else
    random                      the weights that MAE starts from, measured likewise; and raw pixels
    PixMIM, MFF_PixMIM, MFF_detach
    MFF_2, MFF_4, MFF_12        so many fused levels (table 4); 1 is MAE, 6 is MFF_MAE
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import multiprocessing.connection
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import train_detect
import train_finetune
import train_pretrain
import train_probe
import train_segment
from mff_data.sources import fingerprint, match_labels, open_data
from mff_min.config import check_ranges, knob, opt, parse
from mff_min.errors import Fault, UserError, printable
from mff_run.files import check_regular, make_folder, write_atomically, write_json, write_tensors
from mff_run.jsonfile import misfit, opened, read_json
from mff_run.log import read_log
from mff_run.process import StopSignals, leave, run
from mff_run.progress import duration
from mff_run.world import describe_environment, source_commit, start_world
from tools import comparison, probe_layers
from tools.figures import check_matplotlib, save
from tools.records import LINE, ROWS, is_count, is_percent

# ---------------------------------------------------------------- what is compared

GROUPS = (("MAE", "MFF_MAE"), ("random",), ("PixMIM", "MFF_PixMIM", "MFF_detach"),
          ("MFF_2", "MFF_4", "MFF_12"))
ABLATION = GROUPS[-1]
PIXMIM = "--low-pass-radius 40 --crop simple"
METHODS = {"MAE": "--out-indices last",
           "MFF_MAE": "--out-indices spread",
           "random": "--out-indices last",
           "PixMIM": f"--out-indices last {PIXMIM}",
           "MFF_PixMIM": f"--out-indices spread {PIXMIM}",
           "MFF_detach": "--out-indices spread --detach-shallow",
           "MFF_2": "--out-indices 0,11",
           "MFF_4": "--out-indices 0,4,8,11",
           "MFF_12": "--out-indices all"}

SMALL = "--model vit_test --patch-size 8 --decoder-embed-dim 64 --decoder-num-heads 2"
TUNE = "--crop simple --rand-augment 0 --mixup 0 --cutmix 0 --drop-path 0"
# Flags of each stage. "shapes" is the data unless --data names another; "ablation": the stages of ABLATION.
PRESETS = {
    "minutes": dict(
        shapes="shapes:10000", ablation=("pretrain", "layers"),
        pretrain=f"{SMALL} --decoder-depth 1 --img-size 48 --global-batch 32 --batch-size 32 --steps 400 "
                 f"--lr 3e-3",
        layers="--layers 2,5,8,11 --images 2000 --pool avg",
        finetune=f"{TUNE} --global-batch 32 --batch-size 32 --steps 100 --lr 4e-3"),
    "cpu": dict(
        shapes="shapes:20000", ablation=("pretrain", "layers", "knn"),
        pretrain=f"{SMALL} --decoder-depth 2 --img-size 64 --global-batch 64 --batch-size 64 --steps 2500 "
                 f"--lr 3e-3",
        layers="--layers 0,2,4,6,8,11 --images 5000 --pool avg",
        knn="--knn 20 --pool avg",
        finetune=f"{TUNE} --global-batch 64 --batch-size 64 --steps 400 --lr 4e-3",
        segment="--img-size 64 --width 32 --global-batch 32 --batch-size 32 --steps 400 --lr 1e-2 "
                "--layer-decay 0.8 --drop-path 0 --clip-grad 1 --warmup-steps 20 --picture-images 1",
        detect="--img-size 64 --window 4 --width 32 --proposals 200 --regions 32 --scale 0.8,1.25 "
               "--global-batch 16 --batch-size 16 --steps 400 --lr 3e-3 --layer-decay 0.8 --drop-path 0 "
               "--clip-grad 1 --warmup-steps 20 --picture-images 1"),
    "gpu": dict(
        shapes="shapes:50000", ablation=("pretrain", "layers", "knn", "finetune"),
        pretrain="--model vit_t --patch-size 8 --decoder-embed-dim 192 --decoder-depth 4 "
                 "--decoder-num-heads 6 --img-size 112 --global-batch 512 --batch-size 512 --epochs 200 "
                 "--lr 1e-3",
        layers="--layers 0,2,4,6,8,11 --pool avg",
        knn="--knn 20 --pool avg",
        linear="--pool avg --cache 1 --epochs 90 --global-batch 1024 --batch-size 512",
        finetune="--global-batch 256 --batch-size 256 --epochs 50"),
}
DENSE = "segment", "detect"                                             # stages on embedded scenes alone
FORK = multiprocessing.get_context("fork")                              # nothing is imported again
MODULES = {"pretrain": train_pretrain, "layers": probe_layers, "knn": train_probe, "linear": train_probe,
           "finetune": train_finetune, "segment": train_segment, "detect": train_detect}


@dataclass(frozen=True)
class Config:
    # these change the result
    preset: str = opt("minutes", "sizes and lengths of everything", choices=list(PRESETS))
    data: str = opt("shapes", "shapes (embedded), or a folder or pack with classes, train/ and val/")
    seeds: str = opt("0,1,2", "comma-separated; more of them may be added later")
    methods: str = opt("all", f"all, or some of {','.join(METHODS)}")

    # these change only how it is reached
    study_dir: str = knob("", "the units' folders; not given: runs/study/<data>_<device>[_<preset>]")
    output_dir: str = knob("runs/study", "where study_<data>_<device>[_<preset>].json is written")
    figures: str = knob("", "where to draw the figures, as study_*.png, .svg and .json; not given: none")
    report: bool = knob(False, "run nothing: the tables and figures of what is finished")
    minutes: float = knob(0.0, "stop after so long, with everything saved; whole chains first, and no steps "
                               "are spent on an estimate; 0: stop when all is done", least=0)
    jobs: int = knob(2, "units at a time, each of one thread; 1 on a GPU", above=0, most=1024)
    workers: int = knob(0, "loader processes for each unit", least=0, most=1024)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


# What is read of a unit's metrics.json and of the results, as kinds of jsonfile.py.
ENVIRONMENT = {"device": str, "cpus": int, "torch": str}
MEASURED = {"val_images?": is_count, "acc1?": is_percent, "rows?": ROWS}
METRICS = MEASURED | {"environment": ENVIRONMENT}
RECORD = {"method": str, "seed": int, "stage": str, "flags": str, "seconds": (float, type(None)),
          "metrics": MEASURED, "loss?": [[float]], "fusion?": [[float]]}
RESULTS = {"preset": str, "data": str, "settings": {"shapes": str}, "environments": [ENVIRONMENT],
           "images": (str, type(None)), "parts": [{"units": int, "jobs": int, "seconds": float}],
           "records": [RECORD]}


class Unit(NamedTuple):
    """One stage of one method from one seed."""
    method: str
    seed: int
    stage: str


def preset_of(name, data):
    """The flags of a preset's stages on this data: only with the embedded images come masks and boxes."""
    preset = PRESETS[name]
    return {key: value for key, value in preset.items() if data == "shapes" or key not in DENSE}


def plan(preset, methods, seeds):
    """The units of a study, in the order in which they are run."""
    found = []
    for group in GROUPS:
        for seed in seeds:
            for stage in MODULES:
                found += [Unit(method, seed, stage) for method in group if method in methods
                          and stage in (preset["ablation"] if group is ABLATION else preset)
                          and stage in preset]
    return found


def in_chains(units):
    """The units of a plan, chain by chain: all stages of one method and seed, then those of the next."""
    chains = list(dict.fromkeys(chain_of(unit) for unit in units))
    return sorted(units, key=lambda unit: chains.index(chain_of(unit)))


def chain_of(unit):
    """The method and the seed of a unit: the units that share them are about one encoder."""
    return unit.method, unit.seed


def flags_of(preset, unit):
    """The flags of a unit that change its result, but for the data and the seed."""
    return preset[unit.stage] + f" {METHODS[unit.method]}" * (unit.stage == "pretrain")


def command_of(cfg, unit, folder):
    """The words that the unit's script would be given."""
    preset = preset_of(cfg.preset, cfg.data)
    data = preset["shapes"] if cfg.data == "shapes" else cfg.data
    words = [*flags_of(preset, unit).split(), "--data", data]
    if unit.stage == "pretrain":
        words += ["--picture-every", "1000000", "--picture-images", "4"]
    else:
        words += ["--checkpoint", str(folder_of(folder, unit._replace(stage="pretrain")))]
    if unit.stage != "layers":                                          # paths may be spelt otherwise now
        changes = "data" if unit.stage == "pretrain" else "data,checkpoint"
        words += ["--resume", "auto", "--allow-change", changes]
    return words + ["--seed", str(unit.seed), "--output-dir", str(folder_of(folder, unit)),
                    "--device", cfg.device, "--workers", str(cfg.workers), "--cache-dir", cfg.cache_dir]


def folder_of(folder, unit):
    """The run folder of a unit of the study in folder."""
    return folder / unit.method / f"seed{unit.seed}" / unit.stage


# ---------------------------------------------------------------- a unit, in a process of its own


def carry_out(unit, words, log):
    """Run a unit's stage in this process, which has done nothing yet; it ends with the stage's exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)                      # PR_SET_PDEATHSIG: it ends with us
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)                           # else the parent's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    module = MODULES[unit.stage]
    main = module.main
    if (unit.method, unit.stage) == ("random", "pretrain"):
        main = initialise
    elif unit.stage == "layers":                                        # pixels are the same for every method
        main = functools.partial(main, baselines=unit.method == "random")
    print(f"{module.__name__} {' '.join(words)}", flush=True)
    run(main, parse(module.Config, words))


def initialise(cfg):
    """Write the encoder that pre-training with this configuration would start from."""
    with start_world(cfg.device) as world:
        torch.manual_seed(cfg.seed)
        encoder = train_pretrain.build_model(cfg, "cpu").encoder
        export = {"model": encoder.state_dict(), "config": asdict(cfg)}
        folder = Path(cfg.output_dir)
        write_tensors(folder / "encoder.pt", export)
        write_json(folder / "metrics.json", dict(step=0, environment=describe_environment(world)))


# ---------------------------------------------------------------- the results file


def thinned(points, most=100):
    """At most so many of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def read_record(unit, flags, folder, seconds):
    """(what the results file keeps of a finished unit, its environment), or None where it is not finished.

    seconds is how long it took, or None of a unit that was cut: then its stage knows only the last part.
    """
    if not (folder / "metrics.json").exists():
        return None
    found = read_json(folder / "metrics.json", METRICS, f"remove {folder} to run the unit again")
    environment = found.pop("environment")
    for key in ("argv", "time"):
        environment.pop(key, None)
    for key in ("config", "margins", "seconds"):
        found.pop(key, None)
    if "rows" in found:                                                 # what the tables read, no more
        kept = [row for row in found["rows"] if row["kind"] in ("trained", "pixels", "chance")]
        found["val_images"] = max((row.get("val_images", 0) for row in kept), default=0)
        found["rows"] = [{key: row[key] for key in ("label", "kind", "layer", "acc1")} for row in kept]
    record = dict(unit._asdict(), flags=flags, seconds=seconds, metrics=found)
    lines = [line for line in read_log(folder / "log.jsonl") if not misfit(line, LINE | {"loss": float})]
    if lines:
        record["loss"] = thinned([[line["step"], round(line["loss"], 5)] for line in lines])
    if lines and all(len(line.get("fusion_weights", ())) > 1 for line in lines):
        record["fusion"] = thinned([[line["step"], *(round(weight, 5) for weight in line["fusion_weights"])]
                                    for line in lines])
    return record, environment


def read_results(path, name, images, cfg):
    """The results file of this study, or an empty one. UserError where it is of another study.

    images tells the data from other data of the same name; None: it is not asked for.
    """
    empty = dict(preset=cfg.preset, data=name, images=images, settings=preset_of(cfg.preset, name), parts=[],
                 environments=[], records=[])
    if not path.exists():
        return empty
    hint = "it is not the results of a study: move it away, or name another --output-dir"
    found = read_json(path, RESULTS, hint)
    kinds = [f"--preset {each['preset']} on "
             f"{each['settings']['shapes'] if each['data'] == 'shapes' else each['data']}"
             for each in (found, empty)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{path} holds {printable(kinds[0])}: expected {kinds[1]}; name another --output-dir")
    if images not in (None, found["images"]):
        raise UserError(f"{path} is of other images that are called {name} too; name another --output-dir")
    for record in found["records"]:
        check_flags(unit_of(record), record["flags"], path, cfg)
        check_record(record, path, hint)
    return found


def check_record(record, path, hint):
    """Raise UserError unless a record has what its stage measures, and rows as its flags make them."""
    needs = {"pretrain": {}, "layers": {"rows": ROWS, "val_images": is_count},
             "segment": {"mIoU": is_percent, "val_images": is_count},
             "detect": {"box_AP": is_percent, "mask_AP": is_percent, "val_images": is_count}}
    other = {"acc1": is_percent, "val_images": is_count}
    problem = misfit(record["metrics"], needs.get(record["stage"], other))
    levels = len(comparison.blocks_of(record)) if record["stage"] == "pretrain" else 0
    for key, width in ("loss", 2), ("fusion", 1 + levels):
        rows = record.get(key, [[0] * width])
        if not rows or any(len(row) != width for row in rows) or key in record and width == 1:
            problem = problem or f"a {key} that is no list of rows of {width} numbers"
    if problem:
        raise UserError(f"{path} holds of {record['method']}, seed {record['seed']}, {record['stage']} "
                        f"{problem}; {hint}")


def check_flags(unit, flags, path, cfg):
    """Raise UserError unless a unit found in path was run with the flags that this study would give it."""
    preset = preset_of(cfg.preset, cfg.data)
    if unit.method not in METHODS or unit.stage not in MODULES or unit.stage not in preset:
        raise UserError(f"{path} holds {printable(f'{unit.method}, {unit.stage}')}, which --preset "
                        f"{cfg.preset} lacks")
    if flags != flags_of(preset, unit):
        raise UserError(f"{path} holds {unit.method}, seed {unit.seed}, {unit.stage} with other settings "
                        f"({printable(flags[:200])}): expected {flags_of(preset, unit)}; name another folder")


def as_text(results):
    """The results as JSON, one record per line."""
    lines = ",\n  ".join(json.dumps(record) for record in results["records"])
    head = json.dumps({key: value for key, value in results.items() if key != "records"}, indent=1)
    return f'{head[:-2]},\n "records": [\n  {lines}\n ]\n}}\n'


def add_record(results, record, environment):
    """Put a unit's record into the results, in the place of an older one."""
    if environment not in results["environments"]:
        results["environments"].append(environment)
    record["environment"] = results["environments"].index(environment)
    key = unit_of(record)
    results["records"] = [old for old in results["records"] if unit_of(old) != key] + [record]


def unit_of(record):
    return Unit(record["method"], record["seed"], record["stage"])


# ---------------------------------------------------------------- the study


def main(cfg):
    """Run what is left of a study, then print its tables and draw --figures. Returns the results."""
    check_ranges(cfg)
    seeds, methods = parse_seeds(cfg.seeds), parse_methods(cfg.methods)
    name = name_of(cfg.data)
    device = device_kind(cfg.device)
    called = f"{name}_{device}" + f"_{cfg.preset}" * (cfg.preset != device)
    folder = Path(cfg.study_dir or f"runs/study/{called}")
    path = Path(cfg.output_dir) / f"study_{called}.json"
    images = None if cfg.report else images_of(cfg)
    results, units = read_results(path, name, images, cfg), plan(preset_of(cfg.preset, name), methods, seeds)
    if cfg.minutes:
        units = in_chains(units)
    if cfg.report and not results["records"]:
        raise UserError(f"{path} holds no finished unit yet: expected one, or no --report")
    if cfg.figures:
        check_matplotlib()
        make_folder("--figures", cfg.figures)
    if not cfg.report:
        make_folder("--output-dir", cfg.output_dir)
        kind = dict(preset=cfg.preset, data=name, device=device, images=images)
        with StopSignals() as signals, held(folder, kind):
            results = read_results(path, name, images, cfg)             # another process may just have ended
            run_units(cfg, units, folder, path, results, device, signals)
    if not results["records"]:
        return results
    print("\n" + comparison.report(results, units), flush=True)
    words = ["--preset", cfg.preset, "--data", cfg.data, "--device", "cpu" if device == "cpu" else "cuda"]
    words += ["--output-dir", cfg.output_dir] * (cfg.output_dir != Config.output_dir)
    command = f"python -m tools.study {shlex.join(words)} --report --figures {shlex.quote(cfg.figures)}"
    for figure, drawn in comparison.figures_of(results).items() if cfg.figures else ():
        save(drawn, f"{cfg.figures}/{path.stem}_{figure}", command)
        print(f"  {cfg.figures}/{path.stem}_{figure}.png", flush=True)
    return results


def name_of(data):
    """What a file calls the data: "shapes", or the last part of its path. UserError for a count of shapes."""
    if data == "shapes":
        return data
    kind, _, argument = data.partition(":")
    if kind == "shapes":
        raise UserError(f"--data {data}: expected shapes alone, since the preset says how many")
    name = Path(argument or data).resolve().name
    if name == "shapes":
        raise UserError(f"--data {data}: the name shapes is that of the embedded images; give its folder "
                        f"another")
    return name


def images_of(cfg):
    """What tells the study's images from others: a sum of their paths, or how many of the embedded ones.

    Raises UserError where they cannot be had, or are not fit to be classified.
    """
    if cfg.data == "shapes":
        return PRESETS[cfg.preset]["shapes"]
    splits = [open_data(cfg.data, split, cfg.cache_dir, print) for split in ("train", "val")]
    match_labels(cfg.data, *splits, print)
    return hashlib.sha256(b"".join(fingerprint(split).numpy().tobytes() for split in splits)).hexdigest()


def parse_seeds(text):
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 19 for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds {text}: expected different whole numbers, such as 0,1,2")
    return [int(part) for part in parts]


def parse_methods(text):
    if text == "all":
        return list(METHODS)
    unknown = [part for part in text.split(",") if part not in METHODS]
    if unknown:
        raise UserError(f"--methods {unknown[0]!r} is none of {', '.join(METHODS)}")
    return text.split(",")


def device_kind(device):
    """"cpu" or "gpu". A process of its own looks: else no other fork of this one could use the GPU."""
    if device != "auto":
        return "gpu" if device.startswith("cuda") else "cpu"
    with FORK.Pool(1) as pool:
        return "gpu" if pool.apply(torch.cuda.is_available) else "cpu"


@contextlib.contextmanager
def held(folder, kind, patience=30.0):
    """A context in which no other process works in the study's folder, not even a killed study's last units.

    Raises UserError where one does for so many seconds, or where the folder is of another kind of study.
    """
    import fcntl  # absent from Windows, which is refused where it is known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_regular(folder / "lock")
        lock = open(folder / "lock", "a")                               # units inherit it, and so hold it too
    except OSError as error:
        raise UserError(f"--study-dir {folder} cannot be written: {error.strerror}") from None
    with lock:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(f"another process works in {folder}: wait for it or end it") from None
                time.sleep(0.2)
        about = folder / "study.json"
        found = read_json(about, hint="name another --study-dir") if about.exists() else kind
        if found != kind:
            differ = ", ".join(f"{key} {printable(str(found.get(key))[:80])} and not {kind[key]}"
                               for key in kind if found.get(key) != kind[key])
            raise UserError(f"{folder} holds another study: its {differ}; name another --study-dir")
        write_json(about, kind)
        yield


def run_units(cfg, units, folder, path, results, device, signals):
    """Run the units that the results lack, some at a time, and write the results after each."""
    preset, began = preset_of(cfg.preset, cfg.data), time.monotonic()
    jobs = 1 if device == "gpu" else cfg.jobs
    commit = source_commit()                                            # of this process to its end
    part = dict(units=0, jobs=jobs, seconds=0)                          # this call's

    def keep():
        """Write the results as they are."""
        write_atomically(path, lambda file: file.write(as_text(results).encode()))

    def note(unit, seconds, **more):
        """Add a unit's record if it is finished; whether it is. more is known of its environment."""
        found = read_record(unit, flags_of(preset, unit), folder_of(folder, unit), seconds)
        if found:
            add_record(results, found[0], found[1] | more)
            keep()
        return found is not None

    left = what_is_left(cfg, units, folder, {unit_of(record) for record in results["records"]}, note)
    print(f"{len(units)} units, {len(left)} of them left: {len(set(map(chain_of, units)))} encoders, "
          f"pre-trained and measured; results: {path}", flush=True)
    if not left:
        return
    if device == "cpu":                                                 # on a GPU it might be looked at here
        torch.use_deterministic_algorithms(False)                       # loads what every fork would load
    costs = measure(cfg, left, results, folder, jobs)
    needed = seconds_of(left, costs)
    if needed is None:
        unknown = [stage for stage in preset if stage in {unit.stage for unit in left} - set(costs)]
        print(f"no estimate: no unit of this study has finished {', '.join(unknown)} yet", flush=True)
    else:
        print(f"about {duration(needed / jobs)} for them, {jobs} at a time", flush=True)

    running, begun, refused, printed = {}, set(), "", time.monotonic()
    results["parts"].append(part)
    signals.start()
    while left or running:
        elapsed = time.monotonic() - began
        busy = set(map(chain_of, running))                              # one stage of an encoder at a time
        unit = next((unit for unit in left if chain_of(unit) not in busy
                     and (chain_of(unit) in begun or not refused)), None)
        if signals.number or cfg.minutes and elapsed > 60 * cfg.minutes or refused and not (unit or running):
            stop(running)
            signals.release()
            part["seconds"] = round(time.monotonic() - began)
            keep()
            text = f"{part['units']} units finished in this part, {len(left) + len(running)} left"
            if signals.number:
                leave(f"stopped: signal {signals.number}: {text}; the same command goes on",
                      128 + signals.number)
            print(f"stopped after {refused or f'{cfg.minutes:g} minutes'}: {text}; the same command goes on",
                  flush=True)
            return
        if unit and len(running) < jobs:
            if cfg.minutes and begun and chain_of(unit) not in begun:   # the first one is begun in any case
                needed = seconds_of([each for each in left if chain_of(each) == chain_of(unit)], costs)
                if needed is not None and elapsed + needed > 60 * cfg.minutes:
                    refused = (f"{duration(elapsed)} of {cfg.minutes:g} minutes, as {unit.method}, seed "
                               f"{unit.seed}, would take about {duration(needed)}")
                    continue
            if unit.stage == "pretrain":                                # what was measured of an encoder that
                results["records"] = [record for record in results["records"]       # is gone goes with it
                                      if chain_of(unit_of(record)) != chain_of(unit)]
            begun.add(chain_of(unit))
            left.remove(unit)
            went_on = (folder_of(folder, unit) / "last.pt").exists()
            running[unit] = start(cfg, unit, folder), time.monotonic(), went_on
            continue
        multiprocessing.connection.wait([process.sentinel for process, _, _ in running.values()], timeout=0.2)
        if signals.number:                                              # Ctrl-C reaches the units as well
            continue
        for unit, (process, started, went_on) in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            del running[unit]
            seconds = time.monotonic() - started
            part |= dict(units=part["units"] + 1, seconds=round(time.monotonic() - began))
            if process.exitcode or not note(unit, None if went_on else seconds, commit=commit):
                stop(running)
                raise failure(unit, process.exitcode, folder)
            print(f"{unit.method}, seed {unit.seed}, {unit.stage}: {duration(seconds)}", flush=True)
            costs, printed = renewed(costs, results, left + list(running)), 0.0
        if time.monotonic() - printed > 30:
            printed, text = time.monotonic(), ""
            needed = seconds_of(left + list(running), costs)
            if needed is not None:
                gone = sum(min(printed - started, cost_of(unit, costs))
                           for unit, (_, started, _) in running.items())
                text = f", about {duration((needed - gone) / jobs)} left"
            print(f"{part['units']} of {part['units'] + len(left) + len(running)} units  "
                  f"{duration(printed - began)} gone{text}", flush=True)
    signals.release()


def what_is_left(cfg, units, folder, done, note):
    """The units to run. Those that had ended before a study was killed are noted; settings are compared."""
    for unit in units:
        about = folder_of(folder, unit) / "flags.txt"
        if about.exists():
            with opened(about, 2 ** 16) as file:
                check_flags(unit, file.read().decode(errors="replace"), about, cfg)
        if unit not in done and note(unit, None):
            done.add(unit)
    # An encoder that is not here is pre-trained again; on a GPU it is another one, so all of it is measured.
    lost = {chain_of(unit) for unit in units if unit not in done
            and not (folder_of(folder, unit._replace(stage="pretrain")) / "encoder.pt").exists()}
    return [unit for unit in units if unit not in done or chain_of(unit) in lost]


def start(cfg, unit, folder, *more):
    """A process that has begun with a unit."""
    place, words = folder_of(folder, unit), command_of(cfg, unit, folder)
    flags = flags_of(PRESETS[cfg.preset], unit).encode()
    place.mkdir(parents=True, exist_ok=True)
    check_regular(place / "output.txt")                                 # to which the process appends
    write_atomically(place / "flags.txt", lambda file: file.write(flags))
    process = FORK.Process(target=carry_out, args=(unit, [*words, *more], place / "output.txt"))
    process.start()
    return process


def failure(unit, code, folder):
    """What to raise where a unit ended with this code: UserError for 2, with its last error in one line."""
    output = folder_of(folder, unit) / "output.txt"
    said = output.read_text(errors="replace")
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    script = f"{MODULES[unit.stage].__name__} "
    begun = max((i for i, line in enumerate(lines) if line.startswith(script)), default=-1)
    lines = lines[begun + 1:] or ["it said nothing"]                    # what is before is of another attempt
    first = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
    said = "; ".join(lines[first:]).removeprefix("error: ")
    kind = UserError if code == 2 else Fault
    return kind(f"{unit.method}, seed {unit.seed}, {unit.stage} ended with code {code} ({output}): {said}")


def stop(running):
    """Ask the running units to save and end, and wait until they have."""
    processes = [process for process, _, _ in running.values()]
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.terminate()                                         # one just begun may still ignore it
        processes[0].join(0.5)
        processes = [process for process in processes if process.is_alive()]


def renewed(costs, results, units):
    """Seconds of each stage: the mean of this study's own units where there are any."""
    costs = dict(costs)
    for stage in {unit.stage for unit in units}:
        seconds = [record["seconds"] for record in results["records"]
                   if record["stage"] == stage and record["method"] != "random" and record["seconds"]]
        if seconds:
            costs[stage] = statistics.mean(seconds)
    return costs


def cost_of(unit, costs):
    """Seconds of a unit, of those of the stages, or None if unknown; the random encoder is only written."""
    return 0 if (unit.method, unit.stage) == ("random", "pretrain") else costs.get(unit.stage)


def seconds_of(units, costs):
    """Seconds of all these units together, or None if that of one is unknown."""
    found = [cost_of(unit, costs) for unit in units]
    return None if None in found else sum(found)


TRIAL_STEPS = 6


def measure(cfg, units, results, folder, jobs):
    """Seconds that a unit of each stage takes: of those that are finished, or from a few steps of each stage.

    With --minutes no steps are spent on that, and stages may be missing. The steps run as many at a time as
    the units will, once per study. A probe's time is that of its forward passes, a third of a step of
    fine-tuning each, and as much again for what follows them.
    """
    path, where = folder / "costs.json", f"{jobs} jobs on {os.cpu_count()} cores"
    kind = {f"{where}?": {f"{stage}?": float for stage in MODULES}}
    found = read_json(path, kind, "remove it") if path.exists() else {}
    costs = renewed(found.get(where, {}), results, units)
    if cfg.minutes or seconds_of(units, costs) is not None:
        return costs
    print(f"measuring {TRIAL_STEPS} steps of what trains an encoder", flush=True)
    preset = preset_of(cfg.preset, cfg.data)
    trial, rates, images = folder / "trial", {}, {}
    shutil.rmtree(trial, ignore_errors=True)
    for seed in range(jobs):
        start(cfg, Unit("random", seed, "pretrain"), trial).join()
    trained = ("MFF_12", "pretrain"), *(("random", stage) for stage in ("finetune", *DENSE))
    for method, stage in [(method, stage) for method, stage in trained if stage in preset]:
        began = time.monotonic()
        line, given = try_out(cfg, [Unit(method, seed, stage) for seed in range(jobs)], trial)
        before = time.monotonic() - began                               # of every unit, about
        num_samples = line["step"] * given["global_batch"] / line["epoch"]
        steps = given["steps"] or given["epochs"] * num_samples / given["global_batch"]
        rates[stage], images[stage] = line["img_per_s"], steps * given["global_batch"]
    for stage in {unit.stage for unit in units} - set(costs):
        if stage in rates:
            costs[stage] = before + images[stage] / rates[stage]
            continue
        given = parse(MODULES[stage].Config, preset[stage].split())
        seen = 2 * min(given.images, num_samples) if stage == "layers" else 1.2 * num_samples
        costs[stage] = before + 2 * seen / (3 * rates["finetune"])
    shutil.rmtree(trial)
    write_json(path, {where: costs})
    return costs


def try_out(cfg, units, folder):
    """Run these at once for TRIAL_STEPS: the last one's last line of log, and its configuration."""
    processes, lines = [start(cfg, unit, folder, "--log-every", str(TRIAL_STEPS // 2)) for unit in units], []
    place = folder_of(folder, units[-1])
    while processes[-1].is_alive() and not (lines and lines[-1]["step"] >= TRIAL_STEPS):
        processes[-1].join(0.1)
        lines = [line for line in read_log(place / "log.jsonl") if "img_per_s" in line]
    for process in processes:
        process.terminate()
        process.join()
    if not lines:
        raise failure(units[-1], processes[-1].exitcode, folder)
    return lines[-1], read_json(place / "config.json")


if __name__ == "__main__":
    run(main, parse(Config))
