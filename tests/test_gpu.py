"""The tests for a GPU pass too, in a process that sees it and compiles Triton's kernels: pytest -m gpu."""

import os
import subprocess
import sys

import pytest
import torch
from sources import ROOT


def environment_with_gpu():
    """The environment that pytest was started with, as far as GPUs are concerned."""
    environment, devices = dict(os.environ), os.environ["GPU_OF_TESTS"]
    del environment["CUDA_VISIBLE_DEVICES"], environment["TRITON_INTERPRET"]
    return environment if devices == "all" else environment | {"CUDA_VISIBLE_DEVICES": devices}


def test_other_tests_find_no_gpu_and_interpret_kernels():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TRITON_INTERPRET"] == "1"
    assert not torch.cuda.is_available()
    assert "CUDA_VISIBLE_DEVICES" not in environment_with_gpu() or os.environ["GPU_OF_TESTS"] != "all"


def test_the_tests_with_the_mark_gpu_pass_in_a_process_of_their_own():
    environment = environment_with_gpu()
    look = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    if subprocess.run(look, env=environment, capture_output=True, text=True).stdout.strip() != "True":
        pytest.skip("needs a GPU, and PyTorch finds none")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_a_gpu_each_of_them_is_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider",
               "tests/test_kernels_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" not in done.stdout
    assert "needs a GPU: PyTorch finds no CUDA device" in done.stdout
