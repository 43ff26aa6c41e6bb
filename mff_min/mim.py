"""Masked image modelling: MAE (arXiv 2111.06377), and MFF (arXiv 2308.00261) on top of it.

What is unusual about MFF: the latent that the decoder receives is not the last block's output but a
softmax-weighted sum of several blocks' outputs, each but the last through a linear projection, taken before
the encoder's one final norm. So the shallow blocks hand the decoder its low-level detail directly, and the
deep ones need not carry it. Downstream the fusion is dropped: what is transferred is the plain encoder.

With one level in out_indices the fusion is the identity and the model is MAE. PixMIM (arXiv 2303.02416)
changes only the target and the crop: targets.py and mff_data/crops.py.

What is unusual about this implementation: the decoder works on tokens in shuffled order (its positions are
shuffled instead), its last block computes masked tokens only, and only they are predicted and scored. All of
it gives the numbers of un-shuffling and predicting everything.

Shapes: B images, C H W, P patch side, L patches, V visible patches, K = L - V masked patches, D width of the
encoder, E width of the decoder, T = V + 1 tokens, M fused levels, N values predicted for a patch.
"""

import torch
from torch import nn

from mff_min.kernels.ops import TORCH
from mff_min.kernels.reference import take_tokens
from mff_min.vit import Block, init_linear, run_block, sincos_pos_embed


def random_masking(noise, num_visible):
    """Shuffle each image's patches by its noise and keep the first V (MAE, arXiv 2111.06377, sec. 3).

    noise is (B, L), uniform. Returns ids_shuffle (B, L), whose first V columns are the patches kept, and mask
    (B, L) in image order, where 1 is removed and 0 is kept.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)                     # (B, L), ties alike on any device
    mask = torch.ones_like(noise)                                       # (B, L)
    mask.scatter_(1, ids_shuffle[:, :num_visible], 0.0)
    return ids_shuffle, mask


def spread_indices(depth):
    """Six levels over depth blocks: the published 0,2,4,6,8,11 of twelve, by the same stride of others."""
    stride = max(depth // 6, 1)
    return tuple(range(0, min(5 * stride, depth - 1), stride)) + (depth - 1,)


def parse_out_indices(text, depth):
    """The blocks that --out-indices names: "spread", "last", "all" or a list, as a tuple of ints.

    Raises ValueError.
    """
    named = {"spread": spread_indices(depth), "last": (depth - 1,), "all": tuple(range(depth))}
    try:
        return named.get(text) or tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"--out-indices {text}: expected spread, last, all, or e.g. 0,4,11") from None


class MaskedAutoencoder(nn.Module):
    """MAE, and MFF when out_indices holds more than one level.

    encoder: a VisionTransformer with global_pool="token"; its positions are frozen here. out_indices: the
    blocks whose outputs are fused, ascending and ending with the last block. target: what is predicted, such
    as targets.PixelTarget. detach_shallow: no gradient reaches the shallow blocks through the fusion (MFF,
    A.8). Raises ValueError for out_indices or a mask_ratio that cannot be.
    """

    def __init__(self, encoder, out_indices, target, mask_ratio=0.75, detach_shallow=False,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, ops=TORCH):
        super().__init__()
        D, E, L = encoder.embed_dim, decoder_embed_dim, encoder.num_patches
        check_out_indices(out_indices, len(encoder.blocks))
        self.num_visible = count_visible(L, mask_ratio)
        self.out_indices, self.detach_shallow = tuple(out_indices), detach_shallow
        self.target, self.ops = target, ops

        self.encoder = encoder
        self.encoder.pos_embed.requires_grad_(False)

        # One scalar logit per level, equal at the start. The shape is mmpretrain's, and it matters: logits of
        # more than one dimension get weight decay, which pulls them to uniform (docs/parity.md, MFF).
        M = len(self.out_indices)
        self.proj_layers = nn.ModuleList(nn.Linear(D, D) for _ in range(M - 1))
        self.proj_weights = nn.Parameter(torch.ones(M, 1, 1, 1), requires_grad=M > 1)

        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(E, encoder.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(E, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, target.dim)

        for module in (self.proj_layers, self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_linear(module)
        nn.init.normal_(self.mask_token, std=0.02)

    def fusion_weights(self):
        """The softmaxed weight of every level, (M,), which sums to 1."""
        return self.proj_weights.flatten().softmax(dim=0)

    def encode(self, images, ids_keep):
        """Fused and normalised latent of the visible patches: (B, C, H, W), ids_keep (B, V) -> (B, T, D)."""
        # embed visible patches
        x = self.encoder.embed(images, ids_keep)                        # (B, T, D)

        # apply blocks, keep the outputs of some
        levels = self.encoder.forward_blocks(x, self.out_indices)       # M of (B, T, D)
        if self.detach_shallow:
            levels[:-1] = [level.detach() for level in levels[:-1]]

        # fuse them: in MAE there is one level, and this is its norm
        return fuse(levels, self.proj_layers, self.proj_weights, self.encoder.norm, self.ops)

    def decode(self, latent, ids_shuffle):
        """Predictions of masked patches: latent (B, T, D) -> (B, K, N), in ids_shuffle's order (B, L)."""
        B, T, D = latent.shape
        L = ids_shuffle.shape[1]

        # embed tokens, append mask tokens
        x = self.decoder_embed(latent)                                  # (B, T, E)
        mask_tokens = self.mask_token.expand(B, 1 + L - T, -1)          # (B, K, E)
        x = torch.cat([x, mask_tokens], dim=1)                          # (B, 1 + L, E)

        # add positions, in shuffled order
        positions = self.decoder_pos_embed[:, 1:].expand(B, -1, -1)     # (B, L, E)
        positions = take_tokens(positions, ids_shuffle)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(B, -1, -1), positions], dim=1)

        # apply blocks; the last one computes masked tokens only
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = run_block(block, x, self.encoder.grad_checkpointing)
        x = run_block(last, x, self.encoder.grad_checkpointing, None, T)    # (B, K, E)

        # predict patches
        return self.decoder_pred(self.decoder_norm(x))                  # (B, K, N)

    def predict(self, images, noise):
        """What is behind the mask: pred (B, K, N), of the patches ids (B, K), and mask (B, L), 1 removed."""
        # mask, encode what is visible, decode what is not
        ids_shuffle, mask = random_masking(noise, self.num_visible)
        latent = self.encode(images, ids_shuffle[:, :self.num_visible])                 # (B, T, D)
        return self.decode(latent, ids_shuffle), ids_shuffle[:, self.num_visible:], mask

    def forward(self, images, noise, pixels=None):
        """The loss on masked patches, a scalar: images (B, C, H, W) normalised, noise (B, L) uniform.

        pixels is the target's: the same images in uint8, cheaper to read, or what else its loss takes.
        """
        pred, ids, _ = self.predict(images, noise)
        return self.target.loss(pred, ids, images, pixels)


