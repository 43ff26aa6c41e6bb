"""Weights between families and into models: bit for bit, and with the numbers of the models they are for.

The other side is live timm and Transformers, and the golden models of MAE, mmpretrain (whose positions have
their halves the other way round) and timm.
"""

import argparse
import sys
import types
import zipfile

import pytest
import torch

from mff_min.errors import UserError
from mff_min.mim import MaskedAutoencoder
from mff_min.targets import PixelTarget
from mff_min.vit import MODELS, VisionTransformer, resize_pos_embed
from mff_weights.checkpoint import encoder_of, load_encoder, load_weights, read_weights, write_weights
from mff_weights.families import FAMILIES, from_family, part_of, split_name, to_family
from tools import convert


def silent(text):
    """What say= takes where nobody listens."""


DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


def build(size, levels=1, img_size=32, decoder=DECODER):
    """A whole model whose last `levels` blocks are fused; decoder {} is the published one."""
    depth = size["depth"]
    encoder = VisionTransformer(img_size, **size)
    target = PixelTarget(encoder.patch_size)
    return MaskedAutoencoder(encoder, range(depth - levels, depth), target, **decoder)


def randomised(model):
    """A model's state with random values everywhere, but where MAE's fusion of one level has its 1."""
    return {name: torch.randn_like(value) if value.numel() > 1 else value.clone()
            for name, value in model.state_dict().items()}


def whole_names(encoder):
    """An encoder's state by the names that it has in a whole model."""
    return {f"encoder.{name}": value for name, value in encoder.items()}


def same(got, want):
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def close(got, want, factor=64):
    """Equal but for fp32 rounding in another order of operations: factor * eps of the largest value."""
    atol = factor * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=atol)


def golden_weights(golden, name, family):
    """(cfg, arrays, the weights by our names) of a golden model."""
    arrays = golden(name)
    state, unknown = from_family({key.removeprefix("state/"): value for key, value in arrays.items()
                                  if key.startswith("state/")}, family)
    assert unknown == []
    return arrays["cfg"].tolist(), arrays, state


WHOLE = [("mae_pixels", "mae"), ("mae_norm_pix", "mae"), ("mff_single_layer", "mmpretrain"),
         ("mff", "mmpretrain")]

# ---------------------------------------------------------------- round trips


