"""How a stage ends: signals, bad input, faults, and the exit code of each."""

import contextlib
import dataclasses
import os
import signal
import sys

import torch

from mff_min.errors import STOP_SIGNALS, Fault, UserError, printable, shared_memory
from mff_run.output import steady_output, whisper
from mff_run.ranks import Lost
from mff_run.world import check_launcher


class Stopped(Exception):
    """Signal n asked a run to stop, and its state is saved. The stage ends with exit code 128 + n."""

    def __init__(self, number, step, stop, folder):
        super().__init__(f"signal {number} at step {step} of {stop}, which is saved in {folder}: "
                         f"--resume auto goes on from there")
        self.number = number


class Interrupted(BaseException):
    """A signal came where the process waits for long. No code but Run's catches it."""


# ---------------------------------------------------------------- the way in and out

class StopSignals:
    """Between start and release, STOP_SIGNALS are only noted, for the loop to end its step.

    Before and after there is nothing to save: they end the process at once, as a second SIGINT always does.
    One that was ignored when the process began, as nohup has it, stays ignored.
    """

    def __init__(self):
        self.number, self.old = 0, {}                                   # the first signal received; 0 is none
        self.interrupts = False

    def note(self, number, frame):
        if number == signal.SIGINT and self.number:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            if "TORCHELASTIC_RUN_ID" not in os.environ:                 # torchrun says so for all
                whisper("stopping as soon as the state is saved" +
                        "; Ctrl-C again stops at once" * (number == signal.SIGINT))
            if self.interrupts:
                raise Interrupted

    @contextlib.contextmanager
    def interrupting(self):
        """A context that may last for long, a wait or an evaluation: a signal raises Interrupted in it."""
        self.interrupts = True
        try:
            if self.number:                                             # it came before
                raise Interrupted
            yield
        finally:
            self.interrupts = False

    def start(self):
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.old[number] = signal.signal(number, self.note)

    def release(self):
        while self.old:
            signal.signal(*self.old.popitem())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


def run(main, cfg):
    """main(cfg) as a process: bad input ends in one line and code 2, a fault in 3, a signal n in 128 + n.

    Any other error ends in Python's traceback and code 1.
    """
    resumable = hasattr(cfg, "resume")
    steady_output()
    with contextlib.nullcontext() if resumable or "TORCHELASTIC_RUN_ID" in os.environ else ended_by_signals():
        end_well(main, cfg, resumable)


def end_well(main, cfg, resumable):
    """main(cfg), and the end of the process where it raises."""
    try:
        check_launcher()
        main(cfg)
    except (UserError, Fault, Lost) as error:
        leave(f"error: {own_words(error, cfg)}", 2 if isinstance(error, UserError) else 3, error)
    except Stopped as error:
        leave(f"stopped: {error}", 128 + error.number, error)
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):            # in a save, whose end then failed
            leave_interrupted(resumable, error.__context__)
        text = advice(error, cfg) or advice(error.__context__, cfg)     # a worker's death may break a save
        if not text and isinstance(error, OSError):                     # a full disk, a folder that went away
            text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            text += "; what was saved before is whole" + ", and --resume auto goes on from there" * resumable
        if not text:
            raise
        leave(f"error: {text}", 3, error)
    except KeyboardInterrupt as error:
        leave_interrupted(resumable, error)


@contextlib.contextmanager
def ended_by_signals():
    """In this context the first of STOP_SIGNALS is a KeyboardInterrupt with its number: no half file stays.

    A second one ends the process at once. Those that were ignored stay so.
    """
    heard = {number: signal.getsignal(number) for number in STOP_SIGNALS
             if signal.getsignal(number) != signal.SIG_IGN}
    process = os.getpid()

    def end(number, frame):
        for each in heard:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != process:                                      # a child that was just forked
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt(number)
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in heard.items():
            signal.signal(number, before)


def leave_interrupted(resumable, error):
    """End the process as a second Ctrl-C does, or a signal that ends a tool."""
    hint = "; --resume auto goes on from the last checkpoint, if there is one" * resumable
    leave(f"stopped: interrupted{hint}", 128 + (error.args or (signal.SIGINT,))[0], error)


def own_words(error, cfg):
    """The text of an error, without the traceback that one of a worker process comes with.

    A flag's value that has lines is escaped: it would look like several errors.
    """
    text = str(error).strip()
    for value in getattr(cfg, "__dict__", {}).values():
        if isinstance(value, str) and "\n" in value:
            text = text.replace(value, printable(value))
    if text.startswith("Caught "):
        return text.splitlines()[-1].partition(f"{type(error).__name__}: ")[2]
    return text


def leave(text, code, error=None):
    """Print why to stderr, unless another rank does so of the error raised, and end the process."""
    sys.stdout.flush()
    by_rank_0 = isinstance(error, KeyboardInterrupt) and os.environ.get("RANK", "0") != "0"     # torchrun's
    if not getattr(error, "told", by_rank_0):
        print("\n" * sys.stdout.isatty() + text, file=sys.stderr, flush=True)     # below the progress line
    raise SystemExit(code)


def advice(error, cfg):
    """What to try where PyTorch ran out of memory or lost a loader's process; "" for any other error."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, EOFError | ConnectionError):
        reason = "DataLoader worker ended without a word"
    if reason.startswith("DataLoader"):
        text = reason.rstrip(". ")
        if "Bus error" in text and hasattr(cfg, "batch_size"):          # perhaps of memory that is not there
            return f"{text}; {shared_memory(f'a batch takes {cfg.batch_size} images')}"
        if "timed out" in text and (data := getattr(cfg, "data", "")):
            return f"{text}: no images of --data {data} came; does its disk hang?"
        return f"{text}; fewer --workers may help, or --workers 0, which shows a loader's own error"
    on_cpu = "DefaultCPUAllocator" in reason
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
        return ""
    text, half = f"out of {'' if on_cpu else 'GPU '}memory", getattr(cfg, "batch_size", 0) // 2
    if not half or not hasattr(cfg, "global_batch"):
        return f"{text}: {reason}"
    together = half * int(os.environ.get("WORLD_SIZE", 1))
    text += (f" at --batch-size {cfg.batch_size}: try --batch-size {half} with --global-batch "
             f"{cfg.global_batch} as it is: {cfg.global_batch // together} micro-batches a step instead of "
             f"{cfg.global_batch // (2 * together)}")
    if not getattr(cfg, "grad_checkpointing", True):
        text += ", or --grad-checkpointing"
    field, = (field for field in dataclasses.fields(cfg) if field.name == "batch_size")
    return text + ("; that changes the result, so it takes --allow-change batch_size to resume"
                   if field.metadata["changes_result"] else "")
