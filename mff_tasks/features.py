"""Features of a frozen teacher as the target, as EVA and MILAN have it: what differs from MAE in each.

EVA, as the paper's baseline has it, is MAE with another target: the decoder predicts the teacher's features
of the masked patches. MILAN (arXiv 2208.06049) also keeps patches that matter to the teacher more often, and
its decoder updates mask tokens alone and predicts all tokens. MFF is what it always is: the fused levels.

What is unusual here: the teacher is no part of the model. It prepares the batch for the model, so no
checkpoint, no optimizer and no fully_shard ever sees its weights.

Shapes: B images, C H W, L patches, V visible patches, K masked patches, T = V + 1 tokens, D width of the
teacher, E width of the decoder, N width of the features.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.config import knob, numbers, opt
from mff_min.errors import UserError
from mff_min.kernels.reference import take_tokens
from mff_min.mim import MaskedAutoencoder, random_masking
from mff_min.vit import MODELS, Block, init_linear
from mff_run import picture
from mff_run.flops import block_flops, step_flops
from mff_run.world import autocast
from mff_tasks.clip import find_towers, fingerprint, load_tower, teach
from mff_weights.checkpoint import encoder_of, read_tensors, read_weights
from mff_weights.families import PATCHES, part_of

# ---------------------------------------------------------------- target, masking, decoder


class CosineTarget(nn.Module):
    """A teacher's features, of width dim: the loss is 2 - 2 cos, from 0 for equal to 4 for opposite ones."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def loss(self, pred, ids, images, tokens):
        """The mean over pred, which is of the patches ids (B, K), or of the class token and these.

        tokens (B, 1 + L, N) are the teacher's, class token first.
        """
        target = take_tokens(tokens[:, 1:], ids)                        # (B, K, N)
        if pred.shape[1] > ids.shape[1]:
            target = torch.cat([tokens[:, :1], target], dim=1)          # (B, 1 + K, N)
        return 2 - 2 * F.cosine_similarity(pred.float(), target, dim=-1).mean()


def importance_noise(noise, importance):
    """Noise whose order samples patches without replacement, in proportion to importance: both (B, L).

    The first of the order is each patch with the probability of its share of the importance, the next one
    likewise of those that are left, and so on (MILAN, arXiv 2208.06049, sec. 3.3). Each patch waits for an
    exponential time whose rate is its importance. Equal importance leaves the order of the noise as it is.
    """
    rates = importance.double().clamp_min(1e-30)                        # of 0, all would wait for ever
    return -torch.log1p(-noise.double()) / rates


class PromptingBlock(Block):
    """A block that updates tokens from the num_prompts-th on; those before are keys and values alone.

    These come back unchanged, and no norm is applied to them (MILAN, arXiv 2208.06049, sec. 3.2).
    """

    def __init__(self, dim, num_heads, num_prompts):
        super().__init__(dim, num_heads)
        self.num_prompts = num_prompts

    def forward(self, x, branches=None, first=0):
        T = self.num_prompts                                            # `first` is the last plain block's
        prompts, x = x[:, :T], x[:, T:]                                 # (B, T, E), (B, K, E)
        x = x + self.attn(torch.cat([prompts, self.norm1(x)], dim=1), T)    # (B, K, E)
        x = x + self.mlp(self.norm2(x))                                 # (B, K, E)
        return torch.cat([prompts, x], dim=1)                           # (B, 1 + L, E)


class PromptingAutoencoder(MaskedAutoencoder):
    """A MaskedAutoencoder with MILAN's decoder: mask tokens alone are updated, and all tokens predicted."""

    def __init__(self, encoder, out_indices, target, mask_ratio=0.75, detach_shallow=False,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, **options):
        super().__init__(encoder, out_indices, target, mask_ratio, detach_shallow, decoder_embed_dim,
                         decoder_depth, decoder_num_heads, **options)
        size = decoder_embed_dim, decoder_num_heads, self.num_visible + 1
        self.decoder_blocks = nn.ModuleList(PromptingBlock(*size) for _ in range(decoder_depth))
        init_linear(self.decoder_blocks)

    def predict(self, images, noise):
        """pred (B, 1 + L, N), of the class token and then the patches ids (B, L), and mask (B, L)."""
        ids_shuffle, mask = random_masking(noise, self.num_visible)
        latent = self.encode(images, ids_shuffle[:, :self.num_visible])     # (B, T, D)
        return self.decode(latent, ids_shuffle), ids_shuffle, mask


