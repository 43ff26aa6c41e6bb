"""CLIP's tower as a teacher: it equals timm's, and reads the released layouts. No released file is here."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from teachers import as_modules, correctly_spelt, openai_state, random_tower, transformers_state

from mff_min.errors import UserError
from mff_min.vit import VisionTransformer, resize_pos_embed
from mff_tasks.clip import fingerprint, load_tower, read_tower, teach
from mff_weights.checkpoint import write_safetensors


def silent(text):
    """What say= takes where nobody listens."""


LAYOUTS = {"OpenAI": openai_state, "Transformers": transformers_state,
           "Transformers, spelt correctly": lambda *given: correctly_spelt(transformers_state(*given))}
# Two blocks, but twelve of the first. The released files are fp16 (OpenAI) and fp32 (Transformers).
BASE = dict(width=768, heads=12, out_dim=512)
SHAPES = {"vit_base_patch16_clip_quickgelu_224": dict(**BASE, patch_size=16, depth=12),
          "vit_base_patch32_clip_quickgelu_224": dict(**BASE, patch_size=32),
          "vit_large_patch14_clip_quickgelu_224": dict(width=1024, heads=16, out_dim=768, patch_size=14)}


def timms(name, tower):
    """timm's model with the tower's weights: its tokens of images, projected."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=len(tower.blocks), num_classes=tower.head.out_features).eval()
    model.load_state_dict(tower.state_dict() | {"head.bias": torch.zeros_like(model.head.bias)})
    return lambda images: model.head(model.forward_features(images))


@pytest.mark.parametrize("layout, name", [("OpenAI", name) for name in SHAPES]
                         + [(layout, list(SHAPES)[1]) for layout in list(LAYOUTS)[1:]])
@torch.no_grad()
def test_the_tower_gives_the_tokens_of_timm_from_files_of_either_layout(tmp_path, layout, name):
    tower = random_tower(side=224, **SHAPES[name])
    dtype = torch.float16 if layout == "OpenAI" else torch.float32
    tower.load_state_dict({key: value.to(dtype).float() for key, value in tower.state_dict().items()})
    state, suffix = LAYOUTS[layout](tower, dtype), "pth" if layout == "OpenAI" else "safetensors"
    if suffix == "pth":
        torch.save(state, tmp_path / "teacher.pth")
    else:
        write_safetensors(tmp_path / "teacher.safetensors", state, {})
    loaded, _ = load_tower(tmp_path / f"teacher.{suffix}", tower.grid, silent)
    images = torch.randn(1, 3, 224, 224)
    tokens, importance = loaded(images)
    want = timms(name, tower)(images)
    assert tokens.shape == want.shape == (1, 1 + tower.num_patches, SHAPES[name]["out_dim"])
    assert (tokens - want).abs().max() <= 2e-5 * want.abs().max()       # fp32 rounding, in another order
    assert importance.shape == (1, tower.num_patches)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_the_tower_equals_transformers_on_a_folder_that_it_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                image_size=16, patch_size=4, projection_dim=24)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**size)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    x = model.vision_model(images).last_hidden_state
    want = model.visual_projection(model.vision_model.post_layernorm(x))
    torch.testing.assert_close(load_tower(tmp_path, (4, 4), silent)[0](images)[0], want, rtol=1e-5, atol=1e-5)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it has no head.weight; expected its projection too, as in"):
        load_tower(tmp_path, (4, 4), silent)


@torch.no_grad()
def test_the_oracle_can_fail_with_gelu_the_tower_would_be_another():
    tower = random_tower(side=224, **SHAPES["vit_base_patch32_clip_quickgelu_224"])
    images = torch.randn(1, 3, 224, 224)
    want = timms("vit_base_patch32_clip_224", tower)(images)
    assert (tower(images)[0] - want).abs().max() > 1e-3 * want.abs().max()


@torch.no_grad()
def test_importance_is_the_last_blocks_attention_from_the_class_token():
    tower, images = random_tower(heads=2), torch.randn(3, 3, 16, 16)
    _, importance = tower(images)
    x, = tower.forward_blocks(tower.embed(images), [0])
    block = tower.blocks[1]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    weights = torch.stack([(q[:, :, half] @ k[:, :, half].mT / 4).softmax(dim=-1)
                           for half in (slice(16), slice(16, 32))]).mean(dim=0)
    torch.testing.assert_close(importance, weights[:, 0, 1:])
    torch.testing.assert_close(importance.sum(dim=1) + weights[:, 0, 0], torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):                         # attention in fp32 all the same
        assert tower(images)[1].dtype == torch.float32


@torch.no_grad()
def test_any_vit_teaches_its_normed_tokens_and_its_attention():
    encoder, images = VisionTransformer(16, 4, 32, 1, 2), torch.randn(2, 3, 16, 16)
    tokens, importance = teach(encoder, images)
    torch.testing.assert_close(tokens, encoder.forward_features(images))
    assert (importance > 0).all() and (importance.sum(dim=1) < 1).all()


def test_positions_are_resampled_for_the_students_grid(tmp_path):
    tower, said = random_tower(), []
    torch.save(openai_state(tower), tmp_path / "a.pth")
    loaded, _ = load_tower(tmp_path / "a.pth", (3, 6), said.append)
    assert torch.equal(loaded.pos_embed, resize_pos_embed(tower.pos_embed, (4, 4), (3, 6)))
    assert loaded(torch.randn(1, 3, 12, 24))[0].shape == (1, 19, 24)
    assert "sees images of 12x24, positions resampled from 4x4 patches" in said[0]


