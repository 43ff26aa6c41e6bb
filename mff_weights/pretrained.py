"""What a pre-training run has learned: found, read, and built again for a stage that comes after it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.config import check_channels
from mff_min.errors import UserError
from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS, VisionTransformer, init_linear, resize_pos_embed
from mff_run.resume import load_state
from mff_weights.checkpoint import find_grid, find_model, find_size, read_weights, refuse_losses
from mff_weights.families import part_of


@dataclass(frozen=True)
class Pretrained:
    """The parts of a checkpoint that outlive the run that wrote it."""
    path: Path
    encoder: dict                                                       # parameters by timm's names
    fusion: dict                                                        # proj_layers.*, proj_weights; or none
    config: dict                                                        # config_of
    classes: list                                                       # of a classifier; empty if unknown


def read_pretrained(path):
    """The Pretrained in the folder of a run (in its last.pt, else in its encoder.pt) or in a checkpoint.

    It may be of any family in families.py. Raises UserError.
    """
    weights = read_weights(path)
    refuse_losses(weights.path, {"unexpected": weights.unknown})
    encoder = {name.removeprefix("encoder."): value for name, value in weights.state.items()
               if part_of(name) == "encoder"}
    fusion = {name: value for name, value in weights.state.items() if part_of(name) == "fusion"}
    return Pretrained(weights.path, encoder, fusion, config_of(weights), weights.classes)


def config_of(weights):
    """The settings of the run that wrote Weights; model, sides, patch and channels are those of its shapes.

    Raises UserError where the shapes are of no model.
    """
    size = find_size(weights)
    told = {name: value for name, value in weights.config.items()
            if value is not None and not (name in ("mean", "std") and isinstance(value, str))}
    sides = tuple(count * size["patch_size"] for count in find_grid(weights))
    return told | dict(model=find_model(size), img_size=sides, patch_size=size["patch_size"],
                       in_chans=size["in_chans"])


def settings_of(pretrained, img_size=None, mean=None, std=None, white=None):
    """These settings as a dict; where one is None, the checkpoint's own, or ImageNet's mean and deviation.

    Raises UserError unless mean and std fit the checkpoint's channels.
    """
    saved = pretrained.config
    found = dict(img_size=tuple(img_size or saved["img_size"]),
                 mean=tuple(mean or saved.get("mean", IMAGENET_MEAN)),
                 std=tuple(std or saved.get("std", IMAGENET_STD)), white=white or white_of(saved))
    check_channels(saved["in_chans"], found["mean"], found["std"])
    return found


def white_of(config):
    """The --white of the run that wrote a checkpoint with these settings, or None."""
    white = config.get("white")
    return white if isinstance(white, str) else None


def build_vit(model, img_size, patch_size, in_chans, **options):
    """A VisionTransformer with random weights, on the CPU. UserError where the sizes do not go together."""
    try:
        size = MODELS[model] | {"patch_size": patch_size}
        return VisionTransformer(img_size, in_chans=in_chans, **size, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_like(pretrained, img_size, **options):
    """A VisionTransformer with random weights of the checkpoint's model, patch size and channels."""
    size = pretrained.config
    return build_vit(size["model"], img_size, size["patch_size"], size["in_chans"], **options)


def build_encoder(pretrained, img_size=None):
    """The checkpoint's VisionTransformer with its trained weights, frozen, in eval mode.

    Raises UserError where the weights do not fit the image size.
    """
    encoder = build_like(pretrained, img_size or pretrained.config["img_size"])
    load_state(encoder, pretrained.encoder, f"checkpoint {pretrained.path}")
    return encoder.requires_grad_(False).eval()


def load_for_tuning(model, pretrained):
    """Load the trained weights into a classifier; its head stays new, and fc_norm where there is none.

    Positions are resized to the model's grid. The final norm is left out where the model pools without it.
    Raises UserError where the weights do not fit.
    """
    own = model.state_dict()
    left_out = "head." if "norm.weight" in own else ("head.", "norm.")
    trained = {name: value for name, value in pretrained.encoder.items() if not name.startswith(left_out)}
    trained["pos_embed"] = fit_positions(trained["pos_embed"], pretrained, model)
    new = {name: value for name, value in own.items() if name.startswith(("head.", "fc_norm."))}
    load_state(model, new | trained, f"checkpoint {pretrained.path}")


def load_classifier(model, pretrained):
    """Load a whole classifier, its head too; positions are resized to the model's grid. Raises UserError."""
    positions = fit_positions(pretrained.encoder["pos_embed"], pretrained, model)
    load_state(model, pretrained.encoder | {"pos_embed": positions}, f"checkpoint {pretrained.path}")


def fit_positions(pos_embed, pretrained, model):
    """The checkpoint's positions (1, 1 + L, D), resampled on the model's grid."""
    patch_size = pretrained.config["patch_size"]
    grid = tuple(side // patch_size for side in pretrained.config["img_size"])
    return resize_pos_embed(pos_embed, grid, model.grid)


def build_untrained(encoder, fusion, seed):
    """(encoder, fusion) of the same sizes with the random weights that pre-training starts from."""
    torch.manual_seed(seed)
    image = [patches * encoder.patch_size for patches in encoder.grid]
    untrained = VisionTransformer(image, encoder.patch_size, encoder.embed_dim, len(encoder.blocks),
                                  encoder.blocks[0].attn.num_heads, in_chans=encoder.in_chans)
    device = encoder.cls_token.device
    return (untrained.requires_grad_(False).eval().to(device),
            fusion and Fusion(fusion.out_indices, encoder.embed_dim).to(device))


class Fusion(nn.Module):
    """MFF's projections and weights as `fuse` takes them, with random values, frozen."""

    def __init__(self, out_indices, dim):
        super().__init__()
        self.out_indices = out_indices
        self.proj_layers = nn.ModuleList(nn.Linear(dim, dim) for _ in out_indices[:-1])
        self.proj_weights = nn.Parameter(torch.ones(len(out_indices), 1, 1, 1))
        init_linear(self)
        self.requires_grad_(False)


def build_fusion(pretrained, encoder):
    """The Fusion that was trained with the encoder, or None where there was none (MAE) or it was not kept."""
    if len(pretrained.fusion) < 2:                                      # MAE has one weight and no projection
        return None
    out_indices = parse_out_indices(pretrained.config.get("out_indices", "spread"), len(encoder.blocks))
    fusion = Fusion(out_indices, encoder.embed_dim)
    load_state(fusion, pretrained.fusion, f"checkpoint {pretrained.path}")
    return fusion.to(encoder.cls_token.device)