DECODERS = {"plain": MaskedAutoencoder, "prompting": PromptingAutoencoder}


# ---------------------------------------------------------------- teacher


@dataclass(frozen=True)
class FeatureFlags:
    """The flags of feature targets; a stage's Config has them beside those of RunFlags."""
    target: str = opt("pixels", "what is predicted: pixels, or features of a --teacher, which is CLIP's "
                                "vision tower (clip) or another ViT (encoder)",
                      choices=["pixels", "clip", "encoder"])
    masking: str = opt("random", "random, or importance: what the --teacher attends to is kept more often",
                       choices=["random", "importance"])
    decoder: str = opt("plain", "plain (MAE), or prompting: visible tokens are keys and values alone (MILAN)",
                       choices=list(DECODERS))
    teacher_mean: tuple[float, ...] | None = opt(None, "mean of each channel of the teacher's images; not "
                                                       "given: as an encoder's file tells, else --mean",
                                                 type=numbers)
    teacher_std: tuple[float, ...] | None = opt(None, "standard deviation likewise", type=numbers)
    teacher_sha256: str = opt("", "of the teacher's weights, which a run keeps; not given: the file's own")
    teacher: str = knob("", "the frozen encoder of --target and --masking: docs/targets.md")
    teacher_key: str | None = knob(None, "of a file with several encoders: which, for example teacher")
    picture = property(lambda cfg: "reconstruction" if cfg.target == "pixels" else "features")  # its name

    @classmethod
    def from_flags(cls, **given):
        """--norm-pix-loss is the default of pixels alone; RunFlags does the rest."""
        if given.get("target", "pixels") != "pixels":
            given = dict(norm_pix_loss=False) | given
        return super().from_flags(**given)


def check_features(cfg):
    """Raise UserError for flags of targets, maskings and decoders that do not go together."""
    asks = [f"--{name} {value}" for name, value, plain in
            (("target", cfg.target, "pixels"), ("masking", cfg.masking, "random")) if value != plain]
    if asks and not cfg.teacher:
        raise UserError(f"{asks[0]} needs a teacher, and none is given: expected --teacher FILE, the weights "
                        f"of a frozen encoder (docs/targets.md)")
    about = cfg.teacher, cfg.teacher_mean, cfg.teacher_std, cfg.teacher_sha256, cfg.teacher_key
    if any(about) and not asks:
        raise UserError("a flag of a --teacher is given, and nothing asks for one: expected --target clip or "
                        "encoder, or --masking importance, or no such flag")
    if cfg.decoder == "prompting" and cfg.target == "pixels":
        raise UserError("--decoder prompting predicts all tokens, also the class token, which has no pixels: "
                        "expected --target clip or encoder, or --decoder plain")
    for name, values in (("mean", cfg.teacher_mean), ("std", cfg.teacher_std)):
        if values and (len(values) != cfg.in_chans or name == "std" and min(values) <= 0):
            raise UserError(f"--teacher-{name} {','.join(map(str, values))}: expected {cfg.in_chans} numbers"
                            + " above 0" * (name == "std") + ", one per channel")
    for flag in ("--norm-pix-loss" * cfg.norm_pix_loss, "--low-pass-radius" * bool(cfg.low_pass_radius)):
        if flag and cfg.target != "pixels":
            raise UserError(f"{flag} is of pixels, and --target {cfg.target} predicts features: expected "
                            f"--target pixels, or no {flag}")


