# SPDX-License-Identifier: Apache-2.0
"""Mean squared error of predicted patches, targets read from the image; specified by reference.patch_loss.

No longer in memory: the images cut into patches, the targets and their mean and variance, and every float32
temporary; a uint8 image is normalised as it is read, so that no float image exists at all. The forward pass
writes the difference from which the gradient follows, so that neither images nor predictions are read again.

    forward     t = patch ids[b, k] of the image        with norm_pix, (t - mean(t)) / sqrt(var(t) + 1e-6)
                diff = pred - t                         loss = mean of diff ** 2
    backward    dpred = dloss * 2 / (B K N) * diff

var is the unbiased variance. diff is stored unscaled: dpred itself, about 1e-7 before dloss, would vanish in
float16. An id that names no patch makes the loss NaN; nothing outside the image is read.

Shapes: B images, C H W, P patch side, L patches, K masked patches, N = P * P * C.
"""

import torch
import triton
import triton.language as tl

from . import checks, reference
from .layer_sum import accumulator
from .register import register

MAX_PATCH = 16384                                       # a patch lives in the registers of one program


@triton.jit
def patch_loss_forward(losses, diff, pred, images, ids, mean, std, K, columns, L,
                       stride_b, stride_c, stride_h, stride_w,
                       C: tl.constexpr, P: tl.constexpr, NORM_PIX: tl.constexpr,
                       BLOCK: tl.constexpr, ACC: tl.constexpr):
    N: tl.constexpr = P * P * C
    row = tl.program_id(0).to(tl.int64)                                 # which prediction: b * K + k
    patch = tl.load(ids + row)
    named = (patch >= 0) & (patch < L)
    fault = tl.where(named, 0.0, float("nan"))
    patch = tl.where(named, patch, 0)
    top = patch // columns * P
    left = patch % columns * P

    n = tl.arange(0, BLOCK)                                             # in a patch, channel fastest
    inside = n < N
    c = n % C
    y = top + n // (P * C)
    x = left + n // C % P
    at = row // K * stride_b + c * stride_c + y * stride_h + x * stride_w
    t = tl.load(images + at, mask=inside, other=0).to(ACC)              # (BLOCK,)
    if mean is not None:
        m = tl.load(mean + c, mask=inside, other=0.0).to(ACC)
        s = tl.load(std + c, mask=inside, other=1.0).to(ACC)
        t = t * (1 / (255 * s)) - m / s
    if NORM_PIX:
        t = tl.where(inside, t - tl.sum(tl.where(inside, t, 0.0), axis=0) / N, 0.0)
        t = t / tl.sqrt(tl.sum(t * t, axis=0) / (N - 1) + 1e-6)

    d = tl.load(pred + row * N + n, mask=inside, other=0.0).to(ACC) - t
    d = tl.where(inside, d + fault, 0.0)
    tl.store(diff + row * N + n, d.to(diff.dtype.element_ty), mask=inside)
    tl.store(losses + row, tl.sum(d * d, axis=0) / N)


@triton.jit
def patch_loss_backward(dpred, diff, dloss, scale, n, BLOCK: tl.constexpr, ACC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(diff + at, mask=at < n, other=0.0).to(ACC)
    d = d * (tl.load(dloss).to(ACC) * scale)                            # read here: the CPU does not wait
    tl.store(dpred + at, d.to(dpred.dtype.element_ty), mask=at < n)


def launch_forward(pred: torch.Tensor, images: torch.Tensor, ids: torch.Tensor, patch_size: int,
                   norm_pix: bool, mean: torch.Tensor | None,
                   std: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    pred, ids = pred.contiguous(), ids.contiguous()
    mean, std = (t if t is None else t.contiguous() for t in (mean, std))
    (B, K, N), (C, H, W), P = pred.shape, images.shape[1:], patch_size
    diff = torch.empty_like(pred)                                       # (B, K, N)
    losses = pred.new_empty(B * K, dtype=reference.wide(pred.dtype))    # (B * K,)
    BLOCK = triton.next_power_of_2(N)
    with torch.cuda.device_of(pred):
        patch_loss_forward[(B * K,)](
            losses, diff, pred, images, ids, mean, std, K, W // P, (H // P) * (W // P), *images.stride(),
            C=C, P=P, NORM_PIX=norm_pix, BLOCK=BLOCK, ACC=accumulator(pred.dtype),
            num_warps=min(max(BLOCK // 256, 1), 16), enable_fp_fusion=True)
    return losses.mean(), diff


def launch_backward(diff: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    dpred = torch.empty_like(diff)                                      # (B, K, N)
    n, BLOCK = diff.numel(), 2048
    with torch.cuda.device_of(diff):
        patch_loss_backward[(triton.cdiv(n, BLOCK),)](
            dpred, diff, dloss, 2 / n, n,
            BLOCK=BLOCK, ACC=accumulator(diff.dtype), num_warps=4, enable_fp_fusion=True)
    return dpred


def twin_forward(pred, images, ids, patch_size, norm_pix, mean, std):
    wide = reference.wide(pred.dtype)
    target = reference.target_patches(images, ids, patch_size, norm_pix, mean, std, wide)   # (B, K, N)
    diff = pred - target                                                # (B, K, N)
    return (diff ** 2).mean(), diff.to(pred.dtype).contiguous()


def twin_backward(diff, dloss):
    return (diff.to(dloss.dtype) * (dloss * (2 / diff.numel()))).to(diff.dtype)


patch_loss_op = register("patch_loss", launch_forward, twin_forward)
patch_loss_backward_op = register("patch_loss_backward", launch_backward, twin_backward)


def save_difference(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)                    # diff has no gradient: no zeros for it


def backward(ctx, dloss, ddiff):
    if dloss is None:                                   # nothing depends on the loss
        return None, None, None, None, None, None, None
    dpred = patch_loss_backward_op(ctx.saved_tensors[0], dloss)
    return dpred, None, None, None, None, None, None


patch_loss_op.register_autograd(backward, setup_context=save_difference)


def patch_loss(pred, images, ids, patch_size, norm_pix, mean=None, std=None):
    """Mean squared error of predicted patches, a scalar in fp32 (MAE, arXiv 2111.06377, sec. 3 and table 1d).

    pred (B, K, N) predicts the patches of images (B, C, H, W) that ids (B, K) names; with norm_pix each
    target patch is normalised by its own mean and variance. uint8 images need mean and std (C,), in [0, 1]
    units, as in prepare.
    """
    checks.check_patches(pred, images, ids, patch_size, mean, std)
    if pred.shape[-1] > MAX_PATCH:
        raise ValueError(f"patches of {pred.shape[-1]} numbers: one program of patch_loss holds {MAX_PATCH}")
    return patch_loss_op(pred, images, ids, patch_size, norm_pix, mean, std)[0]
