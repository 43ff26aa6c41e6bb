"""What a run has left, read again for figures: its flags, its log and its metrics.

A record is the same of a run whose folder is gone, in one small file: metrics.json with the log's lines. A
record of encoders is what examine.py found in those of several runs.
"""

import itertools
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mff_min.config import check_reachable
from mff_min.errors import UserError
from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS
from mff_run.files import write_json
from mff_run.jsonfile import is_number, is_path, misfit, read_json
from mff_run.log import each_line
from tools.examine import Features, Findings
from tools.measures import frequencies


def is_percent(value):
    """a number from 0 to 100"""
    return type(value) in (int, float) and 0 <= value <= 100


def is_line(value):
    """a text that fits into a line"""
    return isinstance(value, str) and value.isprintable() and len(value) < 200


def is_count(value):
    """a whole number above 0"""
    return type(value) is int and value > 0


def is_trained(value):
    """trained or random"""
    return value in ("trained", "random")


def is_constant(value):
    """pixels or chance"""
    return value in ("pixels", "chance")


def is_layer(value):
    """fused, or block and its number"""
    return value == "fused" or isinstance(value, str) and bool(re.fullmatch(r"block [0-9]{1,4}", value))


# What is read of a run, as kinds of jsonfile.py; a line of the log that is no LINE is somebody else's.
CONFIG = {"model?": (type(None), is_line), "data?": is_path, "global_batch?": int, "out_indices?": is_line}
LINE = {"step": int, "lr": float, "fusion_weights?": [float]}
ACCURACY = {"label": str, "acc1": is_percent}
ROWS = [(ACCURACY | {"kind": is_constant, "layer": is_constant},
         ACCURACY | {"kind": is_trained, "layer": is_layer})]
ENCODERS = {"data": str, "images": int, "batch_size": int,
            "encoders": [{"name": str, "model": str, "grid": [int], "patch_size": int, "amplitudes": dict,
                          "distances": [[float]]}],
            "cka": [{"across": str, "up": str, "values": [[float]]}]}
LARGEST = 128                                                           # patches along a side of an image


@dataclass(frozen=True)
class Run:
    """What is read of a run before anything is drawn."""
    name: str
    path: Path                                                          # of its folder, or of its record
    config: dict
    log: list                                                           # a dict each logged training step
    metrics: dict                                                       # empty where it has not ended
    findings: Findings | None = None                                    # alone in a record of encoders
    evaluations: list = field(default_factory=list)                     # the log's lines of val_images
    logged: int = 0                                                     # lines of training; log has some

    def seen(self, line):
        """Images seen up to a line of the log."""
        return line["step"] * self.config["global_batch"]

    def curve(self, key):
        """(images seen, value) of the log's lines that hold numbers by this name."""
        return [(self.seen(line), line[key]) for line in self.log if type(line.get(key)) in (int, float)]

    def fusion_weights(self):
        """(depth of the model, fused blocks, [(images seen, their weights)]). Raises UserError."""
        model = self.config["model"]
        if model not in MODELS:
            raise UserError(f"{self.path} is of a model {model}: expected one of {', '.join(MODELS)}")
        depth = MODELS[model]["depth"]
        try:
            blocks = parse_out_indices(self.config.get("out_indices", "spread"), depth)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None
        found = [(self.seen(line), line["fusion_weights"]) for line in self.log if "fusion_weights" in line]
        if any(len(weights) != len(blocks) for _, weights in found):
            raise UserError(f"{self.path}: its log has other levels than the {len(blocks)} of its "
                            f"--out-indices")
        return depth, blocks, found

    def has_encoder(self):
        """Whether the folder holds what train_pretrain.py trained."""
        files = (self.path / name for name in ("last.pt", "encoder.pt"))
        return "mask_ratio" in self.config and any(path.is_file() for path in files)