def test_a_fingerprint_is_of_the_values_and_not_of_the_file(tmp_path):
    tower = random_tower()
    tower.load_state_dict({name: value.half().float() for name, value in tower.state_dict().items()})
    for i, (dtype, names) in enumerate([(torch.float16, openai_state), (torch.float32, transformers_state)]):
        torch.save(names(tower, dtype), tmp_path / f"{i}.pth")
    a, b = (load_tower(tmp_path / f"{i}.pth", grid, silent)[1] for i, grid in enumerate([(4, 4), (2, 2)]))
    assert a == b == fingerprint(tower.state_dict()) and len(a) == 64
    tower.blocks[1].mlp.fc2.bias[3] += 1
    assert fingerprint(tower.state_dict()) != a


@pytest.mark.filterwarnings("ignore:.torch.jit")                      # it is old, as OpenAI's file is
def test_the_command_for_a_torchscript_archive_makes_a_file_that_is_read(tmp_path, monkeypatch):
    tower, path = random_tower(), tmp_path / "it's OpenAI's.pt"
    torch.jit.save(torch.jit.script(as_modules(openai_state(tower, torch.float16))), path)
    with pytest.raises(UserError, match="is a TorchScript archive, which is a program: expected") as refused:
        read_tower(path)
    command = shlex.split(str(refused.value).partition("where you trust it, ")[2].partition(" takes them")[0])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert load_tower(tmp_path / "weights.pth", (4, 4), silent)[1] == fingerprint(
        {name: value.half() for name, value in tower.state_dict().items()})


# ---------------------------------------------------------------- what is refused


def without(*parts):
    return lambda state: {name: value for name, value in state.items()
                          if not any(part in name for part in parts)}


def with_value(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize("change, message", [
    (without("visual."), "holds no CLIP tower; it begins with text_projection, positional_embedding, "),
    (without("ln_pre.weight"), "holds no CLIP tower; it begins with visual.class_embedding"),
    (without("ln_pre.bias"), "no whole CLIP vision tower: norm_pre.bias is missing; expected"),
    (without("resblocks.0"), "it has no blocks.0.mlp.fc1.weight; expected a ViT, since a ResNet"),
    (without("visual.proj"), "it has no head.weight; expected its projection too, as in CLIPModel and"),
    (without("visual.positional"), "it has no pos_embed; expected 3 dimensions"),
    (lambda state: state | {f"ema.{name}": value for name, value in state.items()},
     "holds 2 CLIP towers, at visual., ema.visual.: expected one"),
    (lambda state: state | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)},
     r"blocks.\*.ls_1.gamma is unknown"),
    (lambda state: state | {"visual.cls_token": torch.zeros(1, 1, 32)}, "visual.cls_token is unknown"),
    (lambda state: state | {"visual.transformer.resblocks.0.norm1.bias": torch.zeros(32)},
     r"visual.transformer.resblocks.\*.norm1.bias is there by two names"),
    (with_value("visual.proj", lambda x: x[:5]), r"head.weight has shape \(24, 5\), expected \(24, 32\)"),
    (with_value("visual.proj", lambda x: x * float("nan")), "head.weight has NaN or infinity"),
    (with_value("visual.conv1.weight", lambda x: x[..., 0]), r"proj.weight of shape \(32, 3, 4\)"),
    (with_value("visual.conv1.weight", lambda x: torch.zeros(10 ** 6, 1, 1, 1)), "norm.*has shape"),
    (with_value("visual.conv1.weight", lambda x: torch.zeros(100, 1, 1, 1)), "is 100 wide: expected a"),
    (with_value("visual.positional_embedding", lambda x: x[:8]),
     "positions of 7 patches, which are no square and cannot be resampled to the student's 4x4 patches"),
    (with_value("visual.positional_embedding", lambda x: x[:1]), "positions of 0 patches, which are no"),
    (with_value("visual.class_embedding", lambda x: torch.tensor(1.0)), r"cls_token has shape \(1, 1, 1\)"),
    (with_value("visual.ln_post.bias", lambda x: x.long()), "visual.ln_post.bias is no floating-point"),
])
def test_a_file_that_is_no_whole_tower_is_refused_with_what_it_has(tmp_path, change, message):
    torch.save(change(openai_state(random_tower())), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as refused:
        load_tower(tmp_path / "a.pth", (4, 4), silent)
    assert "expected" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("told, message", [
    ({}, None), (dict(vision_config=dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)), None),
    (dict(vision_config=dict(hidden_act="gelu")), "says hidden_act gelu, with which .* expected quick_gelu"),
    (dict(hidden_act="gelu"), "says hidden_act gelu"), (dict(vision_config=3), None),
    (dict(vision_config=dict(num_attention_heads=4)), "says num_attention_heads 4"),
])
def test_a_folder_of_transformers_whose_config_says_otherwise_is_refused(tmp_path, told, message):
    write_safetensors(tmp_path / "model.safetensors", transformers_state(random_tower()), {})
    Path(tmp_path, "config.json").write_text(json.dumps(told))
    if message is None:
        assert load_tower(tmp_path, (4, 4), silent)[0].grid == (4, 4)
        return
    with pytest.raises(UserError, match=message):
        load_tower(tmp_path, (4, 4), silent)
