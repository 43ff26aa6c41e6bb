"""How five families spell the same tensors: ours, MAE, timm, mmpretrain, Transformers ("hf").

In here every tensor goes by its name in a whole MaskedAutoencoder: encoder.*, the decoder's names, proj_*. A
family is a spelling of these names and has a place for all or some of them. Values are never computed anew,
positions least of all: their two halves differ between families (docs/weights.md), and so they are copied.
"""

import re

import torch

# Ours, mmpretrain's, Transformers' as its files have it; MAE's and timm's are ours without "encoder.". "*" is
# the number of a block. Where one tensor of ours has several names, their rows stand one below the other.
TOP = (
    ("encoder.cls_token", "backbone.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "backbone.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj", "backbone.patch_embed.projection",
     "vit.embeddings.patch_embeddings.projection"),
    ("encoder.norm", "backbone.ln1", "vit.layernorm"),
    ("encoder.fc_norm", "backbone.ln2", ""),
    ("encoder.head", "head.fc", "classifier"),
    ("proj_layers.*", "backbone.proj_layers.*", ""),
    ("proj_weights", "backbone.proj_weights", ""),
    ("mask_token", "neck.mask_token", "decoder.mask_token"),
    ("decoder_embed", "neck.decoder_embed", "decoder.decoder_embed"),
    ("decoder_pos_embed", "neck.decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_norm", "neck.ln1", "decoder.decoder_norm"),
    ("decoder_pred", "neck.decoder_pred", "decoder.decoder_pred"),
)
BLOCKS = (
    ("encoder.blocks.*", "backbone.layers.*", "vit.encoder.layer.*"),
    ("decoder_blocks.*", "neck.decoder_blocks.*", "decoder.decoder_layers.*"),
)
IN_BLOCK = (
    ("norm1", "ln1", "layernorm_before"),
    ("attn.qkv", "attn.qkv", "attention.attention.query attention.attention.key attention.attention.value"),
    ("attn.proj", "attn.proj", "attention.output.dense"),
    ("norm2", "ln2", "layernorm_after"),
    ("mlp.fc1", "ffn.layers.0.0", "intermediate.dense"),
    ("mlp.fc2", "ffn.layers.1", "output.dense"),
)

# Other spellings that are read: each (pattern, what stands there in the table above), applied in this order.
ALIASES = {
    "mmpretrain": (
        (r"^(?!backbone\.|neck\.|head\.)", "backbone."),               # taken off with the wrappers
        (r"\.norm([12])\.", r".ln\1."),                                 # older versions
        (r"^head\.layers\.head\.", "head.fc."),                         # VisionTransformerClsHead
    ),
    "hf": (
        (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),       # ViTModel, ViTMAEModel
        (r"^vit\.layers\.", "vit.encoder.layer."),                      # a state_dict of Transformers 5
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),     # a file of Transformers 5.23
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
}
PATCHES = "encoder.patch_embed.proj.weight"                             # what every encoder has

# How the families spell it, and what an encoder is called in a whole model.
PROJECTIONS = {"patch_embed.proj.weight": "encoder.", "patch_embed.projection.weight": "backbone.",
               "embeddings.patch_embeddings.projection.weight": "vit."}

# Of names that mean nothing here: what an encoder's function is made of, by the first part of the name.
INSIDE = dict.fromkeys(("ours", "mae", "timm", "mmpretrain"), ("blocks", "layers", "patch_embed"))
INSIDE["hf"] = ("embeddings", "encoder", "layers", "layer")
BEFORE_BLOCKS = r"(patch|pre_|pos_|rel_|rope|rotary|ln_|norm|stem|prompt|(input|embed)\w*_norm)"
DECODER_BLOCKS = r"(neck\.)?decoder_blocks\.|decoder\.(decoder_layers|decoder_encoder)\."

# Parameters that stand inside an encoder, and that its features do not depend on.
BESIDE = ("mask_token", "mask_embedding", "mask_embed", "masked_embed", "position_ids", "logit_scale",
          "logit_bias", "temperature", "queue", "queue_ptr", "center", "n_averaged", "num_batches_tracked")
REASONS = ((r"gamma|\.ls\d|lambda|layer_?scale", "LayerScale"), (r"reg\w*tok", "register tokens"),
           (r"dist\w*tok", "a distillation token"), (r"[qk]_?\w*norm|norm_?[qk]\b", "norms of q and k"),
           (r"rel_|relative|rope|freqs|periods", "relative or rotary positions"),
           (r"mlp|ffn|\.w\d|intermediate", "another MLP"), (r"norm|ln", "another norm"))


def part_of(name):
    """The part of a MaskedAutoencoder that one of our names belongs to: encoder, fusion or decoder."""
    if name.startswith("encoder."):
        return "encoder"
    return "fusion" if name.startswith("proj_") else "decoder"


def parts_of(state):
    """The parts of a MaskedAutoencoder that are in a state dict by our names."""
    return {part_of(name) for name in state}


def spellings():
    """{family: {our name: the family's names}}, without .weight and .bias: all that it has a place for."""
    rows = list(TOP)
    for blocks in BLOCKS:
        for inside in IN_BLOCK:
            rows.append(tuple(" ".join(f"{block}.{part}" for part in parts.split())
                              for block, parts in zip(blocks, inside, strict=True)))
    mae = {row[0]: row[0].removeprefix("encoder.") for row in rows if part_of(row[0]) != "fusion"}
    names = {"ours": {row[0]: row[0] for row in rows}, "mae": mae,
             "timm": {ours: theirs for ours, theirs in mae.items() if part_of(ours) == "encoder"},
             "mmpretrain": {row[0]: row[1] for row in rows}, "hf": {row[0]: row[2] for row in rows}}
    return {family: {ours: theirs.split() for ours, theirs in spelled.items() if theirs}
            for family, spelled in names.items()}