class Teacher:
    """A frozen encoder that sees whole images, and prepares the batch for the model.

    encoder is one that teach takes, on the device. Images are resized to what it needs for the student's
    patches, and normalised by mean and std where the student's are others. dim is its features' width.
    """

    def __init__(self, cfg, encoder, mean, std, device, dtype):
        self.encoder, self.dtype, self.target, self.masking = encoder, dtype, cfg.target, cfg.masking
        self.sides = tuple(count * encoder.patch_size for count in encoder.grid)
        mean, std, own_mean, own_std = (torch.tensor(values, device=device).view(-1, 1, 1)
                                        for values in (mean, std, cfg.mean, cfg.std))   # each (C, 1, 1)
        same = torch.equal(mean, own_mean) and torch.equal(std, own_std)
        self.change = None if same else (own_std / std, (own_mean - mean) / std)
        shape = (1, len(cfg.mean), *cfg.img_size)
        ramp = torch.linspace(0, 1, math.prod(shape), device=device).view(shape)    # from black to white
        tokens, importance = self((ramp - own_mean) / own_std)
        self.dim = tokens.shape[-1]
        if not (tokens.isfinite().all() and importance.isfinite().all()):
            raise UserError(f"teacher {cfg.teacher} gives values that are not finite in {dtype}: expected "
                            f"finite ones; --dtype float32, or another teacher")

    @torch.no_grad()
    def __call__(self, images):
        """What teach returns for the student's normalised images (B, C, H, W)."""
        if self.change:
            images = images * self.change[0] + self.change[1]
        if images.shape[-2:] != self.sides:
            images = F.interpolate(images, self.sides, mode="bicubic", antialias=True)
        with autocast(images.device, self.dtype):
            return teach(self.encoder, images)

    def guide(self, images, noise, pixels):
        """What the model takes: images, the noise that masks them, and pixels or the teacher's tokens."""
        tokens, importance = self(images)                               # (B, 1 + L, N), (B, L)
        if self.masking == "importance":
            noise = importance_noise(noise, importance)                 # (B, L)
        return images, noise, pixels if self.target == "pixels" else tokens

    @property
    def flops(self):
        """FLOPs of a forward pass for one image, of which no backward pass is asked."""
        encoder, T = self.encoder, self.encoder.num_patches + 1
        D, head = encoder.embed_dim, getattr(encoder.head, "weight", torch.empty(0)).numel()
        embed = 2 * (T - 1) * encoder.patch_embed.proj.weight.numel()
        attention = 2 * (1 + T) * D * D                                 # q and k of class_attention
        return embed + sum(block_flops(block, T, T) for block in encoder.blocks) + 2 * T * head + attention


