"""Set-up for all tests: one thread, kernels in Triton's interpreter, and the golden arrays.

Triton decides between interpreter and compiler when it is imported, once a process, and other packages import
it. So the variable is set first of all, and tests that compile start a process of their own with
TRITON_INTERPRET=0.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")                           # small models: threads do not help

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def golden():
    """golden(name) reads tests/golden/<name>.npz: a dict of tensors, and of arrays where they hold text."""
    def tensor(array):
        return torch.tensor(array) if array.dtype.kind in "fiu" else array

    def read(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as file:
            return {key: tensor(file[key]) for key in file}
    return read


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the embedded images are kept, for all tests of stages."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, cache):
    """The folder of a small MFF pre-training run, for the stages that come after it."""
    import train_pretrain
    from mff_min.config import parse
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
             "--data shapes:100 --global-batch 16 --batch-size 16 --steps 2 --device cpu").split()
    flags += ["--output-dir", str(folder), "--cache-dir", str(cache)]
    train_pretrain.main(parse(train_pretrain.Config, flags))
    return folder


@pytest.fixture(autouse=True)
def one_seed():
    """A test begins with this seed, and ends with as many threads as it began with: sums depend on them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
