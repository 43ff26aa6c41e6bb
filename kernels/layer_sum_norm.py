# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of the weighted sum of M layer outputs, in one pass; specified by reference.layer_sum_norm.

No longer in memory: the sum s, in either direction, and its gradient. Saved for the backward pass: two
numbers per row.

    forward     s = sum_i w_i x_i           n = (s - mean(s)) / std(s)      y = n * weight + bias
    backward    g = dy * weight             ds = (g - mean(g) - n mean(g n)) / std(s)
                dx_i = w_i ds               dw_i = <ds, x_i>                dlogits = w (dw - <w, dw>)
                dweight = sum of dy * n over the rows                       dbias = sum of dy over the rows

mean and std are over a row, that is one token; std(s) = sqrt(var(s) + eps) with the biased variance. The
backward kernel has M + 1 rows to read: it reads each x_i twice, once to rebuild s and once for dx_i, and the
second reading is from cache. A program takes every G-th row and keeps its sums over rows in registers; the G
shares are added afterwards, in order.

Shapes: B images, T tokens, M levels, R rows (the tokens of all images), D width, G programs.
"""

import torch
import triton
import triton.language as tl

from . import checks, reference
from .layer_sum import LEVELS, accumulator, launch_logits_backward, result_type, softmax_weights
from .register import gradient_shapes, gradients, register

MAX_WIDTH = 8192                                        # a row lives in the registers of one program


@triton.jit
def layer_sum_norm_forward(y, mean, rstd, xs, logits, weight, bias,
                           M: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
                           BLOCK: tl.constexpr, ACC: tl.constexpr):
    level = tl.arange(0, LEVELS)
    weights = softmax_weights(logits, M, LEVELS, ACC)                   # (LEVELS,)

    row = tl.program_id(0).to(tl.int64)                                 # which token: b * T + t
    column = tl.arange(0, BLOCK)
    inside = column < D
    s = tl.zeros([BLOCK], dtype=ACC)
    for i in tl.static_range(M):
        w = tl.sum(tl.where(level == i, weights, 0.0), axis=0)          # the one lane that is i
        s += w * tl.load(xs[i] + row * D + column, mask=inside, other=0.0).to(ACC)

    centre = tl.sum(s, axis=0) / D
    s = tl.where(inside, s - centre, 0.0)
    scale = 1 / tl.sqrt(tl.sum(s * s, axis=0) / D + EPS)
    gamma = tl.load(weight + column, mask=inside, other=0.0).to(ACC)
    beta = tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    tl.store(y + row * D + column, (s * scale * gamma + beta).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)


@triton.jit
def layer_sum_norm_backward(dy, mean, rstd, xs, dxs, logits, weight, shares, affine_shares, rows,
                            M: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                            ACC: tl.constexpr):
    """Every dx_i, and this program's shares of dw (G, LEVELS) and of dweight and dbias (G, 2, D)."""
    level = tl.arange(0, LEVELS)
    weights = softmax_weights(logits, M, LEVELS, ACC)                   # (LEVELS,)

    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    share = tl.zeros([LEVELS], dtype=ACC)
    dgamma = tl.zeros([BLOCK], dtype=ACC)
    dbeta = tl.zeros([BLOCK], dtype=ACC)

    row = program
    while row < rows:
        s = tl.zeros([BLOCK], dtype=ACC)
        for i in tl.static_range(M):
            w = tl.sum(tl.where(level == i, weights, 0.0), axis=0)
            s += w * tl.load(xs[i] + row * D + column, mask=inside, other=0.0).to(ACC)
        scale = tl.load(rstd + row)
        n = tl.where(inside, (s - tl.load(mean + row)) * scale, 0.0)

        dout = tl.load(dy + row * D + column, mask=inside, other=0.0).to(ACC)
        dgamma += dout * n
        dbeta += dout
        g = dout * tl.load(weight + column, mask=inside, other=0.0).to(ACC)     # from cache: fewer registers
        ds = (g - tl.sum(g, axis=0) / D - n * (tl.sum(g * n, axis=0) / D)) * scale
        for i in tl.static_range(M):
            w = tl.sum(tl.where(level == i, weights, 0.0), axis=0)
            x = tl.load(xs[i] + row * D + column, mask=inside, other=0.0).to(ACC)   # from cache
            share += tl.where(level == i, tl.sum(ds * x, axis=0), 0.0)
            tl.store(dxs[i] + row * D + column, (w * ds).to(dxs[i].dtype.element_ty), mask=inside)
        row += tl.num_programs(0)

    tl.store(shares + program * LEVELS + level, share)
    tl.store(affine_shares + program * 2 * D + column, dgamma, mask=inside)
    tl.store(affine_shares + program * 2 * D + D + column, dbeta, mask=inside)


