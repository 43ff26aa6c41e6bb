"""Every op in plain PyTorch, compiled and in Triton: its time, the bytes that it moves, its memory and error.

On a GPU that is milliseconds, bytes moved by count, peak memory, the error against float64, and the rate as
a share of a plain copy's, measured in the same run. The rate is of the bytes that the kernel has to move, in
every column: a higher share is a shorter time. Without a GPU it is the bytes by count and the times of plain
PyTorch on a small batch.

Shapes: B images, T tokens, D width, M levels, C H W, P patch side, K masked patches, N = P * P * C.
"""

import itertools
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mff_min.kernels import ops as kernels
from mff_run.files import write_json
from mff_run.world import start_world
from tools.bench.measure import FAILURES, NotRun, reason_of, result_path

HEAD = ("op", "case", "column", "forward ms", "backward ms", "forward GB", "backward GB",
        "forward % copy", "backward % copy", "peak MB", "error")


# ---- what is measured

def level_case(op, M, T, D, dtype, B, device):
    """Arguments of one of the three sums over levels, as a model keeps them: parameters in float32."""
    xs = [torch.randn(B, T, D, device=device, dtype=dtype).requires_grad_() for _ in range(M)]
    logits = torch.zeros(M, 1, 1, 1, device=device).requires_grad_()
    weight, bias = torch.ones(D, device=device), torch.zeros(D, device=device)
    norm = weight.requires_grad_(), bias.requires_grad_(), 1e-6
    if op == "layer_sum":
        return xs, logits
    if op == "layer_sum_norm":
        return xs, logits, *norm
    projections = [(torch.randn(D, D, device=device, dtype=dtype).div_(D ** 0.5).requires_grad_(),
                    torch.zeros(D, device=device, dtype=dtype).requires_grad_()) for _ in range(M - 1)]
    return xs, logits.detach().to(dtype).requires_grad_(), projections, *norm


def loss_case(images, dtype, B, device):
    """Arguments of patch_loss: three quarters of the 16-pixel patches of 224-pixel images are masked."""
    pred = torch.randn(B, 147, 768, device=device, dtype=dtype).requires_grad_()
    ids = torch.rand(B, 196, device=device).argsort(dim=1)[:, :147]
    if images == torch.uint8:
        pixels = torch.randint(256, (B, 3, 224, 224), device=device, dtype=torch.uint8)
        return pred, pixels, ids, 16, True, torch.zeros(3, device=device), torch.ones(3, device=device)
    return pred, torch.randn(B, 3, 224, 224, device=device), ids, 16, True


def prepare_case(mixed, dtype, B, device):
    """Arguments of prepare: normalise, and when mixed also mixup and CutMix."""
    images = torch.randint(256, (B, 3, 224, 224), device=device, dtype=torch.uint8)
    mean, std = torch.full((3,), 0.45, device=device), torch.full((3,), 0.22, device=device)
    if not mixed:
        return images, mean, std, dtype
    partner = torch.arange(B, device=device).flip(0)
    box = torch.tensor([[40, 60, 150, 200]], device=device).expand(B, 4).contiguous()
    return images, mean, std, dtype, partner, torch.full((B,), 0.5, device=device), box


def cases():
    """(op, words, arguments of (B, device)) of every row, those that matter most first."""
    half, single = torch.bfloat16, torch.float32
    grid = list(itertools.product((50, 197), (6, 2, 12), (768, 384, 1024), (half, single)))
    for i, (T, M, D, dtype) in enumerate(grid):
        for op in ("layer_sum", "layer_sum_norm", "project_sum_norm"):
            if op != "project_sum_norm" or (M, D, dtype) == (6, 768, half):
                words = f"M={M} T={T} D={D} {short(dtype)}"
                yield op, words, lambda B, device, a=(op, M, T, D, dtype): level_case(*a, B, device)
        if i == 0:
            for images, dtype in ((torch.uint8, half), (single, half), (single, single)):
                words = f"{short(images)} images, {short(dtype)}"
                yield "patch_loss", words, lambda B, device, a=(images, dtype): loss_case(*a, B, device)
            for mixed, dtype in ((False, half), (True, half), (True, single)):
                words = f"{'mixup, cutmix' if mixed else 'normalise'}, {short(dtype)}"
                yield "prepare", words, lambda B, device, a=(mixed, dtype): prepare_case(*a, B, device)


