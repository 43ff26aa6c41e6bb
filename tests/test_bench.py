"""bench.py's byte model against what can be derived by hand, and the documentation against bench.py."""

import json
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


def documented(name):
    """The lines of a generated table in docs/kernels.md."""
    text = (ROOT / "docs/kernels.md").read_text()
    return text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].splitlines()


def test_the_table_of_the_documentation_is_what_bench_prints():
    assert documented("bytes") == list(bench.byte_table())


def test_the_comparison_with_torch_compile_is_what_the_results_hold():
    result = json.loads((ROOT / "results/ops_bytes.json").read_text())
    assert documented("compiled") == list(bench.compiled_table(result))
    for row in result["rows"]:                              # counted anew: only torch.compile's count is slow
        if row["case"].startswith("M=6"):
            arguments = bench.level_case(row["op"], 6, 50, 768, torch.bfloat16, result["batch"], "meta")
            kernel = getattr(kernels.triton_column(), row["op"])
            assert sum(bench.count_bytes(kernel, arguments)) == row["kernel"]
