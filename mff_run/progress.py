"""How far long work has come, how long it will take, and what it waits for."""

import contextlib
import sys
import time

import torch

from mff_run.output import ERASE


class Progress:
    """One line about long work, with the time that is left. On a terminal it is rewritten in place."""

    def __init__(self, total, done, world, every=30.0, text=""):
        self.total, self.first, self.is_main, self.every = total, done, world.is_main, every
        self.started = self.printed = time.monotonic()
        self.rewrites, self.text, self.open = sys.stdout.isatty(), text, False

    def show(self, done, text):
        """Print the line now; done counts in the units of total."""
        self.text = text
        if not self.is_main:
            return
        self.printed = time.monotonic()
        elapsed = self.printed - self.started
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        line = f"{100 * done / self.total:5.1f} %  {text}  {duration(elapsed)} gone, {duration(left)} left"
        print(ERASE + line if self.rewrites else line, end="" if self.rewrites else "\n", flush=True)
        self.open = self.rewrites

    def tick(self, done):
        """Print the last line again if it is long ago, so that a slow step is not taken for a dead one."""
        if time.monotonic() - self.printed > self.every:
            self.show(done, self.text)

    def say(self, text):
        """Print a line of its own."""
        if self.is_main:
            print("\n" * self.open + text, flush=True)
            self.open = False


class Meter(Progress):
    """The progress line of a training loop, which takes its micro-batches through next.

    It measures throughput and the time lost to waiting for data, and says early how long the run will take.
    peak_img_per_s is the throughput of devices that do nothing but multiply, of which mfu is the share; 0
    where it is not known. advice is said once, if data is late. instead, of the seconds of an image, is the
    command to try where a CPU takes too long.
    """

    def __init__(self, schedule, start, world, peak_img_per_s=0.0, advice="more --workers would help",
                 instead=None):
        super().__init__(schedule.stop * schedule.global_batch, start * schedule.global_batch, world)
        self.schedule, self.start, self.device, self.ranks = schedule, start, world.device, world.size
        self.peak_img_per_s, self.advice, self.instead = peak_img_per_s, advice, instead
        self.micro, self.asked = 0, time.monotonic()
        self.waited, self.read_at, self.read_step = 0.0, self.asked, start
        self.queued = torch.cuda.Event() if world.device.type == "cuda" else None

    def next(self, batches):
        """The next of these micro-batches."""
        if self.micro == 2:                                             # two have ended; the first warms up
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)                     # this once
            self.estimate(time.monotonic() - self.asked)
        self.tick(self.start * self.schedule.global_batch + self.micro * self.schedule.images_at_once)
        self.asked = time.monotonic()
        if self.queued:
            self.queued.record()
        batch = next(batches)
        if not self.queued or self.queued.query():                      # a GPU with work left loses no time
            self.waited += time.monotonic() - self.asked
        self.micro += 1
        return batch

    @contextlib.contextmanager
    def paused(self):
        """A context whose time counts neither as training nor as waiting: evaluations."""
        began = time.monotonic()
        yield
        self.read_at += time.monotonic() - began

    def foresee(self, seconds, rate):
        """Say before the first step how long the run will take at least: its micro-batches so many seconds.

        rate is that of the device, in TFLOP/s, from which seconds follow.
        """
        self.say(f"this {self.device.type.upper()} multiplies {1e3 * rate:.0f} GFLOP/s: a micro-batch takes "
                 f"{seconds:.1f} s or more, and the run {duration(self.total_of(seconds))} or more")
        self.warn_if_hopeless(seconds)

    def estimate(self, seconds):
        """Say how long the run will take, with micro-batches of so many seconds."""
        self.say(f"a micro-batch takes {seconds:.2f} s, so the run takes about "
                 f"{duration(self.total_of(seconds))}")
        self.warn_if_hopeless(seconds)

    def total_of(self, seconds):
        """Seconds of all steps, with micro-batches of so many."""
        return seconds * self.schedule.accumulation * (self.schedule.stop - self.start)

    def warn_if_hopeless(self, seconds):
        """Say once what to try where a CPU would take over a day."""
        if self.instead and self.device.type == "cpu" and self.total_of(seconds) > 86_400:
            each = seconds * self.ranks / self.schedule.images_at_once
            self.say(f"that is over a day on this CPU; to try it first: {self.instead(each)}")
            self.instead = None

    def read(self, done, loss, lr):
        """Show the line at step `done`; {img_per_s, data_wait, perhaps mfu} since it was last read."""
        now = time.monotonic()
        img_per_s = (done - self.read_step) * self.schedule.global_batch / (now - self.read_at)
        found = dict(img_per_s=img_per_s, data_wait=self.waited / (now - self.read_at))
        text = (f"step {done}/{self.schedule.stop}  loss {loss:.4f}  lr {lr:.1e}  {img_per_s:.0f} img/s  "
                f"{100 * found['data_wait']:.0f} % waiting for data")
        if self.peak_img_per_s:
            found["mfu"] = img_per_s / self.peak_img_per_s
            text += f"  {100 * found['mfu']:.1f} % MFU"
        self.show(done * self.schedule.global_batch, text)
        if found["data_wait"] > 0.1 and self.read_step > self.start and self.advice:        # not the first
            self.say(f"{100 * found['data_wait']:.0f} % of the time was lost to waiting for data: "
                     f"{self.advice}")
            self.advice = ""
        self.waited, self.read_at, self.read_step = 0.0, now, done
        return found


def duration(seconds):
    """Seconds as text: "0:00:42", or "3 days 4:05:06"."""
    days, seconds = divmod(int(seconds), 86_400)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days} day{'s' * (days > 1)} {clock}" if days else clock
