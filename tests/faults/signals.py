"""Promise 3: a signal ends a run after its step, which is saved, on all ranks; so does a launcher's death."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from faults.killed import begun_at, command, differences, furthest, wait_for_step
from faults.ranks import at_micro_batch, ended, gone_on, torchrun, two_ranks, whole_run
from faults.suite import STAGES, Child, Fault, Guard, Tally, fork, many, share_out

from mff_data import views
from mff_run import files, process, progress, world

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# ---------------------------------------------------------------- one process


def signal_at_random(folder, quick):
    """Each signal at random moments of each stage: no step is lost, and the run goes on to the same bits."""
    tally, seconds, steps = Tally(), {}, ("--steps", 12)
    for name in STAGES:
        began = time.monotonic()
        ran = fork(command(name, folder / name, *steps))
        assert ran.code == 0, ran.said
        seconds[name] = time.monotonic() - began

    def trial(number):
        name, sent = list(STAGES)[number % 3], SIGNALS[number // 3 % 3]
        run, moment = folder / f"run{number}", random.Random(number).uniform(0, 1.1)
        begun, work = folder / f"begun{number}", command(name, run, *steps)

        def wait_to_begin():
            main = STAGES[name].main
            STAGES[name].main = lambda cfg: begun.touch() or main(cfg)  # from here on run() answers for it
            work()
        child = Child(wait_to_begin)
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(moment * seconds[name])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, sent)
        first, reached = child.end(), furthest(run)
        problems = []
        if first.code not in (0, 128 + sent, -sent):                    # -sent: before the first step
            problems.append(f"code {first.code}: {first.last}")
        again = fork(command(name, run, *steps))
        lost = max(reached - begun_at(again), 0)
        problems += [f"{lost} steps lost"] * (lost > 0)
        problems += [f"code {again.code}: {again.last}"] * (again.code != 0)
        problems += differences(name, run, folder / name) if not again.code else []
        yield f"{name}, signal {int(sent)}: {'; '.join(problems)}" if problems else "", lost
    share_out([lambda number=number: trial(number) for number in range(many(6, 30, quick))], tally)
    return tally.outcome()


# ---------------------------------------------------------------- two ranks


def signal_one_rank(folder, quick):
    """A signal to one of two ranks: both end with its code at one step, which is saved once and goes on."""
    tally, whole = Tally(), whole_run("pretrain", folder / "whole")
    kinds = [(signal.SIGUSR1, 1), (signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 0)]
    for number, rank in kinds[:1] if quick else kinds:
        run = folder / f"{int(number)}-{rank}"

        def act(mine, number=number, rank=rank):
            if mine == rank:
                at_micro_batch(3, lambda: os.kill(os.getpid(), number))
        with two_ranks("pretrain", run, act=act) as children:
            found, _ = ended(children)
        codes, said = [one.code for one in found], "".join(one.said for one in found)
        if codes != [128 + number] * 2 or said.count(f"stopped: signal {int(number)} at step 3 of") != 1:
            tally.note(f"signal {int(number)} to rank {rank}: codes {codes}: {found[rank].last}")
        else:
            tally.note(gone_on(run, whole))
    return tally.outcome()


# ---------------------------------------------------------------- the launcher


def alive(pid):
    """Whether a process lives; one that has ended and waits to be asked why does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def started_by(pid):
    """The processes that this one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def gone(pids, limit):
    """The seconds until none of these processes lives, None where it takes longer than the limit."""
    began = time.monotonic()
    while any(map(alive, pids)):
        if time.monotonic() - began > limit:
            return None
        time.sleep(0.02)
    return time.monotonic() - began


def saved_step(folder):
    return files.read_checkpoint(folder / "last.pt")["step"]


def lose_the_launcher(folder, quick):
    """What started two ranks is killed: they save their step and end; one that waits for a stuck one ends."""
    tally, slowest = Tally(), 0.0
    for stuck in (False,) if quick else (False, True):
        run = folder / f"run{stuck}"
        (folder / "pids").mkdir(exist_ok=True)

        def act(rank, run=run, stuck=stuck):
            (folder / "pids" / str(rank)).write_text(str(os.getpid()))
            if stuck and rank == 1:
                at_micro_batch(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
            else:
                at_micro_batch(2, lambda: time.sleep(0.2))
            slow = progress.Meter.next
            progress.Meter.next = lambda *given: time.sleep(0.05) or slow(*given)

        def launch(run=run, act=act):
            with two_ranks("pretrain", run, "--steps", 400, "--timeout", 60, act=act,
                           TORCHELASTIC_RUN_ID="none") as children:
                for child in children:
                    child.process.join()
        launcher = Child(launch)
        wait_for_step(3, run, launcher)
        launcher.process.kill()
        pids = [int((folder / "pids" / str(rank)).read_text()) for rank in range(2)]
        seconds = gone(pids[:1] if stuck else pids, 12)
        reached = furthest(run)
        lost = 0 if stuck else reached - saved_step(run)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.end(1)
        slowest = max(slowest, seconds or 12)
        tally.note("they live on after 12 s" if seconds is None else "a step is lost" if lost else "", lost)
    return tally.outcome(seconds_until_all_have_ended=slowest)


def wait_for_ever(folder, quick):
    """A signal while a loader's disk hangs, or in an evaluation: the last step is saved, all ranks end."""
    def hang(from_index, crop):
        read, seen = views.Views.read, []

        def late(self, epoch, index):
            seen.append(index)
            if len(seen) > from_index and self.crop.startswith(crop):
                time.sleep(600)
            return read(self, epoch, index)
        views.Views.read = late

    def judged(said, run, least):
        codes = {one.code for one in said}
        saved = saved_step(run) if (run / "last.pt").exists() else 0
        problem = f"codes {codes}: {said[0].last}" if codes != {128 + signal.SIGTERM} else ""
        return problem or (f"{furthest(run) - saved} lost" if saved < max(furthest(run), least) else "")
    tally = Tally()
    # (stage, from which item on which crop hangs, --workers, the step that is waited for, that must be saved)
    cases = [(name, 40, "", 1, 4, 4) for name in STAGES]
    cases += [(name, 0, "evaluation", 0, 2, 1) for name in ("probe", "finetune")]
    for name, index, crop, workers, reached, least in cases[:1] if quick else cases:
        run = folder / f"{name}-{crop}"
        work = command(name, run, "--steps", 60, "--workers", workers, "--save-every", 2 if crop else 50)
        child = Child(lambda work=work, index=index, crop=crop: hang(index, crop) or work())
        wait_for_step(reached, run, child)
        time.sleep(1)
        os.kill(child.process.pid, signal.SIGTERM)
        tally.note(judged([child.end(20)], run, least))
    run = folder / "ranks"
    with two_ranks("pretrain", run, "--steps", 60, "--workers", 1, "--timeout", 60, "--save-every", 50,
                   act=lambda rank: rank and hang(20, "")) as children:
        wait_for_step(4, run, children[0])
        time.sleep(1)
        for child in children:
            os.kill(child.process.pid, signal.SIGTERM)
        found, _ = ended(children, 20)
    tally.note(judged(found, run, 4))
    return tally.outcome()


