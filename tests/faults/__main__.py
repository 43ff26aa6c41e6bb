"""Cause the faults that docs/reliability.md lists, and count what survives.

    python tests/faults                                                 # some five minutes on two cores
    python tests/faults --quick --only "kill -9"                        # fewer trials, of some faults
    python tests/faults --long --only hostile                           # ten times as many, of some faults
    python tests/faults --without save-to-the-final-name                # one guard removed: this must fail
    python tests/faults --controls                                      # every guard, each on its fault

Exit code 0: every trial survived, or with --controls every removed guard was noticed; 1: not so.
"""

import os
import sys

if __name__ == "__main__":
    # In place of this folder: its numbers.py would be taken for the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(1, os.path.dirname(sys.path[0]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dataclasses
import importlib
import platform
import time
import traceback
from pathlib import Path

import torch
from faults import suite
from faults.suite import FORK, Outcome, hear_signals, prepared, shared_memory

from mff_min.config import opt, parse
from mff_min.errors import UserError
from mff_run.files import write_json
from mff_run.progress import duration


@dataclasses.dataclass(frozen=True)
class Config:
    only: str = opt("", "the faults whose names contain this")
    quick: bool = opt(False, "fewer trials of each")
    long: bool = opt(False, "ten times as many of the cases that are drawn, and of the points of a save")
    without: str = opt("", "a guard that is removed first: the suite must then fail")
    controls: bool = opt(False, "remove every guard in turn, each for the fault that must notice")
    output_dir: str = opt("", "where to write faults_cpu.json, or with --controls controls_cpu.json")


def collect():
    """(faults in the order of their promises, guards) of all modules in this folder."""
    faults, guards = [], []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__main__", "suite"):
            module = importlib.import_module(f"faults.{path.stem}")
            faults += getattr(module, "FAULTS", [])
            guards += getattr(module, "GUARDS", [])
    return sorted(faults, key=lambda fault: fault.promise), guards


def cause(fault, quick, remove=None):
    """The Outcome of a fault in a process of its own, without a guard; or the text of what ended it."""
    ours, theirs = FORK.Pipe(duplex=False)

    def work(folder):
        try:
            if remove:
                remove()
            theirs.send(fault.run(Path(folder), quick))
        except BaseException:                                           # whatever it was: told, not hidden
            theirs.send(traceback.format_exc())
    with shared_memory() as folder:
        process = FORK.Process(target=work, args=(folder,))
        process.start()
        theirs.close()
        try:
            outcome = ours.recv()
        except EOFError:
            outcome = "the process that was to cause it died"
        process.join()
    if isinstance(outcome, str):
        return outcome
    problems = [text.replace(str(folder), "FOLDER") for text in outcome.problems]       # it is gone by now
    return dataclasses.replace(outcome, problems=problems)


def run_faults(faults, quick, remove=None, record=lambda rows: None):
    """A dict for each fault: what became of it. record(rows) is called after each."""
    rows, began = [], time.monotonic()
    for fault in faults:
        started = time.monotonic()
        outcome = cause(fault, quick, remove)
        if isinstance(outcome, str):
            outcome = Outcome(1, 0, problems=[outcome])
        seconds = time.monotonic() - started
        rows.append(dict(name=fault.name, promise=fault.promise, seconds=seconds,
                         **dataclasses.asdict(outcome)))
        record(rows)
        print(f"{fault.name:<56} tried {outcome.tried:>5}  survived {outcome.survived:>5}  "
              f"lost {outcome.lost:>2}  {seconds:5.1f} s  {left(began, len(rows), len(faults))}",
              *(f"\n    {problem}" for problem in outcome.problems), flush=True)
    return rows


def run_controls(faults, guards, record=lambda rows: None):
    """A dict for each guard: whether its fault failed without it, which it must not do by itself."""
    faults, sound, rows, began = {fault.name: fault for fault in faults}, {}, [], time.monotonic()
    for guard in guards:
        started = time.monotonic()
        if guard.fault not in sound:
            outcome = cause(faults[guard.fault], True)
            sound[guard.fault] = not isinstance(outcome, str) and outcome.survived == outcome.tried
        outcome = cause(faults[guard.fault], True, guard.remove)
        if isinstance(outcome, str):                                    # it broke, which shows nothing
            caught, found = False, outcome
        else:
            caught = sound[guard.fault] and outcome.survived < outcome.tried
            found = f"{outcome.survived} of {outcome.tried} survived"
            found += "".join(f": {problem.splitlines()[0]}" for problem in outcome.problems[:1])
        if not sound[guard.fault]:
            found = "the fault fails with every guard in its place"
        seconds = time.monotonic() - started
        rows.append(dict(name=guard.name, fault=guard.fault, caught=caught, found=found, seconds=seconds))
        record(rows)
        print(f"without {guard.name:<36} {'caught' if caught else 'NOT CAUGHT'} by {guard.fault}  "
              f"{seconds:5.1f} s  {left(began, len(rows), len(guards))}\n    {found}", flush=True)
    return rows


def left(began, done, count):
    """How far a list of work is, as text."""
    gone = time.monotonic() - began
    return f"[{done}/{count}, {duration(gone)} gone, {duration(gone / done * (count - done))} left]"


def main(cfg):
    """Whether all is as it should be."""
    faults, guards = collect()
    chosen = [fault for fault in faults if cfg.only in fault.name]
    remove = {guard.name: guard.remove for guard in guards}
    if not chosen:
        names = ", ".join(fault.name for fault in faults)
        raise UserError(f"--only {cfg.only}: expected a part of one of: {names}")
    if cfg.without and cfg.without not in remove:
        raise UserError(f"--without {cfg.without}: expected one of {', '.join(remove)}")

    began, name = time.monotonic(), "controls" if cfg.controls else "faults"
    environment = dict(python=platform.python_version(), torch=torch.__version__, cpus=os.cpu_count(),
                       platform=platform.platform())

    def record(rows):
        """Write what was found so far: a suite that is stopped has not run in vain."""
        if cfg.output_dir:
            Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
            write_json(Path(cfg.output_dir) / f"{name}_cpu.json",
                       {"quick": cfg.quick, "seconds": time.monotonic() - began, "environment": environment,
                        name: rows})

    suite.TIMES = 10 if cfg.long else 1
    prepared()                                                          # once, for all that is forked
    if cfg.controls:
        guards = [guard for guard in guards if cfg.only in guard.fault]
        if not guards:
            raise UserError(f"--only {cfg.only}: no guard is removed for such a fault")
        rows = run_controls(faults, guards, record)
        good, count = sum(row["caught"] for row in rows), len(rows)
        text = f"caught {good} of {count}"
    else:
        rows = run_faults(chosen, cfg.quick, remove.get(cfg.without), record)
        good, count = (sum(row[key] for row in rows) for key in ("survived", "tried"))
        text = f"survived {good} of {count} trials of {len(rows)} faults"
    print(f"{text} in {duration(time.monotonic() - began)}", flush=True)
    return good == count


if __name__ == "__main__":
    hear_signals()
    try:
        raise SystemExit(not main(parse(Config)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
