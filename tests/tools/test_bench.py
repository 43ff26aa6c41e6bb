"""tools.bench: its byte model against what can be derived by hand, its records, and that work is equal."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import generated
import pytest
import torch
from sources import ROOT
from torch.utils.data import Dataset, default_collate

from mff_min import vit
from mff_min.errors import UserError
from mff_min.kernels import ops as kernels
from mff_run import flops
from mff_run.flops import product_tflops
from mff_run.world import World
from mff_tasks.boxes import levels_of
from tools.bench import __main__ as bench
from tools.bench import attention, contenders, data, detect, everything, imports, measure, ops, segment, step

pytest.importorskip("triton")


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


# ---------------------------------------------------------------- times of ops

class FakeGpu:
    """The clocks of a host, which launches, and of a GPU, which does what was launched once it is free."""
    host = device = 0.0                                     # milliseconds

    def launch(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.device, self.gpu.host)

    def query(self):
        return self.at <= self.gpu.host

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, stop):
        return stop.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGpu in the place of torch.cuda, for functions that launch on it."""
    gpu = FakeGpu()
    monkeypatch.setattr(ops, "time", SimpleNamespace(perf_counter=lambda: gpu.host / 1e3))
    cold = SimpleNamespace(zero_=lambda: gpu.launch(0.005, 0.1))
    monkeypatch.setattr(torch, "empty", lambda *_, **options: cold)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(0.005, cycles / 2e6))
    return gpu


@pytest.mark.parametrize("launches", [1, 20, 200])
def test_a_short_op_is_timed_on_the_gpu_and_not_on_the_host(gpu, launches):
    def op():
        for _ in range(launches):
            gpu.launch(0.05, 0.002)                         # the GPU is 25 times as fast as the host
    ms, host_bound = ops.milliseconds(op, "cuda")
    assert math.isclose(ms, 0.002 * launches, rel_tol=1e-6) and not host_bound


def test_what_is_made_for_a_call_is_not_timed(gpu):
    ms, _ = ops.milliseconds(lambda out: gpu.launch(0.05, out), "cuda", lambda: gpu.launch(1, 5) or (0.25,))
    assert math.isclose(ms, 0.25, rel_tol=1e-6)


def test_an_op_that_waits_for_the_gpu_is_marked(gpu):
    def op():
        gpu.host = max(gpu.host, gpu.device)
        gpu.launch(0.05, 0.002)
    assert ops.milliseconds(op, "cuda")[1]


def test_no_time_is_0_where_an_event_cannot_tell(gpu):
    assert ops.milliseconds(lambda: None, "cuda") == (5e-4, False)


