"""What a pre-training run has learned: found, read, and built again for a stage that comes after it."""

import re
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from mff_data.decode import DataFlags
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.config import check_channels, numbers, opt, side_or_sides
from mff_min.errors import UserError
from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS, VisionTransformer, init_linear
from mff_run.resume import load_state
from mff_weights.checkpoint import (
    Weights,
    adapted,
    check_projection,
    find_grid,
    find_model,
    find_size,
    load_weights,
    read_weights,
)
from mff_weights.families import PATCHES, part_of
from mff_weights.places import shown

BETWEEN = re.compile(r"attn_pool|pooler|pre_logits|head|bottleneck")  # parts of a file


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags(DataFlags):
    """The flags of every stage and tool that begins with trained weights: which, and for what images."""
    checkpoint: str = opt("", "the weights: a run folder, or a file of any family that tools.convert reads")
    key: str | None = opt(None, "of a file with several encoders: which, for example teacher")
    img_size: tuple[int, int] | None = opt(None, "crop, SIDE or HEIGHTxWIDTH; not given: the checkpoint's",
                                           type=side_or_sides)
    in_chans: int | None = opt(None, "channels of an image; not given: the checkpoint's", above=0)
    patch_size: int | None = opt(None, "side of a patch in pixels; not given: the checkpoint's", above=0)
    adapt: bool = opt(False, "make the projection of patches fit another --in-chans or --patch-size, as timm "
                             "does: channels are summed up or repeated, patches resampled")
    mean: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)
    std: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)


@dataclass(frozen=True)
class Pretrained:
    """The parts of a checkpoint that outlive the run that wrote it."""
    weights: Weights
    config: dict                                                        # config_of

    @property
    def path(self):
        return self.weights.path

    @property
    def classes(self):
        """The names of a classifier's classes; empty if unknown."""
        return self.weights.classes

    @property
    def encoder(self):
        """The encoder's parameters by timm's names."""
        return {name.removeprefix("encoder."): value for name, value in self.weights.state.items()
                if part_of(name) == "encoder"}

    @property
    def fusion(self):
        """proj_layers.* and proj_weights, or none."""
        return {name: value for name, value in self.weights.state.items() if part_of(name) == "fusion"}


def read_pretrained(path, key=None, img_size=None):
    """The Pretrained in the folder of a run (in its last.pt, else in its encoder.pt) or in a checkpoint.

    It may be of any family in families.py; key and img_size are read_weights' and find_grid's. Raises
    UserError.
    """
    if not path:
        raise UserError("--checkpoint is not given: expected a run folder, an encoder.pt, a classifier.pt or "
                        "a state dict")
    weights = read_weights(path, key)
    weights = replace(weights, grid=find_grid(weights, img_size))
    return Pretrained(weights, config_of(weights))


def open_pretrained(cfg, say):
    """(the Pretrained that CheckpointFlags name, the flags with what they leave to the checkpoint)."""
    pretrained = read_pretrained(cfg.checkpoint, cfg.key, cfg.img_size)
    saved = pretrained.config
    wanted = dict(in_chans=cfg.in_chans or saved["in_chans"],
                  patch_size=cfg.patch_size or saved["patch_size"])
    change = {name: value for name, value in wanted.items() if value != saved[name]}
    if change and not cfg.adapt:
        width = pretrained.weights.state[PATCHES].shape[0]
        check_projection(pretrained.weights, {PATCHES: (width, *wanted.values())})
    if change:
        told = dict(mean=saved.get("mean", IMAGENET_MEAN), std=saved.get("std", IMAGENET_STD))
        if "in_chans" in change:
            told = {name: (sum(values) / len(values),) * cfg.in_chans for name, values in told.items()}
        pretrained = Pretrained(adapted(pretrained.weights, **wanted), saved | wanted | told)
    settings = settings_of(pretrained, cfg.img_size, cfg.mean, cfg.std, cfg.white)
    if change:
        used = [f"--{name} {','.join(f'{x:.4g}' for x in settings[name])}" for name in ("mean", "std")]
        say(f"{pretrained.path}: adapted from {saved['in_chans']} channels in patches of "
            f"{saved['patch_size']} to {wanted['in_chans']} in patches of {wanted['patch_size']}; "
            f"images with {' '.join(used)}")
    elif not (cfg.mean and cfg.std or "mean" in saved and "std" in saved):
        say(f"{pretrained.path} does not tell --mean and --std: ImageNet's are taken")
    return pretrained, replace(cfg, **wanted, **settings)