def launch_shape(D):
    """BLOCK for a row and the warps of its program: 8 numbers per thread, 16 bytes of bfloat16."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // 256, 1), 16)


def launch_forward(xs: list[torch.Tensor], logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                   eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    xs, logits = tuple(x.contiguous() for x in xs), logits.contiguous()
    y = torch.empty_like(xs[0], dtype=result_type(xs))                  # (B, T, D)
    D = y.shape[-1]
    mean = y.new_empty(y.numel() // D, dtype=reference.wide(y.dtype))   # (R,)
    rstd = torch.empty_like(mean)                                       # (R,)
    BLOCK, warps = launch_shape(D)
    with torch.cuda.device_of(y):
        layer_sum_norm_forward[(len(mean),)](
            y, mean, rstd, xs, logits, weight.contiguous(), bias.contiguous(),
            M=len(xs), LEVELS=LEVELS, D=D, EPS=eps, BLOCK=BLOCK, ACC=accumulator(y.dtype),
            num_warps=warps, enable_fp_fusion=True)
    return y, mean, rstd


def launch_backward(dy: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, xs: list[torch.Tensor],
                    logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                    eps: float) -> list[torch.Tensor]:                  # eps: for the twin; here rstd has it
    dy, xs, logits = dy.contiguous(), tuple(x.contiguous() for x in xs), logits.contiguous()
    dxs = tuple(torch.empty_like(x) for x in xs)
    R, D, acc = len(mean), weight.shape[0], accumulator(dy.dtype)
    programs = min(R, 4 * multiprocessors(dy.device))
    shares = mean.new_empty(programs, LEVELS)                           # (G, LEVELS)
    affine_shares = mean.new_empty(programs, 2, D)                      # (G, 2, D)
    BLOCK, warps = launch_shape(D)
    with torch.cuda.device_of(dy):
        layer_sum_norm_backward[(programs,)](
            dy, mean, rstd, xs, dxs, logits, weight.contiguous(), shares, affine_shares, R,
            M=len(xs), LEVELS=LEVELS, D=D, BLOCK=BLOCK, ACC=acc, num_warps=warps, enable_fp_fusion=True)
        dlogits = launch_logits_backward(logits, shares, len(xs), acc)
    dweight, dbias = affine_shares.sum(dim=0)                           # (D,), (D,)
    return [*dxs, dlogits, dweight.to(weight.dtype), dbias.to(bias.dtype, copy=True)]


def multiprocessors(device):
    """How many programs run side by side: the multiprocessors of a GPU, and 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def twin_forward(xs, logits, weight, bias, eps):
    s = reference.layer_sum(xs, logits).flatten(0, -2)                  # (R, D)
    var, mean = torch.var_mean(s.to(reference.wide(s.dtype)), dim=-1, correction=0)     # (R,), (R,)
    y = reference.layer_sum_norm(xs, logits, weight, bias, eps)         # (B, T, D)
    return y.contiguous(), mean, (var + eps).rsqrt()


def twin_backward(dy, mean, rstd, *inputs):
    return gradients(reference.layer_sum_norm)(dy, *inputs)


layer_sum_norm_op = register("layer_sum_norm", launch_forward, twin_forward)
layer_sum_norm_backward_op = register("layer_sum_norm_backward", launch_backward, twin_backward,
                                      lambda dy, mean, rstd, *inputs: gradient_shapes(*inputs))


def save_inputs(ctx, inputs, output):
    xs, logits, weight, bias, ctx.eps = inputs
    y, mean, rstd = output
    ctx.save_for_backward(mean, rstd, logits, weight, bias, *xs)


def backward(ctx, dy, dmean, drstd):
    mean, rstd, logits, weight, bias, *xs = ctx.saved_tensors
    inputs = xs, logits, weight, bias, ctx.eps
    *dxs, dlogits, dweight, dbias = layer_sum_norm_backward_op(dy, mean, rstd, *inputs)
    return dxs, dlogits, dweight, dbias, None


layer_sum_norm_op.register_autograd(backward, setup_context=save_inputs)


def layer_sum_norm(xs, logits, weight, bias, eps):
    """LayerNorm of layer_sum(xs, logits), as MFF's encoder ends: weight and bias are (D,) -> (B, T, D)."""
    checks.check_levels(xs, logits)
    D = xs[0].shape[-1]
    checks.check_norm(weight, bias, D)
    if D > MAX_WIDTH:
        raise ValueError(f"width {D} is more than the {MAX_WIDTH} that one program of layer_sum_norm holds")
    return layer_sum_norm_op(list(xs), logits, weight, bias, eps)[0]
