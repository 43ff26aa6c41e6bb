"""Compile every kernel for GPUs that need not be here, and print what came of each as a line of JSON.

    TRITON_INTERPRET=0 python tests/compile_ahead.py sm_80 sm_90 sm_100 gfx942

The launch functions run as they are, on tensors without memory, and a recorder in the kernel's place keeps
what would have been launched. So what is compiled here is what is launched on a GPU, its block sizes and its
warps included.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mff_min.kernels import layer_sum, layer_sum_norm, patch_loss, prepare  # noqa: E402

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
KERNELS = ((layer_sum, ("layer_sum_forward", "layer_sum_backward", "logits_backward")),
           (layer_sum_norm, ("layer_sum_norm_forward", "layer_sum_norm_backward")),
           (patch_loss, ("patch_loss_forward", "patch_loss_backward")),
           (prepare, ("prepare_forward",)))
OPTIONS = ("num_warps", "enable_fp_fusion")


class Recorder:
    """Stands where a kernel stands and keeps the arguments of every launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(case):
    """The launches that case makes."""
    launches, originals = [], []
    for module, names in KERNELS:
        for name in names:
            originals.append((module, name, getattr(module, name)))
            setattr(module, name, Recorder(getattr(module, name), launches))
    try:
        with torch.device("meta"):
            case()
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return launches


def specialise(value):
    """How Triton's launcher types one argument: its signature, its attributes and, for a constant, its
    value."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], [["tt.divisibility", 16]], None
    if isinstance(value, float):
        return "fp32", [], None
    if value is None or value == 1:
        return "constexpr", [], value
    return "i64" if value >= 2 ** 31 else "i32", [["tt.divisibility", 16]] if value % 16 == 0 else [], None


def source(kernel, args, kwargs):
    """What triton.compile takes, for one recorded launch."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, tuple):
            signature[name] = tuple(specialise(v)[0] for v in value)
            attributes.update({(i, j): specialise(v)[1] for j, v in enumerate(value)})
        else:
            signature[name], attributes[(i,)], constant = specialise(value)
            if signature[name] == "constexpr":
                constants[name] = constant
    for name, value in kwargs.items():
        if name not in OPTIONS:
            signature[name], constants[name] = "constexpr", value
    attributes = {path: attribute for path, attribute in attributes.items() if attribute}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def layers(M, D, dtype, T=197):
    return [torch.empty(64, T, D, dtype=dtype) for _ in range(M)], torch.empty(M, 1, 1, 1)


def sum_case(M, D, dtype):
    xs, logits = layers(M, D, dtype)
    out = layer_sum.launch_forward(xs, logits)
    layer_sum.launch_backward(out, xs, logits)


def norm_case(M, D, dtype):
    xs, logits = layers(M, D, dtype)
    y, mean, rstd = layer_sum_norm.launch_forward(xs, logits, torch.empty(D), torch.empty(D), 1e-6)
    layer_sum_norm.launch_backward(y, mean, rstd, xs, logits, torch.empty(D), torch.empty(D), 1e-6)


def loss_case(dtype, image_dtype, P, norm_pix):
    images = torch.empty(64, 3, 224, 224, dtype=image_dtype)
    mean = torch.empty(3) if image_dtype == torch.uint8 else None
    pred, ids = torch.empty(64, 147, P * P * 3, dtype=dtype), torch.empty(64, 147, dtype=torch.int64)
    loss, diff = patch_loss.launch_forward(pred, images, ids, P, norm_pix, mean, mean)
    patch_loss.launch_backward(diff, loss)


def prepare_case(dtype, mixed, channels_last=False):
    images = torch.empty(64, 3, 224, 224, dtype=torch.uint8)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    mix = (torch.empty(64, dtype=torch.int64), torch.empty(64), torch.empty(64, 4, dtype=torch.int64))
    mix = mix if mixed else (None, None, None)
    prepare.launch(images, torch.empty(3), torch.empty(3), dtype, *mix)


def cases():
    """Name and function of all that is launched: each block size, number of warps and constant branch."""
    half, single, byte = torch.bfloat16, torch.float32, torch.uint8
    for M, dtype in ((6, half), (12, half), (6, single)):
        yield f"M={M} {dtype}", lambda M=M, dtype=dtype: sum_case(M, 768, dtype)
    for M, D, dtype in ((2, 192, half), (2, 384, half), (6, 768, half), (12, 1024, half), (2, 1280, half),
                        (2, 2560, half), (6, 768, single)):
        yield f"M={M} D={D} {dtype}", lambda M=M, D=D, dtype=dtype: norm_case(M, D, dtype)
    for dtype, images, P, norm_pix in ((half, byte, 16, True), (half, single, 16, False),
                                       (single, byte, 14, True), (half, byte, 32, True)):
        yield (f"{dtype} of {images} P={P} norm_pix={norm_pix}",
               lambda a=dtype, b=images, c=P, d=norm_pix: loss_case(a, b, c, d))
    for dtype, *rest in ((half, False), (single, True), (half, True, True)):
        yield f"{dtype} mixed, channels last: {rest}", lambda a=dtype, b=rest: prepare_case(a, *b)


def launches():
    """(case, kernel, source, options) of every launch that differs from those before it."""
    found = {}
    for title, case in cases():
        for kernel, args, kwargs in record(case):
            src = source(kernel, args, kwargs)
            options = {name: kwargs[name] for name in OPTIONS}
            key = repr((kernel.__name__, src.signature, src.constants, src.attrs, options))
            found.setdefault(key, (title, kernel, src, options))
    return list(found.values())


def resources(compiled, target):
    """Registers, spilled bytes and 16-byte memory instructions of one compiled kernel."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])
        spills = int(re.search(r"\.vgpr_spill_count: +(\d+)", text)[1])
        return {"registers": registers, "spills": 4 * spills,
                "wide_loads": text.count("load_dwordx4"), "wide_stores": text.count("store_dwordx4")}
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        gpu = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={gpu}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spills": spills,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx))}


def compile_one(number, name):
    """The row of one launch on one target."""
    title, kernel, src, options = launches()[number]
    compiled = triton.compile(src, target=TARGETS[name], options=options)
    return {"kernel": kernel.__name__, "case": title, "target": name, "warps": options["num_warps"],
            "shared": compiled.metadata.shared, **resources(compiled, TARGETS[name])}


def main(names):
    numbers = range(len(launches()))
    with ProcessPoolExecutor(max_workers=2) as pool:
        for row in pool.map(compile_one, [n for n in numbers for _ in names], [*names] * len(numbers)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
