"""What a pre-training run has learned: found, read, and built again for a stage that comes after it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mff_min.config import UserError
from mff_min.mim import parse_out_indices
from mff_min.runtime import load_state, read_checkpoint
from mff_min.vit import MODELS, VisionTransformer, init_linear


@dataclass(frozen=True)
class Pretrained:
    """The parts of a checkpoint that outlive pre-training."""
    path: Path
    encoder: dict                                                       # parameters by timm's names
    fusion: dict                                                        # proj_layers.*, proj_weights; or none
    config: dict                                                        # the run's flags; empty if unknown


def read_pretrained(path):
    """The Pretrained in a run folder (in its last.pt, else in its encoder.pt) or in a checkpoint file.

    The file may be one of ours or hold a timm-named encoder alone. Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("last.pt", "encoder.pt") if (path / name).exists()]
        if not files:
            raise UserError(f"{path} has neither last.pt nor encoder.pt: expected the folder of a run")
        path = files[0]
    saved = read_checkpoint(path)
    state = saved.get("model", saved)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    encoder = {name.removeprefix("encoder."): value for name, value in tensors.items()
               if name.startswith("encoder.")} or tensors
    if "patch_embed.proj.weight" not in encoder:
        found = ", ".join(map(str, list(state)[:3])) or "nothing"
        raise UserError(f"checkpoint {path} holds no encoder: expected timm's names, patch_embed.proj.weight "
                        f"among them, with or without encoder. before them; it holds {found} ...")
    fusion = {name: value for name, value in tensors.items() if name.startswith("proj_")}
    return Pretrained(path, encoder, fusion, saved.get("config", {}))


def build_encoder(pretrained, model, img_size, patch_size, in_chans):
    """A VisionTransformer with the trained weights, frozen and in eval mode, on the CPU.

    An argument that is None is as in the pre-training run, or, where the checkpoint does not tell, 224
    pixels, the model's own patch size and 3 channels. Raises UserError where the weights do not fit.
    """
    saved = pretrained.config
    model = model or saved.get("model")
    if model not in MODELS:
        raise UserError(f"checkpoint {pretrained.path} does not say which model it holds: give --model, and "
                        f"--img-size and --patch-size where they are not 224 and the model's own")
    size = dict(MODELS[model])
    size["patch_size"] = patch_size or saved.get("patch_size") or size["patch_size"]
    try:
        encoder = VisionTransformer(img_size or saved.get("img_size", 224),
                                    in_chans=in_chans or saved.get("in_chans", 3), **size)
    except ValueError as error:
        raise UserError(str(error)) from None
    load_state(encoder, pretrained.encoder, f"checkpoint {pretrained.path}")
    return encoder.requires_grad_(False).eval()


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
