"""CLIP's vision tower (arXiv 2103.00020), whose features EVA and MILAN predict, and the files that hold it.

What is unusual about it, beside the encoder of vit.py: a LayerNorm before the first block, norms with eps
1e-5, QuickGELU in place of GELU, no bias in the projection of patches, and a last projection into the space
that images and texts share. CLIP projects the class token alone; a teacher's projects every token.

Shapes: B images, C H W, L patches, T tokens (class token first), D width, D' width of the features, h heads,
d head width.
"""

import hashlib
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.errors import UserError, printable
from mff_min.vit import MODELS, Block, Mlp, VisionTransformer, resize_pos_embed
from mff_weights.checkpoint import check_tensor, read_small_json, read_tensors
from mff_weights.places import shown

# ---------------------------------------------------------------- model


class QuickGeluMlp(Mlp):
    """Two layers with x * sigmoid(1.702 x) between them, an older approximation of GELU."""

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class ClipBlock(Block):
    """A pre-norm Transformer block with eps 1e-5 and QuickGELU."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.norm1.eps = self.norm2.eps = 1e-5
        self.mlp = QuickGeluMlp(dim, int(dim * mlp_ratio))


class ClipTower(VisionTransformer):
    """The tower, with timm's parameter names. forward(images) returns what teach does."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, in_chans, out_dim):
        super().__init__(img_size, patch_size, embed_dim, 0, num_heads, in_chans=in_chans)
        self.patch_embed.proj.register_parameter("bias", None)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=1e-5)
        self.blocks = nn.ModuleList(ClipBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm.eps = 1e-5
        self.head = nn.Linear(embed_dim, out_dim, bias=False)

    def embed(self, images, ids_keep=None):
        return self.norm_pre(super().embed(images, ids_keep))           # (B, T, D)

    def forward(self, images):
        return teach(self, images)


@torch.no_grad()
def teach(encoder, images):
    """What an encoder says of images (B, C, H, W): tokens (B, 1 + L, D') and importance (B, L), fp32.

    The tokens have gone through the final norm and the projection, where there is one. A patch's importance
    is the attention that the class token gives it in the last block, the mean over heads (MILAN, arXiv
    2208.06049); with the class token's own they sum to 1.
    """
    last = len(encoder.blocks) - 1
    x = encoder.embed(images)                                           # (B, T, D)
    *_, x, y = x, *encoder.forward_blocks(x, (last - 1, last))          # each (B, T, D)
    tokens = encoder.head(encoder.norm(y))                              # (B, T, D')
    return tokens.float(), class_attention(encoder.blocks[-1], x)


def class_attention(block, x):
    """A block's attention from the class token to each patch, the mean over heads: (B, T, D) -> (B, L)."""
    D = x.shape[-1]
    x, weight, bias = block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias
    q = F.linear(x[:, :1], weight[:D], bias[:D])                        # (B, 1, D)
    k = F.linear(x, weight[D:2 * D], bias[D:2 * D])                     # (B, T, D)
    q, k = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2).float() for t in (q, k))
    scores = (q * k).sum(dim=-1) * q.shape[-1] ** -0.5                  # (B, h, T): autocast rounds products
    return scores.softmax(dim=-1).mean(dim=1)[:, 1:]                    # (B, L)


# ---------------------------------------------------------------- files

