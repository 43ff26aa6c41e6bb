# SPDX-License-Identifier: Apache-2.0
"""Every op in plain PyTorch: the specification that kernels are tested against, and the path on a CPU.

Shapes: B images, C H W, P patch side, L patches, T tokens, D width, M fused levels, K masked patches,
N = P * P * C; H' W' the frequencies kept.
"""

import functools
import math

import torch
import torch.nn.functional as F

from . import checks


def patchify(images, patch_size):
    """Cut images into patches: (B, C, H, W) -> (B, L, N), channel fastest (MAE, arXiv 2111.06377)."""
    B, C, H, W = images.shape
    P = patch_size
    x = images.reshape(B, C, H // P, P, W // P, P)                      # (B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 3, 5, 1)                                     # (B, H // P, W // P, P, P, C)
    return x.reshape(B, -1, P * P * C)                                  # (B, L, N)


def unpatchify(patches, patch_size, grid):
    """Put patches back: (B, L, N) -> (B, C, H, W), the inverse of patchify; grid is (H // P, W // P)."""
    B, L, N = patches.shape
    P, (rows, columns) = patch_size, grid
    x = patches.reshape(B, rows, columns, P, P, -1)                     # (B, rows, columns, P, P, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                                     # (B, C, rows, P, columns, P)
    return x.reshape(B, -1, rows * P, columns * P)                      # (B, C, H, W)


def take_tokens(x, ids):
    """The tokens of each image that ids names: x (B, L, D), ids (B, V) -> (B, V, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def prepare(images, mean, std, dtype=torch.float32, partner=None, lam=None, box=None):
    """Normalise uint8 images (B, C, H, W): (x / 255 - mean) / std; mean and std are (C,) in [0, 1] units.

    partner (B,): the image of the batch that each one is mixed with, in the share 1 - lam, lam (B,) (mixup,
    arXiv 1710.09412), and wholly inside box (B, 4): top, left, bottom, right, half open (CutMix, arXiv
    1905.04899).
    """
    checks.check_images(images, mean, std, partner, lam, box)
    scale, shift = scale_and_shift(mean, std)
    x = images * scale[:, None, None] - shift[:, None, None]            # (B, C, H, W)
    if partner is not None:
        keep = mix_share(images, lam, box).to(x.dtype)                  # (B, 1, H, W) or (B, 1, 1, 1)
        x = keep * x + (1 - keep) * x[partner]
    return x.to(dtype)


def scale_and_shift(mean, std):
    """The two numbers of each channel for which x * scale - shift is (x / 255 - mean) / std."""
    return 1 / (255 * std), mean / std


def mix_share(images, lam, box):
    """What each pixel keeps of its own image: lam, but 0 inside the box; (B, 1, H, W) or (B, 1, 1, 1)."""
    B, C, H, W = images.shape
    keep = torch.ones(B, 1, 1, 1, device=images.device) if lam is None else lam.view(B, 1, 1, 1)
    if box is None:
        return keep
    top, left, bottom, right = box.view(B, 4, 1, 1, 1).unbind(dim=1)    # each (B, 1, 1, 1)
    y = torch.arange(H, device=images.device)[:, None]                  # (H, 1)
    x = torch.arange(W, device=images.device)                           # (W,)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)      # (B, 1, H, W)
    return keep.masked_fill(inside, 0)


def layer_sum(xs, logits):
    """Softmax-weighted sum of M layer outputs (MFF, arXiv 2308.00261): M of (B, T, D), M logits -> one."""
    checks.check_levels(xs, logits)
    weights = logits.flatten().softmax(dim=0)                           # (M,)
    out = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        out = out + weight * x
    return out


def layer_sum_norm(xs, logits, weight, bias, eps):
    """LayerNorm of layer_sum(xs, logits), as MFF's encoder ends: weight and bias are (D,) -> (B, T, D)."""
    checks.check_norm(weight, bias, xs[0].shape[-1])
    s = layer_sum(xs, logits)                                           # (B, T, D)
    dtype = wide(s.dtype)                                               # parameters may be wider than levels
    return F.layer_norm(s.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(s.dtype)


def project_sum_norm(xs, logits, projections, weight, bias, eps):
    """MFF's fusion (arXiv 2308.00261, sec. 3.2): project all but the last level, sum, LayerNorm -> (B, T, D).

    projections are M - 1 pairs: a weight (D, D) and a bias (D,), as in nn.Linear; the last level is not
    projected.
    """
    checks.check_projections(xs, projections)
    projected = [F.linear(x, *projection) for x, projection in zip(xs[:-1], projections, strict=True)]
    levels = [*projected, xs[-1]]                                       # M of (B, T, D)
    return layer_sum_norm(levels, logits, weight, bias, eps)            # softmax, weighted sum, LayerNorm


def merge_projections(xs, logits, projections):
    """Two levels and two logits with the same layer_sum as M levels of which M - 1 are projected first.

    Nothing stands between a projection and the sum, so the softmax weights go into the projections, and M - 1
    products become one, of the levels side by side. Its weights are the softmax among the M - 1 alone; their
    share of the whole is the weight that the logit logsumexp(logits[:-1]) has beside logits[-1].
    """
    if len(xs) == 1:
        return xs, logits
    logits = logits.flatten()
    weights = logits[:-1].softmax(dim=0)                                # (M - 1,)
    merged = [w * p for w, (p, _) in zip(weights, projections, strict=True)]
    merged = torch.cat(merged, dim=1)                                   # (D, (M - 1) * D)
    bias = sum(w * b for w, (_, b) in zip(weights, projections, strict=True))   # (D,)
    row = torch.cat([x.to(product_type(x)) for x in xs[:-1]], dim=-1)   # (B, T, (M - 1) * D)
    product = F.linear(row, merged, bias)                               # (B, T, D)
    return [product, xs[-1]], torch.stack([logits[:-1].logsumexp(dim=0), logits[-1]])


def product_type(x):
    """The type in which a matrix product reads x: autocast's where it is on, so no wider copy is made."""
    kind = x.device.type
    # Not torch.amp.is_autocast_available: Dynamo of PyTorch 2.11 cannot trace it, and cuts the graph there.
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def patch_loss(pred, images, ids, patch_size, norm_pix, mean=None, std=None):
    """Mean squared error of predicted patches, a scalar in fp32 (MAE, arXiv 2111.06377, sec. 3 and table 1d).

    pred (B, K, N) predicts the patches of images (B, C, H, W) that ids (B, K) names; with norm_pix each
    target patch is normalised by its own mean and variance. uint8 images need mean and std (C,), in [0, 1]
    units, as in prepare.
    """
    checks.check_patches(pred, images, ids, patch_size, mean, std)
    target = target_patches(images, ids, patch_size, norm_pix, mean, std, wide(pred.dtype))     # (B, K, N)
    return F.mse_loss(pred.to(target.dtype), target)


def target_patches(images, ids, patch_size, norm_pix, mean, std, dtype):
    """What patch_loss compares with, a constant: the patches that ids names, normalised -> (B, K, N)."""
    target = take_tokens(patchify(images.detach(), patch_size), ids.long()).to(dtype)      # (B, K, N)
    if mean is not None:
        scale, shift = scale_and_shift(mean, std)                       # (C,), (C,)
        target = (target.unflatten(-1, (-1, len(mean))) * scale - shift).flatten(-2).to(dtype)
    return normalise_patches(target) if norm_pix else target


def patch_statistics(patches):
    """Mean and standard deviation of each patch, as norm_pix uses them: (B, K, N) -> two of (B, K, 1)."""
    mean = patches.mean(dim=-1, keepdim=True)                           # (B, K, 1)
    var = patches.var(dim=-1, keepdim=True)                             # unbiased, as in the official code
    return mean, (var + 1e-6).sqrt()


def normalise_patches(patches):
    """Patches (B, K, N) with zero mean and unit variance each."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def low_pass(images, radius):
    """Keep the frequencies inside a disk (PixMIM, arXiv 2303.02416): (B, C, H, W) in [0, 1] -> same, >= 0.

    radius is in frequency bins. As published, the disk is centred half a bin off the zero frequency when a
    side is even, so the result is slightly complex, and its absolute value is taken: docs/parity.md, PixMIM.
    """
    exact = torch.get_float32_matmul_precision() == "highest"           # TF32 products would be off by 1e-3
    if images.is_cuda and exact:
        return low_pass_products(images, radius)
    return low_pass_fft(images, radius)


def low_pass_fft(images, radius):
    """low_pass by the fast Fourier transform of every frequency: the quicker form on a CPU."""
    kept = low_pass_disk(images.shape[-2], images.shape[-1], radius, images.device)
    return torch.fft.ifft2(torch.fft.fft2(images.float()) * kept).abs()


def low_pass_products(images, radius):
    """low_pass by products with the kept rows of two Fourier matrices: the full spectrum never exists."""
    H, W = images.shape[-2:]
    disk, rows, columns = low_pass_matrices(H, W, radius, images.device)
    real = torch.view_as_real(columns.mT).flatten(1)                    # (W, 2 * W'): images are real
    with torch.autocast(images.device.type, enabled=False):             # targets stay in fp32
        x = torch.view_as_complex((images.float() @ real).unflatten(-1, (-1, 2)))       # (B, C, H, W')
        spectrum = (rows @ x) * disk                                    # (B, C, H', W')
        filtered = (rows.mH @ spectrum @ columns.conj()).abs()          # (B, C, H, W)
    return filtered / (H * W)


@functools.lru_cache(maxsize=8)
def low_pass_matrices(height, width, radius, device):
    """The kept part of the disk, (H', W'), and the Fourier rows it needs: (H', H) and (W', W)."""
    disk = low_pass_disk(height, width, radius, device)                 # (H, W)
    in_rows, in_columns = disk.any(dim=1), disk.any(dim=0)              # (H,), (W,)
    rows, columns = fourier_matrix(height, device)[in_rows], fourier_matrix(width, device)[in_columns]
    return disk[in_rows][:, in_columns], rows, columns


def fourier_matrix(size, device):
    """exp(-2 pi i j k / size) for frequency j and position k: (size, size)."""
    k = torch.arange(size, device=device)
    angle = (k[:, None] * k % size).double() * (-2 * math.pi / size)    # reduced first: exact for any size
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


@functools.lru_cache(maxsize=8)
def low_pass_disk(height, width, radius, device):
    """1 where a frequency is kept, else 0: (H, W) in the order of torch.fft.fft2."""
    # Centre at (H - 1) / 2, half a bin off when H is even: parity.md, PixMIM.
    rows = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=device)[None, :] - (width - 1) / 2
    disk = (rows ** 2 + columns ** 2 <= radius ** 2).float()            # (H, W), zero frequency at its centre
    return torch.fft.ifftshift(disk)                                    # shifted here: images never are


def wide(dtype):
    """The type that sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
