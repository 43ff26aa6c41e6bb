"""Promise 1: a run that is killed ends, when its command is given again, as if nothing had happened."""

import functools
import json
import os
import random
import re
import shutil
import signal
import time

import torch
from faults.suite import STAGES, Child, Fault, Guard, Tally, fork, many, share_out, stage
from PIL import Image
from run_folders import log_of, same_bits, state_of

from mff_data import views
from mff_min.errors import UserError
from mff_run import files, log, resume

STEPS, SAVE_EVERY = 4, 2
SAVED = ("last.pt", "previous.pt", "log.jsonl", "encoder.pt", "classifier.pt")  # of others a third is tried
EXPORTS = {"pretrain": "encoder.pt", "probe": None, "finetune": "classifier.pt"}

# ---------------------------------------------------------------- what a killed run leaves, and comes to


def half_files(folder):
    """The files with a final name that are not whole. Of a log only the last line may be torn."""
    for path in sorted(folder.glob("*")):
        try:
            if path.suffix == ".pt":
                files.read_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".jsonl":
                for line in path.read_text().splitlines()[:-1]:
                    json.loads(line)
        except (UserError, ValueError, OSError) as error:
            yield f"{path.name} is half a file: {error}"


def results_of(name, folder):
    """All that a finished run must have the same as another: its state, its log, what it exports."""
    state = {key: value for key, value in state_of(folder).items() if key != "config"}
    export = {"export": files.read_checkpoint(folder / EXPORTS[name])["model"]} if EXPORTS[name] else {}
    return state | export | {"log": log_of(folder)}


results_of_whole = functools.cache(results_of)                           # many are compared with it


def differences(name, folder, whole):
    """How a finished run differs from one that nothing interrupted."""
    ours, theirs = results_of(name, folder), results_of_whole(name, whole)
    for key in ours.keys() | theirs.keys():
        if not same_bits(ours.get(key), theirs.get(key)):
            yield f"{key} differs"
    for path in folder.glob("*.tmp.*"):
        yield f"{path.name} is left"
    if not (folder / "previous.pt").exists():
        yield "one checkpoint is left"


def furthest(folder):
    """The last step that a run has logged."""
    return max((line["step"] for line in log.read_log(folder / "log.jsonl")), default=0)


def wait_for_step(step, folder, child):
    """Wait until a run has logged this step, or the child that it runs in has ended."""
    while furthest(folder) < step and child.process.is_alive():
        time.sleep(0.01)


def begun_at(ended):
    """The step that a run said it goes on from."""
    found = re.search(r"^steps (\d+) to", ended.said, re.M)
    return int(found[1]) if found else 0


def command(name, folder, *more):
    evaluate = () if name == "pretrain" else ("--eval-every", 0.2)      # after steps 2 and 3
    flags = ["--steps", STEPS, "--save-every", SAVE_EVERY, "--resume", "auto"]
    return stage(name, folder, *flags, *evaluate, *more)


@functools.cache
def uninterrupted(name, folder, *more):
    ended = fork(command(name, folder, *more))
    assert ended.code == 0, ended.said
    return folder


def gone_on(name, folder, whole, *more):
    """(problem or "", steps repeated) of a run that was killed and whose command is given again."""
    problems, reached = list(half_files(folder)), furthest(folder)
    ended = fork(command(name, folder, *more))
    if ended.code:
        return f"code {ended.code}: {ended.last}", 0
    lost = max(reached - begun_at(ended), 0)
    if lost > SAVE_EVERY:
        problems.append(f"{lost} steps are repeated")
    problems += differences(name, folder, whole)
    return "; ".join(problems), lost


# ---------------------------------------------------------------- every point of a save


