# SPDX-License-Identifier: Apache-2.0
"""Softmax-weighted sum of M layer outputs (MFF, arXiv 2308.00261); specified by reference.layer_sum.

No longer in memory: the products w_i x_i and the sums on the way, and dout * x_i in the backward pass. The
forward kernel reads M tensors and writes one; the backward kernel reads M + 1 and writes M.

    forward     w = softmax(logits)         out = sum_i w_i x_i
    backward    dx_i = w_i dout             dw_i = <dout, x_i>          dlogits = w (dw - <w, dw>)

Each program of the backward kernel writes its own share of the M inner products, and one last program adds
the shares in a fixed order. Nothing is added atomically, so two runs are bit equal.

Shapes: M levels, G programs, n numbers in a level. LEVELS is M rounded up: a vector of weights lives in
registers.
"""

import torch
import triton
import triton.language as tl

from . import checks, reference
from .register import gradient_shapes, gradients, register

LEVELS = 16                                             # lanes that hold the M <= 12 weights: a power of two


@triton.jit
def softmax_weights(logits, M: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr):
    """softmax(logits) in the first M of LEVELS lanes, and 0 in the others."""
    level = tl.arange(0, LEVELS)
    x = tl.load(logits + level, mask=level < M, other=float("-inf")).to(ACC)    # (LEVELS,)
    x = tl.exp(x - tl.max(x, axis=0))
    return x / tl.sum(x, axis=0)


@triton.jit
def layer_sum_forward(out, xs, logits, n,
                      M: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    level = tl.arange(0, LEVELS)
    weights = softmax_weights(logits, M, LEVELS, ACC)                   # (LEVELS,)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)    # (BLOCK,), n may exceed 2 ** 31
    total = tl.zeros([BLOCK], dtype=ACC)
    for i in tl.static_range(M):
        weight = tl.sum(tl.where(level == i, weights, 0.0), axis=0)     # the one lane that is i
        total += weight * tl.load(xs[i] + at, mask=at < n, other=0.0).to(ACC)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def layer_sum_backward(dout, xs, dxs, logits, shares, n,
                       M: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Every dx_i, and this program's share of the M inner products: shares (G, LEVELS)."""
    level = tl.arange(0, LEVELS)
    weights = softmax_weights(logits, M, LEVELS, ACC)                   # (LEVELS,)

    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)                          # (BLOCK,)
    g = tl.load(dout + at, mask=at < n, other=0.0).to(ACC)
    share = tl.zeros([LEVELS], dtype=ACC)
    for i in tl.static_range(M):
        x = tl.load(xs[i] + at, mask=at < n, other=0.0).to(ACC)
        share = tl.where(level == i, tl.sum(g * x, axis=0), share)
        weight = tl.sum(tl.where(level == i, weights, 0.0), axis=0)
        tl.store(dxs[i] + at, (weight * g).to(dxs[i].dtype.element_ty), mask=at < n)
    tl.store(shares + program * LEVELS + level, share)


@triton.jit
def logits_backward(dlogits, logits, shares, programs,
                    M: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """dlogits (M,): the sum of shares (G, LEVELS), which is dw, then the derivative of softmax."""
    level = tl.arange(0, LEVELS)
    total = tl.zeros([BLOCK, LEVELS], dtype=ACC)
    start = 0
    while start < programs:                                             # Triton 3.6 interprets no range()
        g = start + tl.arange(0, BLOCK)[:, None]                        # (BLOCK, 1)
        total += tl.load(shares + g * LEVELS + level[None, :], mask=g < programs, other=0.0)
        start += BLOCK

    dw = tl.sum(total, axis=0)                                          # (LEVELS,)
    weights = softmax_weights(logits, M, LEVELS, ACC)
    dl = weights * (dw - tl.sum(weights * dw, axis=0))
    tl.store(dlogits + level, dl.to(dlogits.dtype.element_ty), mask=level < M)


def launch_forward(xs: list[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    xs, logits = tuple(x.contiguous() for x in xs), logits.contiguous()
    out = torch.empty_like(xs[0], dtype=result_type(xs))
    BLOCK = 2048
    with torch.cuda.device_of(out):
        layer_sum_forward[(triton.cdiv(out.numel(), BLOCK),)](
            out, xs, logits, out.numel(),
            M=len(xs), LEVELS=LEVELS, BLOCK=BLOCK, ACC=accumulator(out.dtype),
            num_warps=4, enable_fp_fusion=True)
    return out


def launch_backward(dout: torch.Tensor, xs: list[torch.Tensor], logits: torch.Tensor) -> list[torch.Tensor]:
    dout, xs, logits = dout.contiguous(), tuple(x.contiguous() for x in xs), logits.contiguous()
    dxs = tuple(torch.empty_like(x) for x in xs)
    BLOCK, acc = 4096, accumulator(dout.dtype)
    programs = triton.cdiv(dout.numel(), BLOCK)
    shares = dout.new_empty(programs, LEVELS, dtype=reference.wide(dout.dtype))     # (G, LEVELS)
    with torch.cuda.device_of(dout):
        layer_sum_backward[(programs,)](
            dout, xs, dxs, logits, shares, dout.numel(),
            M=len(xs), LEVELS=LEVELS, BLOCK=BLOCK, ACC=acc, num_warps=8, enable_fp_fusion=True)
        dlogits = launch_logits_backward(logits, shares, len(xs), acc)
    return [*dxs, dlogits]


def launch_logits_backward(logits, shares, M, acc):
    dlogits = torch.empty_like(logits)
    logits_backward[(1,)](dlogits, logits, shares, len(shares),
                          M=M, LEVELS=LEVELS, BLOCK=256, ACC=acc, num_warps=8, enable_fp_fusion=True)
    return dlogits


def accumulator(dtype):
    """The type of sums inside a kernel: float32, or float64 for float64 tensors, for gradcheck."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def result_type(xs):
    """The type of a sum of xs: that of the widest level."""
    dtype = xs[0].dtype
    for x in xs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def twin_forward(xs, logits):
    return reference.layer_sum(xs, logits).contiguous()


twin_backward = gradients(reference.layer_sum)
layer_sum_op = register("layer_sum", launch_forward, twin_forward)
layer_sum_backward_op = register("layer_sum_backward", launch_backward, twin_backward,
                                 lambda dout, *inputs: gradient_shapes(*inputs))


def save_inputs(ctx, inputs, output):
    xs, logits = inputs
    ctx.save_for_backward(*xs, logits)


def backward(ctx, dout):
    *xs, logits = ctx.saved_tensors
    *dxs, dlogits = layer_sum_backward_op(dout, xs, logits)
    return dxs, dlogits


layer_sum_op.register_autograd(backward, setup_context=save_inputs)


def layer_sum(xs, logits):
    """Softmax-weighted sum of M layer outputs (MFF, arXiv 2308.00261): M of (B, T, D), M logits -> one."""
    checks.check_levels(xs, logits)
    return layer_sum_op(list(xs), logits)