def short(dtype):
    """A type's short name."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "uint8"}[dtype]


# ---- bytes by count

class ByteCount(TorchDispatchMode):
    """Counts the bytes that operations inside it move: each reads its inputs and writes its results once."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        memory = {t.untyped_storage()._cdata for t in read}
        view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in memory for t in written)
        if not view and "empty" not in func.__name__ and func.namespace != "prim":
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in read + written)
        return out


def count_bytes(op, arguments):
    """Bytes that the forward and the backward pass of op move; the arguments are tensors without memory."""
    with ByteCount() as forward:
        out = op(*arguments)
    wanted = trainable(arguments)
    if not wanted:
        return forward.total, 0
    cotangent = torch.empty_like(out)
    with ByteCount() as backward:
        torch.autograd.grad(out, wanted, cotangent)
    return forward.total, backward.total


def trainable(arguments):
    """Every tensor of the arguments that has a gradient."""
    return [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]


def byte_table(batch=256):
    """Lines of a Markdown table: bytes of every case by count, of plain PyTorch and of the kernels."""
    fused = kernels.triton_column()
    yield "| op | case | PyTorch GB, forward + backward | kernel GB, forward + backward | ratio |"
    yield "|---|---|---|---|---|"
    for op, words, arguments in cases():
        if "M=" in words and "T=50 D=768 bf16" not in words:
            continue                                        # bytes grow with T, D and the type, ratios do not
        plain = count_bytes(getattr(kernels.TORCH, op), arguments(batch, "meta"))
        kernel = count_bytes(getattr(fused, op), arguments(batch, "meta"))
        columns = [f"{a / 1e9:.3f} + {b / 1e9:.3f}" for a, b in (plain, kernel)]
        yield f"| {op} | {words} | {columns[0]} | {columns[1]} | {sum(plain) / sum(kernel):.2f} |"


def compiled_bytes(op, arguments):
    """Bytes that torch.compile's graphs of op move, forward and backward, as Inductor itself counts them."""
    from torch._inductor.graph import GraphLowering
    counts, generate = [], GraphLowering.codegen

    def generate_and_count(graph):
        code = generate(graph)
        counts.append(graph.count_bytes()[0])
        return code
    torch.compiler.reset()
    with mock.patch.object(GraphLowering, "codegen", generate_and_count), \
            torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(op, fullgraph=True, dynamic=False)(*arguments)
        if trainable(arguments):
            torch.autograd.grad(out, trainable(arguments), torch.ones_like(out))
    return sum(counts)


def bench_bytes(output_dir, batch=8):
    """Write ops_bytes.json: what PyTorch, torch.compile and the kernels move, by count; needs no GPU."""
    rows, fused = [], kernels.triton_column()
    for op, words, arguments in cases():
        if op == "project_sum_norm" or "M=" in words and "T=50 D=768 bf16" not in words:
            continue                                        # its product is torch.compile's own
        plain, kernel = getattr(kernels.TORCH, op), getattr(fused, op)
        rows.append({"op": op, "case": words, "pytorch": sum(count_bytes(plain, arguments(batch, "meta"))),
                     "compiled": compiled_bytes(plain, arguments(batch, "cpu")),
                     "kernel": sum(count_bytes(kernel, arguments(batch, "meta")))})
        print_row(rows[-1].values())
    path = Path(output_dir) / "ops_bytes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"torch": torch.__version__, "batch": batch, "rows": rows})
    print(f"\nwrote {path}")