class Points:
    """Stands in the way of what changes files, in this process: each write, fsync, rename and removal.

    seen collects (what, name of the file). stop() is called before, after or, of a write, halfway through the
    point at, a number or one of these pairs. By itself it kills the process.
    """

    def __init__(self, at=None, when="before", stop=lambda: os.kill(os.getpid(), signal.SIGKILL)):
        self.at, self.when, self.stop, self.seen = at, when, stop, []

        def opened(path, mode="r", **options):
            file = open(path, mode, **options)
            return Watched(self, file, os.path.basename(path)) if mode[0] in "wa" else file

        def watch(what, name_of):
            call = getattr(os, what)
            setattr(os, what, lambda *given, **more: self.meet(what, name_of(*given),
                                                               lambda: call(*given, **more)))
        files.open = opened
        watch("fsync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        watch("replace", lambda path, target: os.path.basename(target))
        watch("unlink", os.path.basename)

    def meet(self, what, name, do, half=None):
        point = what, re.sub(r"\.tmp\.\d+", ".tmp", name)
        when = self.when if self.at in (len(self.seen), point) else ""
        self.seen.append(point)
        if when == "before":
            self.stop()
        if when == "halfway":
            half()
            self.stop()
        try:
            return do()
        finally:                                                        # also of what is not there to remove
            if when == "after":
                self.stop()


class Watched:
    """A file whose writes are on the disk at once, and are points."""

    def __init__(self, points, file, name):
        self.points, self.file, self.name = points, file, name

    def write(self, content):
        def put(content=content):
            count = self.file.write(content)
            self.file.flush()
            return count
        return self.points.meet("write", self.name, put, lambda: put(bytes(content)[:len(content) // 2]))

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def points_of(name, folder):
    """What a whole run meets, in order."""
    def work():
        points = Points()
        command(name, folder)()
        (folder / "points.json").write_text(json.dumps(points.seen))
    ended = fork(work)
    assert ended.code == 0, ended.said
    return json.loads((folder / "points.json").read_text())


def watched(name, folder, *more, **how):
    """work for fork: a stage among Points, which stop it as told."""
    def work():
        Points(**how)
        command(name, folder, *more)()
    return work


def killed_at(name, folder, whole, point):
    ended = fork(watched(name, folder, at=point[0], when=point[1]))
    at = f"{name}, killed {point[1]} point {point[0]}"
    if ended.code != -signal.SIGKILL:
        yield f"{at}: it was not killed but had code {ended.code}, {ended.last}", 0
        return
    problem, lost = gone_on(name, folder, whole)
    yield f"{at}: {problem}" if problem else "", lost
    shutil.rmtree(folder)                                               # memory, mostly


def chosen(seen, most):
    """(number, when) of points: all but writes, which come by the thousand: of each file `most`, spread."""
    points, run = [], []
    for i, (what, name) in enumerate(seen):
        if what == "write":
            run.append(i)
        if run and (what != "write" or i + 1 == len(seen) or seen[i + 1][1] != name):
            spread = sorted({run[j * (len(run) - 1) // max(most - 1, 1)] for j in range(most)})
            points += [(j, ("before", "halfway", "after")[k % 3]) for k, j in enumerate(spread)]
            run = []
        if what != "write":
            points += [(i, "before"), (i, "after")]
    return points


def kill_at_points(folder, quick):
    """Pre-training killed before and after all that it does to what is SAVED, other stages at half of it."""
    trials, seen_points = [], 0
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        seen = points_of(name, folder / f"{name}-points")
        seen_points += len(seen)
        usual, every = (9, 1) if name == "pretrain" else (3, 2)
        points = chosen(seen, many(usual, usual, quick))[::every]
        others = [point for point in points if not seen[point[0]][1].startswith(SAVED)]
        points = sorted(set(points) - set(others) | set(others[::3]))
        points = points[2::len(points) // 12] if quick else points
        trials += [functools.partial(killed_at, name, folder / f"{name}-{i}-{when}", whole, (i, when))
                   for i, when in points]
    tally = Tally()
    share_out(trials, tally)
    return tally.outcome(points_in_all=seen_points)


# ---------------------------------------------------------------- any moment


def kill_often(name, folder, whole, kills, seed, workers):
    """A run killed after a random time, given again and killed again until it ends; then the next."""
    draw, run, counted, problems = random.Random(seed), 0, 0, []
    began = time.monotonic()
    assert fork(command(name, folder / "timed", "--workers", workers)).code == 0
    longest, reached = 1.3 * (time.monotonic() - began), 0
    while counted < kills or reached:
        place = folder / str(run)
        ended = Child(command(name, place, "--workers", workers)).end(draw.uniform(0, longest))
        begun = begun_at(ended)
        lost = max(reached - begun, 0) if "steps " in ended.said else 0
        if lost > SAVE_EVERY:
            problems.append(f"{lost} steps are repeated")
        if ended.code == 0:
            problems += differences(name, place, whole)
            if problems:
                yield f"{name} with {workers} workers: {'; '.join(problems)}", lost
            run, reached, problems = run + 1, 0, []
            shutil.rmtree(place)
        elif ended.code != -signal.SIGKILL:
            yield f"{name} with {workers} workers: code {ended.code}, {ended.last}", lost
            run, reached, problems = run + 1, 0, []
        else:
            problems += half_files(place)
            reached, counted = furthest(place), counted + 1
            yield "", lost


def kill_at_random(folder, quick):
    """Kills at random moments, of runs without and with worker processes."""
    trials = []
    for seed, (name, kills, workers) in enumerate([("pretrain", 50, 0), ("pretrain", 24, 2),
                                                   ("finetune", 18, 2), ("probe", 8, 0)]):
        whole = uninterrupted(name, folder / f"{name}-whole")
        trials.append(functools.partial(kill_often, name, folder / str(seed), whole,
                                        many(kills // 8, kills, quick), seed, workers))
    tally = Tally()
    share_out(trials, tally)
    return tally.outcome()


# ---------------------------------------------------------------- the order of the calls


def order_of_calls(folder, quick):
    """A save writes, flushes the file, renames, flushes the folder, and removes its temporary name alone."""
    tally = Tally()
    for name in STAGES:
        place = folder / name
        calls = [tuple(call) for call in points_of(name, place)]
        calls = [call for i, call in enumerate(calls) if i == 0 or call != calls[i - 1]]    # writes, as one
        begun = [i for i, call in enumerate(calls) if call == ("write", "last.pt.tmp")]
        for i, start in enumerate(begun):
            moved = [("replace", "previous.pt")] if i else []
            want = [("write", "last.pt.tmp"), ("fsync", "last.pt.tmp"), *moved, ("replace", "last.pt"),
                    ("fsync", name), ("unlink", "last.pt.tmp")]
            got = calls[start:start + len(want)]
            tally.note("" if got == want else f"{name}: {got}")
        removed = {target for what, target in calls if what == "unlink" and not target.endswith(".tmp")}
        tally.note(f"{name} removes {removed}" if removed else "")
    return tally.outcome()


FAULTS = [Fault("kill -9 at every point of a save", 1, kill_at_points),
          Fault("kill -9 at random moments", 1, kill_at_random),
          Fault("the order of write, fsync and rename", 1, order_of_calls)]

# ---------------------------------------------------------------- guards


def save_to_the_final_name():
    def write(path, fill, previous=None):
        if previous and path.exists():
            os.replace(path, path.with_name(previous))
        with getattr(files, "open", open)(path, "wb") as file:
            fill(file)
    files.write_atomically = write


def delete_before_save():
    save = resume.save_checkpoint

    def delete_first(folder, state):
        for path in resume.checkpoints_in(folder):
            path.unlink()
        save(folder, state)
    resume.save_checkpoint = delete_first


def noise_from_the_global_generator():
    get = views.Views.__getitem__

    def draw(views, key):
        item = get(views, key)
        return item | dict(noise=torch.rand(item["noise"].shape))
    views.Views.__getitem__ = draw


def leave_the_log_as_it_is():
    begin = log.Log.__init__

    def without_cutting(log, folder, world, step):
        text = (folder / "log.jsonl").read_text() if step else None
        begin(log, folder, world, step)
        if text:
            log.path.write_text(text)
    log.Log.__init__ = without_cutting


def forget_the_folder():
    files.sync_folder = lambda folder: None


GUARDS = [Guard("save-to-the-final-name", "kill -9 at every point of a save", save_to_the_final_name),
          Guard("delete-before-save", "kill -9 at every point of a save", delete_before_save),
          Guard("no-generator", "kill -9 at every point of a save", noise_from_the_global_generator),
          Guard("log-not-cut", "kill -9 at every point of a save", leave_the_log_as_it_is),
          Guard("no-fsync-of-the-folder", "the order of write, fsync and rename", forget_the_folder)]