def stop_torchrun(folder, quick):
    """SIGTERM, SIGUSR1 or SIGKILL to torchrun itself: its ranks save their step and end."""
    tally, slowest, steps = Tally(), 0.0, 40
    whole = whole_run("pretrain", folder / "whole", "--steps", steps)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)[:1 if quick else 3]:
        run = folder / f"run{int(number)}"
        launcher = torchrun(run, "", "--steps", steps)
        wait_for_step(3, run, launcher)
        pids = started_by(launcher.process.pid)
        os.kill(launcher.process.pid, number)
        seconds = gone(pids, 12)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ran = launcher.end(1)
        slowest, lost = max(slowest, seconds or 12), furthest(run) - saved_step(run)
        problem = ("they live on after 12 s" if seconds is None else f"{lost} steps lost" if lost else
                   f"{len(pids)} ranks where 2 were expected: {ran.said[-300:]}" if len(pids) != 2 else
                   gone_on(run, whole, "--steps", steps))
        tally.note(f"signal {int(number)}: {problem}" if problem else "", lost)
    return tally.outcome(seconds_until_all_have_ended=slowest)


def keep_the_signal():
    """A rank no longer asks the others what they were told."""
    world.World.max = lambda world, value: value


def note_alone():
    """A signal that comes while a batch is awaited is noted, for when it is there."""
    process.StopSignals.interrupting = lambda signals: contextlib.nullcontext()


def watch_nobody():
    """A rank no longer notices that its launcher is gone."""
    world.watch_launcher = lambda: None


FAULTS = [
    Fault("a signal at a random moment", 3, signal_at_random),
    Fault("a signal to one of two ranks", 3, signal_one_rank),
    Fault("the launcher of two ranks dies", 3, lose_the_launcher),
    Fault("torchrun is stopped", 3, stop_torchrun),
    Fault("a signal while a disk hangs", 3, wait_for_ever),
]
GUARDS = [
    Guard("signals-agreed-among-ranks", "a signal to one of two ranks", keep_the_signal),
    Guard("waits-interrupted", "a signal while a disk hangs", note_alone),
    Guard("launcher-watched", "the launcher of two ranks dies", watch_nobody),
]