@pytest.fixture(scope="module", params=MODELS)
def sized(request):
    """Random bytes in the shapes of a whole MFF model of this size: as good as floats, to be moved."""
    size = MODELS[request.param]
    with torch.device("meta"):
        model = build(size, levels=6, img_size=2 * size["patch_size"], decoder={})
    return {name: torch.empty(tensor.shape, dtype=torch.int8).random_()
            for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_comes_back_from_every_family_bit_for_bit(sized, family):
    places = {"mmpretrain": ("encoder", "decoder", "fusion"), "ours": ("encoder", "decoder", "fusion"),
              "timm": ("encoder",)}.get(family, ("encoder", "decoder"))
    for parts in {places, ("encoder",)}:
        state = {name: tensor for name, tensor in sized.items() if part_of(name) in parts}
        if "decoder" in parts and "fusion" not in parts:
            state["proj_weights"] = torch.ones(1, 1, 1, 1)
        theirs, lost = to_family(state, family)
        alone = family == "ours" and parts == ("encoder",)
        back, unknown = from_family(theirs, "timm" if alone else family)
        assert lost == unknown == [] and same(back, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", ["all", "encoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_come_back_from_every_family_bit_for_bit(tmp_path, family, part, suffix):
    levels = 6 if family in ("ours", "mmpretrain") else 1
    state = randomised(build(MODELS["vit_test"], levels, img_size=(16, 32)))
    if part == "encoder" or family == "timm":
        state = {name.removeprefix("encoder."): value for name, value in state.items() if "encoder." in name}
    config = dict(img_size=(16, 32), out_indices="spread", decoder_num_heads=2)
    torch.save({"model": state, "config": config}, tmp_path / "a.pt")
    for source, target, to in (("a.pt", f"b{suffix}", family), (f"b{suffix}", "c.pt", "ours")):
        convert.main(convert.Config(str(tmp_path / source), str(tmp_path / target), to=to, img_size=(16, 32)))
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    assert same(back["model"], state)
    kept = suffix == ".safetensors" or family == "ours"                 # where there is a place for a config
    assert (back["config"].get("out_indices") == "spread") == kept
    assert tuple(back["config"]["img_size"]) == (16, 32) and back["config"]["model"] == "vit_test"


def test_bfloat16_stays_bfloat16(tmp_path):
    state = {name: value.bfloat16() for name, value in randomised(build(MODELS["vit_test"], 6)).items()}
    torch.save({"model": state}, tmp_path / "a.pt")
    convert.main(convert.Config(str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), to="mmpretrain"))
    convert.main(convert.Config(str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")))
    assert same(torch.load(tmp_path / "c.pt", weights_only=True)["model"], state)


# ---------------------------------------------------------------- the same numbers on the other side


def timm_model(timm, cfg, **options):
    img_size, patch_size, dim, depth, heads = cfg[:5]
    return timm.models.VisionTransformer(img_size, patch_size, embed_dim=dim, depth=depth, num_heads=heads,
                                         **options).eval()


@pytest.mark.parametrize("name, family", WHOLE)
def test_a_whole_checkpoint_exported_for_timm_loads_strictly_and_gives_our_features(golden, tmp_path, name,
                                                                                    family):
    timm = pytest.importorskip("timm")
    cfg, arrays, state = golden_weights(golden, name, family)
    write_weights(tmp_path / "a.pth", to_family(state, family)[0], family, {})
    encoder = {key: value for key, value in read_weights(tmp_path / "a.pth").state.items()
               if part_of(key) == "encoder"}
    write_weights(tmp_path / "b.pth", to_family(encoder, "timm")[0], "timm", {})
    theirs = timm_model(timm, cfg, num_classes=0)
    theirs.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=True)
    ours = load_encoder(tmp_path / "a.pth", num_heads=cfg[4], say=silent)
    with torch.no_grad():
        close(ours.forward_features(arrays["in/imgs"]), theirs.forward_features(arrays["in/imgs"]))


def test_names_and_shapes_of_every_size_are_timms():
    timm = pytest.importorskip("timm")
    for model, name in dict(vit_t="tiny_patch16", vit_s="small_patch16", vit_b="base_patch16",
                            vit_l="large_patch16", vit_h="huge_patch14").items():
        with torch.device("meta"):
            theirs = timm.create_model(f"vit_{name}_224", num_classes=0).state_dict()
            ours = build(MODELS[model], img_size=224, decoder={}).state_dict()
        encoder = {key: value for key, value in ours.items() if part_of(key) == "encoder"}
        got, lost = to_family(encoder, "timm")
        assert lost == [] and {key: value.shape for key, value in got.items()} == {
            key: value.shape for key, value in theirs.items()}


def hf_folder(path, state, size, sides, **config):
    """A folder for from_pretrained with these weights by our names, as tools.convert writes it."""
    cfg = convert.Config("", str(path), to="hf")
    config = dict(img_size=sides) | config
    theirs, lost = to_family(state, "hf")
    assert lost == []
    convert.write_folder(cfg, theirs, config, convert.transformers_config(cfg, state, size, config))
    return path


@pytest.mark.parametrize("name, family", WHOLE[:3])
def test_transformers_predicts_and_loses_what_the_golden_models_do(golden, tmp_path, name, family):
    transformers = pytest.importorskip("transformers")
    cfg, arrays, state = golden_weights(golden, name, family)
    size = dict(patch_size=cfg[1], embed_dim=cfg[2], depth=cfg[3], num_heads=cfg[4], in_chans=3)
    folder = hf_folder(tmp_path / "hf", state, size, (32, 32), decoder_num_heads=cfg[7],
                       norm_pix_loss=name != "mae_pixels")
    model, report = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model.eval()(arrays["in/imgs"], noise=arrays["in/noise"])
    close(found.logits, arrays["out/pred"])
    close(found.loss, arrays["out/loss"])
    assert torch.equal(found.mask, arrays["out/mask"])
    assert same(read_weights(folder).state, state | {"proj_weights": torch.ones(1, 1, 1, 1)})
    encoder = transformers.ViTMAEModel.from_pretrained(folder).eval()
    assert encoder(arrays["in/imgs"]).last_hidden_state.shape == (2, 5, 24)     # 12 of 16 patches are masked


def test_an_encoder_alone_becomes_a_vit_that_masks_nothing(golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg, arrays, state = golden_weights(golden, "mff", "mmpretrain")
    state = {key: value for key, value in state.items() if part_of(key) == "encoder"}
    size = dict(patch_size=cfg[1], embed_dim=cfg[2], depth=cfg[3], num_heads=cfg[4], in_chans=3)
    folder = hf_folder(tmp_path / "hf", state, size, (32, 32))
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        got = model(arrays["in/imgs"]).last_hidden_state
        want = load_encoder(folder, num_heads=cfg[4], say=silent).forward_features(arrays["in/imgs"])
    close(got, want)


def test_the_golden_mff_model_goes_through_a_file_to_its_published_numbers(golden, tmp_path):
    cfg, arrays, state = golden_weights(golden, "mff", "mmpretrain")
    write_weights(tmp_path / "a.safetensors", to_family(state, "mmpretrain")[0], "mmpretrain", {})
    size = dict(patch_size=cfg[1], embed_dim=cfg[2], depth=cfg[3], num_heads=cfg[4])
    model = MaskedAutoencoder(VisionTransformer(32, **size), arrays["cfg_fuse_layers"].tolist(),
                              PixelTarget(cfg[1]), decoder_embed_dim=cfg[5], decoder_depth=cfg[6],
                              decoder_num_heads=cfg[7])
    assert load_weights(model, read_weights(tmp_path / "a.safetensors"), say=silent) == []
    close(model(arrays["in/imgs"], arrays["in/noise"]), arrays["out/loss"])


@pytest.mark.parametrize("name, pool", [("classifier_cls_token", "token"), ("classifier_global_pool", "avg")])
def test_classifiers_go_to_every_family_that_has_a_place_for_them(golden, tmp_path, name, pool):
    cfg, arrays, state = golden_weights(golden, name, "timm")
    for family in FAMILIES:
        theirs, lost = to_family(state, family)
        if family == "hf" and pool == "avg":
            assert lost == ["encoder.fc_norm.weight", "encoder.fc_norm.bias"]
            continue
        write_weights(tmp_path / f"{family}.pth", theirs, family, {})
        back = read_weights(tmp_path / f"{family}.pth")
        assert lost == back.unknown == [] and same(back.state, state)
    img_size, patch_size, dim, depth, heads = cfg[:5]
    model = VisionTransformer(img_size, patch_size, dim, depth, heads, num_classes=cfg[6], global_pool=pool)
    load_weights(model, back, say=silent)
    close(model(arrays["in/imgs"]), arrays["out/logits"])
    assert encoder_of(back, num_heads=heads, say=silent)(arrays["in/imgs"]).shape == (4, dim)   # no head

    transformers = pytest.importorskip("transformers")
    if pool == "token":
        size = dict(patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads, in_chans=3)
        folder = hf_folder(tmp_path / "hf", state, size, (32, 32))
        theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        close(theirs(arrays["in/imgs"]).logits, arrays["out/logits"])


# ---------------------------------------------------------------- spellings and wrappers


def test_the_three_spellings_of_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=256,
                 image_size=16, patch_size=4, layer_norm_eps=1e-6)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, **small))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "saved")                           # what this version writes
    torch.save(model.state_dict(), tmp_path / "memory.pth")             # what it has in memory
    saved = read_weights(tmp_path / "saved")
    write_weights(tmp_path / "hub.pth", to_family(saved.state, "hf")[0], "hf", {})      # what the Hub has
    hub = torch.load(tmp_path / "hub.pth", weights_only=True)
    assert "decoder.decoder_layers.1.attention.attention.query.weight" in hub
    renamed = {name.replace("decoder_layers", "decoder_encoder.layer"): value for name, value in hub.items()}
    torch.save(renamed, tmp_path / "5.23.pth")
    for name in ("memory.pth", "hub.pth", "5.23.pth"):
        other = read_weights(tmp_path / name)
        assert other.family == "hf" and other.unknown == [] and same(other.state, saved.state)
    bare = {name.removeprefix("vit."): tensor for name, tensor in hub.items() if name.startswith("vit.")}
    torch.save(bare, tmp_path / "bare.pth")                             # a ViTMAEModel's
    assert same(read_weights(tmp_path / "bare.pth").state,
                {name: value for name, value in saved.state.items() if part_of(name) == "encoder"})


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"model": state}, lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"state_dict": {"model": state}},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    lambda state: {"model": {f"_orig_mod.module.backbone.{name}": value for name, value in state.items()}},
    lambda state: {name.replace("blocks.", "blocks._orig_mod."): value for name, value in state.items()},
])
def test_wrappers_are_taken_off(tmp_path, wrap):
    state = randomised(VisionTransformer(16, **MODELS["vit_test"]))
    torch.save(wrap(state), tmp_path / "a.pth")
    assert same(read_weights(tmp_path / "a.pth").state, whole_names(state))


