"""Promise 5: a rank that dies or hangs ends the others in a stated time, and an error is told once.

Two ranks are forked, as torchrun would start them: the store they meet at is this process's. What torchrun
itself does is caused with torchrun.
"""

import contextlib
import ctypes
import os
import re
import signal
import time

import torch
import torch.distributed as dist
from faults.suite import STAGES, Child, Fault, Tally, fork, stage
from run_folders import log_of, same_bits, state_of
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mff_data import views
from mff_min import errors
from mff_min.errors import UserError
from mff_run import progress, resume

TIMEOUT = 4                                                             # --timeout of these runs, in seconds
STEPS = 6

# ---------------------------------------------------------------- two ranks


@contextlib.contextmanager
def two_ranks(name, folder, *more, act=None, **env):
    """Two Childs that run a stage together, half a batch each; act(rank) comes first in each of them."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    flags = ["--batch-size", 4, "--timeout", TIMEOUT, "--steps", STEPS, "--resume", "auto", *more]
    work = stage(name, folder, *flags)

    def start(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                          MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True", **env)
        if act:
            act(rank)
        work()
    children = [Child(lambda rank=rank: start(rank)) for rank in range(2)]
    yield children
    for child in children:
        child.process.kill()                                            # one that is stopped too
        child.process.join()


def ended(children, limit=40.0):
    """(how each ended, seconds until all have); a rank that is stopped is not waited for."""
    began = time.monotonic()
    waited = [child for child in children if not getattr(child, "stopped", False)]
    for child in waited:
        child.process.join(max(limit - (time.monotonic() - began), 0.1))
    seconds = time.monotonic() - began
    return [child.end(0.1) for child in children], seconds


def at_micro_batch(number, do):
    """do() when this process asks for its micro-batch of that number, the first is 0."""
    call = progress.Meter.next

    def next_batch(meter, batches):
        if meter.micro == number:
            do()
        return call(meter, batches)
    progress.Meter.next = next_batch


def one_rank(name, folder, *more):
    """How the run went that one rank makes of it, with two micro-batches where they have one each."""
    return fork(stage(name, folder, "--batch-size", 4, "--steps", STEPS, "--resume", "auto", *more))


def whole_run(name, folder, *more):
    """folder, with an uninterrupted run in it."""
    ran = one_rank(name, folder, *more)
    assert ran.code == 0, ran.said
    return folder


def differs(folder, whole):
    """What of a finished run differs from another one, "" where nothing does."""
    ours, theirs = state_of(folder), state_of(whole)
    found = [key for key in ("model", "optimizer", "step") if not same_bits(ours[key], theirs[key])]
    found += ["log"] * ([line["step"] for line in log_of(folder)] != [line["step"] for line in log_of(whole)])
    return f"{', '.join(found)} differs" if found else ""


def gone_on(folder, whole, *more):
    """What is wrong with a run that one rank goes on with, "" where nothing is."""
    ran = one_rank("pretrain", folder, *more)
    return f"resumed: code {ran.code}: {ran.last}" if ran.code else differs(folder, whole)


# ---------------------------------------------------------------- a rank that ends or hangs


def lose_a_rank(folder, quick):
    """SIGKILL and SIGSTOP to either rank in a step: the other one names it, and the run can go on."""
    tally, whole = Tally(), whole_run("pretrain", folder / "whole")
    slowest = {"SIGKILL": 0.0, "SIGSTOP": 0.0}
    for number, rank in [("SIGKILL", 1), ("SIGSTOP", 0), ("SIGKILL", 0), ("SIGSTOP", 1)][:2 if quick else 4]:
        run = folder / f"{number}{rank}"

        def act(mine, number=number, rank=rank):
            if mine == rank:
                at_micro_batch(3, lambda: os.kill(os.getpid(), getattr(signal, number)))
        with two_ranks("pretrain", run, act=act) as children:
            children[rank].stopped = number == "SIGSTOP"
            found, seconds = ended(children)
        other, problems = found[1 - rank], []
        words = (f"rank {rank} ended without a word in step 4" if number == "SIGKILL" else
                 f"rank {rank} gave no answer for {TIMEOUT} s (--timeout) in step 4")
        if other.code != 3 or f"error: {words}" not in other.last:
            problems.append(f"{number} to rank {rank}: the other ended with {other.code}: {other.last}")
        lost = 3 - state_of(run)["step"]
        slowest[number] = max(slowest[number], seconds)
        tally.note("; ".join([*problems, *filter(None, [gone_on(run, whole)])]), lost)
    return tally.outcome(seconds_after_sigkill=slowest["SIGKILL"], seconds_after_sigstop=slowest["SIGSTOP"],
                         timeout=TIMEOUT)


def raise_on_a_rank(folder, quick):
    """An error on one rank, of several kinds and at several moments: said once, with the rank's exit code."""
    tally = Tally()

    def bad_data(rank):
        def refuse(*arguments):
            raise UserError("data is bad")
        STAGES["pretrain"].open_data = refuse

    def raising(error):
        def fail():
            raise error
        return lambda rank: at_micro_batch(3, fail)
    kinds = [("bad data on rank 1", 1, bad_data, 2, "error: data is bad"),
             ("bad data on rank 0", 0, bad_data, 2, "error: data is bad"),
             ("a bug on rank 1", 1, raising(KeyError("a bug")), 1, "KeyError: 'a bug'"),
             ("too many bad samples on rank 1", 1, raising(errors.Fault("20 images in a row")), 3,
              "error: 20 images in a row"),
             ("a full disk on rank 0", 0, raising(OSError(28, "No space left", "/full")), 3,
              "error: /full: No space left"),
             ("bad flags on both", None, None, 2, "error: --global-batch 9 is not")]
    for text, rank, make, code, words in kinds[:3] if quick else kinds:
        def act(mine, rank=rank, make=make):
            if mine == rank:
                make(rank)
        more = ["--global-batch", 9] if rank is None else []
        with two_ranks("pretrain", folder / text.replace(" ", "-"), *more, act=make and act) as children:
            found, _ = ended(children)
        said = "".join(one.said for one in found)
        lines = re.findall(r"^(?:\w*Error: |error: ).*", said, re.M)
        bad = len(lines) != 1 or words not in lines[0] or found[rank or 0].code != code
        codes = [one.code for one in found]
        tally.note(f"{text}: codes {codes}, said: {' | '.join(lines)[:300]}" if bad or 0 in codes else "")
    return tally.outcome()


