"""A Vision Transformer (arXiv 2010.11929) as MAE uses it, with timm's parameter names.

What is unusual about this one:
- patches are cut out of the image before they are projected, so that MAE can drop masked patches first and
  project only the visible ones; the projection's parameters are still those of a convolution, as in timm and
  MAE;
- it hands out the outputs of any blocks, which is what MFF fuses;
- positions are fixed sin-cos by default, heights and widths may differ, and any number of channels will do.

Shapes: B images, C H W, P patch side, L patches, V visible patches, D width, T tokens (class token first),
Q updated tokens, h heads, d head width, N = P * P * C.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mff_min.kernels.reference import patchify, take_tokens

CPU_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()                    # else it is slower there than float32

# ViT-S is DeiT's (arXiv 2012.12877), ViT-B and L are ViT's, ViT-H with 14-pixel patches is MAE's. vit_test is
# for tests and for the demo: twelve thin blocks, so that the paper's fusion indices mean the same there.
MODELS = {
    "vit_test": dict(patch_size=4, embed_dim=64, depth=12, num_heads=2),
    "vit_t": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "vit_s": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_b": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_l": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_h": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}


class PatchEmbed(nn.Module):
    """Linear projection of flattened patches, stored as the convolution it is equal to."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches):
        """Patches as patchify cuts them, (..., N) -> (..., D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1)                   # (D, P, P, C), patchify's order
        return F.linear(patches, weight.flatten(1), self.proj.bias)     # (..., D)


class Attention(nn.Module):
    """Multi-head self-attention, all tokens to all tokens."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, first=0):
        """Self-attention. Only tokens first, first + 1, ... are updated; all tokens serve as keys and values.

        (B, T, D) -> (B, Q, D), Q = T - first.
        """
        B, T, D = x.shape
        if first:
            q_weight, kv_weight = self.qkv.weight.split((D, 2 * D))     # (D, D), (2 * D, D)
            q_bias, kv_bias = self.qkv.bias.split((D, 2 * D))           # (D,), (2 * D,)
            q = F.linear(x[:, first:], q_weight, q_bias)                # (B, Q, D)
            k, v = F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1)     # each (B, T, D)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)                      # each (B, T, D)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = attend(q, k, v)                                             # (B, h, Q, d)
        return self.proj(x.transpose(1, 2).flatten(2))                  # (B, Q, D)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for every head, in the faster of two forms: (B, h, Q, d) -> same.

    k and v are (B, h, T, d).
    """
    # In bfloat16 on a CPU that multiplies it, the backward pass of the fused form takes longer than that of
    # these products, which keep B h Q T weights for it: docs/walkthrough.md, Encoder.
    if CPU_HAS_BF16 and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return attend_by_products(q, k, v)                              # (B, h, Q, d)
    return F.scaled_dot_product_attention(q, k, v)                      # (B, h, Q, d)


def attend_by_products(q, k, v):
    """The two products and the softmax as written."""
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)          # (B, h, Q, T)
    return weights @ v                                                  # (B, h, Q, d)


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm Transformer block, (B, T, D) -> (B, T, D).

    branches (B, 2) is what each image's two residual branches are multiplied by (drop path); None: by 1. With
    `first`, only tokens from there on are computed, (B, Q, D); the others are keys and values for them.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, branches=None, first=0):
        y, x = self.attn(self.norm1(x), first), x[:, first:]            # each (B, Q, D)
        if branches is None:
            x = x + y
            return x + self.mlp(self.norm2(x))
        scale_attn, scale_mlp = branches[:, :, None, None].unbind(dim=1)    # each (B, 1, 1)
        x = x + scale_attn * y
        return x + scale_mlp * self.mlp(self.norm2(x))


def run_block(block, x, recompute, *more):
    """block(x, *more); with recompute, activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, *more, use_reentrant=False)
    return block(x, *more)


def drop_path_branches(noise, drop_path):
    """What drop path multiplies each branch by (arXiv 1603.09382), from uniform noise: (B, depth, 2) -> same.

    Block i of n drops a branch of an image with probability drop_path * i / (n - 1), and those that it keeps
    are scaled, so that the expectation stays.
    """
    dropped = torch.linspace(0, drop_path, noise.shape[1], device=noise.device)[:, None]   # (depth, 1)
    return (noise >= dropped) / (1 - dropped)


