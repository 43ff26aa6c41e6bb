"""The peers of a training step, each with the weights of ours, and each the way its own package would do it.

A peer of pre-training is a module whose forward pass takes (images, noise) and returns the loss, as that of
our MaskedAutoencoder; load takes our weights. So the same noise masks the same patches, and equal losses
show that the work is equal.
"""

import re
from functools import partial

import torch
from torch import nn

from mff_min.kernels.reference import patchify
from mff_min.mim import count_visible
from mff_min.vit import MODELS
from tools.bench.measure import NotRun

MASK_RATIO = 0.75


def timm_vit(case, **options):
    """timm's ViT of this case's sizes."""
    from timm.models.vision_transformer import VisionTransformer
    size = MODELS[case.model] | dict(img_size=case.img_size, patch_size=case.patch_size)
    return VisionTransformer(**size, **options)


def common_loss(pred, images, patch_size, mask):
    """Mean squared error of all patches, of which the masked ones count, with targets normalised by patch."""
    target = patchify(images, patch_size)
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    error = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


class TimmMAE(nn.Module):
    """MAE of timm's blocks, in the order of work of facebookresearch/mae.

    All patches are projected before most are dropped; the decoder gets the tokens in image order; it predicts
    all patches, and the loss leaves the visible ones out.
    """

    package = "timm"

    def __init__(self, case):
        super().__init__()
        from timm.models.vision_transformer import Block, PatchEmbed
        size, (E, depth, heads) = MODELS[case.model], case.decoder
        D, norm = size["embed_dim"], partial(nn.LayerNorm, eps=1e-6)
        self.patch_size = case.patch_size
        self.patch_embed = PatchEmbed(case.img_size, case.patch_size, 3, D)
        L = self.patch_embed.num_patches
        self.num_visible = count_visible(L, MASK_RATIO)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + L, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, size["num_heads"], qkv_bias=True, norm_layer=norm)
                                    for _ in range(size["depth"]))
        self.norm = norm(D)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + L, E), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(E, heads, qkv_bias=True, norm_layer=norm)
                                            for _ in range(depth))
        self.decoder_norm = norm(E)
        self.decoder_pred = nn.Linear(E, case.patch_size ** 2 * 3)

    def load(self, ours):
        self.load_state_dict({name.removeprefix("encoder."): value for name, value in ours.items()
                              if name != "proj_weights"})

    def forward(self, images, noise):
        ids_shuffle = noise.argsort(dim=1)
        ids_keep = ids_shuffle[:, :self.num_visible, None]
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = x.gather(1, ids_keep.expand(-1, -1, x.shape[2]))
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))

        masked = noise.shape[1] - self.num_visible
        patches = torch.cat([x[:, 1:], self.mask_token.expand(len(x), masked, -1).to(x.dtype)], dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        mask = (ids_restore >= self.num_visible).to(noise.dtype)
        return common_loss(pred, images, self.patch_size, mask)


class TransformersMAE(nn.Module):
    """Transformers' ViTMAEForPreTraining."""

    package = "transformers"

    def __init__(self, case):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        size, (E, depth, heads) = MODELS[case.model], case.decoder
        self.model = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=case.img_size, patch_size=case.patch_size, hidden_size=size["embed_dim"],
            num_hidden_layers=size["depth"], num_attention_heads=size["num_heads"],
            intermediate_size=4 * size["embed_dim"], layer_norm_eps=1e-6, mask_ratio=MASK_RATIO,
            norm_pix_loss=True, decoder_hidden_size=E, decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=heads, decoder_intermediate_size=4 * E))

    def load(self, ours):
        state = {}
        for name, value in ours.items():
            name = self.rename(name)
            if ".qkv." in name:
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    state[name.replace(".qkv.", f".{part}_proj.")] = third
            elif name != "proj_weights":
                state[name] = value
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if missing or unexpected:                                       # names have changed between versions
            raise NotRun(f"this version of transformers has other names: {[*missing, *unexpected][0]}")

    @staticmethod
    def rename(name):
        """Transformers' name for ours."""
        for ours, theirs in (
                (r"^encoder\.(cls_token)", r"vit.embeddings.\1"),
                (r"^encoder\.pos_embed", "vit.embeddings.position_embeddings"),
                (r"^encoder\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
                (r"^encoder\.norm", "vit.layernorm"), (r"^encoder\.blocks", "vit.layers"),
                (r"^decoder_blocks", "decoder_layers"), (r"^(decoder_|mask_token)", r"decoder.\1"),
                (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
                (r"\.attn\.proj\.", ".attention.o_proj."), (r"\.attn\.", ".attention.")):
            name = re.sub(ours, theirs, name)
        return name

    def forward(self, images, noise):
        return self.model(images, noise=noise).loss


class LightlyMAE(nn.Module):
    """lightly's masked ViT and decoder, as its MAE example joins them: only masked patches are predicted."""

    package = "lightly"

    def __init__(self, case):
        super().__init__()
        try:
            from lightly.models import utils
            from lightly.models.modules import MaskedVisionTransformerTIMM
            from lightly.models.modules.masked_vision_transformer_decoder_timm import (
                MaskedVisionTransformerDecoderTIMM as Decoder,
            )
        except ImportError as error:
            raise NotRun(f"this version of lightly lacks something: {error}") from None
        self.utils, (E, depth, heads) = utils, case.decoder
        self.backbone = MaskedVisionTransformerTIMM(timm_vit(case, num_classes=0))
        L = self.backbone.sequence_length - 1
        self.patch_size, self.num_visible = case.patch_size, count_visible(L, MASK_RATIO)
        self.decoder_embed = nn.Linear(MODELS[case.model]["embed_dim"], E)
        self.decoder = Decoder(num_patches=L, embed_dim=E, depth=depth, num_heads=heads)
        self.decoder_pred = nn.Linear(E, case.patch_size ** 2 * 3)
        self.backbone.mask_token.requires_grad_(False)                  # of BEiT-like methods: unused by MAE

    def load(self, ours):
        state = {"backbone.mask_token": self.backbone.mask_token}
        for name, value in ours.items():
            name = name.replace("encoder.", "backbone.vit.", 1) if name.startswith("encoder.") else name
            name = re.sub(r"^decoder_(pos_embed|blocks|norm)", r"decoder.\1", name)
            if name != "proj_weights":
                state[name.replace("mask_token", "decoder.mask_token")] = value
        self.load_state_dict(state)

    def forward(self, images, noise):
        at, ids = self.utils.get_at_index, noise.argsort(dim=1)
        ids_keep, ids_mask = ids[:, :self.num_visible] + 1, ids[:, self.num_visible:] + 1
        ids_keep = torch.cat([torch.zeros_like(ids_keep[:, :1]), ids_keep], dim=1)      # the class token
        x = self.decoder_embed(self.backbone.encode(images, idx_keep=ids_keep))
        shape = len(images), self.decoder.sequence_length
        tokens = self.utils.repeat_token(self.decoder.mask_token, shape)
        tokens = self.utils.set_at_index(tokens, ids_keep, x.type_as(tokens))
        pred = self.decoder_pred(at(self.decoder(tokens), ids_mask))
        target = self.utils.normalize_mean_var(self.utils.patchify(images, self.patch_size))
        return nn.functional.mse_loss(pred, at(target, ids_mask - 1))


PRETRAIN_PEERS = {"timm blocks as facebookresearch/mae": TimmMAE, "Transformers ViTMAE": TransformersMAE,
                  "lightly MAE": LightlyMAE}