def fuse(levels, proj_layers, proj_weights, norm, ops):
    """MFF's fusion (arXiv 2308.00261, sec. 3.2): M levels x_0 ... x_(M-1), each (B, T, D) -> (B, T, D).

        w = softmax(proj_weights)
        y = norm(w_0 P_0(x_0) + ... + w_(M-2) P_(M-2)(x_(M-2)) + w_(M-1) x_(M-1))

    P_i are the linear layers proj_layers. The last level is not projected. ops.project_sum_norm computes it.
    """
    projections = [(proj.weight, proj.bias) for proj in proj_layers]
    return ops.project_sum_norm(levels, proj_weights, projections, norm.weight, norm.bias, norm.eps)


def count_visible(num_patches, mask_ratio):
    """How many of L patches stay visible, rounded down as in the official code.

    Raises ValueError when none or all do.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio} is outside (0, 1)")
    num_visible = int(num_patches * (1 - mask_ratio))
    if not 0 < num_visible < num_patches:
        raise ValueError(f"mask_ratio {mask_ratio} leaves {num_visible} of {num_patches} patches visible: "
                         f"expected at least one visible and one masked")
    return num_visible


def check_out_indices(out_indices, depth):
    """Raise ValueError unless out_indices ascend and end with the last of depth blocks."""
    text = ",".join(map(str, out_indices))
    if not out_indices or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(f"out_indices {text or '(empty)'} must ascend, without repeats")
    if out_indices[0] < 0 or out_indices[-1] != depth - 1:
        last = depth - 1
        raise ValueError(f"out_indices {text} must lie in 0 ... {last} and end with the last block, {last}")
