"""Weights in files: read from any family, written for any, and loaded into a model with a report.

A file is a stranger's: nothing in it is run, no class in it is made, and its tensors are compared with the
size of the file and with the model that they should fit before memory is taken for them.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mff_min.config import check_reachable
from mff_min.errors import UserError, printable
from mff_min.mim import MaskedAutoencoder
from mff_min.vit import MODELS, VisionTransformer, resize_pos_embed
from mff_run.files import check_regular, read_checkpoint, write_atomically, write_tensors
from mff_run.jsonfile import parse_json, read_json
from mff_weights import families
from mff_weights.adapt import adapt_projection
from mff_weights.places import choose_place, flatten, part_in_file, shown

# Of these, the first that is there is read.
IN_FOLDER = ("last.pt", "classifier.pt", "encoder.pt", "model.safetensors", "pytorch_model.bin")
LARGEST = 64                                                            # patches that are adapted
PROCESSOR = "preprocessor_config.json"
CONTAINERS = {"ours": "model", "mae": "model", "mmpretrain": "state_dict"}          # where a .pth has them
DENSE = {"model.decode_head": "train_segment.py", "model.rpn_head": "train_detect.py"}  # what has such a part

# A quantized or complex tensor, or one of four bits, fits no model here.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


# ---------------------------------------------------------------- reading and writing

@dataclass(frozen=True)
class Weights:
    """What a file holds."""
    path: Path
    family: str                                                         # a key of families.FAMILIES
    state: dict                                                         # tensors by our names
    unknown: list                                                       # names inside it without a place here
    config: dict                                                        # flags of the run, if it was ours
    classes: list                                                       # of a classifier of ours, else empty
    place: str = ""                                                     # in the file, as find_places has it
    behind: tuple = ()                                                  # the part of each tensor beside it
    grid: tuple | None = None                                           # of its positions, where it is known
    processor: dict = field(default_factory=dict)                       # read_processor's

    def numbers(self, name, default):
        """The list of numbers that the config has by this name, or the default."""
        found = self.config.get(name)
        return tuple(found) if isinstance(found, list | tuple) else default


def read_tensors(path):
    """(the file, {name: tensor}, its content, what it says of itself, read_processor's) of a file or folder.

    The folder is a run's or of Transformers. .safetensors are mapped, and read where they are touched. Raises
    UserError.
    """
    path, processor = Path(path), {}
    check_reachable("checkpoint", path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).exists()]
        if (path / ".metadata").exists() and not found:
            raise UserError(f"{path} is a folder of torch.distributed.checkpoint, whose .metadata may run "
                            f"code: expected a file that torch.save or safetensors wrote")
        if not found:
            raise UserError(f"{path} holds none of {', '.join(IN_FOLDER)}: expected a checkpoint, or a "
                            f"folder with one of these")
        processor = read_processor(path / PROCESSOR)
        path = found[0]
    if path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
        about = {}
        for name in {"config", "classes"} & metadata.keys():
            with contextlib.suppress(ValueError):                       # of another program
                about[name] = parse_json(metadata[name].encode())
    else:
        content = about = read_checkpoint(path, foreign=True)
    return path, flatten(path, content), content, about, processor


def read_weights(path, key=None, flag="--key"):
    """The Weights in a checkpoint of any family, or in the folder of a run or of Transformers.

    The encoder may be anywhere in nested dicts and under any prefix. Where there are several, key says which,
    by a part of its place; it came from the flag. Raises UserError.
    """
    path, tensors, content, about, processor = read_tensors(path)
    place, base = choose_place(path, tensors, content, key, flag)
    ours = {name.removeprefix(base): value for name, value in tensors.items() if name.startswith(base)}
    for name, tensor in ours.items():
        check_tensor(path, name, tensor)
    own = place.removeprefix(base)
    family = families.find_family(ours, own)
    try:
        state, beside = families.from_family(ours, family)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {printable(str(error)[:500])}") from None
    shape = tuple(state[families.PATCHES].shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise UserError(f"checkpoint {path} has a patch projection of shape {shape}: expected (width, "
                        f"channels, side, side)")
    if family == "hf":
        check_transformers(path.parent / "config.json", state)
    unknown = [name for name in beside if families.changes_function(name, own, family)]
    behind = [base + name for name in beside if not families.changes_function(name, own, family)]
    behind += [name for name in tensors if not name.startswith(base)]
    behind = tuple(part_in_file(name, base) for name in behind)
    return Weights(path, family, state, unknown, plain_values(dict.get(about, "config")),
                   plain_names(dict.get(about, "classes")), place, behind, processor=processor)


def read_small_json(path):
    """The dict that a JSON file of Transformers holds; {} where there is none."""
    hint = f"expected a small JSON file of Transformers, or no {path.name}"
    return read_json(path, hint=hint, most=2 ** 20) if os.path.lexists(path) else {}


def check_transformers(path, state):
    """Raise UserError where the config.json beside weights of Transformers says that they compute more."""
    told, width = read_small_json(path), len(state[families.PATCHES])
    sizes = width, families.count_blocks(state, "encoder.blocks.")
    heads = [size["num_heads"] for size in MODELS.values() if (size["embed_dim"], size["depth"]) == sizes]
    fits = {"hidden_act": lambda value: value == "gelu",
            "layer_norm_eps": lambda value: type(value) is float and 0 <= value <= 1e-5,
            "num_attention_heads": lambda value: not heads or value in heads}
    for name, fit_here in fits.items():
        if name in told and not fit_here(told[name]):
            raise UserError(f"{path} says {name} {printable(str(told[name])[:40])}, with which the weights "
                            f"compute something else here: expected hidden_act gelu, layer_norm_eps to 1e-5"
                            + f" and {heads[0]} heads" * bool(heads))


def read_processor(path):
    """What a preprocessor_config.json says of img_size (height, width), mean and std; {} where it is none."""
    told = read_small_json(path)
    if told.get("do_rescale", True) is False:
        raise UserError(f"{path} says do_rescale false, which leaves pixels from 0 to 255: expected from 0 "
                        f"to 1; without the file, --mean and --std say what is subtracted and divided by")
    if told.get("do_normalize", True) is False:                         # pixels stay between 0 and 1
        mean = told.get("image_mean")
        count = len(mean) if isinstance(mean, list) else 3
        told = told | dict(image_mean=[0.0] * count, image_std=[1.0] * count)
    size = told.get("crop_size" if told.get("do_center_crop") else "size")
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    sides = [size.get(side, size.get("shortest_edge")) for side in ("height", "width")]
    found = dict(img_size=sides, mean=told.get("image_mean"), std=told.get("image_std"))
    for name, values in found.items():
        kinds, least = ((int,), 1) if name == "img_size" else ((int, float), 0)
        if values is not None and values != [None, None] and not (
                isinstance(values, list) and values and all(type(value) in kinds and least <= value < 10 ** 5
                                                            for value in values)):
            raise UserError(f"{path} has {name} {printable(str(values)[:100])}: expected numbers; without "
                            f"the file, --img-size, --mean and --std say them")
    return {name: tuple(values) for name, values in found.items() if values and values != [None, None]}


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
    check_regular(path)
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


def plain_values(config):
    """The plain values and lists of numbers in a config, by name; none where it is no dict."""
    def plain(value):
        if isinstance(value, list | tuple):
            return all(type(number) in (int, float) and plain(number) for number in value)
        return value is None or type(value) in (str, bool) or (
            type(value) in (int, float) and abs(value) < 2 ** 63)      # as check_ranges has it
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
                        f"blocks{odd_parts(weights)}; width x blocks of the models: {known}")
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
    if weights.grid:
        return weights.grid
    patch_size = weights.state[families.PATCHES].shape[3]
    positions = weights.state.get("encoder.pos_embed", torch.empty(0))
    count = positions.shape[1] - 1 if positions.dim() == 3 else 0
    side = math.isqrt(max(count, 0)) * patch_size
    for sides in (weights.numbers("img_size", ()), (side, side), img_size or ()):
        grid = tuple(int(number // patch_size) for number in sides if math.isfinite(number))
        if len(grid) == 2 and min(grid) > 0 and grid[0] * grid[1] == count:
            return grid
    lacks = "" if "encoder.cls_token" in weights.state else " and no class token"
    shape = f"positions of shape {tuple(positions.shape)}" if positions.numel() else "no positions"
    raise UserError(f"checkpoint {weights.path} has {shape}{lacks}{odd_parts(weights)}: expected one for the "
                    f"class token and one per patch of a square, or of an image of --img-size HEIGHTxWIDTH")


def odd_parts(weights):
    """What an encoder has beside those of a plain ViT, for a message: ", with register tokens", or ""."""
    reasons = list(dict.fromkeys(map(families.reason_of, weights.unknown)))
    return f", with {' and '.join(reasons[:3])}" if reasons else ""


def fit(weights, shapes, old_grid, new_grid):
    """(the tensors that a model of these shapes takes, what was found).

    Positions are resampled from one grid of (rows, columns) to the other. What was found is {"loaded": names,
    "missing": ..., "unexpected": ..., "resized": ...}. Raises UserError where a shape differs, or a number is
    not finite.
    """
    found = {kind: [] for kind in ("loaded", "missing", "unexpected", "resized")}
    fitting, problems = {}, []
    check_projection(weights, shapes)
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
    if broken := [name for name, tensor in fitting.items() if not tensor.float().isfinite().all()]:
        raise UserError(f"checkpoint {weights.path} has NaN or infinity in {', '.join(shown(broken, 3))}: "
                        f"expected finite numbers, of an earlier checkpoint perhaps")
    found["unexpected"] = [name for name in weights.state if name not in shapes] + weights.unknown
    return fitting, found


def check_projection(weights, shapes):
    """Raise UserError, in words, where a model of these shapes takes other channels or patches."""
    _, channels, patch_size, _ = weights.state[families.PATCHES].shape
    here = shapes[families.PATCHES]
    if tuple(here[1:3]) != (channels, patch_size):
        raise UserError(f"checkpoint {weights.path} was trained on {channels} channels in patches of "
                        f"{patch_size}, and here --in-chans is {here[1]} and --patch-size {here[2]}: give "
                        f"--in-chans {channels} --patch-size {patch_size}, or --adapt, which makes its "
                        f"projection fit as timm does")


def adapted(weights, in_chans, patch_size):
    """Weights for this many channels, in patches of this side: the projection as timm adapts it.

    Channels are added up for one, or repeated; patches are resampled. The decoder's prediction, which is of
    the old pixels, is left behind.
    """
    old = weights.state[families.PATCHES]
    if old.shape[1:3] == (in_chans, patch_size):
        return weights
    if max(old.shape[3], patch_size) > LARGEST:                         # P^2 times Q^2 are inverted
        raise UserError(f"--adapt: patches of {old.shape[3]} to {patch_size}: expected sides of {LARGEST} or "
                        f"less")
    state = weights.state | {families.PATCHES: adapt_projection(old, in_chans, patch_size)}
    pred = [name for name in state if name.startswith("decoder_pred.")]
    return replace(weights, state={name: tensor for name, tensor in state.items() if name not in pred},
                   grid=find_grid(weights), behind=weights.behind + ("decoder_pred",) * len(pred))


def table(found, grids=None):
    """What was found, as text: a line a kind, with the number of tensors and which they are.

    grids are the (rows, columns) between which positions were resampled.
    """
    lines = []
    for kind, names in found.items():
        if kind != "loaded" and not names:
            continue
        text = "" if kind == "loaded" else ", ".join(shown(names))
        if kind == "resized" and names and grids:
            text += " from {}x{} to {}x{} patches".format(*grids[0], *grids[1])
        lines.append(f"  {kind:12}{len(names):5}  {text}".rstrip())
    return "\n".join(lines)


def refuse_losses(path, found, hint=""):
    """Raise UserError where anything is missing, unexpected or lost, with its names and what to do."""
    losses = {kind: f"{kind}: {', '.join(shown(found[kind]))}" for kind in ("missing", "unexpected", "lost")
              if found.get(kind)}
    if "unexpected" in losses:
        reasons = ", ".join(dict.fromkeys(map(families.reason_of, found["unexpected"])))
        losses["unexpected"] += f", without which it would compute something else ({reasons})"
    if losses:
        expected = "; expected a plain ViT: docs/weights.md" if losses.keys() != {"lost"} else ""
        if stage := next((DENSE[part] for part in found.get("left behind", ()) if part in DENSE), None):
            expected = (f"; it is of a run of {stage}, which changes the encoder: expected the checkpoint "
                        f"that this run began with")
        raise UserError(f"checkpoint {path} does not go over whole; {'; '.join(losses.values())}{expected}"
                        f"{hint}")


# ---------------------------------------------------------------- into a model

def load_encoder(path, img_size=None, num_heads=None, allow_missing=False, say=print, key=None):
    """The encoder in a checkpoint of any family: a VisionTransformer without head, in eval mode, on the CPU.

    img_size is a side or (height, width) in pixels for which positions are resampled; not given, it is the
    checkpoint's. num_heads is needed for an encoder that is no size of MODELS. say(text) is told what was
    found. Raises UserError where a shape fits nothing and, unless allow_missing, where a tensor is missing or
    unknown.
    """
    return encoder_of(read_weights(path, key), img_size, num_heads, allow_missing, say)


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


def load_weights(model, weights, may_lack=(), fresh=(), allow_missing=False, say=print):
    """Load Weights into a MaskedAutoencoder, or their encoder into a VisionTransformer.

    Positions are resampled where the model's grid is another, and a head stays behind where the model has
    none. Parts of may_lack ("fusion", "decoder") that the checkpoint does not hold keep their values; they
    are returned. So do parameters whose names in a whole model begin with one of fresh. say(text) is told
    what was found. Raises UserError as load_encoder does.
    """
    whole = isinstance(model, MaskedAutoencoder)
    encoder, prefix = (model.encoder, "") if whole else (model, "encoder.")
    shapes = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    state, parts = dict(weights.state), families.parts_of(shapes)
    if whole and len(model.proj_weights) > 1 and families.has_one_level(state):
        del state["proj_weights"]                                       # MAE's, which says nothing
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(fresh))}
    behind = [name for name in state if families.part_of(name) not in parts
              or name not in shapes and name.startswith(("encoder.head.", *fresh))]
    state = {name: tensor for name, tensor in state.items() if name not in behind}
    unknown = [name for name in weights.unknown
               if "decoder" in families.parts_of(state) or not families.is_decoders(name)]

    lacking = [part for part in may_lack if part not in families.parts_of(state)]
    shapes = {name: shape for name, shape in shapes.items() if families.part_of(name) not in lacking}
    sides = [count * encoder.patch_size for count in encoder.grid]
    old_grid = find_grid(weights, sides)
    fitting, found = fit(replace(weights, state=state, unknown=unknown), shapes, old_grid, encoder.grid)
    found["left behind"] = [part_of_model(name) for name in behind] + list(weights.behind)
    say(f"{weights.path}, names of {origin_of(weights)}\n"
        f"{table(found, (old_grid, encoder.grid))}")
    if not allow_missing:
        refuse_losses(weights.path, found)
    fitting = {name.removeprefix(prefix): tensor for name, tensor in fitting.items()}
    model.load_state_dict(fitting, strict=False)
    return lacking


def part_of_model(name):
    """The part of a model that one of our names is of, for the table: head, encoder, fusion or decoder."""
    return "head" if ".head." in name else families.part_of(name)


def origin_of(weights):
    """The family of Weights, and where in the file they were found, for the table."""
    place = weights.place.rstrip(".")
    return weights.family + (f", from {shown([place])[0]}" if place else "")
