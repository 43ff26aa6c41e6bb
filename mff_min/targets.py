"""What is to be predicted, and how predictions become pictures again.

A target is a module with two things: dim, how many values a patch's prediction has, and
loss(pred, ids, images, pixels), a scalar. MaskedAutoencoder asks for no more. Features as the target are in
mff_tasks/features.py; docs/targets.md has a target in ten lines.

Shapes: B images, C H W, P patch side, L patches, K masked patches, N = P * P * C.
"""

import torch
from torch import nn

from mff_min.kernels.ops import TORCH
from mff_min.kernels.reference import patch_statistics, patchify, take_tokens, target_patches, unpatchify


class PixelTarget(nn.Module):
    """The pixels of the masked patches (MAE, arXiv 2111.06377), without high frequencies for PixMIM.

    With norm_pix_loss the pixels of a patch are normalised by their own mean and variance (MAE, table 1d).
    low_pass_radius is in frequency bins of the image (PixMIM, arXiv 2303.02416); 0 keeps all. mean and std
    (C values each, of pixels in [0, 1]) are those that the images are normalised by.
    """

    def __init__(self, patch_size, in_chans=3, norm_pix_loss=True, mean=None, std=None, low_pass_radius=0.0,
                 ops=TORCH):
        super().__init__()
        self.dim = patch_size ** 2 * in_chans                           # N
        self.patch_size, self.norm_pix_loss, self.ops = patch_size, norm_pix_loss, ops
        self.low_pass_radius = low_pass_radius
        for name, values in (("mean", mean), ("std", std)):             # no checkpoint holds them
            self.register_buffer(name, None if values is None else torch.tensor(values), persistent=False)

    def loss(self, pred, ids, images, pixels=None):
        """Mean squared error of pred (B, K, N) for the patches ids (B, K) of normalised images (B, C, H, W).

        pixels (B, C, H, W) are the same images in uint8: the same numbers from a quarter of the bytes.
        """
        if pixels is None or self.low_pass_radius:
            return self.ops.patch_loss(pred, self.filter(images), ids, self.patch_size, self.norm_pix_loss)
        return self.ops.patch_loss(pred, pixels, ids, self.patch_size, self.norm_pix_loss, self.mean,
                                   self.std)

    def loss_of_means(self, ids, images):
        """The loss of predicting each masked patch by its own mean, the baseline to get below: a scalar."""
        return patch_mean_loss(self.filter(images), ids, self.patch_size, self.norm_pix_loss, self.ops)

    @torch.no_grad()
    def filter(self, images):
        """The normalised images (B, C, H, W) as they are to be predicted."""
        if not self.low_pass_radius:
            return images
        with torch.autocast(images.device.type, enabled=False):         # a target is not rounded to bfloat16
            return low_pass_target(images, self.mean, self.std, self.low_pass_radius, self.ops)


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
    assert pred.shape[-1] == patches.shape[-1]                          # else a part would be pasted
    if norm_pix:
        mean, std = patch_statistics(take_tokens(patches, ids).float())
        pred = pred * std + mean
    index = ids[..., None].expand_as(pred)                              # (B, K, N)
    patches = patches.scatter(1, index, pred.to(patches.dtype))
    H, W = targets.shape[-2:]
    return unpatchify(patches, patch_size, (H // patch_size, W // patch_size))


def patch_mean_loss(targets, ids, patch_size, norm_pix, ops):
    """patch_loss of predicting each masked patch of the targets (B, C, H, W) by its own mean: a scalar.

    With norm_pix this is (N - 1) / N for every patch that is not flat.
    """
    target = target_patches(targets, ids, patch_size, False, None, None, torch.float32)     # (B, K, N)
    if norm_pix:
        pred = torch.zeros_like(target)
    else:
        pred = target.mean(dim=-1, keepdim=True).expand_as(target)
    return ops.patch_loss(pred, targets, ids, patch_size, norm_pix)
