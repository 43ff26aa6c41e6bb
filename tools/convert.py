"""Convert weights between five families of names: ours, MAE, timm, mmpretrain, Transformers.

    python -m tools.convert mae_pretrain_vit_base_full.pth mae.pt   MAE's whole model, for --init-from
    python -m tools.convert runs/mff encoder.safetensors --to timm   an encoder for timm
    python -m tools.convert runs/mff mff.pth --to mmpretrain        the whole model, fusion included
    python -m tools.convert runs/mae vit_mae --to hf                a folder for from_pretrained
    python -m tools.convert dino.pth dino.pt --key teacher          one of several encoders in a file

SOURCE is a checkpoint of any family, which is told by its names, or the folder of a run or of Transformers.
TARGET ends in .safetensors, .pth, .pt or .bin; with --to hf it may be a folder, with the config.json and
preprocessor_config.json that Transformers needs. What goes over is printed, and anything that would be lost
is an error that names it. docs/weights.md tells what each family has a place for.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.config import REQUIRED, check_ranges, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_min.mim import MaskedAutoencoder
from mff_min.targets import PixelTarget
from mff_min.vit import VisionTransformer
from mff_run.files import is_alive, write_json
from mff_run.process import run
from mff_weights import checkpoint
from mff_weights.checkpoint import (
    find_grid,
    find_size,
    fit,
    origin_of,
    part_of_model,
    read_weights,
    refuse_losses,
    table,
    write_weights,
)
from mff_weights.families import FAMILIES, count_blocks, is_decoders, part_of, parts_of, to_family

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Config:
    source: str = opt(REQUIRED, "what to read: a checkpoint file, or a folder with one")
    target: str = opt(REQUIRED, "what to write; it must not exist")
    to: str = opt("ours", "whose names the target has", choices=list(FAMILIES))
    part: str = opt("all", "all that is there; encoder: that alone; whole: all, and refuse an encoder alone",
                    choices=["all", "encoder", "whole"])
    img_size: tuple[int, int] | None = opt(None, "resample positions for this size: SIDE or HEIGHTxWIDTH",
                                           type=side_or_sides)
    decoder_num_heads: int | None = opt(None, "for --to hf, where the source does not tell: heads of the "
                                              "decoder; of a decoder 512 wide there are 16", above=0)
    key: str | None = opt(None, "of a source with several encoders: which, for example teacher")
    allow_missing: bool = opt(False, "convert what is there and has a place, and let go of the rest")


def main(cfg):
    """Convert as cfg says; returns what was found, {"loaded": names, ...}."""
    check_ranges(cfg)
    check_target(cfg)
    weights = read_weights(cfg.source, cfg.key)
    size, grid = find_size(weights), find_grid(weights, cfg.img_size)
    sides = cfg.img_size or tuple(count * size["patch_size"] for count in grid)
    new_grid = tuple(side // size["patch_size"] for side in sides)
    kept = choose_parts(cfg, weights)
    behind = [part_of_model(name) for name in weights.state if name not in kept]
    unknown = [name for name in weights.unknown if "decoder" in parts_of(kept) or not is_decoders(name)]
    weights = replace(weights, state=kept, unknown=unknown)
    fitting, found = fit(weights, shapes_of(weights, size, sides), grid, new_grid)
    state, found["lost"] = to_family(fitting, cfg.to)
    found["left behind"] = behind + list(weights.behind)
    model = checkpoint.find_model(size)
    print(f"{weights.path}, names of {origin_of(weights)}: {model}, {sides[0]}x{sides[1]} pixels in patches "
          f"of {size['patch_size']}\n{table(found, (grid, new_grid))}")
    if not cfg.allow_missing:
        more = "; --part encoder needs no place for them" * (parts_of(found["lost"]) - {"encoder"} != set())
        refuse_losses(weights.path, found, f"{more}; --allow-missing goes on without")

    config = weights.config | weights.processor | dict(
        model=model, img_size=sides, patch_size=size["patch_size"], in_chans=size["in_chans"])
    if cfg.to == "hf" and Path(cfg.target).suffix not in SUFFIXES:
        write_folder(cfg, state, config, transformers_config(cfg, fitting, size, config, weights.classes))
    else:
        write_weights(cfg.target, state, cfg.to, config, weights.classes)
        if cfg.to == "hf":
            print("Transformers needs a config.json too, with layer_norm_eps 1e-6: a TARGET without suffix "
                  "is a folder that has it")
    print(f"{cfg.target}: {len(state)} tensors, names of {cfg.to}")
    return found


def check_target(cfg):
    """Raise UserError unless the target can be written and is not there yet."""
    target = Path(cfg.target)
    if target.suffix not in SUFFIXES and cfg.to != "hf":
        raise UserError(f"{target}: expected a name that ends in {', '.join(SUFFIXES)}")
    if target.exists():
        raise UserError(f"{target} is there already: name another, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: {target.parent} is no folder")
    if target.suffix == ".safetensors" or target.suffix not in SUFFIXES:    # a folder has one
        checkpoint.import_safetensors()


def choose_parts(cfg, weights):
    """The tensors that are asked for and that the family has a model for. UserError where whole is not."""
    if cfg.part == "whole":
        if cfg.to == "timm":
            raise UserError("--part whole: timm has no decoder; expected another --to")
        if "decoder" not in parts_of(weights.state):
            raise UserError(f"checkpoint {weights.path} holds an encoder alone: --part whole needs a decoder")
    alone = cfg.part == "encoder" or cfg.to == "timm"
    target = weights.config.get("target", "pixels")
    if target != "pixels" and "decoder" in parts_of(weights.state) and not alone and cfg.to != "ours":
        raise UserError(f"checkpoint {weights.path} predicts features (--target {target}), and {cfg.to}'s "
                        f"decoder pixels: expected --part encoder, or --to ours")
    return {name: tensor for name, tensor in weights.state.items() if part_of(name) == "encoder" or not alone}


def shapes_of(weights, size, sides):
    """{our name: shape} of the model that a checkpoint is of, for images of these sides. UserError."""
    def rows(name, default):
        shape = weights.state[name].shape if name in weights.state else ()
        return shape[0] if shape else default
    depth, levels = size["depth"], rows("proj_weights", 1)
    try:
        with torch.device("meta"):                                      # shapes alone, no memory
            encoder = VisionTransformer(sides, num_classes=rows("encoder.head.weight", 0), **size)
            target = PixelTarget(size["patch_size"], size["in_chans"])
            target.dim = rows("decoder_pred.weight", target.dim)        # a run of features has another
            model = MaskedAutoencoder(encoder, range(depth - levels, depth), target, mask_ratio=0.5,
                                      decoder_embed_dim=rows("decoder_embed.weight", 4),
                                      decoder_depth=count_blocks(weights.state, "decoder_blocks."),
                                      decoder_num_heads=1)
    except ValueError as error:
        raise UserError(f"checkpoint {weights.path} fits no model: {error}") from None
    parts = parts_of(weights.state)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if part_of(name) in parts}


# ---------------------------------------------------------------- Transformers


def transformers_config(cfg, state, size, config, classes=()):
    """config.json for these tensors: of ViTMAEForPreTraining, ViTForImageClassification or ViTModel.

    ViTMAEModel would mask (docs/weights.md), so an encoder alone is a ViTModel. Raises UserError.
    """
    height, width = config["img_size"]
    values = dict(hidden_size=size["embed_dim"], num_hidden_layers=size["depth"],
                  num_attention_heads=size["num_heads"], intermediate_size=4 * size["embed_dim"],
                  hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=True,
                  layer_norm_eps=1e-6, image_size=height if height == width else [height, width],
                  patch_size=size["patch_size"], num_channels=size["in_chans"])
    if "decoder" in parts_of(state):
        dim = state["decoder_embed.weight"].shape[0]
        heads = cfg.decoder_num_heads or config.get("decoder_num_heads") or (16 if dim == 512 else 0)
        if not isinstance(heads, int) or heads < 1 or dim % heads:
            raise UserError(f"the decoder is {dim} wide and its number of heads is not known: give "
                            f"--decoder-num-heads")
        return values | dict(architectures=["ViTMAEForPreTraining"], model_type="vit_mae",
                             decoder_hidden_size=dim, decoder_num_attention_heads=heads,
                             decoder_num_hidden_layers=count_blocks(state, "decoder_blocks."),
                             decoder_intermediate_size=4 * dim, mask_ratio=config.get("mask_ratio", 0.75),
                             norm_pix_loss=config.get("norm_pix_loss", False))
    if "encoder.head.weight" in state:
        count = len(state["encoder.head.weight"])
        names = classes if len(classes) == count else [f"LABEL_{i}" for i in range(count)]
        return values | dict(architectures=["ViTForImageClassification"], model_type="vit",
                             id2label={str(i): name for i, name in enumerate(names)},
                             label2id={name: i for i, name in enumerate(names)})
    return values | dict(architectures=["ViTModel"], model_type="vit")


def image_processor(config, channels):
    """preprocessor_config.json for images as the encoder has seen them, or None where mean or std is unknown.

    A ViTImageProcessor resizes to the sides and crops nothing (docs/weights.md).
    """
    height, width = config["img_size"]
    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    if not all(isinstance(values, list | tuple) and len(values) == channels for values in (mean, std)):
        return None
    return dict(image_processor_type="ViTImageProcessor", do_convert_rgb=channels == 3, do_resize=True,
                size=dict(height=height, width=width), resample=3, do_rescale=True, rescale_factor=1 / 255,
                do_normalize=True, image_mean=list(mean), image_std=list(std))      # resample 3 is bicubic


def is_ours(folder):
    """Whether a folder, and no link to one, holds only what write_folder puts into one."""
    names = ("config.json", checkpoint.PROCESSOR, "model.safetensors")
    return folder.is_dir() and not folder.is_symlink() and all(
        path.name.partition(".tmp.")[0] in names for path in folder.iterdir())


def write_folder(cfg, state, config, transformers):
    """Write a folder for from_pretrained, which is there when it is whole."""
    target = Path(cfg.target)
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    for path in target.parent.iterdir():                                # of a process that was killed
        pid = path.name.removeprefix(f"{target.name}.tmp.")
        if pid.isdecimal() and path.name != pid and not is_alive(int(pid)) and is_ours(path):
            shutil.rmtree(path)
    try:
        temporary.mkdir()
        write_weights(temporary / "model.safetensors", state, "hf", config)
        write_json(temporary / "config.json", transformers)
        if processor := image_processor(config, transformers["num_channels"]):
            write_json(temporary / checkpoint.PROCESSOR, processor)
        else:
            print(f"no {checkpoint.PROCESSOR}: the source does not tell mean and std of "
                  f"{transformers['num_channels']} channels")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    run(main, parse(Config))
