"""Weights in files: read from any family, written for any, and loaded into a model with a report.

A file is a stranger's: nothing in it is run, no class in it is made, and its tensors are compared with the
size of the file and with the model that they should fit before memory is taken for them.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mff_min.config import check_reachable
from mff_min.errors import UserError, printable
from mff_min.mim import MaskedAutoencoder
from mff_min.vit import MODELS, VisionTransformer, resize_pos_embed
from mff_run.files import read_checkpoint, write_atomically, write_tensors
from mff_weights import families

# Of these, the first that is there is read.
IN_FOLDER = ("last.pt", "classifier.pt", "encoder.pt", "model.safetensors", "pytorch_model.bin")
CONTAINERS = {"ours": "model", "mae": "model", "mmpretrain": "state_dict"}          # where a .pth has them

# What training checkpoints hold beside weights: MAE its flags, mmpretrain the history of its losses.
DROPPED = ("argparse.Namespace", "mmengine.logging.history_buffer.HistoryBuffer", "numpy.ndarray",
           "numpy.dtype", *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
                            for name in ("_reconstruct", "scalar")))


# A quantized or complex tensor, or one of four bits, fits no model here.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Dropped:
    """Takes the place of a class that is neither needed nor loaded: made of anything, it keeps nothing."""

    def __init__(self, *values, **named):
        pass

    def __setstate__(self, state):
        pass


# ---------------------------------------------------------------- reading and writing

@dataclass(frozen=True)
class Weights:
    """What a file holds."""
    path: Path
    family: str                                                         # a key of families.FAMILIES
    state: dict                                                         # tensors by our names
    unknown: list                                                       # names that mean nothing here
    config: dict                                                        # flags of the run, if it was ours
    classes: list                                                       # of a classifier of ours, else empty

    def numbers(self, name, default):
        """The list of numbers that the config has by this name, or the default."""
        found = self.config.get(name)
        return tuple(found) if isinstance(found, list | tuple) else default


def read_weights(path):
    """The Weights in a checkpoint of any family, or in the folder of a run or of Transformers.

    .safetensors are mapped, and read where they are touched. Raises UserError.
    """
    path = Path(path)
    check_reachable("checkpoint", path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).exists()]
        if (path / ".metadata").exists() and not found:
            raise UserError(f"{path} is a folder of torch.distributed.checkpoint, whose .metadata may run "
                            f"code: expected a file that torch.save or safetensors wrote")
        if not found:
            raise UserError(f"{path} holds none of {', '.join(IN_FOLDER)}: expected a checkpoint, or a "
                            f"folder with one of these")
        path = found[0]
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        about = {key: parse_json(metadata[key]) for key in ("config", "classes") if key in metadata}
    else:
        state = about = read_pickle(path)
    for _ in range(3):                                                  # not for ever: it may hold itself
        inside = [state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)]
        state = inside[0] if inside else state
    tensors = {}
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            check_tensor(path, name, tensor)
            bare = families.strip_wrappers(name)
            if bare in tensors:
                raise UserError(f"checkpoint {path} has two tensors of the name {shown([bare])[0]}, one of "
                                f"them as {shown([name])[0]}")
            tensors[bare] = tensor.detach()
    family = families.find_family(tensors)
    if not family:
        raise UserError(f"checkpoint {path} is of no known family (ours, MAE, timm, mmpretrain, "
                        f"Transformers); it holds {', '.join(shown(list(state)[:3])) or 'nothing'} ...")
    try:
        state, unknown = families.from_family(tensors, family)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {printable(str(error)[:500])}") from None
    shape = tuple(state[families.PATCHES].shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise UserError(f"checkpoint {path} has a patch projection of shape {shape}: expected (width, "
                        f"channels, side, side)")
    unknown = [name for name in unknown if not name.startswith("data_preprocessor.")]   # mean and std
    return Weights(path, family, state, unknown, plain_values(about.get("config")),
                   plain_names(about.get("classes")))


def read_pickle(path):
    """The dict in a .pth file, without the objects of DROPPED; any other class is refused. UserError."""
    with torch.serialization.safe_globals([(Dropped, name) for name in DROPPED]):
        return read_checkpoint(path)


def check_tensor(path, name, tensor):
    """Raise UserError unless a tensor is a plain one that its file is large enough for."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    if not plain or tensor.dim() > 16 or tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise UserError(f"checkpoint {path} holds {shown([name])[0]} as {tensor.dtype} of shape "
                        f"{str(tuple(tensor.shape))[:80]}: expected plain tensors, whole in the file")


