"""Promises 3 and 4: what a run prints may be lost; the run goes on, and a signal finds it as well as ever."""

import contextlib
import os
import signal

from faults.killed import command, furthest, wait_for_step
from faults.suite import STAGES, Child, Fault, Guard, Tally, share_out

from mff_run import files, process

STEPS = ("--steps", 6)


def broken_pipe():
    """The end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def open_as(numbers, find):
    """What find() opens takes the place of these file descriptors; they are closed where it opens none."""
    for number in numbers:
        if file := find():
            os.dup2(file, number)
        else:
            os.close(number)


WAYS = {"its reader has left": broken_pipe, "its disk is full": lambda: os.open("/dev/full", os.O_WRONLY),
        "it is closed": lambda: None}


def lose_the_output(folder, quick):
    """Words cannot be written: all steps are made, or a signal ends the run with its step saved."""
    def trial(name, way, numbers, sent):
        run = folder / f"{name}-{way}-{numbers}-{sent}".replace(" ", "-")
        work = command(name, run, *(("--steps", 2000) if sent else STEPS))
        child = Child(lambda: open_as(numbers, WAYS[way]) or work())
        if sent:
            wait_for_step(2, run, child)
        with contextlib.suppress(ProcessLookupError):                   # it ended before
            os.kill(child.process.pid, sent)
        code, reached = child.end().code, furthest(run)
        saved = files.read_checkpoint(run / "last.pt")["step"] if (run / "last.pt").exists() else 0
        good = code == (128 + sent if sent else 0) and saved == reached
        yield "" if good else f"{name}, {way}, {numbers}, {sent}: code {code}, {reached - saved} lost", 0
    kinds = [(name, way, numbers, sent) for name in STAGES for way in WAYS
             for numbers in ((1,), (2,), (0, 1, 2)) for sent in (0, signal.SIGINT)]
    kinds, tally = kinds[:4] + kinds[17:18] if quick else kinds, Tally()
    share_out([lambda kind=kind: trial(*kind) for kind in kinds], tally)
    return tally.outcome()


def signal_of_a_shell(folder, quick):
    """SIGHUP, SIGQUIT and SIGXCPU save the step and end the run; SIGHUP under nohup does not."""
    def trial(name, sent, ignored):
        run = folder / f"{name}-{int(sent)}-{ignored}"
        work = command(name, run, "--steps", 60 if ignored else 2000)

        def begin():
            if ignored:
                signal.signal(sent, signal.SIG_IGN)
            work()
        child = Child(begin)
        wait_for_step(2, run, child)
        with contextlib.suppress(ProcessLookupError):                   # it ended before
            os.kill(child.process.pid, sent)
        ran, reached = child.end(), furthest(run)
        saved = files.read_checkpoint(run / "last.pt")["step"] if (run / "last.pt").exists() else 0
        good = ran.code == (0 if ignored else 128 + sent) and saved == reached
        yield "" if good else f"{name}, signal {int(sent)}: code {ran.code}, {ran.last}", reached - saved
    ends = [(sent, False) for sent in (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)]
    kinds = [(name, *end) for name in STAGES for end in (*ends, (signal.SIGHUP, True))]
    tally = Tally()
    share_out([lambda kind=kind: trial(*kind) for kind in (kinds[::5] if quick else kinds)], tally)
    return tally.outcome()


def print_as_it_comes():
    """What cannot be printed is an error."""
    process.steady_output = lambda: None


def say_before_acting():
    """A handler writes to stderr before it keeps the signal, whatever becomes of that."""
    def note(signals, number, frame):
        os.write(2, b"stopping\n")
        signals.number = signals.number or number
    process.StopSignals.note = note


def know_three_signals():
    """SIGHUP, SIGQUIT and SIGXCPU end a run as they end any program."""
    process.STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


FAULTS = [
    Fault("what a run prints is lost", 4, lose_the_output),
    Fault("a signal of the shell", 3, signal_of_a_shell),
]
GUARDS = [
    Guard("output-steady", "what a run prints is lost", print_as_it_comes),
    Guard("signals-kept-before-words", "what a run prints is lost", say_before_acting),
    Guard("signals-of-a-shell", "a signal of the shell", know_three_signals),
]