def test_two_names_of_one_tensor_are_not_chosen_between(tmp_path):
    state = randomised(VisionTransformer(16, **MODELS["vit_test"]))
    torch.save(state | {"_orig_mod.norm.bias": state["norm.bias"] + 1}, tmp_path / "a.pth")
    message = "two tensors of the name norm.bias, one of them as _orig_mod.norm.bias"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "a.pth")
    theirs, _ = to_family(whole_names(state | {"head.weight": torch.ones(2, 64)}), "mmpretrain")
    torch.save(theirs | {"head.layers.head.weight": torch.ones(2, 64)}, tmp_path / "b.pth")
    message = "head.layers.head.weight and head.fc.weight are two names of the same tensor"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "b.pth")


def test_parts_of_one_tensor_that_do_not_go_together_are_named(tmp_path):
    theirs, _ = to_family(whole_names(randomised(VisionTransformer(16, **MODELS["vit_test"]))), "hf")
    del theirs["vit.encoder.layer.3.attention.attention.key.bias"]
    torch.save(theirs, tmp_path / "a.pth")
    with pytest.raises(UserError, match="attention.value.bias do not make encoder.blocks.3.attn.qkv.bias"):
        read_weights(tmp_path / "a.pth")


def test_split_name_takes_the_first_number_as_the_block():
    assert split_name("backbone.layers.3.ffn.layers.0.0.weight") == ("backbone.layers.*.ffn.layers.0.0", "3",
                                                                     ".weight")
    assert split_name("proj_layers.10.bias") == ("proj_layers.*", "10", ".bias")
    assert split_name("encoder.pos_embed") == ("encoder.pos_embed", "", "")


