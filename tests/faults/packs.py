"""Promises 4, 5, 9 and 11 of packs: one that changes is noticed, and packing leaves nothing behind."""

import functools
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from faults import suite
from faults.folders import fine
from faults.killed import command, differences, uninterrupted
from faults.ranks import at_micro_batch, ended, two_ranks
from faults.suite import Child, Fault, Guard, Tally, fork, share_out, stage
from PIL import Image
from torch.utils.data import _utils

from mff_data import packed, unchanged, views
from mff_data.packed import Packed
from mff_min.config import parse
from mff_min.errors import UserError
from mff_run.process import run
from tools import pack

# ---------------------------------------------------------------- packs


def images_in(folder, count=24, seed=0):
    """A folder of two classes of noise images, train and val."""
    for split in ("train", "val"):
        for i in range(count):
            place = folder / split / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def packing(source, output, *more):
    """work for fork: tools.pack as its command line runs it, in blocks of four images."""
    def work():
        pack.BLOCK = 4
        run(pack.main, parse(pack.Config, [str(source), str(output), "--short-side", "0", *map(str, more)]))
    return work


def packs_of(source, output):
    """output, with the packs of a folder in it."""
    done = fork(packing(source, output))
    assert done.code == 0, done.said
    return output


def content(folder):
    """{name: bytes} of what tools.pack left in a folder, but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


# ---------------------------------------------------------------- under a run


def write_over(path, other):
    with open(path, "r+b") as file:
        file.write(other.read_bytes())


CHANGES = {"cut short": lambda path, other: os.truncate(path, path.stat().st_size // 2),
           "replaced": lambda path, other: os.replace(shutil.copy(other, path.with_name("other")), path),
           "written over": write_over,
           "emptied": lambda path, other: os.truncate(path, 0),
           "removed": lambda path, other: path.unlink(),
           "written over with itself": lambda path, other: write_over(path, path)}


def changes_under_a_run(folder, quick):
    """A run, alone or on two ranks, ends with the name of a pack that was cut short or written to.

    One that was replaced or removed is read to the end as it was: a file lives as long as it is open.
    """
    tally, whole = Tally(), packs_of(images_in(folder / "images"), folder / "whole")
    other = packs_of(images_in(folder / "images2", seed=1), folder / "other") / "train.pack"
    sound = {name: uninterrupted(name, folder / f"sound-{name}", "--data", whole)
             for name in ("pretrain", "finetune")}

    def changed(what, workers, name):
        data = Path(shutil.copytree(whole, folder / f"{name}-{what}-{workers}"))
        place, path, lasts = data / "run", data / "train.pack", what in ("replaced", "removed")
        long = () if lasts else ("--steps", 40)
        work = command(name, place, "--data", data, "--workers", workers, *long)

        def work_under_change():
            at_micro_batch(2, lambda: CHANGES[what](path, other))
            work()
        end = fork(work_under_change, limit=40)
        problem = fine(end, 3 * (not lasts), *([] if lasts else [f"error: {path} was cut short, written to"]))
        problem = problem or ", ".join(differences(name, place, sound[name]) if lasts else ())
        yield f"{name}, {what}, {workers} workers: {problem}" if problem else "", 0

    trials = [functools.partial(changed, what, workers, name) for name in sound for what in CHANGES
              for workers in (0, 2)]
    share_out(trials[:4] if quick else trials, tally)
    for rank in range(0 if quick else 2):
        path = Path(shutil.copy(whole / "train.pack", folder / f"rank{rank}.pack"))

        def act(mine, rank=rank, path=path):
            if mine == rank:
                at_micro_batch(3, lambda: os.truncate(path, 99))
        flags = ["--data", path, "--steps", 40]
        with two_ranks("pretrain", folder / f"ranks{rank}", *flags, act=act) as children:
            ends, _ = ended(children)
        lines = [line for end in ends for line in end.said.splitlines() if line.startswith("error: ")]
        codes = [end.code for end in ends]
        good = len(lines) == 1 and f"{path} was cut short" in lines[0] and codes == [3, 3]
        tally.note("" if good else f"rank {rank}: codes {codes}, {lines}")
    return tally.outcome()


def other_pixels(folder, quick):
    """A run does not go on with a pack of other pixels under the same names, unless data may change."""
    tally = Tally()
    whole = packs_of(images_in(folder / "images"), folder / "whole")
    for name in ("pretrain",) if quick else ("pretrain", "probe", "finetune"):
        data = Path(shutil.copytree(whole, folder / name))
        again = command(name, data / "run", "--data", data)
        tally.note(fine(fork(again), 0))
        os.replace(shutil.copy(packs_of(images_in(folder / f"{name}1", seed=1), folder / f"{name}2")
                               / "train.pack", data / "new"), data / "train.pack")
        tally.note(fine(fork(again), 2, "data     24 images  24 images (+24 -24)", "--allow-change data"))
        tally.note(fine(fork(command(name, data / "run", "--data", data, "--allow-change", "data")), 0))
    return tally.outcome()


def flipped_bits(folder, quick):
    """A pack with flipped bits is refused, or each image is shown as it was, or named; --verify sees it."""
    tally = Tally()
    path = packs_of(images_in(folder / "images"), folder / "pack") / "train.pack"
    whole, sound = path.read_bytes(), Packed(path, "train")
    images = [sound.open(i).tobytes() for i in range(len(sound))]

    def trial(seed):
        draw, file, place = random.Random(seed), bytearray(whole), folder / f"pack{seed}"
        for _ in range(draw.randint(1, 3)):
            file[draw.randrange(len(file))] ^= 1 << draw.randrange(8)
        place.mkdir()
        (place / "train.pack").write_bytes(file)
        wrong, bad = [], 0
        try:
            source = Packed(place / "train.pack", "train")
        except UserError:
            bad = len(images)
        else:
            for i, image in enumerate(images):
                try:
                    wrong += [i] * (source.open(i).tobytes() != image)
                except ValueError:
                    bad += 1
        problem = f"images {wrong} are other ones" if wrong else "nothing was noticed" * (not bad)
        if not problem and seed % 10 == 0:
            problem = fine(fork(packing("-", place, "--verify")), 2, "error: ", str(place / "train.pack"))
        shutil.rmtree(place)
        yield f"HOSTILE_SEED={suite.SEED}, {seed}: {problem}" if problem else "", 0
    first = 10_000 * suite.SEED
    share_out([functools.partial(trial, first + i) for i in range(suite.many(60, 400, quick))], tally)
    return tally.outcome()


# ---------------------------------------------------------------- packing that is stopped


def living(session):
    """The processes of a session, but those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state != "Z":
            found.append(int(folder.name))
    return found


