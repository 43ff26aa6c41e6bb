"""What is measured on the layers of an encoder: frequencies, similarity, how far its attention reaches.

Each function takes what one batch of unmasked images gives; sums over batches are the caller's.

Shapes: B images, L patches, T tokens (class token first), D width, h heads, F frequencies.
"""

import math

import torch

# ---------------------------------------------------------------- frequencies


def frequencies(grid):
    """Those of log_amplitudes for a (rows, columns) grid, in units of pi a patch along the shorter side.

    They are 2 k / side below 1, so of 14 patches the last is 12 / 14: Nyquist is none of them.
    """
    side = min(grid)
    return [2 * k / side for k in range((side + 1) // 2)]


def log_amplitudes(x, grid):
    """Mean log amplitude of patch tokens on the diagonal of their spectrum: (B, L, D) -> (F,), fp64.

    The mean is over images and channels, after the log; what is shown is relative to the first, at frequency
    0 (Park and Kim, arXiv 2202.06709). Noise is not flat there: the first one's log has another mean, so only
    differences of curves say something. On a grid that is not square the diagonal is that of equal frequency,
    to the nearest whole wave along the longer side.
    """
    maps = x.double().mT.unflatten(-1, grid)                            # (B, D, rows, columns)
    amplitudes = torch.fft.fft2(maps).abs()                             # (B, D, rows, columns)
    k = torch.arange((min(grid) + 1) // 2, device=x.device)             # (F,)
    row, column = ((k * side / min(grid)).round().long() for side in grid)
    return (amplitudes[..., row, column] + 1e-6).log().mean(dim=(0, 1))


# ---------------------------------------------------------------- attention


def attention_weights(attention, x):
    """softmax(q k^T / sqrt(d)) of an Attention for its input, (B, T, D) -> (B, h, T, T), fp32."""
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)                         # each (B, T, D)
    q, k = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float() for t in (q, k))
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)             # (B, h, T, T)


def patch_distances(grid, patch_size):
    """Pixels between the centres of any two patches of a (rows, columns) grid, (L, L)."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))  # (L, 2)
    return torch.cdist(places, places) * patch_size                     # (L, L)


def attention_distance(weights, grid, patch_size):
    """How far each head attends in pixels, (B, h, T, T) -> (h,), fp64: the mean over patches and images.

    Attention to and from the class token, which has no place, is left out, and rows sum to 1 without it
    (arXiv 2010.11929, figure 7). A patch that attends to nothing but the class token counts as 0.
    """
    among = weights[..., 1:, 1:].double()                               # (B, h, L, L)
    among = among / among.sum(dim=-1, keepdim=True).clamp(min=1e-300)   # (B, h, L, L)
    return (among * patch_distances(grid, patch_size).to(weights.device)).sum(dim=-1).mean(dim=(0, 2))


# ---------------------------------------------------------------- similarity


def gram(x):
    """Products of any two images' features, less the batch's mean: (B, ...) -> (B, B), fp64."""
    x = x.double().flatten(1)
    x = x - x.mean(dim=0)                                               # changes no HSIC, but its rounding
    return x @ x.T


def unbiased_hsic(a, b):
    """HSIC_1 of two Gram matrices of the same n >= 4 images (Song et al., JMLR 13, 2012, eq. 5)."""
    n = len(a)
    if n < 4:
        raise ValueError(f"HSIC of {n} images: expected 4 or more")
    a, b = (x - torch.diag(x.diagonal()) for x in (a, b))               # each (B, B)
    rows_a, rows_b = a.sum(dim=0), b.sum(dim=0)                         # each (B,)
    whole = (a * b).sum() + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows_a @ rows_b
    return float(whole / (n * (n - 3)))


def cka(grams_a, grams_b):
    """Linear CKA of two layers from their Gram matrices of the same minibatches (arXiv 2010.15327, eq. 3).

    Rotation and scale of the features change nothing, equal layers have 1, independent ones about 0, above or
    below. A layer that is the same for every image has 0.
    """
    def summed(left, right):
        return sum(unbiased_hsic(a, b) for a, b in zip(left, right, strict=True))

    own = summed(grams_a, grams_a) * summed(grams_b, grams_b)
    return summed(grams_a, grams_b) / math.sqrt(own) if own > 0 else 0.0
