"""What is to be predicted, and how predictions become pictures again.

Shapes: B images, C H W, L patches, K masked patches, N = P * P * C.
"""

import torch

from kernels.reference import patch_statistics, patchify, take_tokens, target_patches, unpatchify


def low_pass_target(images, mean, std, radius, ops):
    """PixMIM's target (arXiv 2303.02416): normalised images (B, C, H, W) without their high frequencies.

    The filter works on pixels in [0, 1]; mean and std are (C,). radius is in frequency bins of the image.
    """
    mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)           # each (1, C, 1, 1)
    return (ops.low_pass(images * std + mean, radius) - mean) / std


def low_pass_radius_at(radius, img_size):
    """The radius, for images of this (height, width), that keeps the cycles per pixel of `radius` at 224.

    One circle of bins serves both axes, so it holds for the shorter side, and the longer one keeps fewer.
    """
    return radius * min(img_size) / 224


def reconstruction(pred, targets, ids, patch_size, norm_pix):
    """Images whose masked patches are predicted and whose visible ones are the target's: (B, C, H, W).

    pred (B, K, N) belongs to the patches ids (B, K). With norm_pix the prediction has lost its mean and
    contrast, which come back from the true patch: without them it is no picture.
    """
    patches = patchify(targets, patch_size)                             # (B, L, N)
    if norm_pix:
        mean, std = patch_statistics(take_tokens(patches, ids).float())
        pred = pred * std + mean
    index = ids[..., None].expand_as(pred)                              # (B, K, N)
    patches = patches.scatter(1, index, pred.to(patches.dtype))
    H, W = targets.shape[-2:]
    return unpatchify(patches, patch_size, (H // patch_size, W // patch_size))


def patch_mean_loss(targets, ids, patch_size, norm_pix, ops, mean=None, std=None):
    """The loss of predicting each masked patch by its own mean, the baseline to get below: a scalar.

    With norm_pix this is (N - 1) / N for every patch that is not flat. targets, mean and std as in
    patch_loss.
    """
    target = target_patches(targets, ids, patch_size, False, mean, std, torch.float32)      # (B, K, N)
    if norm_pix:
        pred = torch.zeros_like(target)
    else:
        pred = target.mean(dim=-1, keepdim=True).expand_as(target)
    return ops.patch_loss(pred, targets, ids, patch_size, norm_pix, mean, std)
