"""All subjects, one after the other, each in processes of its own and in a share of the time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mff_run.world import start_world
from tools.bench.measure import Budget, NotRun, Record

ROOT = Path(__file__).resolve().parents[2]
LEAST_MINUTES = {"bytes": 1.0}                                          # below that it does not end
GRACE = 60                                                              # seconds: imports, a last compilation

# Shares of the time that is left when their turn comes. On a GPU the step is first, and compiling takes most
# of its time; the bytes need no GPU.
SHARES = {"cpu": {"imports": 0.08, "data": 0.12, "attention": 0.1, "segment": 0.15, "detect": 0.2,
                  "step": 0.6, "ops": 0.6, "bytes": 1.0},
          "cuda": {"step": 0.75, "attention": 0.4, "segment": 0.3, "detect": 0.3, "data": 0.4, "ops": 0.6,
                   "imports": 1.0, "bytes": 1.0}}


def flags_of(subject, args, minutes, on_gpu):
    """The command line of one subject."""
    flags = ["--output-dir", os.path.relpath(args.output_dir, ROOT)]
    if subject != "bytes":
        flags += ["--minutes", f"{minutes:.2f}", "--device", args.device]
    if subject in ("imports", "data", "step", "segment", "detect"):
        flags += ["--rounds", str(args.rounds)]
    if subject == "data":
        flags += ["--images", "32"]
    if subject == "step":
        flags += ["--cases", "vit_b", "--dtypes", "bfloat16"] if on_gpu else ["--batch", "4"]
    return flags


def run_part(subject, flags, seconds):
    """Run one subject; NotRun says why it did not end well."""
    if seconds < 60 * LEAST_MINUTES.get(subject, 0):
        raise NotRun(f"{max(seconds, 0):.0f} seconds were left, too few for it")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))     # by way of finally
    command = [sys.executable, "-m", "tools.bench", subject, *flags]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NotRun(f"it was stopped after {seconds:.0f} seconds; what it had written stands") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)                        # its loaders and compilers, too
            child.wait()
        signal.signal(signal.SIGTERM, before)
    if code:
        raise NotRun(f"it ended with code {code}")


def bench_all(args):
    """Every subject, and into all_<device>.json which of them ran."""
    with start_world(args.device) as world:
        on_gpu, budget = world.device.type == "cuda", Budget(60 * args.minutes)
        record, rows = Record("all", args.output_dir, world, minutes=args.minutes), []
        for subject, share in SHARES[world.device.type].items():
            minutes, began = max(budget.left, 0) * share / 60, time.monotonic()
            world.say(f"\n==== {subject}: {minutes:.1f} of {budget.left / 60:.1f} minutes")
            row = {"name": subject, "flags": flags_of(subject, args, minutes, on_gpu)}
            try:
                budget.check()
                run_part(subject, row["flags"], min(60 * minutes + GRACE, budget.left))
            except NotRun as problem:
                row["not_run"] = str(problem)
                world.say(f"not run: {problem}")
            rows.append(row | {"seconds": time.monotonic() - began})
        record.add({"name": "all", "rows": rows})
        ran = [row["name"] for row in rows if "not_run" not in row]
        world.say(f"\nran in {budget.seconds - budget.left:.0f} s: {', '.join(ran)}; "
                  f"not run: {', '.join(record.content['not_run']) or 'nothing'}\nwrote {record.path}")
