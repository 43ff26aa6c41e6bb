"""Files of teachers with random weights, in the layouts of the released ones."""

import re

import torch
from torch import nn

from mff_tasks.clip import ClipTower

# timm's names, which ClipTower has, as OpenAI and as Transformers spell them.
OPENAI = (("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks", "transformer.resblocks"),
          ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.qkv.", "attn.in_proj_"),
          ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
          ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("head.weight", "proj"),
          ("^norm", "ln_post"))
TRANSFORMERS = (("patch_embed.proj", "embeddings.patch_embedding"), ("norm_pre", "pre_layrnorm"),
                ("blocks", "encoder.layers"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                ("attn.proj", "self_attn.out_proj"), ("cls_token", "embeddings.class_embedding"),
                ("pos_embed", "embeddings.position_embedding.weight"), ("^norm", "post_layernorm"))


def random_tower(patch_size=4, side=16, width=32, depth=2, heads=1, out_dim=24, seed=0):
    """A ClipTower with random values in all parameters, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    tower = ClipTower(side, patch_size, width, depth, heads, 4.0, 3, out_dim)
    for name, value in tower.named_parameters():
        scale = 0.5 if value.dim() == 1 else 1.5 * value[0].numel() ** -0.5
        is_gain = "norm" in name and name.endswith("weight")
        value.data = torch.randn(value.shape, generator=generator) * scale + is_gain
    return tower.requires_grad_(False).eval()


def openai_state(tower, dtype=torch.float32):
    """The tower by OpenAI's names, with some of the text tower's, as in the state dict of a released file."""
    state = {}
    for name, value in tower.state_dict().items():
        for ours, theirs in OPENAI:
            name = re.sub(ours, theirs, name)
        value = value.mT if name == "proj" else value.squeeze(0) if "embedding" in name else value
        state[f"visual.{name}"] = value.squeeze(0) if name == "class_embedding" else value
    state |= {"text_projection": torch.zeros(8, 24), "positional_embedding": torch.zeros(77, 8),
              "transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.tensor(4.6)}
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    return state | {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}


def transformers_state(tower, dtype=torch.float32):
    """The tower by the names of CLIPModel, with some of the text tower's."""
    state = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(4.6),
             "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    for name, value in tower.state_dict().items():
        if name == "head.weight":
            state["visual_projection.weight"] = value
            continue
        parts = {name: value}
        if ".attn.qkv." in name:
            parts = {name.replace("attn.qkv", f"self_attn.{part}_proj"): piece
                     for part, piece in zip("qkv", value.chunk(3), strict=True)}
        for name, value in parts.items():
            for ours, theirs in TRANSFORMERS:
                name = name if ".self_attn." in name and ours == "attn.proj" else re.sub(ours, theirs, name)
            value = value.flatten() if "class" in name else value.squeeze(0) if "position" in name else value
            state[f"vision_model.{name}"] = value
    return {name: value.to(dtype).contiguous() if value.is_floating_point() else value
            for name, value in state.items()}


def correctly_spelt(state):
    """Transformers' names with pre_layernorm, as newer versions may have it."""
    return {re.sub("pre_layrnorm", "pre_layernorm", name): value for name, value in state.items()}


def as_modules(state):
    """Nested modules that have these tensors, for a TorchScript archive like OpenAI's."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, value)
    return root
