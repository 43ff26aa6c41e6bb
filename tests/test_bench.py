"""bench.py's byte model against what can be derived by hand, and the documentation against bench.py."""

from pathlib import Path

import pytest
import torch

import bench
import kernels

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("M", [1, 2, 6, 12])
def test_the_sum_moves_what_its_equations_need(M):
    S = 4 * 5 * 64 * 2
    arguments = bench.level_case("layer_sum", M, 5, 64, torch.bfloat16, 4, "meta")
    forward, backward = bench.count_bytes(kernels.triton_column().layer_sum, arguments)
    assert forward == (M + 1) * S + 4 * M                   # logits are M numbers of 4 bytes
    assert backward == (2 * M + 1) * S + 2 * 4 * M


def test_the_table_of_the_documentation_is_what_bench_prints():
    text = (ROOT / "docs/kernels.md").read_text()
    table = text.split("<!-- bytes -->\n")[1].split("<!-- end -->")[0]
    assert table.splitlines() == list(bench.byte_table())
