"""What unmasked images tell of the encoders of runs: measures.py, on the same images for each.

Findings are plain values, all that figures show of encoders: they can be kept when the encoders are gone.

Shapes: B images, T tokens (class token first), D width, h heads.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import torch

from mff_data.views import Views, make_loader
from mff_min.errors import UserError
from mff_min.mim import fuse
from mff_min.probe import check_measured
from mff_min.vit import VisionTransformer
from mff_run.progress import Progress
from mff_weights.pretrained import Fusion, build_encoder, build_fusion, read_pretrained, settings_of
from tools.measures import attention_distance, attention_weights, cka, gram, log_amplitudes

DIGITS = 5                                                              # of the numbers in Findings


@dataclass(frozen=True)
class Subject:
    """A trained encoder, with what goes in front of it and what was trained behind it."""
    name: str
    path: Path
    model: str
    encoder: VisionTransformer
    fusion: Fusion | None                                               # None where there is none
    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class Features:
    """What images tell of one encoder."""
    name: str
    model: str
    grid: tuple                                                         # rows and columns of patches
    patch_size: int
    amplitudes: dict                                                    # {tap: mean logarithm by frequency}
    distances: list                                                     # [block][head], in pixels


@dataclass(frozen=True)
class Findings:
    """What the same images tell of every encoder."""
    data: str                                                           # their name
    images: int                                                         # how many were seen
    batch_size: int                                                     # cka depends on it
    encoders: list                                                      # the Features of each
    cka: list                                                           # of similarities, or none

    @property
    def about(self):
        """What the note of a figure begins with."""
        return f"{self.images} unmasked images of {self.data}."


def open_subject(name, path, device, key=None):
    """The Subject that a run of this name has trained. Raises UserError."""
    pretrained = read_pretrained(path, key)
    settings, model = settings_of(pretrained), pretrained.config["model"]
    encoder = build_encoder(pretrained).to(device)
    mean, std = (torch.tensor(settings[key], device=device) for key in ("mean", "std"))
    return Subject(name, Path(path), model, encoder, build_fusion(pretrained, encoder), mean, std)


def difference_of_sizes(subjects):
    """What keeps the layers of these encoders from being compared, or ""."""
    encoders = [subject.encoder for subject in subjects]
    sizes = [f"{encoder.embed_dim} wide, {len(encoder.blocks)} blocks of {encoder.blocks[0].attn.num_heads} "
             f"heads, {encoder.grid[0]} x {encoder.grid[1]} patches of {encoder.patch_size}"
             for encoder in encoders]
    return next((f"runs of one size: {subjects[0].path} is {sizes[0]}, {subject.path} is {size}"
                 for subject, size in zip(subjects, sizes, strict=True) if size != sizes[0]), "")


def look_at(encoder, fusion, images, ops):
    """({tap: tokens (B, T, D)}, attention distances (blocks, h)) of unmasked images (B, C, H, W).

    The taps: "block i", a block's own output; "normed", the last one after the final norm, which is what
    transfers; and "fused", what MFF's decoder would receive.
    """
    first = encoder.embed(images)                                       # (B, T, D)
    levels = encoder.forward_blocks(first, range(len(encoder.blocks)))
    taps = {f"block {i}": level for i, level in enumerate(levels)} | {"normed": encoder.norm(levels[-1])}
    if fusion:
        taps["fused"] = fuse([levels[i] for i in fusion.out_indices], fusion.proj_layers, fusion.proj_weights,
                             encoder.norm, ops)
    distances = []
    for block, x in zip(encoder.blocks, [first, *levels[:-1]], strict=True):
        weights = attention_weights(block.attn, block.norm1(x))
        distances.append(attention_distance(weights, encoder.grid, encoder.patch_size))
    return taps, torch.stack(distances)


@torch.no_grad()
def examine(subjects, source, most, batch_size, workers, ops, world):
    """(Features of each Subject, its Gram matrices [block][minibatch], number of images).

    It looks at so many images at most, spread over the source. Those that cannot be read are left out. Raises
    UserError where fewer than four can.
    """
    count = min(most, len(source))
    keys = [(0, i * len(source) // count) for i in range(count)]        # classes may come one after the other
    starts = range(0, max(count - 3, 1), batch_size)                    # HSIC needs four: fewer join the last
    batches = [keys[start:end] for start, end in zip(starts, [*starts[1:], count], strict=True)]
    progress, found, bad = Progress(count * len(subjects), 0, world, text="looking at images"), [], {}
    grams = [[[] for _ in subject.encoder.blocks] for subject in subjects]
    for number, subject in enumerate(subjects):
        encoder = subject.encoder
        sides = [patches * encoder.patch_size for patches in encoder.grid]
        views = Views(source, "evaluation", sides, encoder.in_chans, 0, seed=0)
        amplitudes, distances, seen = {}, 0, 0
        for batch in make_loader(views, batches, workers, world.device.type == "cuda"):
            bad.update(batch["bad"])
            pixels = batch["image"][~batch["replaced"]].to(world.device)
            if len(pixels) < 4:                                         # of the others, none could be read
                continue
            images = ops.prepare(pixels, subject.mean, subject.std)
            taps, of_heads = look_at(encoder, subject.fusion, images, ops)
            for x in taps.values():
                check_measured(x, "the features")
            seen += len(pixels)
            distances = distances + of_heads * len(pixels)
            for tap, x in taps.items():
                logs = log_amplitudes(x[:, 1:], encoder.grid) * len(pixels)
                amplitudes[tap] = amplitudes.get(tap, 0) + logs
            for block, of_block in enumerate(grams[number]):
                of_block.append(gram(taps[f"block {block}"][:, 1:]))
            progress.tick(number * count + seen)
        if not seen:
            raise UserError(f"{count - len(bad)} images can be read: expected 4 or more")
        amplitudes = {tap: rounded(total / seen) for tap, total in amplitudes.items()}
        found.append(Features(subject.name, subject.model, encoder.grid, encoder.patch_size, amplitudes,
                              rounded(distances / seen)))
    if bad:
        progress.say(f"warning: {len(bad)} images cannot be read and are left out, {min(bad)} for one")
    return found, grams, seen


def rounded(values):
    """A tensor as nested lists of numbers with DIGITS digits."""
    return [rounded(value) for value in values] if values.dim() else round(float(values), DIGITS)


def similarities(found, grams):
    """CKA of any block of one encoder and any of another, or of its own, of all pairs of them.

    Each pair is a dict: values[block of "up"][block of "across"], which are the encoders' names.
    """
    pairs = combinations_with_replacement(zip(found, grams, strict=True), 2)
    return [dict(across=one.name, up=other.name,
                 values=[[round(cka(of_a, of_b), DIGITS) for of_a in a] for of_b in b])
            for (one, a), (other, b) in pairs]