# Names below a tower, ours instead of theirs: each (pattern, our name), all applied.
OPENAI = (
    (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^proj$", "head.weight"),
    (r"^conv1\.", "patch_embed.proj."), (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSFORMERS = (
    (r"^embeddings\.class_embedding$", "cls_token"), (r"^visual_projection\.", "head."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_laye?rnorm\.", "norm_pre."),                                # it is misspelt in the files
    (r"^post_layernorm\.", "norm."), (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."), (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
# What no other model has below its own name, the name of the tower in a whole CLIP, and how names are read.
LAYOUTS = {"OpenAI": ("ln_pre.weight", "visual.", OPENAI),
           "Transformers": ("embeddings.class_embedding", "vision_model.", TRANSFORMERS)}


def find_towers(names):
    """[(layout, what the names of the tower begin with)] of the CLIP towers among the names of a file."""
    return [(layout, name.removesuffix(mark)) for name in names
            for layout, (mark, *_) in LAYOUTS.items() if name == mark or name.endswith(f".{mark}")]


def read_tower(path):
    """(the file, the layout of its names, its tower's tensors in fp32 by our names). Raises UserError."""
    path, tensors, *_ = read_tensors(path)
    towers = find_towers(tensors)
    if len(towers) != 1:
        found = f"{len(towers)} CLIP towers, at {', '.join(shown([own or '.' for _, own in towers]))}"
        holds = f"no CLIP tower; it begins with {', '.join(shown(list(tensors)[:3])) or 'nothing'}"
        raise UserError(f"teacher {path} holds {found if towers else holds}: expected one ViT of CLIP, with "
                        f"visual.ln_pre.weight (OpenAI) or vision_model.embeddings.class_embedding "
                        f"(Transformers); another ViT is --target encoder (docs/targets.md)")
    (layout, own), = towers
    _, in_model, _ = LAYOUTS[layout]
    ours = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    projection = f"{own.removesuffix(in_model)}visual_projection.weight"    # it stands beside the tower
    if layout == "Transformers" and projection in tensors:
        ours["visual_projection.weight"] = tensors[projection]
    ours.pop("embeddings.position_ids", None)                           # of older versions: 0, 1, 2, ...
    state = {}
    for name, tensor in ours.items():
        check_tensor(path, own + name, tensor)
        spelled = our_name(name, layout)
        wrong = "is no floating-point tensor" * (not tensor.is_floating_point())
        wrong = wrong or "is unknown" * (spelled == name) or "is there by two names" * (spelled in state)
        if wrong:
            raise UserError(f"teacher {path} is no whole CLIP vision tower: "
                            f"{shown([own + name])[0]} {wrong}; expected {layout}'s names and floating-point "
                            f"numbers (docs/targets.md)")
        state[spelled] = tensor.float()
    return path, layout, arranged(state, layout)


def our_name(name, layout):
    """A tensor's name in ClipTower; the same again where the layout has no such tensor."""
    for pattern, replacement in LAYOUTS[layout][2]:
        name = re.sub(pattern, replacement, name)
    return name


def arranged(state, layout):
    """The tensors in the shapes that ClipTower has: q, k and v as one, positions with a batch of one."""
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if state[name].dim() and len({state[part].shape for part in parts if part in state}) == 1 \
                and state.keys() >= set(parts):
            state[name.replace(".q.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    for name in {"cls_token", "pos_embed"} & state.keys():
        state[name] = state[name][(None,) * (3 - state[name].dim())]    # (1, 1, D), (1, 1 + L, D)
    if layout == "OpenAI" and "head.weight" in state:
        state["head.weight"] = state["head.weight"].transpose(0, -1)    # (D', D)
    return state


def load_tower(path, grid, say=print):
    """(the ClipTower in a file, its fingerprint): frozen, for images of a (rows, columns) grid of patches.

    Its size is read from the shapes. Positions are resampled for another grid. say(text) is told what was
    found. Raises UserError where the file holds no whole tower, or numbers that are not finite.
    """
    path, layout, state = read_tower(path)
    digest, size = fingerprint(state), find_size(path, state)
    check_transformers(path, layout, size["num_heads"])
    old_grid = find_grid(path, state, grid)
    sides = [count * size["patch_size"] for count in grid]
    with torch.device("meta"):                                          # shapes alone: the file may lie
        tower = ClipTower(sides, **size)
    wanted = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], old_grid, grid)
    check_whole(path, state, wanted)
    tower.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    moved = "" if old_grid == grid else ", positions resampled from {}x{} patches".format(*old_grid)
    say(f"teacher {path}: CLIP with names of {layout}, {size['embed_dim']} wide, {size['depth']} blocks, "
        f"patches of {size['patch_size']}, features of {size['out_dim']}; it sees images of "
        f"{sides[0]}x{sides[1]}{moved}")
    return tower.requires_grad_(False).eval(), digest


def find_size(path, state):
    """The sizes of a tower as ClipTower takes them. Raises UserError where the shapes are of none."""
    def shape(name, dims):
        found = tuple(state[name].shape) if name in state else ()
        if len(found) != dims or 0 in found:
            has = f"{name} of shape {found}" if name in state else f"no {name}"
            ways = {"head.weight": "its projection too, as in CLIPModel and CLIPVisionModelWithProjection",
                    "blocks.0.mlp.fc1.weight": "a ViT, since a ResNet has no tokens"}
            raise UserError(f"teacher {path} is no whole CLIP vision tower: it has {has}; expected "
                            f"{ways.get(name, f'{dims} dimensions')} (docs/targets.md)")
        return found
    width, in_chans, side, _ = shape("patch_embed.proj.weight", 4)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden, _ = shape("blocks.0.mlp.fc1.weight", 2)
    out_dim, _ = shape("head.weight", 2)
    shape("pos_embed", 3)
    heads = {size["embed_dim"]: size["num_heads"] for size in MODELS.values()}.get(width, max(width // 64, 1))
    if width % 4 or width > 64 and width % 64:
        raise UserError(f"teacher {path} is {width} wide: expected a multiple of 64, the width of a head")
    return dict(patch_size=side, embed_dim=width, depth=depth, num_heads=heads, in_chans=in_chans,
                mlp_ratio=(hidden + 0.5) / width, out_dim=out_dim)      # int(mlp_ratio * width) is hidden


def find_grid(path, state, grid):
    """The (rows, columns) of a tower's positions: the grid asked for, if it has as many, else a square."""
    count = state["pos_embed"].shape[1] - 1
    side = math.isqrt(max(count, 0))
    if count != grid[0] * grid[1] and (side * side != count or not count):
        raise UserError(f"teacher {path} has positions of {count} patches, which are no square and cannot be "
                        f"resampled to the student's {grid[0]}x{grid[1]} patches: expected a square number, "
                        f"or --img-size and --patch-size that give as many patches")
    return tuple(grid) if count == grid[0] * grid[1] else (side, side)


def check_whole(path, state, wanted):
    """Raise UserError unless a tower has the tensors that are wanted, by name and shape, all finite."""
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{shown([name])[0]} is unknown" for name in state if name not in wanted]
    problems += [f"{name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
                 for name, shape in wanted.items() if name in state and state[name].shape != shape]
    problems += [f"{name} has NaN or infinity" for name in wanted if name in state and not problems
                 and not state[name].isfinite().all()]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"teacher {path} is no whole CLIP vision tower: {'; '.join(problems[:3])}{more}; "
                        f"expected a ViT of CLIP's shapes and names (docs/targets.md)")


def check_transformers(path, layout, heads):
    """Raise UserError where the config.json beside a tower of Transformers says that it computes more."""
    told = read_small_json(path.parent / "config.json") if layout == "Transformers" else {}
    told = told.get("vision_config", told)
    told = told if isinstance(told, dict) else {}
    for name, value in dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, num_attention_heads=heads).items():
        if told.get(name, value) != value:
            raise UserError(f"{path.parent / 'config.json'} says {name} {printable(str(told[name])[:40])}, "
                            f"with which the weights compute something else here: expected {value}, as "
                            f"OpenAI's have")


def fingerprint(state):
    """The SHA-256 of tensors by name: of their values in float32, whatever the file and its type were."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tuple(tensor.shape)} ".encode())
        found.update(tensor.float().contiguous().numpy())
    return found.hexdigest()