def compiled_table(result):
    """Lines of a Markdown table: what torch.compile moves for every byte that a kernel moves."""
    yield "| op | case | torch.compile / kernel |"
    yield "|---|---|---|"
    for row in result["rows"]:
        yield f"| {row['op']} | {row['case']} | {row['compiled'] / row['kernel']:.2f} |"


# ---- time, memory, error

LEAST_CYCLES, MOST_CYCLES = 2 ** 18, 2 ** 27                           # 0.1 and 70 ms at 2 GHz


def milliseconds(function, device, make=tuple, seconds=0.15):
    """(median time of function(*make()), whether that is the host's time) with a cold cache on a GPU.

    make is not timed. The GPU sleeps before the first event, so that the host has launched everything when
    its clock starts. Where the host was later, the next sleep is twice as long, and the time only counts if
    no sleep was long enough: function waits for the GPU. On a CPU it is the shortest of five.
    """
    if device == "cpu":
        return min(timed(function, make()) for _ in range(5)), False
    cold = torch.empty(256 * 2 ** 20, dtype=torch.uint8, device=device)     # larger than the cache
    times, late, cycles = [], [], LEAST_CYCLES
    end_of_warm_up, end = time.perf_counter() + seconds / 3, time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5 and len(late) < 20:
        ms, host_was_late = timed_on_gpu(function, make(), cold, cycles)
        if host_was_late:
            cycles = min(2 * cycles, MOST_CYCLES)
        if time.perf_counter() > end_of_warm_up:
            (late if host_was_late else times).append(ms)
    return statistics.median(times or late), not times


