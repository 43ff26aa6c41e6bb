"""Attention at this project's shapes: time and error of each form of it, and which one PyTorch chooses.

On a GPU the forms are the back ends of scaled_dot_product_attention and the plain products, in bfloat16; on a
CPU its fused form and the plain products, in float32 and in bfloat16 where the CPU multiplies it, of fewer
images. Errors are those of the output and of the worst gradient, of four images, against the products in
float64. A form that refuses is a row that says why.

Shapes: B images, Q queries, T tokens, h heads, d width of a head, D = h * d.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mff_min.vit import attend_by_products
from mff_run.world import DTYPES, start_world
from tools.bench.measure import FAILURES, Budget, NotRun, Record, reason_of, words
from tools.bench.ops import in_float64, milliseconds, relative_error
from tools.bench.step import slow_dtypes

#          B    Q    T    h   d
SHAPES = {"encoder of ViT-B": (256, 50, 50, 12, 64),
          "decoder": (256, 197, 197, 16, 32),
          "last decoder block": (256, 147, 197, 16, 32),
          "fine-tuning of ViT-B": (128, 197, 197, 12, 64),
          "encoder of vit_test": (256, 5, 5, 2, 32)}
CPU_BATCH = 4


def fused(backend):
    """scaled_dot_product_attention by this back end alone."""
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return attend


FORMS = {"cpu": {"fused": F.scaled_dot_product_attention, "products": attend_by_products},
         "cuda": {"flash": fused(SDPBackend.FLASH_ATTENTION),
                  "efficient": fused(SDPBackend.EFFICIENT_ATTENTION), "products": attend_by_products,
                  "cuDNN": fused(SDPBackend.CUDNN_ATTENTION)}}          # last: after a crash all else fails
TYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


def make_heads(B, Q, T, h, d, device, dtype):
    """[q, k, v, dout], each (B, h, Q or T, d): views, as in the model, of what the products around write."""
    generator = torch.Generator(device).manual_seed(0)

    def written(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)
    if Q == T:
        q, k, v = written(B, T, 3 * h * d).requires_grad_().chunk(3, dim=-1)            # each (B, T, D)
    else:                                                               # queries of the masked patches alone
        q = written(B, Q, h * d).requires_grad_()                       # (B, Q, D)
        k, v = written(B, T, 2 * h * d).requires_grad_().chunk(2, dim=-1)               # each (B, T, D)
    parts = q, k, v, written(B, Q, h * d)
    return [part.unflatten(-1, (h, d)).transpose(1, 2) for part in parts]


def measure(form, heads, dout, device):
    """What is measured of one form of attention."""
    out = form(*heads)                                                  # (B, h, Q, d)
    grads = torch.autograd.grad(out, heads, dout)
    exact = [in_float64(x[:4]) for x in heads]
    true = attend_by_products(*exact)
    true_grads = torch.autograd.grad(true, exact, in_float64(dout[:4]))
    row = {"error": relative_error(out[:4], true),
           "gradient_error": max(relative_error(x[:4], y) for x, y in zip(grads, true_grads, strict=True))}

    found = (milliseconds(lambda: form(*heads), device),
             milliseconds(lambda out: torch.autograd.grad(out, heads, dout), device, lambda: (form(*heads),)))
    row["ms"], row["host_bound"] = map(list, zip(*found, strict=True))
    return row | {"median": sum(row["ms"]) / 1e3}


def bench_shape(name, shape, slow, budget, device):
    """The group of one shape: a row for each form and type; slow is {type: reason} of those left out."""
    B, *rest = shape
    shape = [B if device.type == "cuda" else CPU_BATCH, *rest]
    rows, choices = [], {}
    for dtype in TYPES[device.type]:
        *heads, dout = make_heads(*shape, device, DTYPES[dtype])
        choices[dtype] = SDPBackend(torch._fused_sdp_choice(*heads)).name
        for form, attend in FORMS[device.type].items():
            row = {"name": form, "dtype": dtype}
            with warnings.catch_warnings(record=True) as said:          # a back end warns of why it refuses
                warnings.simplefilter("always")
                try:
                    budget.check()
                    if dtype in slow:
                        raise NotRun(slow[dtype])
                    row |= measure(attend, heads, dout, device.type)
                except FAILURES as problem:
                    reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
                    row["not_run"] = " ".join([reason_of(problem), *reasons])
            rows.append(row)
    sizes = " ".join(f"{letter}={size}" for letter, size in zip("BQThd", shape, strict=True))
    return {"name": f"{name}, {sizes}", "shape": shape, "choice_of_pytorch": choices, "rows": rows}


def show(group):
    """The lines of a group for the terminal."""
    yield f"\n{group['name']}"
    for row in group["rows"]:
        if "not_run" in row:
            yield f"  {words(row):20} not run: {row['not_run']}"
            continue
        forward, backward = (f"{ms:8.3f} ms{' (host)' * bound}"
                             for ms, bound in zip(row["ms"], row["host_bound"], strict=True))
        yield (f"  {words(row):20} forward {forward}  backward {backward}  error {row['error']:.1e}  "
               f"of gradients {row['gradient_error']:.1e}")
    for dtype, choice in group["choice_of_pytorch"].items():
        yield f"  PyTorch's own choice in {dtype}: {choice}"


def bench_attention(args):
    """Every shape, into attention_<device>.json."""
    with start_world(args.device) as world:
        record = Record("attention", args.output_dir, world, minutes=args.minutes)
        budget = Budget(60 * args.minutes)
        slow = slow_dtypes(TYPES[world.device.type], world.device)
        for name, shape in SHAPES.items():
            group = bench_shape(name, shape, slow, budget, world.device)
            record.add(group)
            world.say("\n".join(show(group)))
        world.say(f"\nwrote {record.path}")