def open_teacher(cfg, world, dtype):
    """(the Teacher that FeatureFlags name, or None, the flags with its fingerprint). Raises UserError."""
    check_features(cfg)
    if not cfg.teacher:
        return None, cfg
    patch_size = cfg.patch_size or MODELS[cfg.model]["patch_size"]
    grid = tuple(max(side // patch_size, 1) for side in cfg.img_size)   # the model refuses other sides
    is_clip = cfg.target == "clip" or bool(find_towers(read_tensors(cfg.teacher)[1]))
    if is_clip and cfg.target == "encoder":
        raise UserError(f"teacher {cfg.teacher} is CLIP's: expected --target clip, or another ViT")
    if is_clip and cfg.teacher_key:
        raise UserError(f"--teacher-key {cfg.teacher_key} takes one of several encoders, and teacher "
                        f"{cfg.teacher} is CLIP's: expected no --teacher-key")
    if is_clip:
        encoder, digest = load_tower(cfg.teacher, grid, world.say)
        told = {}                                                       # as MILAN: the student's images
    else:
        encoder, digest, told = load_vit(cfg.teacher, cfg.teacher_key, grid, world.say)
    if encoder.in_chans != cfg.in_chans:
        raise UserError(f"teacher {cfg.teacher} takes {encoder.in_chans} channels, and --in-chans is "
                        f"{cfg.in_chans}: expected --in-chans {encoder.in_chans}"
                        + "; grey images become colour" * (encoder.in_chans == 3))
    if cfg.teacher_sha256 not in ("", digest):
        raise UserError(f"teacher {cfg.teacher} has weights of SHA-256 {digest}: expected --teacher-sha256 "
                        f"{cfg.teacher_sha256}; another teacher needs another --output-dir")
    if len(set(world.all_gather(digest))) > 1:
        raise UserError(f"the processes read different teachers from {cfg.teacher}: expected the same file "
                        f"on all hosts")
    mean, std = (getattr(cfg, f"teacher_{name}") or told.get(name) or getattr(cfg, name)
                 for name in ("mean", "std"))
    if not len(mean) == len(std) == cfg.in_chans or min(std) <= 0:
        raise UserError(f"teacher {cfg.teacher} tells mean {str(mean)[:60]} and std {str(std)[:60]}: "
                        f"expected {cfg.in_chans} numbers each, std above 0; --teacher-mean and "
                        f"--teacher-std say others")
    teacher = Teacher(cfg, encoder.to(world.device), mean, std, world.device, dtype)
    return teacher, replace(cfg, teacher_sha256=digest)


def load_vit(path, key, grid, say):
    """(a frozen ViT of any family, its fingerprint, its own mean and std), as load_tower. UserError."""
    weights = read_weights(path, key, "--teacher-key")
    sides = [count * weights.state[PATCHES].shape[3] for count in grid]
    encoder = encoder_of(weights, sides, say=say).requires_grad_(False)
    if encoder.global_pool == "avg":
        raise UserError(f"teacher {path} has a norm for the mean of its patches alone (fc_norm): expected an "
                        f"encoder with a norm for each token")
    told = {name: values for name in ("mean", "std")
            if (values := weights.processor.get(name) or weights.numbers(name, ()))}
    own = {name: tensor for name, tensor in weights.state.items() if part_of(name) == "encoder"}
    return encoder, fingerprint(own), told


def flops_with_teacher(model, teacher):
    """step_flops, also of a PromptingAutoencoder, and with a teacher its forward pass."""
    flops = step_flops(model)
    if isinstance(model, PromptingAutoencoder):                         # counted as plain so far
        L, T, (N, E) = model.encoder.num_patches, model.num_visible + 1, model.decoder_pred.weight.shape
        flops += 3 * 2 * T * E * N
        for block in model.decoder_blocks[:-1]:
            flops -= 3 * (block_flops(block, L + 1, L + 1) - block_flops(block, L + 1, L + 1 - T))
    return flops + (teacher.flops if teacher else 0)


# ---------------------------------------------------------------- pictures


def feature_sheet(images, tokens, importance, pred, ids, mask, mean, std, patch_size, title):
    """What was there, what the model saw, the teacher's features and the predicted ones, one row an image.

    The features' three principal components are red, green and blue: those of the teacher's on these images,
    for both. importance (B, L), where it is not None, has a column: white is the most important patch. The
    others are as in reconstruction_sheet and CosineTarget.
    """
    true, pred = (F.normalize(x.float().nan_to_num(), dim=-1)           # no picture ends a run
                  for x in (tokens[:, 1:], pred[:, -ids.shape[1]:]))
    true, pred = picture.principal_colours(true, pred)                  # (B, L, 3), (B, K, 3)
    predicted = torch.full_like(true, 0.5)                              # (B, L, 3)
    predicted.scatter_(1, ids[..., None].expand_as(pred), pred)

    H, W = images.shape[-2:]
    columns = {"image": picture.to_uint8(images, mean, std),
               "masked": picture.to_uint8(picture.grey_out(images, mask, patch_size), mean, std)}
    if importance is not None:
        shares = (importance / importance.amax(dim=1, keepdim=True))[..., None]         # (B, L, 1)
        columns["importance"] = picture.painted(shares, patch_size, W)
    columns |= {"teacher": picture.painted(true, patch_size, W),
                "prediction": picture.painted(predicted, patch_size, W)}
    return picture.grid(columns, title, scale=max(1, round(128 / min(H, W))))
