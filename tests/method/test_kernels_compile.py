"""Kernels compiled ahead of time for GPUs that need not be here: no spills, 16-byte loads, little memory."""

import json
import os
import subprocess
import sys

import pytest
from sources import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
STREAMING = ("layer_sum_forward", "layer_sum_backward", "layer_sum_norm_forward", "layer_sum_norm_backward",
             "patch_loss_backward")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A row for each kernel, case and target, from a process in which Triton compiles."""
    script = ROOT / "tests" / "compile_ahead.py"
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    command = [sys.executable, script, *TARGETS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled_for_every_target(rows):
    kernels = {row["kernel"] for row in rows}
    assert kernels == {*STREAMING, "logits_backward", "patch_loss_forward", "prepare_forward"}
    assert all({row["target"] for row in rows if row["kernel"] == kernel} == {*TARGETS} for kernel in kernels)


def test_no_kernel_spills_registers(rows):
    # ptxas trades up to four registers, 16 bytes, for one more program on a multiprocessor.
    assert [row for row in rows if row["spills"] > 16] == []


def test_shared_memory_is_below_48_kib(rows):
    assert max(row["shared"] for row in rows) < 48 * 1024


def test_streaming_kernels_move_16_bytes_at_a_time(rows):
    for row in rows:
        if row["target"] == "gfx942" and row["kernel"] not in ("layer_sum_forward", "layer_sum_backward"):
            continue                                    # twice as many threads a row: 8 bytes each
        if row["kernel"] in STREAMING:
            assert row["wide_loads"] and row["wide_stores"], row
        if row["kernel"] == "prepare_forward":
            assert row["wide_stores"], row
        if row["kernel"] == "patch_loss_forward" and "P=14" not in row["case"]:     # rows of 588 numbers
            assert row["wide_loads"] and row["wide_stores"], row