def import_safetensors():
    """The package safetensors. Raises UserError where it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise UserError("the package safetensors, which reads and writes .safetensors, is not installed: "
                        "pip install -e '.[weights]' installs it; .pth needs no package") from None
    return safetensors


def read_safetensors(path):
    """({name: tensor}, {name: text}) of a file, on the CPU.

    The tensors are views of the file, mapped copy-on-write: their bytes are read when they are touched.
    Raises UserError where the file is not whole or its header claims what cannot be.
    """
    library = import_safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except (library.SafetensorError, OSError, TypeError, RuntimeError) as error:    # TypeError: of a size
        reason = printable(str(error).splitlines()[0][:200])
        raise UserError(f"checkpoint {path} cannot be read ({reason}): expected a whole file of "
                        f"safetensors") from None


def write_safetensors(path, tensors, metadata):
    """Write tensors {name: tensor} and texts {name: text}, atomically."""
    library = import_safetensors()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}    # it refuses shared memory

    def write(file):
        mode = os.fstat(file.fileno()).st_mode
        try:
            library.torch.save_file(tensors, file.name, metadata)
        except library.SafetensorError as error:                        # a full disk
            raise OSError(f"{path} cannot be written ({error})") from None
        with open(file.name, "rb") as written:                          # another file, private, not flushed
            os.fchmod(written.fileno(), mode)
            os.fsync(written.fileno())
    write_atomically(path, write)


def parse_json(text):
    """The value that JSON text holds, or None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def plain_values(config):
    """The plain values and lists of numbers in a config, by name; none where it is no dict."""
    def plain(value):
        if isinstance(value, list | tuple):
            return all(type(number) in (int, float) for number in value)
        return value is None or type(value) in (str, int, float, bool)
    return {name: value for name, value in (config.items() if isinstance(config, dict) else ())
            if isinstance(name, str) and plain(value)}


def plain_names(classes):
    """A list of texts, or an empty one where it is anything else."""
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else []


def write_weights(path, state, family, config, classes=()):
    """Write tensors by a family's names, atomically: .safetensors, or PyTorch's format by any other name.

    Where there is a place for them, config (plain values by name) and classes (texts) stand beside them.
    """
    about = dict(config=config) | (dict(classes=list(classes)) if classes else {})
    path = Path(path)
    if path.suffix == ".safetensors":
        metadata = {key: json.dumps(value) for key, value in about.items()}
        metadata["format"] = "pt"                                       # Transformers asks for it
        write_safetensors(path, state, metadata)
        return
    saved = {name: tensor.clone() for name, tensor in state.items()}    # of a view it would save all
    if family in CONTAINERS:
        saved = {CONTAINERS[family]: saved}
    if family == "ours":
        saved |= about
    write_tensors(path, saved)


# ---------------------------------------------------------------- what fits

def find_size(weights, num_heads=None):
    """The sizes of the encoder in a checkpoint, as VisionTransformer takes them.

    The number of heads is in no shape: it is that of the model of MODELS with this width and depth, unless
    num_heads says otherwise. Raises UserError where there is no such model.
    """
    width, in_chans, patch_size, _ = weights.state[families.PATCHES].shape
    depth = families.count_blocks(weights.state, "encoder.blocks.")
    fitting = [size for size in MODELS.values() if (size["embed_dim"], size["depth"]) == (width, depth)]
    if not (fitting or num_heads):
        known = ", ".join(f"{name} {size['embed_dim']} x {size['depth']}" for name, size in MODELS.items())
        raise UserError(f"checkpoint {weights.path} fits no model size: it is {width} wide and has {depth} "
                        f"blocks; width x blocks of the models: {known}")
    return dict(patch_size=patch_size, embed_dim=width, depth=depth, in_chans=in_chans,
                num_heads=num_heads or fitting[0]["num_heads"],
                global_pool="avg" if "encoder.fc_norm.weight" in weights.state else "token")


def find_model(size):
    """The name in MODELS of an encoder of this size, which is one of find_size's."""
    return next(name for name, known in MODELS.items()
                if (known["embed_dim"], known["depth"]) == (size["embed_dim"], size["depth"]))


