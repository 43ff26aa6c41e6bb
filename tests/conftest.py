import os

os.environ.setdefault("TRITON_INTERPRET", "1")                          # before anything imports triton: timm does

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
            return {key: torch.tensor(file[key]) if file[key].dtype.kind in "fiu" else file[key] for key in file}
    return read


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