def wait_for_rank_0(folder, quick):
    """A save and a picture that take longer than --timeout: no rank gives up."""
    def slow(call):
        def slowly(*arguments, **options):
            time.sleep(3)
            return call(*arguments, **options)
        return slowly

    def act(rank):
        if rank == 0:
            resume.save_checkpoint = slow(resume.save_checkpoint)
            STAGES["pretrain"].draw_reconstructions = slow(STAGES["pretrain"].draw_reconstructions)
    tally = Tally()
    with two_ranks("pretrain", folder / "run", "--timeout", 2, "--steps", 1, act=act) as children:
        found, _ = ended(children)
    tally.note("" if [one.code for one in found] == [0, 0] else f"{found[0].last}; {found[1].last}")
    return tally.outcome()


# ---------------------------------------------------------------- torchrun


def torchrun(folder, what, *more, max_restarts=0):
    """A Child that is torchrun with two ranks; in step 4 rank 1 dies or raises, but not when started again.

    torchrun's own agent starts them, by a fork, which spares them the seconds that imports take.
    """
    flags = ["--batch-size", 4, "--timeout", 60, "--resume", "auto", *more]
    work = stage("pretrain", folder, *flags)

    def rank():
        def wait_or_fail():
            first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if what == "die" and first:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise" and first:
                raise KeyError("a bug")
        at_micro_batch(3, wait_or_fail)
        call = progress.Meter.next
        progress.Meter.next = lambda *given: time.sleep(0.05) or call(*given)
        ctypes.CDLL(None).prctl(1, 0)           # PR_SET_PDEATHSIG: SIGINT, which a command's ranks do not get
        work()
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", run_id=folder.name,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=max_restarts,
                          monitor_interval=0.1)
    return Child(lambda: elastic_launch(config, rank)())


def start_again(folder, quick):
    """torchrun --max-restarts 1 after rank 1 was killed; and what torchrun says of an error on rank 1."""
    tally, whole = Tally(), whole_run("pretrain", folder / "whole")
    ran = torchrun(folder / "dies", "die", "--steps", STEPS, max_restarts=1).end()
    tally.note(f"torchrun ended with {ran.code}: {ran.said[-300:]}" if ran.code else
               differs(folder / "dies", whole))
    ran = torchrun(folder / "raises", "raise", "--steps", STEPS).end()
    cause = ran.said.partition("Root Cause")[2]
    named = "KeyError: 'a bug'" in cause and re.search("rank +: 1 |rank 1: KeyError", cause)
    tally.note("" if named and ran.code else f"torchrun names no cause: {ran.said[-300:]}")
    return tally.outcome()


def lose_a_loader(folder, quick):
    """A loader's process is killed, or takes for ever: the run ends in time and says so."""
    tally, read = Tally(), views.Views.read
    kinds = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "asleep": lambda: time.sleep(99)}
    for text in kinds:
        def fail(views, epoch, index, text=text):
            if epoch == 0 and torch.utils.data.get_worker_info() and index == 7:
                kinds[text]()
            return read(views, epoch, index)
        work = stage("pretrain", folder / text, "--workers", 1, "--timeout", 2, "--steps", 8)

        def hurt(work=work, fail=fail):
            views.Views.read = fail
            work()
        ran = fork(hurt, limit=25)
        words = "error: DataLoader " + ("worker" if text == "killed" else "timed out after 2")
        tally.note("" if ran.code == 3 and ran.last.startswith(words) else
                   f"{text}: code {ran.code}: {ran.last}")
    return tally.outcome()


FAULTS = [
    Fault("a loader process is killed or hangs", 5, lose_a_loader),
    Fault("a rank is killed or hangs", 5, lose_a_rank),
    Fault("an error on one rank", 5, raise_on_a_rank),
    Fault("rank 0 works for longer than the time-out", 5, wait_for_rank_0),
    Fault("torchrun starts its ranks again", 5, start_again),
]