def left_behind(session, limit=8.0):
    """What is wrong where a session's processes outlive its first; they are killed."""
    end = time.monotonic() + limit
    while (pids := living(session)) and time.monotonic() < end:
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return f"{len(pids)} processes are left; " * bool(pids)


def in_session(work, slow=False):
    """A Child that is the first process of a session; slow: its workers take half a second to begin."""
    def begin():
        os.setsid()
        if slow:
            handlers = _utils.signal_handling
            set_up = handlers._set_worker_signal_handlers
            handlers._set_worker_signal_handlers = lambda: time.sleep(0.5) or set_up()
        work()
    return Child(begin)


STOPS = [(signal.SIGKILL, os.kill), (signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg),
         (signal.SIGHUP, os.killpg), (signal.SIGKILL, os.kill)]


def stopped_packing(folder, quick):
    """Packing that a signal stops leaves no process, and the same line goes on to the same bytes."""
    tally, source = Tally(), images_in(folder / "images", 40)
    began = time.monotonic()
    want = content(packs_of(source, folder / "whole"))
    longest = 2 * (time.monotonic() - began)

    def trial(number):
        draw, output = random.Random(number), folder / f"{number}"
        stop, send = STOPS[number % len(STOPS)]
        child = in_session(packing(source, output, "--workers", 2))
        time.sleep(draw.uniform(0.02, longest))
        if child.process.is_alive():
            try:
                send(child.process.pid, stop)
            except ProcessLookupError:                                  # it has no group yet
                os.kill(child.process.pid, stop)
        pid, end = child.process.pid, child.end(20)
        problem = left_behind(pid)
        if end.code not in (0, -stop, 128 + stop) or "Traceback" in end.said:
            problem += f"code {end.code}, {end.said[-300:]}; "
        problem += fine(fork(packing(source, output)), 0)
        problem += "it is another pack" * (not problem and content(output) != want)
        shutil.rmtree(output)
        yield f"{number}, signal {stop}: {problem}" if problem else "", 0
    share_out([functools.partial(trial, i) for i in range(suite.many(5, 40, quick))], tally)
    return tally.outcome()


