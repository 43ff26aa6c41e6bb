"""Features of images: what chosen blocks of an encoder say of them, as one array. Nothing is masked.

    python -m tools.features runs/mff IMAGES features.npy           class tokens of the last block
    python -m tools.features vit_mae.safetensors IMAGES maps.npy --layers 5,11 --pool patch

CHECKPOINT is of any family that tools.convert reads. IMAGES is a folder, or what --data takes in the stages.
The array is float32: (images, layers, width), or with --pool patch (images, layers, patches, width). Beside
it, features.json names the images, in the order of the array, and the layers. Rows of images that cannot be
read are NaN.

Shapes: B images, C H W, T tokens, L patches, D width, n layers.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mff_data.decode import reading_of
from mff_data.sources import describe_files, open_data
from mff_data.views import Views, make_loader
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_min.probe import check_measured
from mff_run.files import write_atomically, write_json
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import autocast, pick_dtype, pick_ops, start_world
from mff_weights.checkpoint import encoder_of
from mff_weights.pretrained import CheckpointFlags, open_pretrained
from tools.probe_layers import parse_layers


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    checkpoint: str = opt(REQUIRED, "the encoder: a checkpoint of any family, or the folder of a run")
    images: str = opt(REQUIRED, "a folder of images, or another of the stages' --data")
    target: str = opt(REQUIRED, "the .npy file to write; it must not exist")
    split: str = opt("train", "of images that have one", choices=["train", "val"])
    layers: str = opt("last", "blocks: last, all, or a list such as 5,11")
    pool: str = opt("cls", "cls: the class token; mean: of the patch tokens; patch: each of them",
                    choices=["cls", "mean", "patch"])
    norm: bool = opt(True, "after the encoder's final norm, every layer; else the blocks' own outputs")
    allow_missing: bool = opt(False, "take the encoder although something in it is missing or unknown")
    dtype: str = opt("float32", "of matrix products", choices=["float32", "bfloat16", "float16", "auto"])

    # these change only how it is reached
    batch_size: int = knob(64, "images that are computed together", above=0)
    workers: int = knob(0, "loader processes", least=0, most=1024)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


@torch.no_grad()
def layer_features(encoder, images, layers, pool, norm):
    """Features of unmasked images (B, C, H, W): (B, n, D), or with pool "patch" (B, n, L, D), fp32.

    norm applies the final norm to the tokens of every layer, or, where the encoder was trained to classify
    the mean of its patches (global_pool "avg"), fc_norm to that mean.
    """
    levels = encoder.forward_blocks(encoder.embed(images), layers)
    if norm and encoder.global_pool == "token":
        levels = [encoder.norm(x) for x in levels]
    x = torch.stack(levels, dim=1)                                      # (B, n, T, D)
    if pool == "cls":
        x = x[:, :, 0]                                                  # (B, n, D)
    else:
        x = x[:, :, 1:]                                                 # (B, n, L, D)
    if pool == "mean":
        x = x.mean(dim=2)                                               # (B, n, D)
    if norm and encoder.global_pool == "avg":
        x = encoder.fc_norm(x)
    return x.float()


def main(cfg):
    """Write the features that cfg asks for; returns the shape of the array."""
    check_ranges(cfg)
    target = Path(cfg.target)
    if target.suffix != ".npy" or not target.parent.is_dir():
        raise UserError(f"{target}: expected a name that ends in .npy, in a folder that is there")
    for path in (target, target.with_suffix(".json")):
        if path.exists():
            raise UserError(f"{path} is there already: name another, or remove it")
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.features runs in one process: expected no --nproc-per-node")
        return extract(cfg, world, target)


def extract(cfg, world, target):
    device, dtype = world.device, pick_dtype(cfg.dtype, world.device)
    pretrained, cfg = open_pretrained(cfg, world.say)
    encoder = encoder_of(pretrained.weights, cfg.img_size, allow_missing=cfg.allow_missing, say=world.say)
    encoder.to(device)
    last = len(encoder.blocks) - 1
    layers = [last] if cfg.layers == "last" else parse_layers(cfg.layers, last + 1)
    if cfg.norm and cfg.pool != "mean" and encoder.global_pool == "avg":
        raise UserError(f"--pool {cfg.pool}: this encoder has a norm for the mean alone; expected --pool "
                        f"mean or --no-norm")
    ops = pick_ops(cfg.ops, device)
    source = open_data(cfg.images, cfg.split, cfg.cache_dir, print, reading_of(cfg))
    describe_files(print, source, output=cfg.target)
    sides = [count * encoder.patch_size for count in encoder.grid]
    views = Views(source, "evaluation", sides, encoder.in_chans, 0, seed=0)
    keys = [(0, i) for i in range(len(source))]
    batches = [keys[first:first + cfg.batch_size] for first in range(0, len(keys), cfg.batch_size)]
    tokens = (encoder.num_patches,) if cfg.pool == "patch" else ()
    shape = (len(source), len(layers), *tokens, encoder.embed_dim)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)
    progress, bad = Progress(len(source), 0, world), {}

    def write(file):
        """The array, batch by batch: it may be larger than the memory."""
        header = dict(descr="<f4", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        for i, batch in enumerate(make_loader(views, batches, cfg.workers, device.type == "cuda")):
            images = ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)
            with autocast(device, dtype):
                found = layer_features(encoder, images, layers, cfg.pool, cfg.norm).cpu()
            check_measured(found.flatten(1), "the features")
            found[batch["replaced"]] = torch.nan
            bad.update(batch["bad"])
            file.write(found.numpy().astype("<f4").tobytes())
            progress.tick(min((i + 1) * cfg.batch_size, len(source)))
    write_atomically(target, write)
    write_json(target.with_suffix(".json"), dict(layers=layers, config=asdict(cfg), unreadable=sorted(bad),
                                                 images=[source.name(i) for i in range(len(source))]))
    unreadable = f"; {len(bad)} images cannot be read, their rows are NaN" if bad else ""
    progress.say(f"{target}: {' x '.join(map(str, shape))}, blocks {','.join(map(str, layers))}{unreadable}")
    return shape


if __name__ == "__main__":
    run(main, parse(Config))
