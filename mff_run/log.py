"""What a run writes down: log.jsonl, and bad_samples.jsonl."""

import json
import os
from pathlib import Path

from mff_min.errors import Fault
from mff_run import files
from mff_run.jsonfile import read_lines


class Log:
    """log.jsonl, one JSON object per line, written by rank 0. A resumed run drops the lines after its step.

    A line that is not the run's is kept as it is, but for a last one without an end, which a crash tore.
    evaluated says whether the evaluation at that step is among the others.
    """

    def __init__(self, folder, world, step):
        self.path, self.world, self.evaluated, kept = Path(folder) / "log.jsonl", world, False, []
        for _, text, line in lines_in(self.path) if step > 0 else ():
            if line is None:
                kept += [text] * text.endswith(b"\n")
            # "done" marks the last line of a finished run: one that goes on writes it anew.
            elif (step_of(line) or 0) <= step and "done" not in line:
                kept.append(text.rstrip(b"\n") + b"\n")
                self.evaluated = self.evaluated or step_of(line) == step and "val_images" in line
        if world.is_main:
            files.write_atomically(self.path, lambda file: file.write(b"".join(kept)))

    def write(self, **values):
        """Append one line; values are plain numbers, lists or text and hold at least step."""
        if self.world.is_main:
            files.check_lock(self.path.parent, self.world)
            files.append_line(self.path, values)


def read_log(path, say=lambda text: None):
    """The lines of a log.jsonl as dicts; a line that a crash tore is skipped, and a missing file has none.

    say(text) is told the number of a line that is skipped. Raises UserError where path is no plain file.
    """
    return list(each_line(path, say))


def each_line(path, say=lambda text: None):
    """The lines of read_log, one at a time: a log may have millions."""
    for number, _, line in lines_in(path):
        if line is not None:
            yield line
        else:
            say(f"warning: line {number} of {path} is torn and is left out")


def lines_in(path):
    """read_lines of a file that may be missing, with None for a line that is no object."""
    for number, text, line in read_lines(path) if os.path.exists(path) else ():
        yield number, text, line if isinstance(line, dict) else None


def step_of(line):
    """The step of a log's line, or None where it is a line of somebody else's."""
    return line["step"] if type(line.get("step")) is int else None


class BadSamples:
    """The files that could not be read: counted, warned about, and each named once in bad_samples.jsonl.

    The file names the first MOST_NAMED of them.
    """

    MOST_NAMED = 10_000

    def __init__(self, folder, world, num_samples, max_bad):
        self.path, self.world = Path(folder) / "bad_samples.jsonl", world
        self.num_samples, self.max_bad = num_samples, max_bad
        self.seen = {str(line.get("name")) for line in read_log(self.path)}         # before it was resumed
        self.new = {}

    def add(self, entries):
        """Note a batch's (name, reason) pairs."""
        self.new.update((name, reason) for name, reason in entries if name not in self.seen)

    def report(self, say=print):
        """Agree among ranks on what is new, write it down and say so.

        Raises Fault when more than max_bad of the samples are bad.
        """
        new = {name: reason for found in self.world.all_gather(self.new) for name, reason in found.items()}
        self.new, first, left = {}, not self.seen, max(self.MOST_NAMED - len(self.seen), 0)
        self.seen.update(new)
        if not new:
            return
        if self.world.is_main:
            for name, reason in sorted(new.items())[:left]:
                files.append_line(self.path, dict(name=name, reason=reason))
            name = min(new)
            example = f", {json.dumps(name)} for one ({new[name]}); {self.path} names them" * first
            say(f"warning: {len(self.seen)} of {self.num_samples} images cannot be read and are replaced "
                f"by others{example}")
        if len(self.seen) > self.max_bad * self.num_samples:
            raise Fault(f"{len(self.seen)} of {self.num_samples} images cannot be read, more than --max-bad "
                        f"{self.max_bad} allows; {self.path} names them")