def orphaned_workers(folder, quick):
    """No loader worker outlives a stage or tools.pack that kill -9 ends, also one that has just begun."""
    tally, source = Tally(), images_in(folder / "images", 40)

    def trial(name, slow, seed):
        work = packing(source, folder / f"{name}{slow}{seed}", "--workers", 2)
        if name != "pack":
            work = stage(name, folder / f"{name}{slow}{seed}", "--workers", 2, "--steps", 9999)
        child = in_session(work, slow)
        pid, end = child.process.pid, time.monotonic() + 20
        while len(living(pid)) < 2 + seed % 2 and child.process.is_alive() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0 if slow else random.Random(seed).uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        child.end(5)
        problem = left_behind(pid)
        yield f"{name}, {'beginning' * slow}, {seed}: {problem}" if problem else "", 0
    names = ("pack", "pretrain") if quick else ("pack", "pretrain", "probe", "finetune")
    share_out([functools.partial(trial, name, slow, seed) for name in names for slow in (True, False)
               for seed in range(suite.many(1, 2, quick))], tally)
    return tally.outcome()


# ---------------------------------------------------------------- where a pack is written


def pipe(path, theirs):
    os.mkfifo(path)


KINDS = {"a link": lambda path, theirs: path.symlink_to(theirs),
         "a hard link": lambda path, theirs: os.link(theirs, path),
         "a link to nowhere": lambda path, theirs: path.symlink_to(theirs.with_name("nowhere")),
         "a pipe": pipe, "a folder": lambda path, theirs: path.mkdir(),
         "a text": lambda path, theirs: path.write_bytes(theirs.read_bytes())}


def files_of_others(folder, quick):
    """Where others have a file of a pack's name, packing is refused, and it stays as it is."""
    tally, source = Tally(), images_in(folder / "images", 8)
    names = ["train.pack.partial", "val.pack.partial", "val.pack.journal", "train.pack", "run.lock"]

    def trial(name, kind):
        output = folder / f"{name}-{kind}"
        output.mkdir()
        theirs = folder / f"theirs-{name}-{kind}"
        theirs.write_bytes(b"a letter\n" * 99)
        KINDS[kind](output / name, theirs)
        before = os.lstat(output / name)
        end = fork(packing(source, output), limit=20)
        after = os.lstat(output / name)
        problem = fine(end, 2, "error: ", str(output / name))
        problem += "; theirs was written to" * (theirs.read_bytes() != b"a letter\n" * 99)
        problem += "; it is another file" * ((before.st_ino, before.st_size) != (after.st_ino, after.st_size))
        problem += "; nowhere was made" * (folder / "nowhere").exists()
        yield f"{name} is {kind}: {problem}" if problem else "", 0
    cases = [(name, kind) for name in names for kind in KINDS if (name, kind) != ("run.lock", "a text")]
    share_out([functools.partial(trial, *case) for case in (cases[::5] if quick else cases)], tally)
    return tally.outcome()


