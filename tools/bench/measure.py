"""How contenders are compared: in rounds, side by side, in a budget of time; and how that is written down.

Machines are noisy and their noise is slow, so contenders take turns, and a ratio is the median of the ratios
of times that were taken in the same round. What could not be measured is a row too, with the reason.
"""

import importlib.util
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from mff_run.files import make_folder, write_json
from mff_run.progress import Progress
from mff_run.world import describe_environment, this_command

PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightly", "triton", "numpy", "pillow")
LEAST_SECONDS = 0.3                                                     # of a sample: short work is repeated


class NotRun(Exception):
    """Something cannot be measured here; the text says why."""


# A contender that fails is a row that says so: no memory left, a compiler's errors and CUDA's.
FAILURES = NotRun, RuntimeError


class Budget:
    """The time that a part of a benchmark may take."""

    def __init__(self, seconds):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    @property
    def left(self):
        """Seconds until it is over, negative after that."""
        return self.end - time.monotonic()

    def share(self, parts):
        """The Budget of one of so many parts that are still to come."""
        return Budget(max(self.left, 0.0) / parts)

    def check(self):
        """Raise NotRun if it is over."""
        if self.left <= 0:
            raise NotRun(f"its {self.seconds:.0f} seconds were over")


def need(package):
    """Raise NotRun where a peer's package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise NotRun(f"{package} is not installed")


def reason_of(problem):
    """Why something was not run, in one line."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return str(problem).strip().split("\n")[0] or type(problem).__name__


# ---- time

def stopwatch(work, device):
    """A function of repeats that does the work so often and returns the seconds that it took each time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        return (time.perf_counter() - start) / repeats
    return sample


def in_rounds(samples, rounds, budget, world, text="", compiled=()):
    """({key: seconds}, a list of one number a round, {key: reason} of those left out) of samples by key.

    A sample is a stopwatch. Each round takes all of them once, each round from another one on. A first round
    warms up and is not counted; it tells which still fit into the budget, in their order. What fits is
    measured once at least; the rounds get a tenth of the budget, even where the warming up took it all. The
    first time of a key of compiled is mostly a compiler's, and says nothing of the next.
    """
    repeats, costs, left_out, compiling = {}, {}, {}, 0.0
    for key, sample in samples.items():
        try:
            budget.check()
            if key in compiled and budget.left < compiling:
                raise NotRun(f"compiling takes about {compiling:.0f} s, and {budget.left:.0f} s were left")
            costs[key] = first = sample(1)
            if first < 2 or key in compiled:                            # else a first time's extra is small
                costs[key] = sample(1)
        except FAILURES as problem:
            costs.pop(key, None)
            left_out[key] = reason_of(problem)
            continue
        if key in compiled:
            compiling = max(compiling, first)
        repeats[key] = max(1, math.ceil(LEAST_SECONDS / costs[key]))
        costs[key] *= repeats[key]

    if budget.left < budget.seconds / 10:
        budget = Budget(budget.seconds / 10)
    left = budget.left
    for key, cost in list(costs.items()):
        if cost <= left:
            left -= cost
            continue
        del costs[key]
        left_out[key] = f"it takes {cost:.1f} s a round, which its {budget.seconds:.0f} seconds had not left"
    seconds = {key: [] for key in costs}
    progress = Progress(rounds * len(costs), 0, world, every=10.0, text=text)
    for i in range(rounds if costs else 0):
        began, order = time.monotonic(), list(costs)
        for done, key in enumerate(order[i % len(order):] + order[:i % len(order)]):
            try:
                seconds[key].append(samples[key](repeats[key]))
            except FAILURES as problem:
                del costs[key], seconds[key]
                left_out[key] = f"in round {i + 1}: {reason_of(problem)}"
            progress.tick(i * len(order) + done + 1)
        if not costs or budget.left < time.monotonic() - began:
            break
    return seconds, left_out


def spread(values):
    """{"median", "quartiles"} of a list of floats."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]]}


def ratio(above, below):
    """spread of the ratios of two lists, pair by pair."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def timed_row(seconds, images, baseline=None, ours=None):
    """What the seconds of a contender's samples say, of which each saw so many images, if any.

    speed_over_baseline above 1 is faster than the baseline; time_over_ours above 1 is slower than ours.
    """
    row = {"seconds": seconds, **spread(seconds)}
    if images:
        row["img_per_s"] = images / row["median"]
    if baseline:
        row["speed_over_baseline"] = ratio(baseline, seconds)
    if ours:
        row["time_over_ours"] = ratio(seconds, ours)
    return row


# ---- what is written down

def result_path(output_dir, subject, device):
    """<subject>_<device>.json in a folder; a GPU's name may have spaces and slashes."""
    return Path(output_dir) / f"{subject}_{re.sub('[^A-Za-z0-9.-]+', '_', device)}.json"


def versions():
    """The version of every package that matters, None of those that are not installed."""
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {name: found.get(name) for name in PACKAGES}


class Record:
    """results/<subject>_<device>.json, written anew after each group: a run that is cut short keeps those."""

    def __init__(self, subject, output_dir, world, **more):
        device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
        self.path = result_path(output_dir, subject, device)
        self.began = time.monotonic()
        command = f"python {this_command()} {shlex.join(sys.argv[1:])}"
        environment = describe_environment(world)
        del environment["argv"]                                         # may name a path of this machine
        self.content = {"subject": subject, "device": device, "command": command,
                        "environment": environment, "packages": versions(), **more,
                        "groups": []}
        make_folder("--output-dir", output_dir)

    def add(self, group):
        """Keep a group of rows, and write all that there is."""
        self.content["groups"].append(group)
        self.content["not_run"] = [line for group in self.content["groups"] for line in not_run(group)]
        self.content["seconds"] = time.monotonic() - self.began
        write_json(self.path, self.content)


def not_run(group):
    """A line for each thing that was to be measured and was not, with the reason."""
    for row in group["rows"]:
        for key, what in (("not_run", ""), ("peak_not_run", " peak memory:")):
            if key in row:
                yield f"{group['name']}: {words(row)}:{what} {row[key]}"


def words(row):
    """What a row is about, in words."""
    return " ".join(row[key] for key in ("name", "dtype", "mode") if key in row)


def show_group(group):
    """The lines of a group for the terminal."""
    yield f"\n{group['name']}"
    for row in group["rows"]:
        yield f"  {words(row):58} {shown(row)}"


def shown(row):
    """What was found of a row, in one line of text."""
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    text = f"{row['img_per_s']:9.2f} img/s" if row.get("img_per_s") else f"{row['median']:9.3f} s"
    if "speed_over_baseline" in row:
        text += f"  {interval(row['speed_over_baseline'])} x"
    if "mfu" in row:
        text += f"  {100 * row['mfu']:3.0f} % MFU"
    if "mfu_datasheet" in row:
        text += f" ({100 * row['mfu_datasheet']:.0f} % of the data-sheet rate)"
    if row.get("peak_bytes"):
        text += f"  {row['peak_bytes'] / 2 ** 20:6.0f} MiB"
    if "peak_not_run" in row:
        text += f"  memory not run: {row['peak_not_run']}"
    if "data_wait" in row:
        text += f"  {100 * row['data_wait']:.1f} % waiting for data"
    return text


def interval(found):
    """A spread as text: the median and both quartiles."""
    low, high = found["quartiles"]
    return f"{found['median']:.2f} [{low:.2f}, {high:.2f}]"