def test_the_backward_pass_is_timed_alone(monkeypatch):
    """However much the forward pass varies, nothing of it is in the backward pass's time."""
    now, forward = [0.0], iter(range(10 ** 6, 0, -1000))

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            now[0] += next(forward)
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            now[0] += 0.003
            return dx
    monkeypatch.setattr(ops, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    forward_ms, backward_ms = ops.measure(Op.apply, (torch.ones(2, requires_grad=True),), "cpu")["ms"]
    assert backward_ms == pytest.approx(3, abs=1e-3) and forward_ms > 1e6


@pytest.mark.parametrize("column", ["compile", "triton"])
def test_a_backward_pass_can_be_timed_many_times(column):
    """A compiled one frees what was saved for it, and a kernel's op is PyTorch's own."""
    arguments = ops.level_case("layer_sum_norm", 3, 5, 64, torch.float32, 2, "cpu")
    op = kernels.triton_column().layer_sum_norm
    if column == "compile":
        op = torch.compile(kernels.TORCH.layer_sum_norm, fullgraph=True, backend="aot_eager")
    forward, backward = ops.measure(op, arguments, "cpu")["ms"]
    assert forward > 0 and backward > 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_no_small_error(wrong):
    def op(x):
        return x * wrong
    with pytest.raises(measure.NotRun, match="not finite"):
        ops.error(op, torch.clone, (torch.ones(2),))
    assert ops.error(lambda x: 1.5 * x, torch.clone, (torch.ones(2, requires_grad=True),)) == 0.5


# ---------------------------------------------------------------- what is recorded

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def benched(tmp_path, monkeypatch):
    """benched(flags) runs a subject with a short sample and returns what it wrote."""
    monkeypatch.setattr(measure, "LEAST_SECONDS", 1e-6)
    monkeypatch.setattr(step, "product_tflops", functools.partial(product_tflops, seconds=0.001))
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


def test_a_record_has_a_command_that_can_be_typed_and_no_path_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/home/me/mff/tools/bench/__main__.py", "step", "--threads", "2"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="tools.bench.__main__"))
    content = measure.Record("step", tmp_path, WORLD).content
    assert content["command"] == "python -m tools.bench step --threads 2"
    assert "/home/me" not in json.dumps(content)


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


def test_waiting_is_measured_with_a_compiled_step_where_compiling_is(benched, monkeypatch):
    compiled = []
    monkeypatch.setattr(step, "LOOP_SECONDS", 0.2)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: compiled.append(module) or module)
    without(monkeypatch, "timm")
    found = benched(f"{STEP} --stages probe --compile")
    check_record(found, "step")
    waiting = found["groups"][-1]
    *ours, peer = waiting["rows"]
    assert waiting["stage"] == "waiting" and [row["name"] for row in waiting["rows"]] == list(data.LOADERS)
    assert all(0 < row["data_wait"] < 1 and row["mode"] == "compiled" for row in ours)
    assert peer["not_run"] == "timm is not installed"
    assert len(compiled) == 2                               # the probe's step, and one for all three loaders


@pytest.mark.parametrize("idle", [False, True])
def test_a_gpu_that_has_work_left_waits_for_no_data(monkeypatch, idle):
    order = []
    event = SimpleNamespace(record=lambda: order.append("record"), query=lambda: idle)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))

    class Queued:
        device = torch.device("cuda")

        def __call__(self):
            order.append("step")
    found = step.waiting(Queued(), iter(range(10 ** 9)), measure.Budget(0.05), 1, 4)
    assert (found["data_wait"] > 0) == idle and found["steps"] > 0
    assert order[:3] == ["step", "wait", "record"] and order.count("wait") == 3     # not one a step


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_contender_without_memory_is_a_row_that_says_so(monkeypatch, benched):
    times = iter([1.0] * 3)
    samples = {"a": lambda repeats: 1.0, "b": lambda repeats: next(times, None) or out_of_memory(),
               "c": out_of_memory}
    seconds, left_out = measure.in_rounds(samples, 3, measure.Budget(60), WORLD)
    assert seconds == {"a": [1.0] * 3}
    assert left_out == {"b": "in round 2: out of memory", "c": "out of memory"}

    stepper = SimpleNamespace(peak_bytes=out_of_memory)
    assert step.peak_on_gpu(stepper) == {"peak_not_run": "out of memory"}
    planted(monkeypatch, out_of_memory)
    monkeypatch.setattr(step, "pretraining_step", out_of_memory)
    found = benched(f"{STEP} --stages probe")
    check_record(found, "step")
    (_, peer), loaders = (group["rows"] for group in found["groups"])
    assert {row["not_run"] for row in (peer, *loaders)} == {"out of memory"}


def test_peak_memory_is_of_a_process_of_its_own():
    row = {"name": "mff_min", "dtype": "float32", "mode": "eager"}
    bad, late = row | {"name": "nobody"}, dict(row)
    group = {"name": "", "stage": "probe", "case": "tiny", "batch": 4, "rows": [row, bad]}
    step.add_peaks(group, measure.Budget(300), 1)
    assert row["peak_bytes"] >= row["before_bytes"] > 2 ** 20 and "code 1" in bad["peak_not_run"]
    step.add_peaks(group | {"rows": [late]}, measure.Budget(0), 1)
    assert late["peak_not_run"] == "its 0 seconds were over"
    assert list(measure.not_run(group))[0].startswith(": nobody float32 eager: peak memory: ")


