"""Reconstruct one's own images with a pre-trained model: original, masked, predicted, pasted.

    python -m tools.reconstruct runs/mff IMAGES --output-dir runs/reconstructed
    python -m tools.reconstruct mae_visualize_vit_base.pth photo.jpg --mask-ratio 0.5 --seed 3
    python -m tools.reconstruct runs/mff photo.jpg --mask drawn.png     white is masked

CHECKPOINT is a run of train_pretrain.py, or weights of MAE, MFF (mmpretrain) or Transformers with their
decoder. IMAGES are folders, which are searched wholly, and images; the model sees the middle of each. Each
picture ends with the means of the masked patches: what it owes to the target, whatever the model predicts.

Shapes: B images, C H W, L patches, K masked patches, N = P * P * C.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mff_data import crops
from mff_data.decode import DECODE_ERRORS, open_image, reading_of, reason_of
from mff_min import rng
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_min.kernels.reference import patchify
from mff_min.mim import MaskedAutoencoder, parse_out_indices
from mff_min.probe import check_measured
from mff_min.targets import PixelTarget, low_pass_radius_at
from mff_run.files import make_folder, write_json
from mff_run.picture import OWED, reconstruction_sheet
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import autocast, pick_dtype, pick_ops, start_world
from mff_weights.checkpoint import load_weights, read_small_json
from mff_weights.families import count_blocks
from mff_weights.pretrained import CheckpointFlags, build_like, open_pretrained
from tools.own_images import OwnImages, check_folder, list_images, write_picture

GREY_OF_MASKED = 128                                                    # from here on a drawn mask is white
ENDS_OF_DECODER = "decoder_embed.weight", "decoder_pred.weight"


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    checkpoint: str = opt(REQUIRED, "a run of train_pretrain.py, or weights with a decoder, of any family")
    images: tuple[str, ...] = opt(REQUIRED, "folders of images, or images")
    mask_ratio: float | None = opt(None, "share of the patches that is masked; not given: the checkpoint's")
    mask: str = opt("", "instead: an image whose white is masked, of the shape of the images or of the crop")
    seed: int = opt(0, "of the masks", least=0)
    norm_pix: str = opt("auto", "whether the prediction is of normalised patches; auto: as the checkpoint "
                                "tells, else as it predicts", choices=["auto", "yes", "no"])
    out_indices: str = opt("", "fused blocks, of a checkpoint that does not tell")
    decoder_num_heads: int | None = opt(None, "heads of the decoder, of a checkpoint that does not tell",
                                        above=0)
    dtype: str = opt("float32", "of matrix products", choices=["float32", "bfloat16", "float16", "auto"])

    # these change only how it is reached
    output_dir: str = knob("runs/reconstructed", "gets a picture of each image: a new or empty folder")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])


def main(cfg):
    """Write the pictures; returns {"images", "unreadable", "loss", "loss_of_means"}, the losses by image."""
    check_ranges(cfg)
    paths, root, places = list_images(*cfg.images)
    check_folder(cfg.output_dir, places)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.reconstruct runs in one process: expected no --nproc-per-node")
        return reconstruct(cfg, world, root, paths)


# ---------------------------------------------------------------- the model


def open_autoencoder(cfg, say, ops):
    """(the MaskedAutoencoder in a checkpoint of any family, in eval mode on the CPU, cfg with its settings).

    Raises UserError where there is no decoder of pixels, and where the checkpoint does not tell its sizes.
    """
    if cfg.adapt:
        raise UserError("--adapt is for other patches or channels, and a decoder predicts those that it was "
                        "trained on: expected no --adapt")
    pretrained, cfg = open_pretrained(cfg, say)
    path, state, told = pretrained.path, pretrained.weights.state, pretrained.config
    if not all(name in state and state[name].dim() == 2 for name in ENDS_OF_DECODER):
        raise UserError(f"checkpoint {path} holds an encoder without a decoder, which is what reconstructs: "
                        f"expected the folder of a pre-training run with its last.pt, or weights with a "
                        f"decoder, such as mae_visualize_vit_base.pth")
    E, N = (len(state[name]) for name in ENDS_OF_DECODER)
    values = cfg.patch_size ** 2 * cfg.in_chans
    if told.get("target", "pixels") != "pixels" or N != values:
        raise UserError(f"checkpoint {path} predicts {N} values per patch (--target "
                        f"{told.get('target', 'unknown')}): expected the {values} pixels of a patch; "
                        f"features.png in its run shows what it predicts")
    if pretrained.weights.family == "hf":
        theirs = read_small_json(path.parent / "config.json")
        told = told | dict(decoder_num_heads=theirs.get("decoder_num_attention_heads"),
                           norm_pix_loss=theirs.get("norm_pix_loss"), mask_ratio=theirs.get("mask_ratio"))
    heads = cfg.decoder_num_heads or told.get("decoder_num_heads") or (16 if E == 512 else None)
    if type(heads) is not int or heads < 1 or E % heads:
        raise UserError(f"the decoder of checkpoint {path} is {E} wide, and its number of heads is not known "
                        f"or does not divide it: give --decoder-num-heads")
    encoder = build_like(pretrained, cfg.img_size)
    levels = levels_of(cfg, pretrained, len(encoder.blocks))
    radius = told.get("low_pass_radius") or 0.0
    radius = low_pass_radius_at(radius, cfg.img_size) if type(radius) in (int, float) else 0.0
    target = PixelTarget(encoder.patch_size, cfg.in_chans, True, cfg.mean, cfg.std, radius, ops)
    ratio = cfg.mask_ratio if cfg.mask_ratio is not None else told.get("mask_ratio") or 0.75
    try:
        model = MaskedAutoencoder(encoder, levels, target, ratio, decoder_embed_dim=E,
                                  decoder_depth=count_blocks(state, "decoder_blocks."),
                                  decoder_num_heads=heads, ops=ops)
    except (ValueError, TypeError) as error:                            # TypeError: a ratio that is no number
        raise UserError(f"checkpoint {path}: {error}") from None
    load_weights(model, pretrained.weights, () if len(levels) > 1 else ("fusion",), say=say)
    model.requires_grad_(False).eval()
    target.norm_pix_loss = is_normalised(cfg, told, model, path, say)
    return model, cfg


def levels_of(cfg, pretrained, depth):
    """The fused blocks: of --out-indices, of the run's flags, or of the number of weights. UserError."""
    count = pretrained.weights.state["proj_weights"].numel() if len(pretrained.fusion) > 1 else 1
    guess = next((text for text in ("last", "spread", "all") if len(parse_out_indices(text, depth)) == count),
                 "")
    text = cfg.out_indices or pretrained.config.get("out_indices") or guess
    try:
        levels = parse_out_indices(str(text), depth) if text else ()
    except ValueError as error:
        raise UserError(str(error)) from None
    if len(levels) != count:
        raise UserError(f"checkpoint {pretrained.path} fuses {count} blocks, and {text or 'nothing'} names "
                        f"{len(levels)}: expected --out-indices with {count} blocks")
    return levels


