"""What tests of stages ask of run folders: their state, their log, whether two are the same; two ranks."""

import os
import subprocess
import sys

import torch
from sources import ROOT

from mff_run.log import read_log

TIMES = ("img_per_s", "data_wait", "mfu", "seconds")                    # may differ between equal runs


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def log_of(folder):
    """The log without what may differ between equal runs."""
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in read_log(folder / "log.jsonl")]


def same_bits(a, b):
    """Whether two nested states hold the same values, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def assert_same_run(a, b):
    """All that the checkpoints of two runs hold is the same, settings apart, and their logs, times apart."""
    states = state_of(a), state_of(b)
    assert states[0].keys() == states[1].keys()
    for key in states[0].keys() - {"config"}:
        assert same_bits(states[0][key], states[1][key]), key
    assert log_of(a) == log_of(b)


def torchrun(ranks, *command):
    """What a stage says under torchrun with that many processes of one thread on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run([*launcher, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            text=True, timeout=240, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return result.stdout