def config_of(weights):
    """The settings of the run that wrote Weights; model, sides, patch and channels are those of its shapes.

    What a preprocessor_config.json beside them says goes first. Raises UserError where the shapes are of no
    model.
    """
    size = find_size(weights)
    told = {name: value for name, value in weights.config.items()
            if value is not None and (name not in ("mean", "std") or weights.numbers(name, ()))}
    sides = tuple(count * size["patch_size"] for count in find_grid(weights))
    return told | dict(img_size=sides) | weights.processor | dict(
        model=find_model(size), patch_size=size["patch_size"], in_chans=size["in_chans"])


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


def build_encoder(pretrained, img_size=None, say=print):
    """The checkpoint's VisionTransformer with its trained weights, frozen, in eval mode.

    Positions are resampled for another image size. Raises UserError where the weights do not fit.
    """
    encoder = build_like(pretrained, img_size or pretrained.config["img_size"])
    load_weights(encoder, pretrained.weights, say=say)
    return encoder.requires_grad_(False).eval()


def load_for_tuning(model, pretrained, say=print):
    """Load the trained weights into a classifier; its head stays new, and fc_norm where there is none.

    Positions are resampled on the model's grid. The final norm is left out where the model pools without it.
    Raises UserError where the weights do not fit.
    """
    norms = ("encoder.fc_norm.", "encoder.norm.") if model.global_pool == "avg" else ()
    load_weights(model, pretrained.weights, fresh=("encoder.head.", *norms), say=say)


def load_classifier(model, pretrained, say=print):
    """Load a whole classifier, its head too; positions as in load_for_tuning. Raises UserError.

    What stands between the encoder and the head, and is not ours, would change every prediction: refused.
    """
    between = sorted({part for part in pretrained.weights.behind if BETWEEN.search(part)})
    if between:
        raise UserError(f"checkpoint {pretrained.path} has {', '.join(shown(between))} between its encoder "
                        f"and its head, which this classifier has not: expected a linear head alone; "
                        f"train_probe.py and tools.features take its encoder")
    load_weights(model, pretrained.weights, say=say)


def initialise(model, cfg, say):
    """Load --init-from, of any family, into a MaskedAutoencoder, and say which parts it does not hold.

    The decoder's last layer is not taken where it predicts something else: other channels or patches, or not
    the features of the same teacher.
    """
    path, weights, fresh = cfg.init_from, read_weights(cfg.init_from, cfg.key), ()
    if cfg.adapt:
        whole, weights = weights, adapted(weights, cfg.in_chans, model.encoder.patch_size)
        if weights is not whole:
            fresh = ("decoder_pred.",)                                  # it predicts pixels
            say(f"--init-from {path} is adapted to {cfg.in_chans} channels in patches of "
                f"{model.encoder.patch_size}: the decoder's last layer starts from random weights")
    if predicted(weights.config) != predicted(asdict(cfg)):
        fresh = ("decoder_pred.",)
        say(f"--init-from {path} is for another target: the decoder's last layer starts from random weights")
    lacking = load_weights(model, weights, ("fusion", "decoder"), fresh, say=say)
    if "decoder" in lacking:
        say(f"--init-from {path} holds an encoder alone: the decoder starts from random weights")
    if "fusion" in lacking and len(model.out_indices) > 1:
        say(f"--init-from {path} holds no fusion: its projections start from random weights")


def predicted(config):
    """What the decoder of a run with these settings predicts: "pixels", or which teacher's features."""
    return "pixels" if config.get("target", "pixels") == "pixels" else config.get("teacher_sha256")


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
