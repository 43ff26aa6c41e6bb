"""Self-attention with learned relative positions, for encoders that are fine-tuned on dense tasks.

What is unusual here: pre-training has none of it. MAE switches a relative position bias on for the transfer
alone, at zero, so that the encoder begins as the one that was pre-trained (arXiv 2111.06377, A.4). A class
here takes the place of an encoder's Attention, with the same names for the same weights.

RelativeAttention is for segmentation, with a class token; WindowAttention is for detection, without one.

Shapes: B images, L patches, D width, T = 1 + L tokens (class token first), Q updated tokens, h heads, d head
width, N = rows * columns of the table; n windows of y rows and x columns, S = y * x.
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
        replace(block, RelativeAttention(encoder.embed_dim, block.attn.num_heads, encoder.grid))


def replace(block, new):
    """Put a new attention into a Block, with the weights that the old one has, on their device."""
    new.to(block.attn.qkv.weight.device)
    new.qkv, new.proj = block.attn.qkv, block.attn.proj
    block.attn = new


class WindowAttention(Attention):
    """Attention inside windows of a grid without class token, with decomposed relative positions (ViTDet).

    Arguments: the grid of (rows, columns), and the side of a window; None, or a window as large as the grid:
    all patches attend to all. Where windows do not divide the grid, zeros are appended below it and to its
    right after the norm, and real patches attend to these too, as in detectron2 (arXiv 2203.16527).

    A query q at row i gets q . rel_pos_h[i - j + y - 1] for a key at row j, and the same for columns; both
    tables, (2 y - 1, d) and (2 x - 1, d), have detectron2's names and begin at zero. No bias of S x S is ever
    formed: the products are more channels of the queries, and a key has a 1 in the channels of its row and of
    its column, so one scaled_dot_product_attention adds them up.
    """

    def __init__(self, dim, num_heads, grid, window=None):
        super().__init__(dim, num_heads)
        self.grid, self.window = grid, tuple(min(window or side, side) for side in grid)
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads)) for side in self.window)

    def forward(self, x, first=0):
        """As in Attention: (B, L, D) -> (B, Q, D), Q = L - first. L is that of the grid."""
        (rows, columns), grid, d = self.window, self.grid, self.rel_pos_h.shape[1]

        # cut the padded grid into windows
        below, right = -grid[0] % rows, -grid[1] % columns
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, right, 0, below))
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        shape = x.shape
        x = x.flatten(0, 2)                                             # (n, y, x, D)

        # scores of relative positions as channels of queries and keys
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        vertical = torch.einsum("nhyxd,yjd->nhyxj", q, offsets(self.rel_pos_h, rows))
        horizontal = torch.einsum("nhyxd,xjd->nhyxj", q, offsets(self.rel_pos_w, columns))
        q = torch.cat([q * d ** -0.5, vertical, horizontal], dim=-1)
        k = torch.cat([k, places(rows, columns, q).expand(*k.shape[:-1], -1)], dim=-1)
        width = self.query_width                                        # equal widths: the fastest kernels
        q, k, v = (F.pad(t, (0, width - t.shape[-1])).flatten(2, 3) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]     # (n, h, S, d)

        # put the windows together, without the padding
        x = x.transpose(1, 2).reshape(shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x[:, :grid[0], :grid[1]].flatten(1, 2)                      # (B, L, D)
        return self.proj(x[:, first:])                                  # (B, Q, D)

    @property
    def query_width(self):
        """Channels of a query with its relative positions, rounded up to a multiple of 8 for GPUs."""
        return -(-(self.rel_pos_h.shape[1] + sum(self.window)) // 8) * 8


def offsets(table, side):
    """The row of a table (2 side - 1, d) for each query (first index) and key: (side, side, d)."""
    index = torch.arange(side, device=table.device)
    return table[index[:, None] - index + side - 1]


def places(rows, columns, like):
    """For each patch of a window a 1 for its row and a 1 for its column: (rows, columns, rows + columns)."""
    row, column = (torch.eye(side, dtype=like.dtype, device=like.device) for side in (rows, columns))
    return torch.cat([row[:, None].expand(-1, columns, -1), column.expand(rows, -1, -1)], dim=-1)


def global_blocks_of(depth):
    """The blocks that attend globally, the last of each of four subsets: 2, 5, 8, 11 of twelve."""
    return tuple(sorted({max(depth * part // 4, 1) - 1 for part in (1, 2, 3, 4)}))


def add_windows(encoder, window, global_blocks=None):
    """Give every block of a VisionTransformer windows, but global_blocks, in place; its weights stay.

    The encoder then takes tokens without class token. global_blocks None: those of global_blocks_of.
    """
    whole = global_blocks_of(len(encoder.blocks)) if global_blocks is None else global_blocks
    for i, block in enumerate(encoder.blocks):
        side = None if i in whole else window
        replace(block, WindowAttention(encoder.embed_dim, block.attn.num_heads, encoder.grid, side))
