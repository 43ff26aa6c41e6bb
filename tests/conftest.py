"""Set-up for all tests: one thread, no GPU, kernels in Triton's interpreter, and the golden arrays.

pytest means the same on every machine: tests find no GPU and interpret Triton's kernels. Only the tests with
the mark gpu are for one; `pytest -m gpu` runs them, and test_gpu.py starts that process. Triton decides
between interpreter and compiler when it is imported, and PyTorch finds its GPUs once per process, so both
variables are set before anything else.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                           # small models: threads do not help

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]                      # for the tests in the rooms


def pytest_configure(config):
    """Choose between the two kinds of process before a test module is imported."""
    for_gpu = config.option.markexpr == "gpu"
    os.environ["TRITON_INTERPRET"] = "0" if for_gpu else "1"
    if not for_gpu:
        os.environ["GPU_OF_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")      # for test_gpu.py
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from faults.suite import hear_signals
    hear_signals()


def pytest_collection_modifyitems(config, items):
    """Skip the tests with the mark gpu where they cannot run, and say why."""
    if config.option.markexpr != "gpu":
        reason = "needs a GPU: test_gpu.py runs it in a process of its own, as pytest -m gpu does"
    else:
        from mff_min.kernels.ops import missing_for_triton
        if not (missing := missing_for_triton(torch.device("cuda"))):
            return
        reason = f"needs a GPU: {missing}"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture
def symbols(monkeypatch):
    """torch.compile makes one graph and no code. The list holds the graph's inputs of symbolic size."""
    from torch._dynamo.backends.registry import lookup_backend  # loads Triton
    compile, generate, found = torch.compile, lookup_backend("aot_eager"), []

    def backend(graph, inputs):
        sizes = [size for x in inputs for size in (x, *getattr(x, "shape", ()))]
        found.extend(size for size in sizes if isinstance(size, torch.SymInt))
        return generate(graph, inputs)
    monkeypatch.setattr(torch, "compile",
                        lambda module, **options: compile(module, backend=backend, fullgraph=True, **options))
    return found


@pytest.fixture(autouse=True)
def one_seed():
    """A test begins with this seed, and ends with as many threads as it began with: sums depend on them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