def full_disk(folder, quick):
    """A disk or a file-size limit that is too small ends packing with the file's name; then it goes on."""
    tally, source = Tally(), images_in(folder / "images", 40)
    want = content(packs_of(source, folder / "whole"))
    size = len(want["val.pack"])

    def limited(limit):
        output = folder / f"limit{limit}"
        work = packing(source, output, "--workers", limit % 3)

        def within():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
        end = fork(within)
        problem = fine(end, 3, f"error: {output}", "File too large", "the same line goes on")
        problem += fine(fork(work), 0) or "it is another pack" * (content(output) != want)
        yield f"files of {limit} bytes: {problem}" if problem else "", 0

    def on_small_disk():
        disk, output = folder / "disk", folder / "disk" / "pack"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", disk]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            return
        try:
            work = packing(source, output)

            def unannounced():
                pack.announce = lambda *rest: None
                work()
            yield fine(fork(work), 2, f"error: {output} needs about"), 0
            yield fine(fork(unannounced), 3, f"error: {output}", "No space left", "the same line goes on"), 0
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", disk], check=True)
            yield fine(fork(work), 0) or "it is another pack" * (content(output) != want), 0
        finally:
            subprocess.run(["umount", disk], check=True)
    limits = [4096 + (size - 4096) * i // 10 for i in range(10)]
    share_out([on_small_disk, *(functools.partial(limited, limit) for limit in limits[::5 if quick else 1])],
              tally)
    return tally.outcome()


def two_at_once(folder, quick):
    """A second tools.pack is refused; where the first's folder was moved or unlocked, the first stops."""
    tally, source = Tally(), images_in(folder / "images", 40)
    want = content(packs_of(source, folder / "whole"))

    def slowly(output):
        """A Child that packs ten images per second, and has begun."""
        work = packing(source, output)

        def wait(call):
            return lambda *given: time.sleep(0.1) or call(*given)

        def begin():
            pack.announce = lambda *rest: None
            pack.encode = wait(pack.encode)
            work()
        child = Child(begin)
        while not (output / "val.pack.journal").exists() and child.process.is_alive():
            time.sleep(0.01)
        return child

    def refused():
        output = folder / "refused"
        first = slowly(output)
        yield fine(fork(packing(source, output)), 2, f"in use by process {first.process.pid} on"), 0
        yield fine(fork(stage("pretrain", folder / "run", "--data", output)), 2, "was not finished"), 0
        yield fine(first.end(), 0), 0
        yield "" if content(output) == want else "it is another pack", 0

    def lost(what):
        output = folder / what
        first = slowly(output)
        if what == "moved":
            output.rename(folder / "elsewhere")
        else:
            (output / "run.lock").unlink()
        problem = fine(fork(packing(source, output)), 0) if what == "moved" else ""
        problem = problem or fine(first.end(), 3, f"{output} is no longer this run's")
        problem = problem or fine(fork(packing(source, output)), 0)
        yield problem or "it is another pack" * (content(output) != want), 0
    share_out([refused, lambda: lost("moved"), lambda: lost("unlocked")], tally)
    return tally.outcome()


FAULTS = [Fault("a pack that changes under a run", 9, changes_under_a_run),
          Fault("a run given a pack of other pixels", 11, other_pixels),
          Fault("a pack with flipped bits", 9, flipped_bits),
          Fault("packing that is stopped", 3, stopped_packing),
          Fault("workers whose process is killed", 5, orphaned_workers),
          Fault("files of others where a pack is written", 11, files_of_others),
          Fault("a full disk while packing", 4, full_disk),
          Fault("two packers at once", 11, two_at_once)]

# ---------------------------------------------------------------- guards


def map_packs():
    def read(file, start, size):
        if "mapped" not in vars(file):
            file.mapped = mmap.mmap(file.handle.fileno(), file.size, access=mmap.ACCESS_READ)
        return file.mapped[start:start + size]
    unchanged.UnchangedFile.read = read


def forget_the_index():
    packed.Packed.content = property(lambda pack: b"", lambda pack, value: None)


def trust_records():
    def open_unchecked(pack, *given, begin=packed.Packed.__init__):
        begin(pack, *given)
        pack.checked[:] = True
    packed.Packed.__init__ = open_unchecked


def let_workers_live():
    for module in (views, pack):
        module.begin_worker = lambda worker: None


def follow_links():
    packed.check_own = lambda path: None
    packed.open_own = open


def keep_no_folder():
    pack.check_lock = lambda folder, world: None


GUARDS = [Guard("packs-read-not-mapped", "a pack that changes under a run", map_packs),
          Guard("index-in-the-fingerprint", "a run given a pack of other pixels", forget_the_index),
          Guard("records-have-sums", "a pack with flipped bits", trust_records),
          Guard("workers-end-with-their-trainer", "workers whose process is killed", let_workers_live),
          Guard("no-links-followed", "files of others where a pack is written", follow_links),
          Guard("packer-asks-for-its-lock", "two packers at once", keep_no_folder)]
