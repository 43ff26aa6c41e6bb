"""Self-attention with learned relative positions, for encoders that are fine-tuned on dense tasks.

What is unusual here: pre-training has none of it. MAE switches a relative position bias on for the transfer
alone, at zero, so that the encoder begins as the one that was pre-trained (arXiv 2111.06377, A.4). A class
here takes the place of an encoder's Attention, with the same names for the same weights.

Shapes: B images, L patches, D width, T = 1 + L tokens (class token first), Q updated tokens, h heads, d head
width, N = rows * columns of the table.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.vit import Attention


class RelativeAttention(Attention):
    """Attention with a learned bias for each head and relative position on a grid of (rows, columns).

    relative_position_bias_table (N + 3, h) is BEiT's (arXiv 2106.08254), with the same name and order: a row
    for each offset of two patches, then one each for class token -> patch, patch -> class token and class
    token -> class token. It is zero at first.
    """

    def __init__(self, dim, num_heads, grid):
        super().__init__(dim, num_heads)
        index = relative_positions(grid)                                # (T, T)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets(grid) + 3, num_heads))
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x, first=0):
        """As in Attention: (B, T, D) -> (B, Q, D), Q = T - first. T is that of the grid."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)     # (B, h, T, d)
        bias = self.relative_position_bias_table[self.relative_position_index[first:]]          # (Q, T, h)
        bias = bias.permute(2, 0, 1)[None].to(q.dtype)                  # (1, h, Q, T)
        x = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=bias)               # (B, h, Q, d)
        return self.proj(x.transpose(1, 2).flatten(2))                  # (B, Q, D)


def num_offsets(grid):
    """How many offsets two patches of a (rows, columns) grid can have."""
    rows, columns = grid
    return (2 * rows - 1) * (2 * columns - 1)


def relative_positions(grid):
    """The row of RelativeAttention's table for each query (first index) and key of the grid: (T, T) int64."""
    rows, columns = grid
    y, x = (index.flatten() for index in torch.meshgrid(
        torch.arange(rows), torch.arange(columns), indexing="ij"))      # each (L,)
    down, right = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1   # each (L, L), from 0 on
    N, T = num_offsets(grid), 1 + rows * columns
    index = torch.full((T, T), N)                                       # (T, T), class token -> patch
    index[1:, 0] = N + 1                                                # patch -> class token
    index[0, 0] = N + 2
    index[1:, 1:] = down * (2 * columns - 1) + right
    return index


def add_relative_positions(encoder):
    """Give every block of a VisionTransformer relative positions, in place; its weights stay as they are."""
    for block in encoder.blocks:
        old = block.attn
        new = RelativeAttention(encoder.embed_dim, old.num_heads, encoder.grid).to(old.qkv.weight.device)
        new.qkv, new.proj = old.qkv, old.proj
        block.attn = new