def find_grid(weights, img_size=None):
    """The (rows, columns) of the positions in a checkpoint.

    From its config, else a square, else that of an image of img_size (height, width). Raises UserError.
    """
    patch_size = weights.state[families.PATCHES].shape[3]
    positions = weights.state.get("encoder.pos_embed", torch.empty(0))
    count = positions.shape[1] - 1 if positions.dim() == 3 else 0
    side = math.isqrt(max(count, 0)) * patch_size
    for sides in (weights.numbers("img_size", ()), (side, side), img_size or ()):
        grid = tuple(int(number // patch_size) for number in sides if math.isfinite(number))
        if len(grid) == 2 and min(grid) > 0 and grid[0] * grid[1] == count:
            return grid
    raise UserError(f"checkpoint {weights.path} has positions of shape {tuple(positions.shape)}: expected "
                    f"one for the class token and one per patch of a square, or of an image of --img-size "
                    f"HEIGHTxWIDTH")


def fit(weights, shapes, old_grid, new_grid):
    """(the tensors that a model of these shapes takes, what was found).

    Positions are resampled from one grid of (rows, columns) to the other. What was found is {"loaded": names,
    "missing": ..., "unexpected": ..., "resized": ...}. Raises UserError where a shape differs.
    """
    found = {kind: [] for kind in ("loaded", "missing", "unexpected", "resized")}
    fitting, problems = {}, []
    for name, shape in shapes.items():
        tensor = weights.state.get(name)
        if tensor is None:
            found["missing"].append(name)
            continue
        moves = name.endswith("pos_embed") and old_grid != new_grid
        if moves and tensor.shape == (1, 1 + old_grid[0] * old_grid[1], shape[2]):
            tensor = resize_pos_embed(tensor.float(), old_grid, new_grid).to(tensor.dtype)
        if tensor.shape == shape:
            fitting[name] = tensor
            found["resized" if moves else "loaded"].append(name)
        else:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, here {tuple(shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"checkpoint {weights.path} is of another model: {'; '.join(problems[:3])}{more}")
    found["unexpected"] = [name for name in weights.state if name not in shapes] + weights.unknown
    return fitting, found


def shown(names, most=20):
    """Names for a line of text: those of all blocks as one, and nothing in them that could forge a line."""
    counts = Counter(re.sub(r"\.[0-9]+(?=\.)", ".*", str(name)[:200], count=1) for name in names)
    texts = [ascii(name)[1:-1] + f" x{count}" * (count > 1) for name, count in counts.items()]
    return texts[:most] + [f"and {len(texts) - most} more"] * (len(texts) > most)


def table(found):
    """What was found, as text: a line a kind, with the number of tensors and which they are."""
    lines = []
    for kind, names in found.items():
        if kind == "left behind":                                       # on purpose: parts say enough
            names = ["head" if "head." in name else families.part_of(name) for name in names]
        text = "" if kind == "loaded" else ", ".join(shown(names))
        lines.append(f"  {kind:12}{len(names):5}  {text}".rstrip())
    return "\n".join(lines)


def refuse_losses(path, found, hint=""):
    """Raise UserError where anything is missing, unexpected or lost, with its names and what to do."""
    losses = [f"{kind}: {', '.join(shown(found[kind]))}" for kind in ("missing", "unexpected", "lost")
              if found.get(kind)]
    if losses:
        raise UserError(f"checkpoint {path} does not go over whole; {'; '.join(losses)}{hint}")


# ---------------------------------------------------------------- into a model

def load_encoder(path, img_size=None, num_heads=None, allow_missing=False, say=print):
    """The encoder in a checkpoint of any family: a VisionTransformer without head, in eval mode, on the CPU.

    img_size is a side or (height, width) in pixels for which positions are resampled; not given, it is the
    checkpoint's. num_heads is needed for an encoder that is no size of MODELS. say(text) is told what was
    found. Raises UserError where a shape fits nothing and, unless allow_missing, where a tensor is missing or
    unknown.
    """
    return encoder_of(read_weights(path), img_size, num_heads, allow_missing, say)


def encoder_of(weights, img_size=None, num_heads=None, allow_missing=False, say=print):
    """load_encoder, of Weights that were read before."""
    size = find_size(weights, num_heads)
    if img_size is None:
        img_size = [count * size["patch_size"] for count in find_grid(weights)]
    try:
        encoder = VisionTransformer(img_size, **size)
    except ValueError as error:
        raise UserError(str(error)) from None
    load_weights(encoder, weights, allow_missing=allow_missing, say=say)
    return encoder.eval()


def load_weights(model, weights, may_lack=(), allow_missing=False, say=print):
    """Load Weights into a MaskedAutoencoder, or their encoder into a VisionTransformer.

    Positions are resampled where the model's grid is another, and a head stays behind where the model has
    none. Parts of may_lack ("fusion", "decoder") that the checkpoint does not hold keep their values; they
    are returned. say(text) is told what was found. Raises UserError as load_encoder does.
    """
    whole = isinstance(model, MaskedAutoencoder)
    encoder, prefix = (model.encoder, "") if whole else (model, "encoder.")
    shapes = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    state, parts = dict(weights.state), families.parts_of(shapes)
    if whole and len(model.proj_weights) > 1 and families.has_one_level(state):
        del state["proj_weights"]                                       # MAE's, which says nothing
    behind = [name for name in state if families.part_of(name) not in parts
              or name.startswith("encoder.head.") and name not in shapes]
    state = {name: tensor for name, tensor in state.items() if name not in behind}

    lacking = [part for part in may_lack if part not in families.parts_of(state)]
    shapes = {name: shape for name, shape in shapes.items() if families.part_of(name) not in lacking}
    sides = [count * encoder.patch_size for count in encoder.grid]
    fitting, found = fit(replace(weights, state=state), shapes, find_grid(weights, sides), encoder.grid)
    say(f"{weights.path}, names of {weights.family}\n"
        f"{table(found | ({'left behind': behind} if behind else {}))}")
    if not allow_missing:
        refuse_losses(weights.path, found)
    fitting = {name.removeprefix(prefix): tensor for name, tensor in fitting.items()}
    model.load_state_dict(fitting, strict=False)
    return lacking
