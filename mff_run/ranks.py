"""What ranks do when one of them ends early or hangs, or when their launcher dies.

A collective has no place here, since one that waits for a lost rank never ends. Ranks leave word in the store
that torchrun keeps, and whose loss breaks nothing.
"""

import contextlib
import datetime
import json
import os
import signal
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from mff_run.output import whisper

PATIENCE = datetime.timedelta(days=1)                                   # with rank 0, which may save or draw
GRACE = 9.0                                                             # s from the launcher's death to ours


class Lost(Exception):
    """Another rank is gone or does not answer. The stage ends with this text and exit code 3."""


class Ranks:
    """A context in which the ranks of a run are joined. An error on one of them ends all, and is told once.

    timeout is in seconds: for so long a rank waits for the others in a step. patient is a group whose
    collectives wait for as long as rank 0 may save, draw or evaluate. The error that leaves the context has
    told=True where another rank has said why the run ends; a rank that only lost the others then ends with
    SystemExit(3), and else with Lost, which names those that are gone or hang.
    """

    def __init__(self, world, timeout):
        self.world, self.timeout = world, timeout
        wait = datetime.timedelta(seconds=timeout)
        store, *_ = next(dist.rendezvous("env://", timeout=wait))
        # torchrun --max-restarts keeps its store, with what the ranks before left in it (PyTorch 2.14).
        self.store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=world.rank, world_size=world.size,
                                timeout=wait)
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            dist.destroy_process_group()
        elif is_loss(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)               # else torchrun's cuts this short
            silent = self.find_silent()
            if self.is_told():
                with contextlib.suppress(RuntimeError):
                    show_in_summary(self.store.get("reason").decode())
                raise SystemExit(3) from None
            lost = Lost(f"{self.fate(silent, error)}; --resume auto goes on from the last checkpoint")
            self.tell(lost)
            raise lost from None
        else:
            self.tell(error)
        return False

    def fate(self, silent, error):
        """What became of the silent ranks: the error is what their absence raised here."""
        names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "another rank"
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"gave no answer for {self.timeout:g} s (--timeout)" if late else "ended without a word"
        return f"{names} {what}" + f" in step {self.world.step}" * (self.world.step is not None)

    def find_silent(self, window=2.0):
        """The ranks that do not say within the window, in seconds, that they too have lost one."""
        others, silent, deadline = [], [], time.monotonic() + window
        with contextlib.suppress(RuntimeError):                         # the store is lost too
            self.store.set(f"waiting/{self.world.rank}", "")
            others = [rank for rank in range(self.world.size) if rank != self.world.rank]
            while time.monotonic() < deadline and not self.is_told():
                silent = [rank for rank in others if not self.store.check([f"waiting/{rank}"])]
                time.sleep(0.05)
        return silent

    def is_told(self):
        with contextlib.suppress(RuntimeError):
            return self.store.check(["reason"])
        return False

    def tell(self, error):
        """Leave word of why this rank ends, unless another one has."""
        text = "".join(traceback.format_exception_only(error)).strip()
        text, error.told = f"rank {self.world.rank}: {text}", False
        with contextlib.suppress(RuntimeError):
            error.told = self.store.add("ended", 1) > 1
            if not error.told:
                self.store.set("reason", text)
        show_in_summary(text)


def show_in_summary(text):
    """Let torchrun's summary of this rank's end hold a text: it is read from a file that torchrun named."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = dict(message=text, extraInfo=dict(py_callstack=text, timestamp=str(int(time.time()))))
        Path(path).write_text(json.dumps(dict(message=about)))


def is_loss(error):
    """Whether an error says no more than that a collective could not end."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "/gloo/" in str(error)


def watch_launcher(grace=GRACE):
    """End this process when the one that started it does: as SIGTERM would, and after the grace at once.

    A thread watches, since the main one may wait for a rank that will never answer.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        whisper("the launcher is gone")
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()
