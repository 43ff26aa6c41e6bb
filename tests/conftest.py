import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                           # for small models threads are a loss
os.environ.setdefault("TRITON_INTERPRET", "1")                          # before triton's import: timm does

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def golden():
    """golden(name) reads tests/golden/<name>.npz as a dict of tensors, and of arrays where they hold text."""
    def read(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        return {key: torch.tensor(value) if value.dtype.kind in "fiu" else value
                for key, value in arrays.items()}
    return read


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