FAMILIES = spellings()


def split_name(name):
    """("encoder.blocks.*.norm1", "3", ".bias") of "encoder.blocks.3.norm1.bias"."""
    module, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.S).groups("")
    number = re.search(r"(?<=\.)[0-9]+(?=\.|$)", module)
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", module, count=1), number[0] if number else "", leaf


def count_blocks(state, prefix):
    """How many blocks a state dict by our names has below "encoder.blocks." or "decoder_blocks."."""
    return len({split_name(name)[1] for name in state if name.startswith(prefix)})


def has_one_level(state):
    """Whether the fusion is that of one level: its one weight is softmaxed to 1, whatever it is."""
    return "proj_weights" in state and state["proj_weights"].numel() == 1


def strip_wrappers(name):
    """A tensor's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return re.sub(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.", "", name)


def find_places(names):
    """Where encoders are among the names of a file: {place: base}.

    A place is what the names of one encoder begin with, "teacher.backbone." or "". Its base is what the names
    of the whole model begin with, "teacher.": a decoder may stand beside an encoder of such a name.
    """
    found = {}
    for name in names:
        for patches, own in PROJECTIONS.items():
            if name == patches or name.endswith(f".{patches}"):
                place = name.removesuffix(patches)
                found[place] = place.removesuffix(own) if f".{place}".endswith(f".{own}") else place
    return found


def find_family(names, own):
    """The family of an encoder whose own names begin with `own` in the names of its whole model."""
    patches = next(patches for patches in PROJECTIONS if own + patches in names)
    if patches == "patch_embed.proj.weight":
        return "ours" if own else "mae" if "decoder_embed.weight" in names else "timm"
    return "mmpretrain" if PROJECTIONS[patches] == "backbone." else "hf"


def changes_function(name, own, family):
    """Whether a tensor that has no place here belongs to what an encoder or decoder computes.

    The names of the encoder begin with `own`, as in find_family. Whatever else a file holds (poolers,
    projection heads, classifiers, queues, other decoders) stands beside the encoder and may be left behind.
    """
    if is_decoders(name):
        return True
    if not name.startswith(own) or name.rpartition(".")[2] in BESIDE:
        return False
    first, below, _ = name.removeprefix(own).partition(".")
    if not below:
        return not first.startswith("decoder_")                         # a parameter of the encoder itself
    return first in INSIDE[family] or bool(re.match(BEFORE_BLOCKS, first))


def is_decoders(name):
    """Whether a name that means nothing here is one of a decoder's blocks."""
    return bool(re.match(DECODER_BLOCKS, name))


def reason_of(name):
    """What a tensor that has no place here is, by its name."""
    return next((reason for pattern, reason in REASONS if re.search(pattern, name)), "others unknown here")


def from_family(state, family):
    """(tensors by our names, the names that mean nothing here), of a state dict without wrappers.

    Raises ValueError where two names mean the same tensor, or the parts of one do not go together.
    """
    places = {theirs: (ours, i) for ours, names in FAMILIES[family].items() for i, theirs in enumerate(names)}
    pieces, unknown = {}, []
    for name, tensor in state.items():
        spelled = name
        for pattern, replacement in ALIASES.get(family, ()):
            spelled = re.sub(pattern, replacement, spelled)
        module, number, leaf = split_name(spelled)
        if module not in places:
            unknown.append(name)
            continue
        ours, i = places[module]
        found = pieces.setdefault(ours.replace("*", number) + leaf, {})
        if i in found:
            raise ValueError(f"{name} and {found[i][0]} are two names of the same tensor")
        found[i] = name, tensor
    ours = {name: join(name, found, len(FAMILIES[family][split_name(name)[0]]))
            for name, found in pieces.items()}
    if parts_of(ours) == {"encoder", "decoder"}:
        ours["proj_weights"] = torch.ones(1, 1, 1, 1)                   # MAE's one level, as ours has it
    return ours, unknown


def join(name, pieces, count):
    """The tensor of this name from {position: (their name, rows)}. Raises ValueError unless count fit."""
    names, tensors = zip(*(pieces[i] for i in sorted(pieces)), strict=True)
    alike = len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1
    if len(tensors) != count or count > 1 and not (alike and all(tensor.dim() for tensor in tensors)):
        raise ValueError(f"{', '.join(names)} do not make {name}, which has {count} parts of the same shape")
    return torch.cat(tensors) if count > 1 else tensors[0]


def to_family(state, family):
    """(tensors by the family's names, those of our names that have no place there).

    Our own names of an encoder alone are timm's.
    """
    places = FAMILIES["timm" if family == "ours" and parts_of(state) == {"encoder"} else family]
    found, lost = {}, []
    for name, tensor in state.items():
        module, number, leaf = split_name(name)
        if module in places:
            spelled = [theirs.replace("*", number) + leaf for theirs in places[module]]
            found |= zip(spelled, tensor.chunk(len(spelled)) if len(spelled) > 1 else [tensor], strict=True)
        elif name != "proj_weights" or not has_one_level(state):
            lost.append(name)
    return found, lost
