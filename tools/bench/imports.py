"""How long a fresh process takes to import what a stage needs: ours, and the peers'."""

import functools
import subprocess
import sys
from pathlib import Path

from mff_run.world import start_world
from tools.bench.measure import Budget, NotRun, Record, in_rounds, need, show_group, stopwatch, timed_row

ROOT = Path(__file__).resolve().parents[2]
STATEMENTS = {                                                          # name: (package, statement)
    "torch alone": ("torch", "import torch"),
    "mff_min": ("torch", "import train_pretrain"),
    "timm": ("timm", "import timm"),
    "Transformers ViTMAE": ("transformers", "from transformers import ViTMAEForPreTraining"),
    "lightly MAE": ("lightly", "from lightly.models.modules import MaskedVisionTransformerTIMM"),
}


def in_fresh_process(statement):
    """Run one statement of Python; NotRun says why it failed."""
    command = [sys.executable, "-W", "ignore", "-c", statement]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise NotRun(said[-1] if said else f"its process ended with code {done.returncode}")


def bench_imports(args):
    """Seconds of each import, the interpreter's start among them, into imports_<device>.json."""
    with start_world(args.device) as world:
        samples, problems = {}, {}
        for name, (package, statement) in STATEMENTS.items():
            try:
                need(package)
                samples[name] = stopwatch(functools.partial(in_fresh_process, statement), world.device)
            except NotRun as problem:
                problems[name] = str(problem)
        record = Record("imports", args.output_dir, world, rounds=args.rounds, minutes=args.minutes)
        seconds, left_out = in_rounds(samples, args.rounds, Budget(60 * args.minutes), world, "imports")
        rows = []
        for name, (_, statement) in STATEMENTS.items():
            found = (timed_row(seconds[name], None, seconds.get("timm")) if name in seconds else
                     {"not_run": problems.get(name) or left_out[name]})
            rows.append({"name": name, "statement": statement, **found})
        group = {"name": "import in a fresh process", "baseline": "timm", "rows": rows}
        record.add(group)
        world.say("\n".join(show_group(group)) + f"\n\nwrote {record.path}")
