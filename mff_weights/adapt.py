"""A patch projection for other channels or another patch size, adapted as timm does.

Shapes: D width, C channels, P and Q patch sides, before and after.
"""

import math

import torch
import torch.nn.functional as F


def adapt_projection(weight, in_chans, patch_size):
    """The projection (D, C, P, P) for in_chans channels in patches of patch_size, in its own type."""
    adapted = adapt_patches(adapt_channels(weight.float(), in_chans), patch_size)
    return adapted.to(weight.dtype)


def adapt_channels(weight, in_chans):
    """(D, C, P, P) for other channels: for one their sum, for others the old ones in turn, scaled.

    A grey image in one channel, or in a multiple of the old number, then gives what it gave before.
    """
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)                          # (D, 1, P, P)
    repeated = weight.repeat(1, math.ceil(in_chans / channels), 1, 1)
    return repeated[:, :in_chans] * (channels / in_chans)               # (D, in_chans, P, P)


def adapt_patches(weight, side):
    """(D, C, P, P) -> (D, C, Q, Q), by the pseudo-inverse of the resize (FlexiViT, arXiv 2212.08013).

    Resized images then give what they gave before: exactly in larger patches, by least squares in smaller.
    """
    old = weight.shape[-1]
    if side == old:
        return weight
    pixels = torch.eye(old * old).view(-1, 1, old, old)                 # each pixel of a patch, alone
    resize = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    resize = resize.flatten(1)                                          # (P * P, Q * Q)
    resampled = weight.flatten(2) @ torch.linalg.pinv(resize).mT        # (D, C, Q * Q)
    return resampled.unflatten(2, (side, side))                         # (D, C, Q, Q)