class VisionTransformer(nn.Module):
    """A ViT; with `num_classes` it classifies, without it returns the pooled feature.

    img_size is a side or (height, width) in pixels. global_pool "token" classifies the class token after the
    final norm, "avg" the mean of the patch tokens through fc_norm, without the final norm (MAE's
    fine-tuning). drop_path is the last block's probability of dropping a branch, in forward passes that get
    noise. Raises ValueError when the image is no whole number of patches.
    """

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0, in_chans=3,
                 num_classes=0, global_pool="token", drop_path=0.0, grad_checkpointing=False):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height}x{width} is not a multiple of patch_size {patch_size}")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool {global_pool!r} is unknown: expected token or avg")
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.grid = (height // patch_size, width // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.global_pool, self.drop_path = global_pool, drop_path
        self.grad_checkpointing = grad_checkpointing

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        if global_pool == "token":
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        else:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self):
        """MAE's initialisation: Xavier-uniform matrices, the patch projection among them, and zero biases."""
        init_linear(self)
        weight = self.patch_embed.proj.weight                           # its bias keeps Conv2d's default
        nn.init.xavier_uniform_(weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images, ids_keep=None):
        """Tokens with positions, class token first, of all patches or of those that ids_keep (B, V) names.

        (B, C, H, W) -> (B, 1 + L, D) or (B, 1 + V, D).
        """
        # cut patches, with the positions of each
        patches = patchify(images, self.patch_size)                     # (B, L, N)
        pos_embed = self.pos_embed[:, 1:].expand(len(images), -1, -1)   # (B, L, D)

        # drop the masked ones, before any of them is projected
        if ids_keep is not None:
            patches = take_tokens(patches, ids_keep)                    # (B, V, N)
            pos_embed = take_tokens(pos_embed, ids_keep)                # (B, V, D)

        # project patches, add positions
        x = self.patch_embed(patches) + pos_embed

        # put the class token in front
        cls_token = self.cls_token + self.pos_embed[:, :1]              # (1, 1, D)
        return torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)

    def forward_blocks(self, x, out_indices, noise=None):
        """Outputs of the blocks that out_indices names, ascending, before any norm: a list of (B, T, D).

        noise (B, depth, 2), uniform in [0, 1), decides which branches drop path leaves out; None: none.
        """
        branches = [()] * len(self.blocks)
        if noise is not None and self.drop_path:
            branches = [(scale,) for scale in drop_path_branches(noise, self.drop_path).unbind(dim=1)]
        outputs = []
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, self.grad_checkpointing, *branches[i])
            if i in out_indices:
                outputs.append(x)
        return outputs

    def forward_features(self, images, noise=None):
        """All tokens of unmasked images, (B, C, H, W) -> (B, 1 + L, D); normed if global_pool is "token"."""
        x = self.forward_blocks(self.embed(images), [len(self.blocks) - 1], noise)[0]       # (B, T, D)
        return self.norm(x) if self.global_pool == "token" else x

    def forward(self, images, noise=None):
        """Logits (B, num_classes), or the pooled feature (B, D) when there is no head.

        noise (B, depth, 2) is for drop path, as in forward_blocks.
        """
        x = self.forward_features(images, noise)
        if self.global_pool == "token":
            x = x[:, 0]                                                 # (B, D)
        else:
            x = self.fc_norm(x[:, 1:].mean(dim=1))                      # (B, D)
        return self.head(x)


def init_linear(module):
    """Xavier-uniform weights and zero biases for every Linear inside module (MAE, arXiv 2111.06377, A.1)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)                       # qkv as one matrix, like the official
            nn.init.zeros_(layer.bias)


def sincos_pos_embed(dim, grid):
    """Fixed 2-D sin-cos positions of a (rows, columns) grid, zeros for the class token: (1, 1 + L, D), fp32.

    The first half of the channels encodes the column, the second half the row, as in the official MAE code;
    mmpretrain has the halves the other way round (docs/parity.md). Raises ValueError when dim is no multiple
    of 4.
    """
    if dim % 4:
        raise ValueError(f"embed_dim {dim} is not a multiple of 4, which 2-D sin-cos positions need")
    rows, columns = grid
    omega = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))     # (D // 4,)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")     # each (rows, columns)
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega                           # each (L, D // 4)
    positions = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)                  # (L, D)
    return torch.cat([torch.zeros(1, dim), positions.float()])[None]                    # (1, 1 + L, D)


def resize_pos_embed(pos_embed, old_grid, new_grid):
    """Positions for another grid of (rows, columns): (1, 1 + L, D) -> (1, 1 + L', D).

    Bicubic without antialias, as MAE does.
    """
    if old_grid == new_grid:
        return pos_embed
    cls_position, positions = pos_embed[:, :1], pos_embed[:, 1:]        # (1, 1, D), (1, L, D)
    positions = positions.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)     # (1, D, rows, columns)
    positions = F.interpolate(positions, size=new_grid, mode="bicubic", align_corners=False)
    positions = positions.flatten(2).transpose(1, 2)                    # (1, L', D)
    return torch.cat([cls_position, positions], dim=1)                  # (1, 1 + L', D)