def test_flags_in_a_checkpoint_are_dropped_and_not_made(tmp_path, monkeypatch):
    state = randomised(VisionTransformer(16, **MODELS["vit_test"]))
    torch.save({"model": state, "epoch": 7, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pth")
    monkeypatch.setattr(argparse.Namespace, "__new__", lambda *values: pytest.fail("made"))
    assert same(read_weights(tmp_path / "a.pth").state, whole_names(state))


def test_a_training_checkpoint_of_mmpretrain_is_read_without_mmengine(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    history = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = history
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    buffer = history()
    buffer.values = torch.arange(3).numpy()
    state, _ = to_family(randomised(build(MODELS["vit_test"], 6)), "mmpretrain")
    extra = {"data_preprocessor.mean": torch.zeros(3, 1, 1)}
    torch.save({"meta": {"epoch": 1}, "state_dict": state | extra, "message_hub": {"loss": buffer}},
               tmp_path / "a.pth")
    monkeypatch.undo()
    read = read_weights(tmp_path / "a.pth")
    assert read.family == "mmpretrain" and read.unknown == [] and len(read.state) == len(state)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("side", [384, 128])
def test_positions_of_another_size_are_the_official_ones(golden, tmp_path, side):
    tables = golden("tables")
    encoder = VisionTransformer(224, 16, 16, 1, 1)
    encoder.pos_embed.data = tables["pos_interp/in14"].float()
    torch.save(encoder.state_dict(), tmp_path / "a.pth")
    got = load_encoder(tmp_path / "a.pth", img_size=side, num_heads=1, say=silent).pos_embed
    torch.testing.assert_close(got.detach(), tables[f"pos_interp/out{side // 16}"].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sides", [(96, 96), (192, 192), (384, 384), (160, 256), (96, 384)])
def test_positions_of_another_size_are_timms(tmp_path, sides):
    """Without antialias, as in MAE; timm's default has it, and so another cubic kernel at any size."""
    timm = pytest.importorskip("timm")
    state = randomised(VisionTransformer(224, **MODELS["vit_t"]))
    torch.save(state, tmp_path / "a.pth")
    got = load_encoder(tmp_path / "a.pth", img_size=sides, say=silent)
    grid, said = [side // 16 for side in sides], []
    want = timm.layers.resample_abs_pos_embed(state["pos_embed"], grid, antialias=False)
    torch.testing.assert_close(got.pos_embed.detach(), want, rtol=0, atol=1e-5)
    default = timm.layers.resample_abs_pos_embed(state["pos_embed"], grid)
    assert not torch.allclose(got.pos_embed, default, atol=0.1)
    weights = read_weights(tmp_path / "a.pth")
    load_weights(VisionTransformer(sides, **MODELS["vit_t"]), weights, say=said.append)
    assert "resized         1  encoder.pos_embed" in said[0]


def test_positions_are_copied_whatever_they_are(golden, tmp_path):
    _, _, state = golden_weights(golden, "mff", "mmpretrain")
    ours = build(dict(patch_size=8, embed_dim=24, depth=6, num_heads=3), img_size=32).state_dict()
    swapped = torch.cat([ours["encoder.pos_embed"][..., 12:], ours["encoder.pos_embed"][..., :12]], dim=2)
    torch.testing.assert_close(state["encoder.pos_embed"], swapped)     # mmpretrain's halves, swapped
    encoder = {key: value for key, value in state.items() if part_of(key) == "encoder"}
    for family in FAMILIES:
        theirs, _ = to_family(encoder, family)
        write_weights(tmp_path / f"{family}.pth", theirs, family, {})
        got = load_encoder(tmp_path / f"{family}.pth", num_heads=3, say=silent).pos_embed
        assert torch.equal(got.data, state["encoder.pos_embed"])


def test_a_grid_that_is_no_square_comes_from_the_config_or_from_img_size(tmp_path):
    state = randomised(VisionTransformer((16, 32), **MODELS["vit_test"]))
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state, "config": {"img_size": (16, 32)}}, tmp_path / "ours.pth")
    with pytest.raises(UserError, match=r"positions of shape \(1, 33, 64\): expected one for the class"):
        load_encoder(tmp_path / "bare.pth", say=silent)
    assert load_encoder(tmp_path / "bare.pth", img_size=(16, 32), say=silent).grid == (4, 8)
    assert load_encoder(tmp_path / "ours.pth", say=silent).grid == (4, 8)
    resized = load_encoder(tmp_path / "ours.pth", img_size=(32, 16), say=silent)
    want = resize_pos_embed(state["pos_embed"], (4, 8), (8, 4))
    assert torch.equal(resized.pos_embed.data, want) and not torch.equal(want, state["pos_embed"])


# ---------------------------------------------------------------- into a model


def test_parts_that_are_not_in_the_file_keep_their_values_and_are_named(tmp_path):
    state, said = randomised(build(MODELS["vit_test"], 1)), []
    for family, kept in (("mae", ["fusion"]), ("timm", ["fusion", "decoder"])):
        parts = {name: value for name, value in state.items()
                 if family == "mae" or part_of(name) == "encoder"}
        write_weights(tmp_path / family, to_family(parts, family)[0], family, {})
        model = build(MODELS["vit_test"], 6)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        weights = read_weights(tmp_path / family)
        assert load_weights(model, weights, ("fusion", "decoder"), say=said.append) == kept
        for name, value in model.state_dict().items():
            assert torch.equal(value, (before if part_of(name) in kept else state)[name]), name
    with pytest.raises(UserError, match=r"missing: .*decoder_blocks.\*.attn.qkv.weight x2"):
        load_weights(build(MODELS["vit_test"], 6), read_weights(tmp_path / "timm"), ("fusion",), say=silent)


def test_what_is_missing_or_unknown_is_an_error_that_names_it(tmp_path):
    state, said = randomised(VisionTransformer(16, **MODELS["vit_test"])), []
    torch.save(state | {f"blocks.{i}.ls1.gamma": torch.ones(64) for i in range(12)}, tmp_path / "more.pth")
    del state["norm.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"unexpected: blocks\.\*\.ls1\.gamma x12"):
        load_encoder(tmp_path / "more.pth", say=silent)
    with pytest.raises(UserError, match="missing: encoder.norm.bias"):
        load_encoder(tmp_path / "less.pth", say=said.append)
    assert said[0].splitlines()[1:3] == ["  loaded        149", "  missing         1  encoder.norm.bias"]
    assert load_encoder(tmp_path / "less.pth", allow_missing=True, say=silent).norm.bias.abs().max() == 0


def test_a_shape_that_differs_is_named(tmp_path):
    state = randomised(VisionTransformer(16, **MODELS["vit_test"]))
    state["blocks.3.attn.qkv.weight"] = torch.zeros(100, 64)
    torch.save(state, tmp_path / "a.pth")
    message = r"another model: encoder.blocks.3.attn.qkv.weight has shape \(100, 64\), here \(192, 64\)"
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path / "a.pth", say=silent)


def test_an_encoder_is_loaded_without_head_and_decoder_and_says_so(tmp_path, capsys):
    torch.save(randomised(build(MODELS["vit_test"], 6)), tmp_path / "a.pth")
    encoder = load_encoder(tmp_path / "a.pth")
    assert not encoder.training and isinstance(encoder.head, torch.nn.Identity)
    assert "left behind    43  fusion x11, decoder x32" in capsys.readouterr().out


# ---------------------------------------------------------------- files of strangers


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(2 ** 20)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive, \
            zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(UserError, match="bomb.pth unpacks to"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("tensor", [
    torch.zeros(1).expand(2 ** 20, 2 ** 20), torch.zeros(4, 4).to_sparse(), torch.zeros(4, device="meta"),
    torch.zeros(4, dtype=torch.complex64),
], ids=["expanded", "sparse", "meta", "complex"])
def test_a_tensor_that_is_not_plain_is_refused(tmp_path, tensor):
    torch.save({"patch_embed.proj.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds patch_embed.proj.weight as .*: expected plain tensors|"
                                        r"is refused: it asks for torch.* and weights need tensors"):
        read_weights(tmp_path / "a.pth")


def test_names_in_a_message_cannot_forge_a_line(tmp_path):
    torch.save({"a\nerror: all is well\x1b[2J": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError) as refused:
        read_weights(tmp_path / "a.pth")
    assert str(refused.value).isprintable()


def test_a_dict_that_holds_itself_ends(tmp_path):
    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="of no known family .* it holds model"):
        read_weights(tmp_path / "a.pth")