def open_run(path, name, say, most=None):
    """The Run in a folder, or in a record of one. Raises UserError where there is none.

    say(text) is told of lines of the log that cannot be read. With most, about so many lines are kept of a
    longer log: those of `thinned`.
    """
    path = Path(path)
    check_reachable("run", path)
    told = path
    if path.exists() and not path.is_dir():
        metrics = read_json(path)
        if "encoders" in metrics:
            return Run(name, path, {}, [], {}, findings_in(metrics, path))
        log, config = metrics.get("log", []), metrics.get("config")
    elif (path / "config.json").exists():
        metrics, told = {}, path / "config.json"
        if (path / "metrics.json").exists():
            metrics = read_json(path / "metrics.json", hint="move it away, and curves are drawn without it")
        log, config = each_line(path / "log.jsonl", say), read_json(told)
    else:
        raise UserError(f"{path} is no folder of a run: it holds no config.json")
    if told == path and not (isinstance(log, list) and all(isinstance(line, dict) for line in log)):
        raise UserError(f"{path} is of no run: its log is no list of objects")
    if not isinstance(config, dict):
        raise UserError(f"{path} is of no run: its config is no object")
    if problem := misfit(config, CONFIG):
        raise UserError(f"{told} holds {problem}, as a run writes it")
    rows = [tuple(kind | {"acc1_error": float, "val_images?": is_count} for kind in ROWS[0])]
    if problem := "margins" in metrics and misfit(metrics, {"rows": rows}):
        raise UserError(f"{path} holds {problem}, as tools.probe_layers writes it")
    evaluations = []

    def training():
        last = {}
        for line in log:
            if not misfit(line, LINE):
                yield (last := line)
            elif "val_images" in line and is_number(line.get("step")):
                if "done" not in line:
                    evaluations.append(line)
                elif evaluations:                                       # alone, it is no curve
                    epoch = last.get("epoch") if last.get("step") == line["step"] else None
                    evaluations.append({"epoch": epoch} | line)         # it does not say its own
    kept, logged = thinned(training(), most or math.inf)
    return Run(name, path, config, kept, metrics, None, evaluations, logged)


def thinned(lines, most):
    """(lines, how many there were): all of them, or of more than `most` those that a curve needs.

    Of equal stretches these are the lines that `extremes` names. The memory is that of what is kept.
    """
    kept, stretch, size, total, count, line = [], [], 1, 0, 0, None
    for line in lines:
        count += 1
        stretch.append(line)
        if len(stretch) == size:
            kept.append(extremes(stretch))
            total, stretch = total + len(kept[-1]), []
        while total > most:
            kept = [extremes(sum(kept[i:i + 2], [])) for i in range(0, len(kept), 2)]
            total, size = sum(map(len, kept)), 2 * size
    found = list(itertools.chain(*kept, extremes(stretch)))
    return found + [line] * (count > 0 and found[-1] is not line), count


def extremes(lines):
    """The first line, those of the least and the largest loss and gradient norm, and the first without."""
    chosen = {0}
    for key in ("loss", "grad_norm"):
        finite = [(line[key], i) for i, line in enumerate(lines) if is_number(line.get(key))]
        others = (i for i, line in enumerate(lines) if not is_number(line.get(key, 0)))
        chosen |= {min(finite, default=(0, 0))[1], max(finite, default=(0, 0))[1], next(others, 0)}
    return [lines[i] for i in sorted(chosen)] if len(lines) > 2 else lines


def findings_in(record, path):
    """The Findings that a record of encoders holds. Raises UserError where they are not whole."""
    try:
        if problem := misfit(record, ENCODERS):
            raise ValueError(problem)
        encoders = [Features(**each) for each in record["encoders"]]
        depths = {each.name: len(each.distances) for each in encoders}
        if len(depths) < max(len(encoders), 1) or min(depths.values()) < 2:
            raise ValueError("expected encoders of two blocks or more, under names that differ")
        for each in encoders:
            check_numbers([each.patch_size, *each.grid], (3,))
            if not 0 < min(each.grid) <= max(each.grid) <= LARGEST or not each.distances[0]:
                raise ValueError(f"a grid of {each.grid}, {len(each.distances[0])} heads")
            check_numbers(each.distances, (depths[each.name], len(each.distances[0])))
            blocks = [f"block {i}" for i in range(depths[each.name])]
            for tap in {"normed", *blocks, *each.amplitudes}:
                check_numbers(each.amplitudes[tap], (len(frequencies(each.grid)),))
        for pair in record["cka"]:
            check_numbers(pair["values"], (depths[pair["up"]], depths[pair["across"]]))
        return Findings(record["data"], record["images"], record["batch_size"], encoders, record["cka"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{path} is no whole record of encoders") from None


def check_numbers(values, shape):
    """Raise ValueError unless nested lists hold finite numbers, as many as shape says."""
    found = np.array(values)                                            # of texts it would be another kind
    if found.shape != shape or found.dtype.kind not in "if" or not np.isfinite(found).all():
        raise ValueError(f"numbers of shape {found.shape}: expected finite ones of {shape}")


def record_of_run(run):
    """What is kept of a run, as plain values."""
    return run.metrics | dict(config=run.config, log=run.log)


def record_of_encoders(findings, environment):
    """What is kept of encoders, as plain values: of their environment all but argv, which has paths in it."""
    return asdict(findings) | dict(environment={name: value for name, value in environment.items()
                                                if name != "argv"})


def write_record(path, record):
    """Write a record. Raises UserError where it cannot."""
    try:
        write_json(path, record)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None