def is_normalised(cfg, told, model, path, say):
    """Whether a model predicts patches that are normalised by their own mean and variance (norm_pix).

    Where nothing tells, four ramps do, from black to white one after the other: predictions of plain pixels
    follow their brightness, and those of normalised patches have none.
    """
    if cfg.norm_pix != "auto":
        return cfg.norm_pix == "yes"
    if type(told.get("norm_pix_loss")) is bool:
        return told["norm_pix_loss"]
    C, (H, W), count = cfg.in_chans, cfg.img_size, 4
    mean, std = (torch.tensor(values).view(1, C, 1, 1) for values in (cfg.mean, cfg.std))
    ramps = torch.linspace(0, 1, count * W).view(count, 1, 1, W).expand(count, C, H, W)
    noise = noise_of(0, 0, model.encoder.num_patches)                   # (1, L)
    images = (ramps - mean) / std                                       # (B, C, H, W)
    pred, ids, _ = model.predict(images, noise.expand(count, -1))
    true = patchify(images, model.encoder.patch_size)[:, ids[0]].mean(dim=-1)           # (B, K)
    true, pred = true - true.mean(), pred.mean(dim=-1)                  # each (B, K)
    slope = float((pred * true).sum() / (true * true).sum())
    normalised = slope < 0.25
    say(f"{path} does not tell whether it predicts normalised patches. Of ramps from black to white its "
        f"predictions have {slope:.2f} of the brightness: --norm-pix {'yes' if normalised else 'no'} is used")
    return normalised


# ---------------------------------------------------------------- masks


def noise_of(seed, index, num_patches):
    """The noise that masks image number index, as pre-training's pictures have it: (1, L) float32."""
    streams = rng.hash_keys(seed, rng.MASK, *np.array([[0], [index]]))
    return torch.from_numpy(rng.numbers(streams, num_patches).astype(np.float32))


class WrongShape(ValueError):
    """An image that a drawn mask does not fit."""


