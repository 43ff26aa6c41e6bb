"""Promise 5: an error that nobody has foreseen ends a run and its loader workers. 12: shared memory runs out.

Workers ignore the SIGTERM that Python's exit sends them, and it then waits for them: what forgets to end them
prints its traceback and hangs.
"""

import os
import shutil
from types import SimpleNamespace

import torch
from faults.ranks import at_micro_batch, ended, two_ranks
from faults.signals import gone, started_by
from faults.suite import STAGES, Fault, Guard, Tally, fork, share_out, stage

import train_pretrain
from mff_data import views
from mff_min import mim, stream

STEPS = ("--steps", 12, "--picture-every", 4)                           # more batches than workers prefetch
LIMIT = 20.0                                                            # s: a run that takes longer hangs


class Unforeseen(Exception):
    """An error of a class that no code knows, and that cannot be made of one text."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


# Where: (the rank that fails, the function that does, the error).
PLACES = {
    "the forward pass": (1, (mim.MaskedAutoencoder, "forward"), RuntimeError("CUDA error: planted")),
    "the loader's main thread": (1, (stream.Stream, "sample"), AssertionError("planted")),
    "a picture": (0, (train_pretrain, "draw_reconstructions"), SystemExit("planted")),
    "an evaluation": (0, (train_pretrain, "evaluate"), Unforeseen("planted", "no reason")),
    "a loader process": (1, (views.Views, "item"), KeyError("planted")),
    "a loader process, unsent": (1, (views.Views, "item"), type("Nowhere", (Exception,), {})("planted")),
}


def plant(place, folder, rank, alone):
    """In this process, that place fails after the first micro-batch. It writes its workers down."""
    failing, (owner, name), error = PLACES[place]
    call = getattr(owner, name)

    def fail(*arguments, **options):
        if "process" not in place or torch.utils.data.get_worker_info() and arguments[2] % 7 == 6:
            raise error
        return call(*arguments, **options)

    def note():
        (folder / f"workers{rank}").write_text(" ".join(map(str, started_by(os.getpid()))))
        hurt()

    def hurt():
        if alone or rank == failing:
            setattr(owner, name, fail)
    at_micro_batch(1, note)
    if "process" in place:                                              # workers must be forked with it
        hurt()


def raise_with_workers(folder, quick):
    """An error in each place, with 1 and 2 workers, alone and on one of two ranks: all ends, with a code."""
    def trial(place, workers, ranks):
        run = folder / f"{place.replace(' ', '-')}-{workers}-{ranks}"
        run.mkdir()
        flags = [*STEPS, "--workers", workers]
        if ranks == 1:
            work = stage("pretrain", run / "run", *flags)
            found = [fork(lambda: plant(place, run, 0, True) or work(), LIMIT)]
        else:
            with two_ranks("pretrain", run / "run", *flags, "--timeout", 60,
                           act=lambda rank: plant(place, run, rank, False)) as children:
                found, _ = ended(children, LIMIT)
        codes, said = [one.code for one in found], "".join(one.said for one in found)
        pids = [int(pid) for path in run.glob("workers*") for pid in path.read_text().split()]
        failing = PLACES[place][0] if ranks == 2 else 0                 # the other may have ended before it
        problems = [f"codes {codes}"] * (codes[failing] not in (1, 3) or -9 in codes)   # -9: it hung
        problems += [f"{said.count('planted')} times told"] * ("planted" not in said)
        problems += ["workers live on"] * (gone(pids, 6) is None)
        problems += [f"{len(pids)} workers were seen"] * (len(pids) > 2 * workers * ranks)
        yield f"{place}, {workers} workers, {ranks} ranks: {', '.join(problems)}" if problems else "", 0
    kinds = [(place, workers, ranks) for place in PLACES for workers in (1, 2) for ranks in (1, 2)]
    kinds = [kinds[i] for i in (0, 7, 9, 14, 20)] if quick else kinds
    tally = Tally()
    share_out([lambda kind=kind: trial(*kind) for kind in kinds], tally)
    return tally.outcome()


# ---------------------------------------------------------------- shared memory

ADVICE = "(of a container: --shm-size or --ipc=host), fewer --workers or a smaller --batch-size"
NO_ROOM = "unable to allocate shared memory(shm) for file </torch_1_2_3>: "


def run_out_of_shared_memory(folder, quick):
    """A /dev/shm that is too small is found before the first step, or at the latest when PyTorch finds it."""
    usage = shutil.disk_usage

    def small(size):
        def disk_usage(path):
            return SimpleNamespace(total=size, free=size) if path == "/dev/shm" else usage(path)
        shutil.disk_usage = disk_usage

    def full(reason):
        def fail(size, **options):
            raise RuntimeError(NO_ROOM + reason)
        torch.UntypedStorage._new_shared = fail
    # A batch takes 8 x (3 x 16 x 16 + 4 x 16) bytes in pre-training and a little less without its noise.
    kinds = {"too small": (lambda: small(8_000), 2, "error: /dev/shm has 0.0 MB, "),
             "too small for some": (lambda: small(30_000), 0, "warning: /dev/shm has 0.0 MB, "),
             "full": (lambda: full("No space left on device (28)"), 3, "error: /dev/shm has "),
             "full, of PyTorch 2.11": (lambda: full("Success (0)"), 3, "error: /dev/shm has ")}
    tally = Tally()
    for name in list(STAGES)[:1] if quick else STAGES:
        for text, (make, code, words) in kinds.items():
            work = stage(name, folder / f"{name}-{text}", "--workers", 2, "--steps", 8)
            ran = fork(lambda make=make, work=work: make() or work())
            lines = [line for line in ran.said.splitlines() if line.startswith(words) and ADVICE in line]
            saved = (folder / f"{name}-{text}" / "last.pt").exists()
            good = ran.code == code and len(lines) == 1 and saved == (not code)
            good &= "Traceback" not in ran.said
            tally.note("" if good else f"{name}, {text}: code {ran.code}: {ran.last}")
    return tally.outcome()


FAULTS = [
    Fault("an error of a new kind while loader workers live", 5, raise_with_workers),
    Fault("shared memory is too small", 12, run_out_of_shared_memory),
]


# ---------------------------------------------------------------- the guards


def leave_children_alone():
    """Python's exit finds the workers alive."""
    views.kill_workers = lambda: None


def measure_no_shared_memory():
    """Nobody looks how large /dev/shm is before the workers fill it."""
    views.check_shared_memory = lambda views, stream, workers: None


GUARDS = [
    Guard("children-ended", "an error of a new kind while loader workers live", leave_children_alone),
    Guard("shared-memory-measured", "shared memory is too small", measure_no_shared_memory),
]
