# SPDX-License-Identifier: Apache-2.0
"""uint8 images normalised and mixed, in one pass; specified by reference.prepare.

No longer in memory: the float image before it is mixed, and its product with lam.

    x'  = (x / 255 - mean) / std
    out = lam x' + (1 - lam) x'[partner]                                        (mixup, arXiv 1710.09412)
    out = x'[partner] inside the box                                            (CutMix, arXiv 1905.04899)

The weights of a mixture add up to 1, so the bytes are mixed first and normalised once. There is no backward
pass: bytes have no gradient.

Shapes: B images, C H W.
"""

import torch
import triton
import triton.language as tl

from . import checks, reference
from .register import register


@triton.jit
def prepare_forward(out, images, mean, std, partner, lam, box, C, H, W,
                    stride_b, stride_c, stride_h, stride_w, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)                               # which plane: b * C + c
    b = plane // C
    c = plane % C
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                 # (BLOCK,), in the plane: y * W + x
    inside = at < H * W
    y = at // W
    x = at % W

    place = images + c * stride_c + y * stride_h + x * stride_w         # (BLOCK,), of image 0
    value = tl.load(place + b * stride_b, mask=inside, other=0).to(tl.float32)

    if partner is not None:
        p = tl.load(partner + b)
        known = (p >= 0) & (p < tl.num_programs(0) // C)
        fault = tl.where(known, 0.0, float("nan"))
        p = tl.where(known, p, b)
        keep = tl.full([BLOCK], 1.0, dtype=tl.float32)                  # this image's share of each pixel
        if lam is not None:
            keep = keep * tl.load(lam + b).to(tl.float32)
        if box is not None:
            rows = (y >= tl.load(box + b * 4)) & (y < tl.load(box + b * 4 + 2))
            columns = (x >= tl.load(box + b * 4 + 1)) & (x < tl.load(box + b * 4 + 3))
            keep = tl.where(rows & columns, 0.0, keep)
        used = inside & (keep < 1)                                      # a box leaves most pixels unread
        other = tl.load(place + p * stride_b, mask=used, other=0)
        value = keep * value + (1 - keep) * other.to(tl.float32) + fault

    s = tl.load(std + c).to(tl.float32)
    value = value * (1 / (255 * s)) - tl.load(mean + c).to(tl.float32) / s
    tl.store(out + plane * H * W + at, value.to(out.dtype.element_ty), mask=inside)


def launch(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype,
           partner: torch.Tensor | None, lam: torch.Tensor | None, box: torch.Tensor | None) -> torch.Tensor:
    B, C, H, W = images.shape
    partner, lam, box = (t if t is None else t.contiguous() for t in (partner, lam, box))
    out = torch.empty(B, C, H, W, dtype=dtype, device=images.device)
    BLOCK = 2048
    with torch.cuda.device_of(images):
        prepare_forward[(B * C, triton.cdiv(H * W, BLOCK))](
            out, images, mean.contiguous(), std.contiguous(), partner, lam, box, C, H, W,
            *images.stride(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return out


def twin(*arguments):
    return reference.prepare(*arguments).contiguous()


prepare_op = register("prepare", launch, twin)


def prepare(images, mean, std, dtype=torch.float32, partner=None, lam=None, box=None):
    """Normalise uint8 images (B, C, H, W): (x / 255 - mean) / std; mean and std are (C,) in [0, 1] units.

    partner (B,): the image of the batch that each one is mixed with, in the share 1 - lam, lam (B,), and
    wholly inside box (B, 4): top, left, bottom, right, half open.
    """
    checks.check_images(images, mean, std, partner, lam, box)
    return prepare_op(images, mean, std, dtype, partner, lam, box)