def read_mask(path, reading):
    """A drawn mask as a grey image, in which what is transparent is black. Raises UserError."""
    try:
        image = open_image(path, reading)
        if isinstance(image, Image.Image) and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
        return crops.to_pillow(crops.to_array(crops.to_mode(image, 1)))
    except DECODE_ERRORS as error:
        raise UserError(f"--mask {path} cannot be read ({reason_of(error, path)}): expected an image whose "
                        f"white is masked") from None


def removed_by(mask, path, encoder):
    """The patches of the crop that a drawn mask removes: (1, L), 1 where half of a patch is white, or more.

    Raises UserError where it leaves no patch, or all.
    """
    size = [count * encoder.patch_size for count in encoder.grid]
    white = torch.from_numpy(crops.center(mask, size) >= GREY_OF_MASKED).float()        # (H, W, 1)
    white = patchify(white.permute(2, 0, 1)[None], encoder.patch_size)  # (1, L, N)
    removed = (white.mean(dim=-1) >= 0.5).float()                       # (1, L)
    count = int(removed.sum())
    if not 0 < count < encoder.num_patches:
        raise UserError(f"--mask {path} masks {count} of {encoder.num_patches} patches: expected some that "
                        f"are white by half or more, and some that are not")
    return removed


def check_shapes(mask, image, size):
    """Raise WrongShape unless a mask has the shape of an image, or that of its crop, at any scale."""
    (H, W), have = crops.sides(mask), crops.sides(image)
    if all(abs(W * height - H * width) > max(H, W, height, width) for height, width in (have, size)):
        raise WrongShape(f"the mask has {W} x {H} pixels, the image {have[1]} x {have[0]}: expected the same "
                         f"shape, or that of the crop, {size[1]} x {size[0]}")


# ---------------------------------------------------------------- pictures


@torch.no_grad()
def reconstruct(cfg, world, root, paths):
    ops, dtype, device = pick_ops(cfg.ops, world.device), pick_dtype(cfg.dtype, world.device), world.device
    model, cfg = open_autoencoder(cfg, world.say, ops)
    encoder, target, reading = model.encoder, model.target, reading_of(cfg)
    mask = removed = None
    if cfg.mask:
        mask = read_mask(cfg.mask, reading)
        removed = removed_by(mask, cfg.mask, encoder)                   # (1, L)
        model.num_visible = encoder.num_patches - int(removed.sum())
    model.to(device)
    mean, std = (torch.tensor(values, device=device) for values in (cfg.mean, cfg.std))
    out, losses = Path(cfg.output_dir), {}
    make_folder("--output-dir", out)
    images = OwnImages(root, paths, reading, Progress(len(paths), 0, world))

    def load(image):
        if mask:
            check_shapes(mask, image, cfg.img_size)
        return torch.from_numpy(crops.center(crops.to_mode(image, cfg.in_chans), cfg.img_size))
    for i, name, pixels in images.each(load):
        pixels = pixels.permute(2, 0, 1)[None].to(device)               # (1, C, H, W)
        image = ops.prepare(pixels, mean, std)                          # (1, C, H, W)
        noise = removed                                                 # (1, L), whose order is stable
        if noise is None:
            noise = noise_of(cfg.seed, i, encoder.num_patches)          # (1, L)
        with autocast(device, dtype):
            pred, ids, gone = model.predict(image, noise.to(device))
        loss, of_means = target.loss(pred, ids, image), target.loss_of_means(ids, image)
        check_measured(torch.stack([loss, of_means])[None], "the losses")
        losses[name] = [loss.item(), of_means.item()]
        title = (f"{ids.shape[1]} of {encoder.num_patches} patches masked, loss {loss:.4f}, "
                 f"of patch means {of_means:.4f}")
        sheet = reconstruction_sheet(image, target.filter(image), pred, ids, gone, target.patch_size,
                                     target.norm_pix_loss, mean, std, title)
        write_picture(out, name, sheet)
    loss, of_means = np.mean(list(losses.values()), axis=0)
    found = dict(images=len(paths), unreadable=images.bad, norm_pix=target.norm_pix_loss,
                 loss={name: values[0] for name, values in losses.items()},
                 loss_of_means={name: values[1] for name, values in losses.items()})
    write_json(out / "metrics.json", found | dict(config=asdict(cfg)))
    images.progress.say(f"{out}: reconstructions of {images.counted}; loss {loss:.4f}, where predicting the "
                        f"mean of each masked patch gives {of_means:.4f}\n{OWED[target.norm_pix_loss]}")
    return found


if __name__ == "__main__":
    run(main, parse(Config))
