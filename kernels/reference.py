"""Every op in plain PyTorch: the specification that the kernels are tested against, and the path taken on a CPU.

Shapes: B images, C H W, P patch side, L patches, T tokens, D width, M fused levels, K masked patches, N = P * P * C.
"""

import functools

import torch
import torch.nn.functional as F


def patchify(images, patch_size):
    """Cut images into patches: (B, C, H, W) -> (B, L, N), channel fastest inside a patch, as MAE does (arXiv 2111.06377)."""
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


def prepare(images, mean, std, dtype=torch.float32):
    """Normalise uint8 images (B, C, H, W): (x / 255 - mean) / std for each channel; mean and std are (C,) in [0, 1] units."""
    scale = (1 / (255 * std)).view(1, -1, 1, 1)                         # (1, C, 1, 1)
    shift = (mean / std).view(1, -1, 1, 1)                              # (1, C, 1, 1)
    return (images * scale - shift).to(dtype)


def layer_sum(xs, logits):
    """Softmax-weighted sum of M layer outputs (MFF, arXiv 2308.00261): M tensors (B, T, D), logits of M numbers -> (B, T, D)."""
    weights = logits.flatten().softmax(dim=0)                           # (M,)
    out = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        out = out + weight * x
    return out


def patch_loss(pred, images, ids, patch_size, norm_pix):
    """Mean squared error of predicted patches, a scalar in fp32 (MAE, arXiv 2111.06377, sec. 3 and table 1d).

    pred (B, K, N) predicts the patches of images (B, C, H, W) that ids (B, K) names; with norm_pix each target patch is
    normalised by its own mean and variance.
    """
    target = take_tokens(patchify(images, patch_size), ids).float()     # (B, K, N)
    if norm_pix:
        target = normalise_patches(target)
    return F.mse_loss(pred.float(), target)


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
    """Keep the frequencies inside a disk (PixMIM, arXiv 2303.02416): images (B, C, H, W) in [0, 1] -> the same shape, >= 0.

    radius is in frequency bins. As published, the disk is centred half a bin off the zero frequency when a side is even,
    so the result is slightly complex, and its absolute value is taken: docs/parity.md, PixMIM.
    """
    kept = low_pass_disk(images.shape[-2], images.shape[-1], radius, images.device)
    return torch.fft.ifft2(torch.fft.fft2(images.float()) * kept).abs()


@functools.lru_cache(maxsize=8)
def low_pass_disk(height, width, radius, device):
    """1 where a frequency is kept, else 0: (H, W) in the order of torch.fft.fft2."""
    rows = torch.arange(height, device=device)[:, None] - (height - 1) / 2      # centre at (H - 1) / 2: parity.md, PixMIM
    columns = torch.arange(width, device=device)[None, :] - (width - 1) / 2
    disk = (rows ** 2 + columns ** 2 <= radius ** 2).float()            # (H, W), zero frequency at (H // 2, W // 2)
    return torch.fft.ifftshift(disk)                                    # shifted once here, so that images never are
