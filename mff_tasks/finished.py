"""A finished model of the stages segment and detect, as they write it: found, read and built again."""

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
from mff_tasks.ade20k import MOST_LETTERS, is_name
from mff_weights.pretrained import Fusion, build_vit


@dataclass(frozen=True)
class Finished:
    """A trained model, in eval mode, with what it takes to use it."""
    path: Path
    model: nn.Module
    classes: list                                                       # their names, by label
    config: dict                                                        # the flags of the run
    img_size: tuple
    in_chans: int
    mean: tuple
    std: tuple
    state: dict                                                         # what else the file holds


@dataclass(frozen=True)
class Kind:
    """What a stage writes: the file's name, and what is told in it."""
    file: str                                                           # in the folder of a finished run
    stage: str                                                          # the script that writes it
    build: object           # build(encoder, number of classes, config, fusion, ops) -> the model
    sizes: tuple = ("width",)                                           # flags that are whole numbers above 0
    switches: tuple = ("fused",)                                        # flags that are True or False
    least: int = 1                                                      # classes
    most: int = 2 ** 16
    needs: tuple = ()                                                   # what else the file holds

    def find(self, path):
        """The file in the folder of a run, or the file of that name; None where there is none."""
        path = Path(path)
        check_reachable("checkpoint", path)
        path = path / self.file if path.is_dir() else path
        return path if path.name == self.file and path.is_file() else None

    def load(self, path, device, ops):
        """The Finished model in a file, on a device. Raises UserError for another."""
        state = read_checkpoint(path, ("model", "config", "classes", *self.needs))
        told, classes, problem = state["config"], state["classes"], ""
        names = "patch_size", "in_chans", *self.sizes
        sizes = [*map(told.get, names), *as_list(told.get("img_size"))]
        if told.get("model") not in list(MODELS):                       # of a list, which has no hash
            problem = (f"is of model {printable(str(told.get('model'))[:40])}: expected one of "
                       f"{', '.join(MODELS)}")
        elif len(sizes) != len(names) + 2 or not all(map(is_size, sizes)):
            problem = f"has no sizes: expected {', '.join(names)} and img_size below 65536"
        elif not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            problem = "has classes that are no text"
        elif not all(map(is_name, classes)):
            problem = f"has names of classes that are not: expected 1 to {MOST_LETTERS} letters on one line"
        elif not all(type(told.get(name, False)) is bool for name in self.switches):
            problem = f"has a {' or '.join(self.switches)} that is no yes or no"
        elif not self.least <= len(classes) <= self.most or len(set(classes)) < len(classes):
            problem = (f"has {len(classes)} classes, {listed(classes)}: expected {self.least} to "
                       f"{self.most}, each once")
        elif not all(is_numbers(told.get(name)) for name in ("mean", "std")):
            problem = "has no mean and std: expected numbers"
        if problem:
            raise UserError(f"checkpoint {path} {problem}; {self.stage} writes such a file when it ends")
        img_size, in_chans, mean, std = (tuple(told["img_size"]), told["in_chans"], tuple(told["mean"]),
                                         tuple(told["std"]))
        check_channels(in_chans, mean, std)

        def build():
            encoder, fusion = build_vit(told["model"], img_size, told["patch_size"], in_chans), None
            if told.get("fused"):
                levels = parse_out_indices(str(told.get("out_indices", "spread")), len(encoder.blocks))
                fusion = Fusion(levels, encoder.embed_dim)
            return self.build(encoder, len(classes), told, fusion, ops)
        try:
            with torch.device("meta"):                                  # shapes alone, no memory
                shapes = {name: value.shape for name, value in build().state_dict().items()}
            wrong = [name for name, value in state["model"].items()
                     if shapes.get(name) != getattr(value, "shape", None)]
            if wrong:
                raise UserError(f"checkpoint {path} says {told['model']}, {img_size[0]}x{img_size[1]} pixels "
                                f"and width {told['width']}, and {listed(map(str, wrong))} do not fit: "
                                f"expected what {self.stage} wrote")
            model = build()
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {error}") from None
        load_state(model, state.pop("model"), f"checkpoint {path}")
        model.requires_grad_(False).eval().to(device)
        return Finished(path, model, classes, told, img_size, in_chans, mean, std, state)


def is_size(value):
    """Whether a value is a whole number from 1 to 65535."""
    return type(value) is int and 0 < value < 2 ** 16


def as_list(value):
    """A list or tuple of plain values as a list; of anything else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def is_numbers(value):
    """Whether a value is a list or tuple of finite numbers."""
    return bool(as_list(value)) and all(map(is_number, value))