def timed_on_gpu(function, arguments, cold, cycles):
    """(milliseconds of one call after a sleep, whether the GPU woke up before the host had launched it)."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cold.zero_()
    torch.cuda._sleep(cycles)
    start.record()
    function(*arguments)
    stop.record()
    host_was_late = start.query()
    stop.synchronize()
    return max(start.elapsed_time(stop), 5e-4), host_was_late          # events tick every half microsecond


def timed(function, arguments):
    """Milliseconds of one call on a CPU."""
    start = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - start) * 1e3


def copy_rate(device):
    """Bytes per second, read and written, of a plain copy of 1 GiB."""
    x = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x), device)[0] / 1e3)


def measure(op, arguments, device):
    """{"ms": [forward, backward], "host_bound": [are these the host's times?], "peak_bytes"} of op.

    Every backward pass has a graph of its own, made before the clock starts: torch.compile frees what it
    saved. The peak of memory is what is beyond the arguments.
    """
    wanted = trainable(arguments)
    cotangent = torch.ones_like(op(*arguments))             # compiles, too

    def backward(out):
        return torch.autograd.grad(out, wanted, cotangent)

    found = [milliseconds(lambda: op(*arguments), device), (0.0, False)]
    if wanted:
        backward(op(*arguments))                            # compiles, too
        found[1] = milliseconds(backward, device, lambda: (op(*arguments),))
    ms, host_bound = map(list, zip(*found, strict=True))
    if device == "cpu":
        return {"ms": ms, "host_bound": host_bound, "peak_bytes": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = op(*arguments)
    kept = backward(out) if wanted else None
    torch.cuda.synchronize()
    del kept
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": ms, "host_bound": host_bound, "peak_bytes": peak}


def error(op, plain, arguments):
    """Largest error of op against plain in float64: output and gradients."""
    exact = torch.utils._pytree.tree_map(in_float64, arguments)
    return max(map(relative_error, results(op, arguments), results(plain, exact)))


def relative_error(found, true):
    """Largest error over the largest true value. Raises NotRun where it is not finite."""
    ratio = (found.double() - true.double()).abs().max() / true.double().abs().max().clamp(min=1e-12)
    if not ratio.isfinite():
        raise NotRun("a result is not finite")
    return ratio.item()


def in_float64(x):
    """x in float64, types included."""
    if isinstance(x, torch.dtype):
        return torch.float64
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def results(op, arguments):
    """The output of op and every gradient of its sum, weighted by a fixed pattern."""
    out = op(*arguments)
    wanted = trainable(arguments)
    pattern = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).bfloat16().to(out.dtype)
    return [out.detach(), *(torch.autograd.grad(out, wanted, pattern) if wanted else ())]


# ---- subjects

def bench_ops(output_dir, batch, minutes, device):
    """The rows of every op, printed as they come; on a GPU also written to output_dir, after each case."""
    with start_world(device) as world:
        if world.device.type == "cpu":
            bench_ops_on_cpu(batch)
        else:
            bench_ops_on_gpu(output_dir, batch, minutes)


def bench_ops_on_gpu(output_dir, batch, minutes):
    """The rows of every op on the current GPU."""
    deadline, rows = time.monotonic() + minutes * 60, []
    gpu, rate = torch.cuda.get_device_name(), copy_rate("cuda")
    path = result_path(output_dir, "ops", gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"gpu": gpu, "torch": torch.__version__, "batch": batch, "copy_bytes_per_s": rate, "rows": rows}
    print(f"{gpu}, PyTorch {torch.__version__}, batch {batch}; a copy moves {rate / 1e9:.0f} GB/s\n")
    print_row(HEAD)

    fused = kernels.load("triton")
    for op, words, arguments in cases():
        plain, kernel = getattr(kernels.TORCH, op), getattr(fused, op)
        moved = {"torch": count_bytes(plain, arguments(batch, "meta")), "compile": None,    # not known here
                 "triton": count_bytes(kernel, arguments(batch, "meta"))}
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        for column, function in {"torch": plain, "compile": compiled, "triton": kernel}.items():
            row = {"op": op, "case": words, "column": column, "bytes": moved[column]}
            if time.monotonic() > deadline:
                row["not_run"] = f"{minutes} minutes were over"
            else:
                row.update(bench_row(function, plain, arguments, batch, moved["triton"], rate))
            print_row(cells(row))
            rows.append(row)
        write_json(path, found)
    print(f"\nwrote {path}")


def bench_ops_on_cpu(batch):
    """The bytes by count, the times of plain PyTorch, and what is missing."""
    print("\n".join(byte_table(batch)))
    print(f"\nPlain PyTorch on this CPU, batch 4, {torch.get_num_threads()} threads, milliseconds:\n")
    print_row(("op", "case", "forward", "backward"))
    for op, words, arguments in cases():
        if "M=" not in words or "M=6 T=50 D=768" in words:
            found = measure(getattr(kernels.TORCH, op), arguments(4, "cpu"), "cpu")
            print_row((op, words, *found["ms"]))
    print("\ntorch.compile, Triton, rates, memory and errors need a GPU: not run.")


def bench_row(function, plain, arguments, batch, least, rate):
    """What is measured of one column of one case; least is the bytes that have to move, rate a copy's."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
        row = measure(function, arguments(batch, "cuda"), "cuda")
        row["error"] = error(function, plain, arguments(batch, "cuda"))
    except FAILURES as problem:
        return {"not_run": reason_of(problem)}
    row["share_of_copy"] = [size / (ms / 1e3) / rate if size else 0.0
                            for size, ms in zip(least, row["ms"], strict=True)]
    return row


def cells(row):
    """The cells of a row under HEAD."""
    name = row["op"], row["case"], row["column"]
    sizes = [size / 1e9 for size in row["bytes"]] if row["bytes"] else ["-", "-"]
    if "not_run" in row:
        return *name, "not run", "not run", *sizes, *["not run"] * 4
    shares = [100 * share for share in row["share_of_copy"]]
    times = [f"{ms:.3g} (host)" if bound else ms
             for ms, bound in zip(row["ms"], row["host_bound"], strict=True)]
    return *name, *times, *sizes, *shares, row["peak_bytes"] / 1e6, row["error"]


def print_row(values):
    """One line of a table."""
    words = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    print("| " + " | ".join(words) + " |", flush=True)
