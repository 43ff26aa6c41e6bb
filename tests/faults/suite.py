"""What the faults share: what a fault and a guard are, small stages, and children in which trials run.

A trial forks a child of a process that has imported all it needs, so one that kills a stage and starts it
again takes a second. Folders lie in shared memory where there is one: what fsync promises about a loss of
power is not tested here, but the order of the calls is.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

import train_finetune
import train_pretrain
import train_probe
from mff_min.config import parse
from mff_min.errors import STOP_SIGNALS
from mff_min.vit import MODELS
from mff_run.process import run

ROOT = Path(__file__).resolve().parent.parent.parent
FORK = multiprocessing.get_context("fork")
STAGES = {"pretrain": train_pretrain, "probe": train_probe, "finetune": train_finetune}
SMALL = {
    "pretrain": "--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 "
                "--decoder-num-heads 2 --picture-images 1 --picture-every 99",
    "probe": "",
    "finetune": "--rand-augment 0",
}
TINY = dict(patch_size=4, embed_dim=32, depth=2, num_heads=2)           # what vit_test is, in children
COMMON = ("--data shapes:60 --global-batch 8 --batch-size 8 --lr 1e-3 --log-every 1 --save-every 2 "
          "--device cpu")
SEED = int(os.environ.get("HOSTILE_SEED", time.strftime("%Y%m%d")))     # of cases that nobody knows before
TIMES = 1                                                               # --long: so many times as many cases


def many(few, usual, quick):
    """How many cases to draw: few for a control, more with --long."""
    return few if quick else TIMES * usual


@dataclass(frozen=True)
class Outcome:
    """What became of the trials of one fault. lost is the most steps any one trial had to repeat."""
    tried: int
    survived: int
    lost: int = 0
    figures: dict = field(default_factory=dict)                         # other numbers worth publishing
    problems: list = field(default_factory=list)                        # of those that did not, ten lines


@dataclass(frozen=True)
class Fault:
    """A kind of fault: promise is its number in docs/reliability.md; run(folder, quick) -> Outcome."""
    name: str
    promise: int
    run: Callable


@dataclass(frozen=True)
class Guard:
    """A protection that remove() takes away from this process; the fault of that name must then fail."""
    name: str
    fault: str
    remove: Callable


class Tally:
    """Counts trials: note(problem, lost) after each, with problem "" where all was well."""

    def __init__(self):
        self.tried, self.survived, self.lost, self.problems = 0, 0, 0, []

    def note(self, problem="", lost=0):
        self.tried += 1
        self.survived += not problem
        self.lost = max(self.lost, lost)
        if problem and len(self.problems) < 10:
            self.problems.append(problem)

    def outcome(self, **figures):
        return Outcome(self.tried, self.survived, self.lost, figures, self.problems)


# ---------------------------------------------------------------- children


def hear_signals():
    """Hear the signals that nohup, or a script that began this in the background, has ignored for us."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its code, which is -n after signal n, and what it said on both streams."""
    code: int
    said: str

    @property
    def last(self):
        """The last line it said."""
        return (self.said.strip().splitlines() or [""])[-1]


class Child:
    """work() in a forked process, whose words go to a file; end(limit) kills it after that many seconds."""

    def __init__(self, work):
        self.words = tempfile.TemporaryFile()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = FORK.Process(target=self.begin, args=(work,))
        self.process.start()

    def begin(self, work):
        os.dup2(self.words.fileno(), 1)
        os.dup2(self.words.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)      # pytest has others
        work()

    def end(self, limit=60.0):
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.words.seek(0)
        said = self.words.read().decode(errors="replace")
        self.words.close()
        return Ended(self.process.exitcode, said)


def fork(work, limit=60.0):
    """How work() ended in a child."""
    return Child(work).end(limit)


def share_out(trials, tally, processes=2):
    """Note in tally what trials come to, functions that give (problem or "", lost) once or often."""
    def work(share, pipe):
        for trial in share:
            for result in trial():
                pipe.send(result)
        pipe.send(None)
    running = []
    for first in range(processes):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=work, args=(trials[first::processes], theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    for process, pipe in running:
        try:
            while result := pipe.recv():
                tally.note(*result)
        except EOFError:
            tally.note("the process of some trials died before their end")
        process.join()


def shared_memory():
    """A new folder in shared memory, or where temporary files lie, as a context."""
    fast = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="mff_min_", dir=fast if os.access(fast, os.W_OK) else None)


# ---------------------------------------------------------------- stages


@functools.cache
def prepared():
    """A folder with the embedded images and a small encoder to train on; it is deleted with this process.

    Called before children are forked it also warms PyTorch up for them.
    """
    torch.set_num_threads(1)
    prepared.holder = shared_memory()
    folder = Path(prepared.holder.name)
    with contextlib.redirect_stdout(io.StringIO()), patch.dict(MODELS, vit_test=TINY):
        for name, module in STAGES.items():
            flags = flags_of(name, folder, folder / name, "--steps", 1)
            module.main(parse(module.Config, flags))
    return folder


def flags_of(stage, shared, folder, *more):
    """The flags of a small run of a stage in folder; shared is what prepared() gives."""
    flags = [*SMALL[stage].split(), *COMMON.split(), "--cache-dir", str(shared / "cache")]
    if stage != "pretrain":
        flags += ["--checkpoint", str(shared / "pretrain" / "encoder.pt")]
    return [*flags, "--output-dir", str(folder), *map(str, more)]


def stage(name, folder, *more):
    """work for fork: a stage as its command line runs it, into folder."""
    flags = flags_of(name, prepared(), folder, *more)

    def work():
        MODELS["vit_test"] = TINY
        run(STAGES[name].main, parse(STAGES[name].Config, flags))
    return work
