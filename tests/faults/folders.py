"""Promise 11: a folder has one run at a time, and goes on with its own settings and images or not at all.

So a command that a launcher starts several times, and torchrun does not join, is refused.
"""

import errno
import fcntl
import hashlib
import itertools
import os
import socket
import time

import numpy as np
from faults.killed import command, differences, uninterrupted
from faults.suite import STAGES, Child, Fault, Guard, Tally, fork, stage
from PIL import Image

from mff_run import files, process, resume, run


def contents(folder):
    """{name: digest} of the files of a run, but the lock, which every start writes into."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir() if path.name != "run.lock"}


def fine(ended, code, *texts):
    """"" where a stage ended with this code and its words hold these texts; else what it did."""
    if ended.code == code and all(text in ended.said for text in texts) and "Traceback" not in ended.said:
        return ""
    return f"code {ended.code}, {ended.said.strip()}"


def begin(name, folder, *more):
    """A long run, which has written its first checkpoint."""
    child = Child(stage(name, folder, "--steps", 100_000, "--save-every", 1, *more))
    while not (folder / "last.pt").exists() and child.process.is_alive():
        time.sleep(0.01)
    return child


def second_runs(folder, quick):
    """A second run in a folder is refused while the first lives, and not after it was killed."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        for workers in (0, 2):
            place = folder / f"{name}-{workers}"
            first = begin(name, place, "--workers", workers)
            settings = (place / "config.json").read_bytes()
            who = f"in use by process {first.process.pid} on {socket.gethostname()} since 2"
            for more in ((), ("--resume", "auto"), ("--seed", 9)):
                tally.note(fine(fork(stage(name, place, "--steps", 2, *more)), 2, str(place), who))
            same = first.process.is_alive() and (place / "config.json").read_bytes() == settings
            tally.note("" if same else f"{name}: the first run was disturbed")
            first.end(0)                                                # kill -9: its workers live on a bit
            step = resume.find_checkpoint(place, "auto", print)["step"]
            again = ["--steps", step + 1, "--resume", "auto", "--allow-change", "steps"]
            ended = fork(stage(name, place, *again))
            tally.note(fine(ended, 0, f"steps {step} to {step + 1}"))
    run = command("probe", folder / "unlocked")

    def where_locks_are_not():
        def lockf(*given):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        fcntl.lockf = lockf
        run()
    ended = fork(where_locks_are_not)
    tally.note(fine(ended, 0, "cannot be locked (No locks available)"))
    tally.note("it is said more than once" if ended.said.count("cannot be locked") > 1 else "")
    return tally.outcome()


# ---------------------------------------------------------------- other settings

# What is changed, and the lines of the table that must show it.
CHANGES = [("--seed 7", ["seed     0      7"]), ("--lr 2e-3", ["lr       0.001  0.002"]),
           ("--epochs 3 --min-lr 1e-5", ["epochs   None   3.0", "min_lr   "]),
           ("--global-batch 16", ["global_batch  8      16"]),
           ("--data shapes:70", ["data     shapes:60  shapes:70"]),
           ("--weight-decay 0.5 --seed 1", ["weight_decay  0", "seed          0"])]


def other_settings(folder, quick):
    """A run is not gone on with other settings, unless they are named, and nothing of it is touched."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        before = contents(whole)
        for flags, rows in CHANGES:
            names = sorted(flag[2:].replace("-", "_") for flag in flags.split() if flag.startswith("--"))
            ended = fork(command(name, whole, *flags.split()))
            problem = fine(ended, 2, "began with other settings:\n  setting", *rows, "or --allow-change ")
            asked = sorted(ended.last.rpartition(" ")[2].split(","))
            if not problem and asked != names:
                problem = f"it asks for {asked}"
            tally.note(f"{name} {flags}: {problem}" if problem else "")
            ended = fork(stage(name, whole, "--steps", 4, *flags.split()))
            tally.note(fine(ended, 2, "a run, of other settings:\n", *rows, "add --resume auto"))
        ended = fork(command(name, whole, "--resume", ""))
        tally.note(fine(ended, 2, "already holds a run: add --resume auto"))
        other = uninterrupted(name, folder / f"{name}-other")
        ended = fork(command(name, whole, "--resume", other / "last.pt"))
        tally.note(fine(ended, 2, "holds another run than --resume"))
        tally.note("" if contents(whole) == before else f"{name}: the folder has changed")
        ended = fork(command(name, whole, "--lr", 0.5, "--allow-change", "lr"))
        tally.note(fine(ended, 0) or "; ".join(differences(name, whole, other)))    # it had ended before
    return tally.outcome()


def other_images(folder, quick):
    """A run is not gone on with where images came or went, unless data may change."""
    tally, images = Tally(), folder / "images"
    for i in range(12):
        place = images / "train" / str(i % 2)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    (images / "val").symlink_to("train")
    for name in ("pretrain",) if quick else STAGES:
        run = command(name, folder / name, "--data", images)
        tally.note(fine(fork(run), 0))
        new = [images / "train" / "0" / f"new{i}.png" for i in range(3)]
        for path in new:
            path.write_bytes((images / "train" / "0" / "0.png").read_bytes())
        (images / "train" / "1" / "1.png").rename(folder / "1.png")
        before = contents(folder / name)
        row = "data     12 images  14 images (+3 -1)"
        tally.note(fine(fork(run), 2, row, "or --allow-change data") or
                   ("" if contents(folder / name) == before else "the folder has changed"))
        tally.note(fine(fork(command(name, folder / name, "--data", images, "--allow-change", "data")), 0))
        for path in new:
            path.unlink()
        (folder / "1.png").rename(images / "train" / "1" / "1.png")
        tally.note(fine(fork(command(name, folder / name, "--data", images.rename(folder / "moved"),
                                     "--allow-change", "data")), 0))
        (folder / "moved").rename(images)
    return tally.outcome()


# ---------------------------------------------------------------- several tasks

LAUNCHERS = [dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="{}"),
             dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="{}"), dict(PMI_SIZE="2", PMI_RANK="{}")]


def tasks_without_torchrun(folder, quick):
    """Of two tasks that srun or mpirun starts neither begins, and the first says what would join them."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        for kind, task in itertools.product(LAUNCHERS, range(2)):
            def work(name=name, kind=kind, task=task):
                os.environ.update({key: value.format(task) for key, value in kind.items()})
                stage(name, folder / name, "--steps", 1)()
            ended = fork(work)
            problem = fine(ended, 2, *["started this 2 times", "torchrun --nproc-per-node=2"] * (task == 0))
            problem = problem or "it says so too" * bool(task and ended.said.strip())
            tally.note(problem or "it has begun" * (folder / name).exists())
    return tally.outcome()


FAULTS = [Fault("a second run in a folder", 11, second_runs),
          Fault("tasks without torchrun", 11, tasks_without_torchrun),
          Fault("a run given other settings", 11, other_settings),
          Fault("a run given other images", 11, other_images)]


def lock_nothing():
    files.lock = lambda folder, say: open(f"{folder}/{files.LOCK}", "a+")


def take_any_settings():
    resume.check_same_settings = lambda cfg, saved, data=(): None


def take_any_images():
    run.check_same_data = lambda cfg, state, seen: None


def start_any_task():
    process.check_launcher = lambda: None


GUARDS = [Guard("no-folder-lock", "a second run in a folder", lock_nothing),
          Guard("launcher-asked", "tasks without torchrun", start_any_task),
          Guard("settings-not-compared", "a run given other settings", take_any_settings),
          Guard("images-not-compared", "a run given other images", take_any_images)]
