# SPDX-License-Identifier: Apache-2.0
"""What the ops refuse: a ValueError that names the value and what was expected, whatever the column.

Shapes: B images, C H W, K masked patches, N = P * P * C, D width.
"""

import torch


def check_levels(xs, logits):
    """Raise ValueError unless xs are 1 to 12 floating tensors of one shape, with a logit each."""
    if not 1 <= len(xs) <= 12:
        raise ValueError(f"{len(xs)} levels: expected 1 to 12")
    for i, x in enumerate(xs):
        if x.shape != xs[0].shape or x.device != xs[0].device or not x.is_floating_point():
            raise ValueError(f"level {i} is {describe(x)}, level 0 is {describe(xs[0])}: they do not match")
    if logits.numel() != len(xs) or logits.device != xs[0].device or not logits.is_floating_point():
        raise ValueError(f"logits are {describe(logits)}: expected {len(xs)} floats on {xs[0].device}")


def check_norm(weight, bias, width):
    """Raise ValueError unless weight and bias are (width,)."""
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(f"weight is {describe(weight)} and bias {describe(bias)}: expected ({width},)")


def check_projections(xs, projections):
    """Raise ValueError unless there is a projection for every level but the last."""
    if len(projections) != len(xs) - 1:
        raise ValueError(f"{len(projections)} projections for {len(xs)} levels: expected {len(xs) - 1}")


def check_patches(pred, images, ids, patch_size, mean, std):
    """Raise ValueError unless patch_loss can compare pred (B, K, N) with patches of images (B, C, H, W)."""
    if images.ndim != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"images are {describe(images)}: expected (B, C, H, W), sides in {patch_size}s")
    B, N = images.shape[0], images.shape[1] * patch_size ** 2
    if pred.ndim != 3 or pred.shape[0] != B or pred.shape[2] != N or not pred.is_floating_point():
        raise ValueError(f"pred is {describe(pred)}: expected ({B}, K, {N}) of a floating type")
    if ids.shape != pred.shape[:2] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids are {describe(ids)}: expected {tuple(pred.shape[:2])} of int64")
    check_statistics(images, mean, std)
    check_device(images, pred=pred, ids=ids, mean=mean, std=std)


def check_images(images, mean, std, partner, lam, box):
    """Raise ValueError unless prepare can normalise and mix images (B, C, H, W)."""
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images are {describe(images)}: expected (B, C, H, W) of uint8")
    B = len(images)
    shapes = {"partner": (partner, (B,)), "lam": (lam, (B,)), "box": (box, (B, 4))}
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {describe(value)}: expected {shape}")
    if partner is not None and partner.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"partner is {describe(partner)}: expected int64")
    if partner is None and (lam is not None or box is not None):
        raise ValueError("lam and box say how to mix with partner, which is missing")
    check_statistics(images, mean, std)
    check_device(images, mean=mean, std=std, partner=partner, lam=lam, box=box)


def check_statistics(images, mean, std):
    """Raise ValueError unless mean and std are (C,) where images are uint8, and absent where they are not."""
    given = [x is not None and x.shape == images.shape[1:2] for x in (mean, std)]
    if images.dtype == torch.uint8 and not all(given):
        raise ValueError(f"uint8 images of {images.shape[1]} channels need a mean and a std for each channel")
    if images.dtype != torch.uint8 and (mean is not None or std is not None):
        raise ValueError(f"mean and std normalise uint8 images, these are {describe(images)}")


def check_device(images, **others):
    """Raise ValueError unless the others, where there are any, are on the images' device."""
    for name, value in others.items():
        if value is not None and value.device != images.device:
            raise ValueError(f"{name} is on {value.device}, images are on {images.device}")


def describe(x):
    """Shape, type and device of a tensor in one phrase."""
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')} on {x.device}"
