"""A finished segmenter, as train_segment.py writes it: found, read and built again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mff_min.config import check_channels, check_reachable
from mff_min.errors import UserError, listed, printable
from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS
from mff_run.files import read_checkpoint
from mff_run.jsonfile import is_number
from mff_run.resume import load_state
from mff_tasks.ade20k import IGNORED, MOST_LETTERS, is_name
from mff_tasks.attention import add_relative_positions
from mff_tasks.upernet import Segmenter
from mff_weights.pretrained import Fusion, build_vit

FILE = "segmenter.pt"                                                   # in the folder of a finished run


@dataclass(frozen=True)
class Finished:
    """A trained Segmenter, in eval mode, with what it takes to use it."""
    path: Path
    model: nn.Module
    classes: list                                                       # their names, by label
    config: dict                                                        # the flags of the run
    img_size: tuple
    in_chans: int
    mean: tuple
    std: tuple


def find_segmenter(path):
    """The segmenter.pt in the folder of a run, or the file of that name; None where there is none."""
    path = Path(path)
    check_reachable("checkpoint", path)
    path = path / FILE if path.is_dir() else path
    return path if path.name == FILE and path.is_file() else None


def load_segmenter(path, device, ops):
    """The Finished segmenter in a file of train_segment.py's, on a device. Raises UserError for another."""
    state = read_checkpoint(path, ("model", "config", "classes"))
    told, classes, problem = state["config"], state["classes"], ""
    sizes = [told.get("patch_size"), told.get("in_chans"), told.get("width"), *as_list(told.get("img_size"))]
    if told.get("model") not in list(MODELS):                           # of a list, which has no hash
        problem = f"is of model {printable(str(told.get('model'))[:40])}: expected one of {', '.join(MODELS)}"
    elif len(sizes) != 5 or not all(type(size) is int and 0 < size < 2 ** 16 for size in sizes):
        problem = "has no sizes: expected patch_size, in_chans, width and img_size below 65536"
    elif not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        problem = "has classes that are no text"
    elif not all(map(is_name, classes)):
        problem = f"has names of classes that are not: expected 1 to {MOST_LETTERS} letters on one line"
    elif not all(type(told.get(name, False)) is bool for name in ("fused", "rel_pos")):
        problem = "has a fused or rel_pos that is no yes or no"
    elif not 2 <= len(classes) <= IGNORED or len(set(classes)) < len(classes):
        problem = f"has {len(classes)} classes, {listed(classes)}: expected 2 to {IGNORED}, each once"
    elif not all(is_numbers(told.get(name)) for name in ("mean", "std")):
        problem = "has no mean and std: expected numbers"
    if problem:
        raise UserError(f"checkpoint {path} {problem}; train_segment.py writes such a file when it ends")
    patch_size, in_chans, width, *img_size = sizes
    mean, std = tuple(told["mean"]), tuple(told["std"])
    check_channels(in_chans, mean, std)

    def build():
        encoder = build_vit(told["model"], tuple(img_size), patch_size, in_chans)
        fusion = None
        if told.get("fused"):
            levels = parse_out_indices(str(told.get("out_indices", "spread")), len(encoder.blocks))
            fusion = Fusion(levels, encoder.embed_dim)
        if told.get("rel_pos"):
            add_relative_positions(encoder)
        return Segmenter(encoder, len(classes), width, fusion, ops)
    try:
        with torch.device("meta"):                                      # shapes alone, no memory
            shapes = {name: value.shape for name, value in build().state_dict().items()}
        wrong = [name for name, value in state["model"].items()
                 if shapes.get(name) != getattr(value, "shape", None)]
        if wrong:
            raise UserError(f"checkpoint {path} says {told['model']}, {img_size[0]}x{img_size[1]} pixels and "
                            f"width {width}, and {listed(map(str, wrong))} do not fit: expected what "
                            f"train_segment.py wrote")
        model = build()
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    load_state(model, state["model"], f"checkpoint {path}")
    model.requires_grad_(False).eval().to(device)
    return Finished(path, model, classes, told, tuple(img_size), in_chans, mean, std)


def as_list(value):
    """A list or tuple of plain values as a list; of anything else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def is_numbers(value):
    """Whether a value is a list or tuple of finite numbers."""
    return bool(as_list(value)) and all(map(is_number, value))