def test_attention_records_each_form_with_its_error(benched, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BATCH", 1)
    found = benched("attention --minutes 5")
    rows = check_record(found, "attention")
    assert len(found["groups"]) == len(attention.SHAPES) and len(rows) == 4 * len(attention.SHAPES)
    for row in rows:
        if row["dtype"] == "float32" or "median" in row:                # some CPUs multiply no bfloat16
            eps = torch.finfo(getattr(torch, row["dtype"])).eps
            assert 0 < row["error"] < 10 * eps and 0 < row["gradient_error"] < 20 * eps
            assert min(row["ms"]) > 0 and math.isclose(row["median"], sum(row["ms"]) / 1e3)
    assert all(set(group["choice_of_pytorch"]) == {"float32", "bfloat16"} for group in found["groups"])


def test_a_form_of_attention_that_refuses_or_errs_is_a_row_that_says_so(benched, monkeypatch, capsys):
    def refuses(q, k, v):
        warnings.warn("it wants wider heads", stacklevel=1)
        raise RuntimeError("No available kernel.\nMore.")
    forms = {"refuses": refuses, "breaks": lambda q, k, v: vit.attend_by_products(q, k, v) * math.inf,
             "unscaled": lambda q, k, v: (q @ k.mT).softmax(dim=-1) @ v}
    monkeypatch.setattr(attention, "FORMS", {"cpu": forms})
    monkeypatch.setattr(attention, "TYPES", {"cpu": ("float32",)})
    monkeypatch.setattr(attention, "SHAPES", {"last decoder block": (4, 5, 7, 2, 8)})
    refused, broken, wrong = check_record(benched("attention"), "attention")
    assert refused["not_run"] == "No available kernel. it wants wider heads"
    assert broken["not_run"] == "a result is not finite"
    assert wrong["error"] > 0.01 and wrong["gradient_error"] > 0.01
    assert "refuses float32      not run: No available kernel." in capsys.readouterr().out
    rows = check_record(benched("attention --minutes 1e-9"), "attention")
    assert {row["not_run"] for row in rows} == {"its 0 seconds were over"}


SEGMENT = "segment --sizes tiny --dtypes float32 --rounds 2 --minutes 5 --threads 1"


def test_segment_records_ours_beside_mmsegmentations_layers(benched):
    found = benched(SEGMENT)
    ours, peer = check_record(found, "segment")
    group, = found["groups"]
    assert (ours["name"], peer["name"]) == (segment.OURS, segment.PEER) and group["rounds"] == 2
    assert group["baseline"] == f"{segment.PEER} float32 eager"
    assert peer["speed_over_baseline"] == ours["time_over_ours"] == {"median": 1, "quartiles": [1, 1]}
    assert all(row["img_per_s"] == group["batch"] / row["median"] for row in (ours, peer))


def test_mmsegmentations_layers_do_our_work():
    """While they train, without dropout: the same logits, and the same gradient of each weight and token."""
    tokens, side, _ = segment.make_inputs(12, 6, 5, 3, "cpu")
    tokens = [x.detach().double().requires_grad_() for x in tokens]
    ours, peer = segment.Ours(12, 6, 4).double(), segment.Peer(12, 6, 4).double()
    peer.load_state_dict(ours.state_dict())
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    outputs, grads = [], []
    for module in (ours, peer):
        wanted = dict(module.named_parameters()) | {f"token {i}": x for i, x in enumerate(tokens)}
        outputs.append(module(tokens, side, None))
        found = torch.autograd.grad([x.square().sum() for x in outputs[-1]], list(wanted.values()))
        grads.append(dict(zip(wanted, found, strict=True)))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("change, reason", [
    (lambda peer: torch.nn.init.zeros_(peer.decode_head.bottleneck.conv.weight), "its main logits are"),
    (lambda peer: torch.nn.init.ones_(peer.auxiliary_head.conv_seg.bias), "its auxiliary logits are"),
    (lambda peer: setattr(peer.decode_head.bottleneck.conv, "bias", torch.nn.Parameter(torch.zeros(6))),
     "it trains"),
])
def test_layers_that_do_other_work_are_named(change, reason):
    tokens, side, _ = segment.make_inputs(12, 6, 5, 3, "cpu")
    ours, peer = segment.Ours(12, 6, 4), segment.Peer(12, 6, 4)
    peer.load_state_dict(ours.state_dict())
    segment.check_equal(peer, ours, tokens, side)
    assert peer.training and ours.training
    with torch.no_grad():
        change(peer)
    with pytest.raises(measure.NotRun, match=f"unequal work: {reason}"):
        segment.check_equal(peer, ours, tokens, side)


DETECT = "detect --sizes tiny --dtypes float32 --rounds 2 --minutes 5 --threads 1"


def test_detect_records_ours_beside_torchvisions(benched):
    pytest.importorskip("torchvision")
    found = benched(DETECT)
    ours, peer, *parts = check_record(found, "detect")
    group, = found["groups"]
    assert (ours["name"], peer["name"]) == (detect.OURS, detect.PEER) and group["rounds"] == 2
    assert group["baseline"] == f"{detect.PEER} float32"
    assert peer["speed_over_baseline"] == ours["time_over_ours"] == {"median": 1, "quartiles": [1, 1]}
    assert all(row["img_per_s"] == group["batch"] / row["median"] for row in (ours, peer))
    assert [row["name"] for row in parts] == ["NMS of ours", "RoIAlign of ours"]
    assert all(0 < row["share"] == row["median"] / ours["median"] for row in parts)


def test_detect_without_torchvision_says_so(benched, monkeypatch):
    without(monkeypatch, "torchvision")
    ours, peer, *parts = check_record(benched(DETECT), "detect")
    assert peer["not_run"] == "torchvision is not installed"
    assert all("median" in row for row in (ours, *parts))


def tiny_detectors():
    """(ours, torchvision's, images, objects, noise) of the smallest size."""
    ours = detect.build("tiny")
    return ours, detect.peer_of(ours, 8, 3), *detect.make_inputs("tiny", ours, "cpu")


def test_torchvisions_detector_has_our_anchors_pooling_and_numbers():
    image_list = pytest.importorskip("torchvision.models.detection.image_list")
    ours, peer, images, targets, _ = tiny_detectors()
    losses = peer(*detect.arguments_of(detect.PEER, images, targets, None))
    assert len(losses) == 5 and all(loss.isfinite() for loss in losses.values())
    trained = [sum(p.numel() for p in module.parameters()) for module in (ours, peer)]
    assert trained[1] - trained[0] == 4 * (4 * 8 + 1) + (8 + 1)        # boxes and masks of the background
    levels, regions = ours.encode(images), ours.anchors[::7]
    made = peer.rpn.anchor_generator(image_list.ImageList(images, [(16, 16)] * 2), levels)[0]
    assert torch.equal(made, ours.anchors.round())
    strides = torch.tensor(ours.strides)[levels_of(regions, 4, 56)]     # its RoIAlign is half a cell off
    names, moved = dict(zip("0123", levels, strict=False)), regions - 0.5 * strides[:, None]
    found = peer.roi_heads.box_roi_pool(names, [moved] * 2, [(16, 16)] * 2)
    torch.testing.assert_close(found, ours.pool(levels, [regions] * 2, 7), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("change, reason", [
    (lambda peer: torch.nn.init.zeros_(peer.rpn.head.cls_logits.weight), "its objectness logits are"),
    (lambda peer: torch.nn.init.ones_(peer.roi_heads.box_head[5].bias), "its class logits are"),
    (lambda peer: torch.nn.init.ones_(peer.roi_heads.mask_predictor.mask_fcn_logits.bias), "its mask logits"),
])
def test_a_detector_that_does_other_work_is_named(change, reason):
    pytest.importorskip("torchvision")
    ours, peer, images, *_ = tiny_detectors()
    detect.check_equal(peer, ours, images)
    change(peer)
    with pytest.raises(measure.NotRun, match=f"unequal work: {reason}"):
        detect.check_equal(peer, ours, images)


def test_the_bytes_of_a_detectors_step_are_what_can_be_derived():
    ours, found = detect.build("tiny"), detect.step_bytes("tiny", torch.float32)
    levels, R, D = sum(rows * columns for rows, columns in ours.grids[:4]), 16, 8
    features = 4 * R * 7 * 7 * D                            # of RoIAlign, in bytes
    tables = 8 * R * 7 * 7 * 16                             # an index and a weight for each of 16 cells
    forward, backward = found["RoIAlign of boxes"]
    assert forward > 3 * 4 * levels * D + features + tables
    assert backward >= 4 * levels * D + features + tables
    assert found["AdamW"] == [28 * sum(p.numel() for p in ours.parameters()), 0]
    assert all(forward > 0 for forward, _ in found.values())


def test_the_share_of_boxes_in_the_documentation_is_what_the_results_hold():
    result = json.loads((ROOT / "results/boxes_bytes.json").read_text())
    assert documented("detect") == list(detect.byte_table(result))
    for dtype, together in (("bfloat16", 0.07), ("float32", 0.04)):
        shares = {row["part"]: row["share"] for row in result["rows"] if row["dtype"] == dtype}
        assert math.isclose(sum(shares.values()), 1)
        boxes = shares["NMS"], shares["RoIAlign of boxes"] + shares["RoIAlign of masks"]
        assert max(boxes) < 0.05 and round(sum(boxes), 2) == together


def test_data_records_every_pipeline(benched):
    pytest.importorskip("torchvision")
    found = benched("data --rounds 1 --images 2")
    rows = {row["name"]: row for row in check_record(found, "data")}
    assert all(row["img_per_s"] > 0 and row["speed_over_baseline"] for row in rows.values())
    assert 40_000 < found["files"]["mean_bytes"] < 160_000              # ImageNet's are 110 kB


class Busy(Dataset):
    """Items that take a worker 10 ms of CPU time each, and a second more when it starts."""
    started = False

    def __getitem__(self, index):
        end = time.process_time() + (0.01 if self.started else 1.0)
        self.started = True
        while time.process_time() < end:
            pass
        return index


def test_a_worker_is_timed_in_its_own_process_once_it_runs():
    before = time.process_time()
    seconds = data.worker_clock(Busy(), default_collate, 4)(3)
    assert 0.04 <= seconds < 0.3 and time.process_time() - before < 1


def test_imports_are_recorded(benched, monkeypatch):
    monkeypatch.setattr(imports, "STATEMENTS", {"timm": ("nowhere", ""), "mff_min": ("torch", "import json"),
                                                "lightly": ("torch", "import json.nothing")})
    timm, ours, broken = check_record(benched("imports --rounds 1"), "imports")
    assert timm["not_run"] == "nowhere is not installed" and ours["statement"] == "import json"
    assert broken["not_run"].startswith("ModuleNotFoundError: No module named 'json.nothing'")


def test_all_lists_what_did_not_run(benched, monkeypatch):
    monkeypatch.setitem(everything.SHARES, "cpu", {"data": 0.5, "bytes": 1.0})
    monkeypatch.setattr(everything, "flags_of", lambda subject, *more: ["--unknown"])
    data_row, bytes_row = check_all(benched("all --minutes 0.5"))
    assert data_row["not_run"] == "it ended with code 2" and "too few for it" in bytes_row["not_run"]


def test_all_runs_its_subjects(benched, monkeypatch, tmp_path):
    flags = f"{STEP} --stages probe --no-waiting --output-dir {tmp_path}".split()
    monkeypatch.setitem(everything.SHARES, "cpu", {"step": 1.0})
    monkeypatch.setattr(everything, "flags_of", lambda *_: flags[1:])
    row, = check_all(benched("all"))
    assert "not_run" not in row and row["seconds"] > 0
    check_record(json.loads((tmp_path / "step_cpu.json").read_text()), "step")


def test_a_stopped_all_leaves_no_process_behind(tmp_path, monkeypatch):
    (tmp_path / "tools" / "bench").mkdir(parents=True)
    (tmp_path / "tools" / "bench" / "__main__.py").write_text("import os, pathlib, time\n"
                                                              "pathlib.Path('pid').write_text(str(os.getpid()))\n"
                                                              "os.kill(os.getppid(), 15)\n"
                                                              "time.sleep(600)\n")
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            everything.run_part("data", [], 60)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def check_all(found):
    """The rows of all_cpu.json, each of which names its subject, and was run or says why not."""
    rows, = (group["rows"] for group in found["groups"])
    assert [row["name"] for row in rows] == list(everything.SHARES["cpu"])
    assert len(found["not_run"]) == sum("not_run" in row for row in rows)
    return rows


def test_the_flags_of_all_are_those_of_its_subjects(tmp_path):
    args = bench.parser().parse_args(["all", "--output-dir", str(tmp_path)])
    for device, shares in everything.SHARES.items():
        for subject in shares:
            flags = everything.flags_of(subject, args, 1.5, device == "cuda")
            there = bench.parser().parse_args([subject, *flags]).output_dir
            assert (ROOT / there).resolve() == tmp_path


@pytest.fixture
def fake_gpu(monkeypatch):
    """The seconds gone on a GPU that compiles a step in 40 s, first does it in 5 s and later in 0.1 s."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    world = World(0, 1, 0, torch.device("cuda"))

    def spend(first, later):
        costs = iter([first])

        def sample(repeats):
            seconds = next(costs, later)
            now[0] += seconds * repeats
            return seconds
        return sample

    def enter(stage, case, inputs, options, budget, device):
        now[0] += 3.0 * len(contenders.STAGES[stage])
        keys = step.keys_of(stage, options)
        steppers = {key: spend(40.0 if key[2] == "compiled" else 5.0, 0.1) for key in keys}
        return steppers, {}, dict.fromkeys(contenders.STAGES[stage], (1.0, 1))

    def multiply(device, dtype):
        now[0] += 0.5
        return 790.0 if now[0] < 200 else 810.0

    def waiting(stepper, batches, budget, parts, batch):
        stepper(1)
        now[0] += min(20.0, budget.share(parts).seconds)
        return {"median": 0.1, "img_per_s": 10 * batch, "data_wait": 0.0, "steps": 10}
    for module in (measure, step):
        monkeypatch.setattr(module, "time", clock)
    for name, value in (
            ("start_world", lambda device: contextlib.nullcontext(world)), ("enter", enter),
            ("product_tflops", multiply), ("stopwatch", lambda sample, device: sample),
            ("make_inputs", lambda *_: None), ("step_flops", lambda *_: 1.0), ("waiting", waiting),
            ("peak_on_gpu", lambda stepper: {"peak_bytes": 1}),
            ("pretraining_step", lambda *_: spend(40.0, 0.1))):
        monkeypatch.setattr(step, name, value)
    for name in ("draw_jpegs", "packed_source"):
        monkeypatch.setattr(data, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU / 2")
    monkeypatch.setitem(flops.DATASHEET, "A GPU / 2", 1000)
    return now


@pytest.mark.parametrize("subject", ["all", "step"])
def test_on_a_gpu_pretraining_in_bfloat16_is_measured_first_and_in_time(tmp_path, fake_gpu, subject):
    args = bench.parser().parse_args([subject, "--output-dir", str(tmp_path)])
    if subject == "all":
        minutes = args.minutes * everything.SHARES["cuda"]["step"]
        flags = everything.flags_of("step", args, minutes, True)
        args = bench.parser().parse_args(["step", *flags, "--output-dir", str(tmp_path)])
    step.bench_step(args)
    found = json.loads((tmp_path / "step_A_GPU_2.json").read_text())
    first, second, *_ = found["groups"]
    assert (first["stage"], first["case"], second["stage"]) == ("pretrain", "vit_b", "waiting")
    rows = {(row["name"], row["mode"]): row for row in first["rows"]
            if row["dtype"] == "bfloat16" and "median" in row}
    assert {name for name, mode in rows if mode == "compiled"} == set(contenders.STAGES["pretrain"])
    assert all(len(row["seconds"]) == args.rounds and row["median"] == 0.1 for row in rows.values())
    assert all("median" in row and row["mode"] == "compiled" for row in second["rows"])
    assert first["product_flops_per_s"]["bfloat16"] == 800e12           # 790 before the rounds, 810 after
    for row in rows.values():
        assert math.isclose(row["mfu"], row["img_per_s"] / 800e12)
        assert math.isclose(row["mfu_datasheet"], row["img_per_s"] / 1000e12)
    assert fake_gpu[0] < 60 * args.minutes + everything.GRACE


# ---------------------------------------------------------------- equal work, in time

def planted(monkeypatch, peer):
    """Let a peer of ours take part in the probe: peer(case, device) builds it."""
    ours = contenders.STAGES["probe"]["mff_min"]
    peer = dataclasses.replace(ours, build=peer, adapt=contenders.same_names)
    stages = contenders.STAGES | {"probe": {"ours": ours, "timm": peer}}
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


def test_a_compiler_is_not_timed_and_not_begun_too_late(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def compiled():
        costs = iter([40.0])

        def sample(repeats):
            seconds = next(costs, 0.25)
            now[0] += seconds * repeats
            return seconds
        return sample
    samples = {name: compiled() for name in "abcd"}
    seconds, left_out = measure.in_rounds(samples, 3, measure.Budget(140), WORLD, "", "abcd")
    assert seconds == {name: [0.25] * 3 for name in "abc"}
    assert left_out == {"d": "compiling takes about 40 s, and 19 s were left"} and now[0] < 140

    samples = {name: compiled() for name in "ab"}
    seconds, _ = measure.in_rounds(samples, 3, measure.Budget(42), WORLD, "", "ab")
    assert seconds == {"a": [0.25] * 3}                     # a tenth of the budget is for the rounds


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
    rates = {torch.float32: 0.1, torch.bfloat16: 0.001}
    monkeypatch.setattr(step, "product_tflops", lambda device, dtype, **options: rates[dtype])
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
    ("step --rounds few", "--rounds"), ("segment --sizes huge", "--sizes huge: expected some of"),
    ("segment --dtypes int8", "--dtypes int8: expected some of"),
    ("detect --sizes huge", "--sizes huge: expected some of"),
    ("sing", "invalid choice: 'sing'"), ("data --speed 3", "--speed"),
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
    rows = [{"name": "fast", "median": 1.0, "img_per_s": 2048.5},
            {"name": "ours", "dtype": "float32", "mode": "eager", "median": 2.0, "img_per_s": 8.0, "mfu": 0.5,
             "speed_over_baseline": ratio, "peak_bytes": 2 ** 21}, {"name": "lightly", "not_run": "absent"},
            {"name": "a loop", "median": 1.0, "data_wait": 0.25},
            {"name": "on a GPU", "median": 1.0, "img_per_s": 8.0, "mfu": 0.5, "mfu_datasheet": 0.375}]
    record = {"device": "cpu", "environment": {"threads": 2}, "packages": {"torch": "2.15", "timm": None},
              "command": "python -m tools.bench step", "groups": [{"name": "pretrain", "rows": rows}]}
    (tmp_path / "results" / "step_cpu.json").write_text(json.dumps(record))
    text = generated.written("bench")
    for line in ("`python -m tools.bench step` on cpu, threads: 2 (torch 2.15):",
                 "| fast | 2050 |  |  |  |  |",
                 "| ours float32 eager | 8 | 1.50 [1.25, 2.00] | 50.0 | 2 |  |",
                 "| lightly | not run: absent | | | | |", "| a loop | 1.00 s |  |  |  | 25.0 |",
                 "| on a GPU | 8 |  | 50.0 (37.5 of the data sheet) |  |  |"):
        assert line in text.splitlines()
