"""bench.py: its byte model against what can be derived by hand, its records, and that work is equal."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import generated
import pytest
import torch

import bench
import kernels
from mff_bench import contenders, data, everything, imports, measure, ops, step
from mff_min.config import UserError
from mff_min.runtime import World

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("M", [1, 2, 6, 12])
def test_the_sum_moves_what_its_equations_need(M):
    S = 4 * 5 * 64 * 2
    arguments = ops.level_case("layer_sum", M, 5, 64, torch.bfloat16, 4, "meta")
    forward, backward = ops.count_bytes(kernels.triton_column().layer_sum, arguments)
    assert forward == (M + 1) * S + 4 * M                   # logits are M numbers of 4 bytes
    assert backward == (2 * M + 1) * S + 2 * 4 * M


def documented(name):
    """The lines of a generated table in docs/kernels.md."""
    text = (ROOT / "docs/kernels.md").read_text()
    return text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].splitlines()


def test_the_table_of_the_documentation_is_what_bench_prints():
    assert documented("bytes") == list(ops.byte_table())


def test_the_comparison_with_torch_compile_is_what_the_results_hold():
    result = json.loads((ROOT / "results/ops_bytes.json").read_text())
    assert documented("compiled") == list(ops.compiled_table(result))
    for row in result["rows"]:                              # counted anew: only torch.compile's count is slow
        if row["case"].startswith("M=6"):
            arguments = ops.level_case(row["op"], 6, 50, 768, torch.bfloat16, result["batch"], "meta")
            kernel = getattr(kernels.triton_column(), row["op"])
            assert sum(ops.count_bytes(kernel, arguments)) == row["kernel"]


# ---------------------------------------------------------------- what is recorded

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def benched(tmp_path, monkeypatch):
    """benched(flags) runs a subject with a short sample and returns what it wrote."""
    monkeypatch.setattr(measure, "LEAST_SECONDS", 1e-6)
    threads = torch.get_num_threads()

    def run(flags):
        bench.main([*flags.split(), "--output-dir", str(tmp_path)])
        return json.loads((tmp_path / f"{flags.split()[0]}_cpu.json").read_text())
    yield run
    torch.set_num_threads(threads)


def without(monkeypatch, *packages):
    """Make these packages look as if they were not installed."""
    find = measure.importlib.util.find_spec
    monkeypatch.setattr(measure.importlib.util, "find_spec",
                        lambda name, *more: None if name in packages else find(name, *more))


def check_record(found, subject):
    """What every record holds, and that each row is measured or says why not."""
    assert found["subject"] == subject and found["device"] == "cpu"
    assert found["command"] and found["environment"]["cpus"]
    assert torch.__version__.startswith(found["packages"]["torch"])
    rows = [row for group in found["groups"] for row in group["rows"]]
    assert rows and len(found["not_run"]) >= sum("not_run" in row for row in rows)
    for row in rows:
        assert ("not_run" in row) != ("median" in row), row
        if "seconds" in row:
            low, high = row["quartiles"]
            assert min(row["seconds"]) <= low <= row["median"] <= high <= max(row["seconds"])
    return rows


STEP = ("step --cases tiny --dtypes float32 --rounds 2 --minutes 5 --threads 1 --images 4 --workers 1 "
        "--no-peaks")


def test_step_records_every_stage_beside_its_peers(benched, monkeypatch):
    pytest.importorskip("timm")
    without(monkeypatch, "transformers", "lightly")
    found = benched(f"{STEP} --no-waiting")
    rows = check_record(found, "step")
    assert [group["stage"] for group in found["groups"]] == ["pretrain", "finetune", "probe"]
    timed = [row["name"] for row in rows if "median" in row]
    assert timed == ["mff_min MAE", "mff_min MFF_MAE", contenders.BASELINES["pretrain"],
                     *["mff_min", "timm"] * 2]
    missing = {row["name"]: row["not_run"] for row in rows if "not_run" in row}
    assert missing == {"Transformers ViTMAE": "transformers is not installed",
                       "lightly MAE": "lightly is not installed"}
    for group in found["groups"]:
        baseline = next(row for row in group["rows"] if group["baseline"] == f"{row['name']} float32 eager")
        assert baseline["speed_over_baseline"] == {"median": 1, "quartiles": [1, 1]} and group["rounds"] == 2
        for row in group["rows"]:
            if "median" in row:
                assert len(row["seconds"]) == 2 and row["img_per_s"] == group["batch"] / row["median"]
                assert 0 < row["mfu"] and row["time_over_ours"]["median"] > 0
                counts, rate = group["flops_per_image"], group["product_flops_per_s"]["float32"]
                flops = counts.get(row["name"], next(iter(counts.values())))
                assert math.isclose(row["mfu"], row["img_per_s"] * flops / rate)


def test_the_share_of_waiting_is_recorded(benched):
    found = benched(f"{STEP.replace('5', '0.1')} --stages probe")
    check_record(found, "step")
    waiting = found["groups"][-1]
    ours, *_ = waiting["rows"]
    assert waiting["stage"] == "waiting" and 0 < ours["data_wait"] < 1


def test_peak_memory_is_of_a_process_of_its_own():
    row = {"name": "mff_min", "dtype": "float32", "mode": "eager"}
    bad, late = row | {"name": "nobody"}, dict(row)
    group = {"name": "", "stage": "probe", "case": "tiny", "batch": 4, "rows": [row, bad]}
    step.add_peaks(group, measure.Budget(300), 1)
    assert row["peak_bytes"] >= row["before_bytes"] > 2 ** 20 and "code 1" in bad["peak_not_run"]
    step.add_peaks(group | {"rows": [late]}, measure.Budget(0), 1)
    assert late["peak_not_run"] == "its 0 seconds were over"
    assert list(measure.not_run(group))[0].startswith(": nobody float32 eager: peak memory: ")


def test_data_records_every_pipeline(benched):
    pytest.importorskip("torchvision")
    found = benched("data --rounds 1 --images 2")
    rows = {row["name"]: row for row in check_record(found, "data")}
    assert rows["torchvision"]["img_per_s"] > 0 and rows["mff_min, JPEG, simple"]["speed_over_baseline"]
    assert "GPU" in rows["mff_min, crop on the device"]["not_run"]
    assert 40_000 < found["files"]["mean_bytes"] < 160_000              # ImageNet's are 110 kB


def test_imports_are_recorded(benched, monkeypatch):
    monkeypatch.setattr(imports, "STATEMENTS", {"timm": ("nowhere", ""), "mff_min": ("torch", "import json")})
    timm, ours = check_record(benched("imports --rounds 1"), "imports")
    assert timm["not_run"] == "nowhere is not installed" and ours["statement"] == "import json"


def test_all_lists_what_did_not_run(benched, monkeypatch):
    monkeypatch.setattr(everything, "SHARES", {"data": 0.5, "bytes": 1.0})
    monkeypatch.setattr(everything, "flags_of", lambda subject, *more: ["--unknown"])
    data_row, bytes_row = check_all(benched("all --minutes 0.5"))
    assert data_row["not_run"] == "it ended with code 2" and "too few for it" in bytes_row["not_run"]


def check_all(found):
    """The rows of all_cpu.json, each of which names its subject, and was run or says why not."""
    rows, = (group["rows"] for group in found["groups"])
    assert [row["name"] for row in rows] == list(everything.SHARES)
    assert len(found["not_run"]) == sum("not_run" in row for row in rows)
    return rows


def test_the_flags_of_all_are_those_of_its_subjects(tmp_path):
    args = bench.parser().parse_args(["all", "--output-dir", str(tmp_path)])
    for on_gpu in (False, True):
        for subject in everything.SHARES:
            flags = everything.flags_of(subject, args, 1.5, on_gpu)
            there = bench.parser().parse_args([subject, *flags]).output_dir
            assert (ROOT / there).resolve() == tmp_path


# ---------------------------------------------------------------- equal work, in time

def planted(monkeypatch, peer):
    """Let a peer of ours take part in the probe: peer(case, device) builds it."""
    ours = contenders.STAGES["probe"]["mff_min"]
    stages = {"probe": {"ours": ours, "timm": dataclasses.replace(ours, build=peer,
                                                                  adapt=contenders.same_names)}}
    monkeypatch.setattr(contenders, "STAGES", stages)
    monkeypatch.setattr(step, "STAGES", stages)


@pytest.mark.parametrize("change, reason", [
    (None, None), ("weights", "unequal work: its loss is"), ("frozen", "unequal work: it trains"),
])
def test_a_peer_that_does_other_work_is_caught(monkeypatch, benched, change, reason):
    class Other(contenders.Probed):
        def forward(self, images, labels):
            return super().forward(images, labels) * (1.001 if change == "weights" else 1)

    def build(case, device):
        module = Other(contenders.ours_vit(case))
        module.probe.head.bias.requires_grad_(change != "frozen")
        return module
    planted(monkeypatch, build)
    _, peer = check_record(benched(f"{STEP} --stages probe --no-waiting"), "step")
    assert reason in peer["not_run"] if reason else "median" in peer


@pytest.mark.parametrize("name", contenders.PRETRAIN_PEERS)
def test_peers_of_pretraining_do_our_work(name):
    contender = contenders.STAGES["pretrain"][name]
    pytest.importorskip(contender.package)
    case, device = contenders.CASES["tiny"], torch.device("cpu")
    ours = contenders.STAGES["pretrain"]["mff_min MAE"].build(case, device)
    inputs = contenders.make_inputs("pretrain", case, 4, device)
    peer = contender.build(case, device)
    contender.adapt(peer, ours)
    contenders.check_equal(*(contenders.fingerprint(module, "pretrain", inputs) for module in (peer, ours)))
    norms = []
    for module in (ours, peer):
        module(*inputs).backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads))
    torch.testing.assert_close(*norms, rtol=256 * torch.finfo(torch.float32).eps, atol=0)


def test_what_does_not_fit_into_the_time_is_named(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def sample(name, seconds):
        def work(repeats):
            asked.append(name)
            now[0] += seconds * repeats
            return seconds
        return work
    samples = {"first": sample("first", 1), "long": sample("long", 10), "last": sample("last", 1)}
    seconds, left_out = measure.in_rounds(samples, 100, measure.Budget(20), WORLD)
    assert seconds == {"first": [1] * 3, "last": [1] * 3} and now == [20]      # 14 to warm up, 3 rounds of 2
    assert left_out == {"long": "it takes 10.0 s a round, which its 20 seconds had not left"}

    asked.clear()
    seconds, left_out = measure.in_rounds(samples, 100, measure.Budget(5), WORLD)
    assert seconds == {} and "last" not in asked and left_out["last"] == "its 5 seconds were over"


def test_contenders_take_turns_and_each_begins_a_round():
    order = []
    samples = {name: lambda repeats, name=name: order.append(name) or 1.0 for name in "abc"}
    seconds, _ = measure.in_rounds(samples, 3, measure.Budget(60), WORLD)
    assert "".join(order[-9:]) == "abcbcacab" and all(len(times) == 3 for times in seconds.values())


def test_ratios_are_taken_pair_by_pair():
    assert measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == {"median": 3.0, "quartiles": [2.5, 3.5]}
    row = measure.timed_row([2.0], 8, baseline=[4.0], ours=[1.0])
    assert row["img_per_s"] == 4 and row["speed_over_baseline"]["median"] == 2
    assert row["time_over_ours"]["median"] == 2


def test_a_type_that_a_cpu_does_not_multiply_is_named(monkeypatch):
    rates = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
    monkeypatch.setattr(step, "product", lambda device, dtype, side: lambda repeats: rates[dtype])
    assert list(step.slow_dtypes(["float32", "bfloat16"], torch.device("cpu"))) == ["bfloat16"]
    assert step.slow_dtypes(["bfloat16"], torch.device("cuda")) == {}


def test_flops_are_those_of_visible_tokens():
    case = contenders.Case("vit_b")
    flops = contenders.step_flops("pretrain", case, contenders.STAGES["pretrain"]["mff_min MAE"])
    T, D, L, E = 50, 768, 197, 512
    encoder = 12 * (12 * T * D * D + 2 * T * T * D)
    decoder = 8 * (12 * L * E * E + 2 * L * L * E)
    rest = 49 * D * 768 + T * D * E + 147 * E * 768
    assert abs(flops / (6 * (encoder + decoder + rest)) - 1) < 0.03     # the last block may do less


@pytest.mark.parametrize("flags, complaint", [
    ("step --device cuda:99", "--device cuda:99"), ("step --cases vit_x", "--cases vit_x: expected some of"),
    ("step --stages sleep", "--stages sleep: expected"), ("data --minutes 0", "expected a number above 0"),
    ("step --rounds few", "--rounds"), ("sing", "invalid choice: 'sing'"), ("data --speed 3", "--speed"),
])
def test_bad_flags_are_one_line(flags, complaint):
    with pytest.raises(UserError) as error:
        bench.main(flags.split())
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_the_drawn_jpegs_are_the_same_every_time(tmp_path):
    for name in "ab":
        data.draw_jpegs(tmp_path / name, 1)
    first, second = (path.read_bytes() for path in sorted(tmp_path.rglob("*.jpg")))
    assert first == second


# ---------------------------------------------------------------- the README's tables

def test_the_readme_copes_with_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    assert "\nNot run.\n" in generated.written("bench")
    ratio = {"median": 1.5, "quartiles": [1.25, 2]}
    rows = [{"name": "ours", "dtype": "float32", "mode": "eager", "median": 2.0, "img_per_s": 8.0, "mfu": 0.5,
             "speed_over_baseline": ratio, "peak_bytes": 2 ** 21}, {"name": "lightly", "not_run": "absent"},
            {"name": "a loop", "median": 1.0, "data_wait": 0.25}]
    record = {"device": "cpu", "environment": {"threads": 2}, "packages": {"torch": "2.15", "timm": None},
              "command": "python bench.py step", "groups": [{"name": "pretrain", "rows": rows}]}
    (tmp_path / "results" / "step_cpu.json").write_text(json.dumps(record))
    text = generated.written("bench")
    for line in ("`python bench.py step` on cpu, threads: 2 (torch 2.15):",
                 "| ours float32 eager | 8 | 1.50 [1.25, 2.00] | 50.0 | 2 |  |",
                 "| lightly | not run: absent | | | | |", "| a loop | 1.00 s |  |  |  | 25.0 |"):
        assert line in text.splitlines()
