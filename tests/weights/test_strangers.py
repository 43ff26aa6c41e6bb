"""Weights as they really come: anywhere in a file, with more in it than weights, for other images."""

import builtins
import collections
import dataclasses
import datetime
import functools
import io
import os
import pathlib
import pickle
import re
import sys
import types
import zipfile

import pytest
import torch

import train_finetune
import train_pretrain
import train_probe
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.vit import MODELS, VisionTransformer, resize_pos_embed
from mff_run.files import read_checkpoint
from mff_weights.adapt import adapt_channels, adapt_patches
from mff_weights.checkpoint import load_encoder, read_weights, write_weights
from mff_weights.families import to_family
from mff_weights.pretrained import (
    CheckpointFlags,
    build_encoder,
    build_like,
    load_classifier,
    open_pretrained,
    read_pretrained,
)
from tools import analyze, convert, evaluate, features, probe_layers

SIZE = MODELS["vit_test"]


def silent(text):
    """What say= takes where nobody listens."""


def encoder_state(**options):
    """Random values for a small encoder, by timm's names."""
    return {name: torch.randn_like(value)
            for name, value in VisionTransformer(16, **SIZE, **options).state_dict().items()}


def below(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def is_encoder(weights, state):
    """Whether Weights hold this encoder alone."""
    want = below("encoder.", state)
    return weights.state.keys() == want.keys() and all(
        torch.equal(weights.state[name], value) for name, value in want.items())


# ---------------------------------------------------------------- anywhere in the file


@pytest.mark.parametrize("wrap, place", [
    (lambda state: state, ""), (lambda state: {"model_state_dict": state}, "model_state_dict."),
    (lambda state: {"teacher": state, "epoch": 3}, "teacher."),
    (lambda state: {"student": {"module": state}}, "student.module."),
    (lambda state: below("module.", state), "module."),
    (lambda state: {"target_encoder": below("module.", state)}, "target_encoder.module."),
    (lambda state: below("vit.", state), "vit."), (lambda state: below("encoder_q.", state), "encoder_q."),
    (lambda state: {"state_dict": below("backbone.vit.", state)}, "state_dict.backbone.vit."),
    (lambda state: below("backbone.net.", state), "backbone.net."),
    (lambda state: {"a": {"b": {"c": {"d": below("base_encoder.", state)}}}}, "a.b.c.d.base_encoder."),
    (lambda state: below("any._fsdp_wrapped_module.name.", state), "any.name."),
    (lambda state: {"models": [{"weight": torch.zeros(2)}, state]}, "models.1."),
    (lambda state: {"encoder": state, "predictor": {"weight": torch.zeros(2)}}, "encoder."),
])
@pytest.mark.parametrize("family", ["timm", "mmpretrain", "hf"])
def test_an_encoder_is_found_anywhere(tmp_path, wrap, place, family):
    state = encoder_state()
    theirs, _ = to_family(below("encoder.", state), family)
    own = {"timm": "", "mmpretrain": "backbone.", "hf": "vit."}[family]
    torch.save(wrap({name.removeprefix(own): value for name, value in theirs.items()}), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert is_encoder(weights, state) and weights.unknown == [] and weights.place == place
    torch.save(wrap(theirs), tmp_path / "b.pth")                        # beneath the family's own name too
    assert is_encoder(read_weights(tmp_path / "b.pth"), state)


def test_a_whole_model_is_found_with_what_stands_beside_its_encoder(tmp_path, pretrained):
    whole = torch.load(pretrained / "last.pt", weights_only=True)["model"]
    for family in ("ours", "mmpretrain"):
        theirs, _ = to_family(whole, family)
        torch.save({"net": below("module.", theirs)}, tmp_path / "a.pth")
        weights = read_weights(tmp_path / "a.pth")
        assert weights.family == family and weights.state.keys() == whole.keys()


def two_encoders():
    return {"student": below("backbone.", encoder_state()), "teacher": below("backbone.", encoder_state())}


def test_of_two_encoders_the_key_takes_one_and_without_it_both_are_named(tmp_path):
    content = two_encoders()
    torch.save(content, tmp_path / "a.pth")
    message = ("a.pth holds 2 encoders: student.backbone, teacher.backbone; --key NAME takes one of them, "
               "for example --key teacher.backbone")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "a.pth")
    for name in ("student", "teacher"):
        state = {key.removeprefix("backbone."): value for key, value in content[name].items()}
        for key in (name, f"{name}.backbone"):
            assert is_encoder(read_weights(tmp_path / "a.pth", key), state)
    for key in ("backbone", "teache", "", "x\n"):
        with pytest.raises(UserError, match="--key .* names [02] encoders of .*: expected one of student"):
            read_weights(tmp_path / "a.pth", key)


def test_an_average_beside_the_model_is_chosen_or_named_but_our_own_runs_go_on_from_the_model(tmp_path):
    state, average = encoder_state(), encoder_state()
    torch.save({"model": state, "model_ema": average}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds 2 encoders: model, model_ema; --key NAME"):
        read_weights(tmp_path / "a.pth")
    assert is_encoder(read_weights(tmp_path / "a.pth", "model_ema"), average)
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "named": encoder_state()}
    run = {"model": state, "average": below("module.", average), "optimizer": moments, "step": 1, "loss": 0.5,
           "config": {"img_size": (16, 16)}}
    torch.save(run, tmp_path / "last.pt")
    weights = read_weights(tmp_path)
    assert is_encoder(weights, state) and collections.Counter(weights.behind) == {"average": 150,
                                                                                  "optimizer": 151}
    assert is_encoder(read_weights(tmp_path, "average"), average)


def test_an_encoder_at_the_top_is_told_from_one_beside_it(tmp_path):
    top, beside = encoder_state(), encoder_state()
    torch.save(top | below("encoder.", beside), tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds 2 encoders: ., encoder; --key NAME takes one"):
        read_weights(tmp_path / "a.pth")
    assert is_encoder(read_weights(tmp_path / "a.pth", "."), top)
    assert is_encoder(read_weights(tmp_path / "a.pth", "encoder"), {**beside})


def test_a_strangers_config_of_plain_values_is_not_believed(tmp_path):
    config = dict(mean=0.5, std="0.5", img_size=224, out_indices=3, model="resnet", patch_size="x")
    torch.save({"model": encoder_state(), "config": config}, tmp_path / "a.pth")
    pretrained, cfg = open_flags(tmp_path / "a.pth", [])
    assert (cfg.img_size, cfg.in_chans, cfg.patch_size) == ((16, 16), 3, 4) and len(cfg.mean) == 3
    assert pretrained.config["model"] == "vit_test"


def test_two_names_of_one_state_dict_are_one_place(tmp_path):
    state = encoder_state()
    torch.save({"model": state, "state_dict": dict(state)}, tmp_path / "a.pth")
    assert is_encoder(read_weights(tmp_path / "a.pth"), state)


def test_what_is_left_behind_is_counted_by_part_and_the_place_is_said(tmp_path):
    said, content = [], two_encoders()
    content["teacher"] |= {"head.mlp.0.weight": torch.zeros(4), "head.mlp.0.bias": torch.zeros(4)}
    content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(4)}}}
    torch.save(content, tmp_path / "a.pth")
    load_encoder(tmp_path / "a.pth", key="teacher", say=said.append)
    assert said[0].splitlines()[0].endswith("a.pth, names of timm, from teacher.backbone")
    assert said[0].splitlines()[1:] == ["  loaded        150",
                                        "  left behind   153  student x150, teacher.head x2, optimizer"]


def test_hostile_nesting_ends_and_takes_no_memory(tmp_path):
    itself = {"n" * 10_000: {"patch_embed.proj.weight": torch.zeros(4, 3, 4, 4)}, 3: 4}
    itself["again"] = {"model": itself}
    many = {f"layer.{i}": torch.zeros(1) for i in range(20_000)}
    torch.save(itself, tmp_path / "itself.pth")
    torch.save({"state": many}, tmp_path / "many.pth")
    (tmp_path / "deep.pth").write_bytes(deep_file(5_000))
    for name in ("itself", "many", "deep"):
        with pytest.raises(UserError, match="is of no known family"):
            read_weights(tmp_path / f"{name}.pth")


def deep_file(depth):
    """The bytes of a checkpoint of so many dicts inside one another, for which pickle.dumps would recurse."""
    file = io.BytesIO()
    torch.save({}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = b"\x80\x02" + b"}X\x01\x00\x00\x00m" * depth + b"}" + b"s" * depth + b"."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return file.getvalue()


# ---------------------------------------------------------------- a few tensors more


BESIDE = ("pooler.dense.weight", "fc.weight", "projector.0.weight", "projector.norm.weight",
          "predictor.2.bias", "prediction_head.weight", "mask_token", "decoder_extra",
          "decoder.blocks.0.attn.qkv.weight", "decoder2.norm.weight",
          "head_dist.weight", "linear_classifier.bias", "queue", "logit_scale")


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_what_stands_beside_an_encoder_is_left_behind(tmp_path, prefix):
    state = encoder_state()
    more = {name: torch.zeros(2) for name in BESIDE} | {"encoder2.weight": torch.zeros(2)}
    torch.save(below(prefix, state | more), tmp_path / "a.pth")
    encoder = load_encoder(tmp_path / "a.pth", say=silent)
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    assert build_encoder(read_pretrained(tmp_path / "a.pth"), say=silent).embed_dim == 64


CHANGES = {"blocks.0.ls1.gamma": "LayerScale", "blocks.0.gamma_1": "LayerScale",
           "reg_token": "register tokens", "register_tokens": "register tokens",
           "dist_token": "a distillation token",
           "blocks.0.attn.q_norm.weight": "norms of q and k", "norm_pre.weight": "another norm",
           "blocks.0.attn.relative_position_bias_table": "relative or rotary positions",
           "rel_pos_bias.relative_position_bias_table": "relative or rotary positions",
           "blocks.0.attn.rope.freqs": "relative or rotary positions",
           "blocks.0.mlp.fc1_g.weight": "another MLP", "blocks.0.mlp.norm.weight": "another MLP",
           "blocks.0.norm3.weight": "another norm",
           "patch_embed.norm.weight": "another norm", "blocks.0.attn.q_bias": "others unknown here",
           "patch_embed.backbone.conv.weight": "others unknown here", "latents": "others unknown here"}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_what_changes_the_function_is_refused_with_the_reason(tmp_path, prefix, name):
    torch.save(below(prefix, encoder_state() | {name: torch.zeros(64)}), tmp_path / "a.pth")
    message = (f"a.pth does not go over whole; unexpected: .*without which it would compute something else "
               rf"\({CHANGES[name]}\); expected a plain ViT: docs/weights.md")
    for load in (lambda: load_encoder(tmp_path / "a.pth", say=silent),
                 lambda: build_encoder(read_pretrained(tmp_path / "a.pth"), say=silent)):
        with pytest.raises(UserError, match=message) as refused:
            load()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, reason", [
    ("embeddings.register_tokens", "register tokens"), ("encoder.layer.0.layer_scale1.lambda1", "LayerScale"),
    ("embeddings.mask_token", ""), ("pooler.dense.weight", ""), ("embeddings.position_ids", "")])
def test_names_of_transformers_too(tmp_path, name, reason):
    theirs, _ = to_family(below("encoder.", encoder_state()), "hf")
    torch.save(theirs | {f"vit.{name}": torch.zeros(64)}, tmp_path / "a.pth")
    if reason:
        with pytest.raises(UserError, match=rf"would compute something else \({reason}\)"):
            load_encoder(tmp_path / "a.pth", say=silent)
    else:
        load_encoder(tmp_path / "a.pth", say=silent)


def test_positions_that_do_not_count_say_what_else_is_there(tmp_path):
    state = encoder_state()
    distilled = state | {"dist_token": torch.zeros(1, 1, 64), "pos_embed": torch.zeros(1, 18, 64)}
    torch.save(distilled, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"\(1, 18, 64\), with a distillation token: expected one for the"):
        read_pretrained(tmp_path / "a.pth")
    torch.save({name: value for name, value in state.items() if name != "pos_embed"}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth has no positions: expected one for the class"):
        read_pretrained(tmp_path / "a.pth")
    del state["cls_token"]
    torch.save(state | {"pos_embed": torch.zeros(1, 16, 64)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"\(1, 16, 64\) and no class token: expected one for the class"):
        read_pretrained(tmp_path / "a.pth")


# ---------------------------------------------------------------- other channels and patches


def open_flags(path, said, **flags):
    return open_pretrained(CheckpointFlags(checkpoint=str(path), **flags), said.append)


def test_other_channels_or_patches_are_refused_in_words(tmp_path):
    torch.save(encoder_state(), tmp_path / "a.pth")
    message = (r"a.pth was trained on 3 channels in patches of 4, and here --in-chans is {} and --patch-size "
               r"{}: give --in-chans 3 --patch-size 4, or --adapt")
    for in_chans, patch_size in ((1, 4), (3, 2), (8, 8)):
        with pytest.raises(UserError, match=message.format(in_chans, patch_size)):
            open_flags(tmp_path / "a.pth", [], in_chans=in_chans, patch_size=patch_size)
    assert open_flags(tmp_path / "a.pth", [], in_chans=3, patch_size=4)[1].in_chans == 3


@pytest.mark.parametrize("in_chans, patch_size", [(1, 4), (2, 4), (5, 4), (8, 4), (3, 8), (3, 2), (3, 3),
                                                  (1, 6)])
def test_a_projection_is_adapted_as_timm_does(tmp_path, in_chans, patch_size):
    timm = pytest.importorskip("timm")
    state, said = encoder_state(), []
    torch.save(state, tmp_path / "a.pth")
    pretrained, cfg = open_flags(tmp_path / "a.pth", said, in_chans=in_chans, patch_size=patch_size,
                                 adapt=True, img_size=(24, 24))
    want = timm.layers.resample_patch_embed(state["patch_embed.proj.weight"], [patch_size, patch_size])
    want = timm.models._manipulate.adapt_input_conv(in_chans, want)
    torch.testing.assert_close(pretrained.encoder["patch_embed.proj.weight"], want, rtol=1e-4, atol=1e-4)
    encoder, side = build_encoder(pretrained, cfg.img_size, silent), 24 // patch_size
    assert encoder(torch.zeros(1, in_chans, 24, 24)).shape == (1, 64) and encoder.grid == (side, side)
    want = resize_pos_embed(state["pos_embed"], (4, 4), (side, side))
    assert torch.equal(encoder.pos_embed, want)
    assert len(cfg.mean) == len(cfg.std) == in_chans
    if in_chans != 3:
        assert cfg.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * in_chans)
        assert f"images with --mean {','.join(['0.449'] * in_chans)} --std" in said[0]
    assert f"adapted from 3 channels in patches of 4 to {in_chans} in patches of {patch_size}" in said[0]


def test_patches_too_large_to_be_adapted_are_refused(tmp_path):
    state = encoder_state() | {"patch_embed.proj.weight": torch.zeros(64, 3, 100, 100)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="--adapt: patches of 100 to 16: expected sides of 64 or less"):
        open_flags(tmp_path / "a.pth", [], patch_size=16, adapt=True)


def test_equal_channels_and_larger_patches_give_what_they_gave():
    weight, grey = torch.randn(5, 3, 4, 4), torch.randn(4, 4)
    want = (weight * grey).sum((1, 2, 3))
    for in_chans in (1, 3, 6, 9):
        torch.testing.assert_close((adapt_channels(weight, in_chans) * grey).sum((1, 2, 3)), want)
    larger = torch.nn.functional.interpolate(grey[None, None], (8, 8), mode="bicubic", antialias=True)
    got = (adapt_patches(weight, 8) * larger).sum((1, 2, 3))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_pretraining_starts_from_adapted_weights_and_says_what_is_new(pretrained, cache, tmp_path, capsys):
    flags = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
             "--in-chans 1 --mean 0.5 --std 0.2 --data shapes:100 --global-batch 16 --batch-size 16 "
             "--steps 1 --lr 1e-30 --weight-decay 0 --device cpu").split()
    flags += ["--cache-dir", str(cache), "--init-from", str(pretrained), "--output-dir"]
    with pytest.raises(UserError, match="was trained on 3 channels in patches of 4, and here --in-chans is"):
        train_pretrain.main(parse(train_pretrain.Config, [*flags, str(tmp_path / "a")]))
    train_pretrain.main(parse(train_pretrain.Config, [*flags, str(tmp_path / "b"), "--adapt"]))
    said = capsys.readouterr().out
    assert "adapted to 1 channels in patches of 4: the decoder's last layer starts from random" in said
    want = torch.load(pretrained / "last.pt", weights_only=True)["model"]
    got = torch.load(tmp_path / "b" / "last.pt", weights_only=True)["model"]
    name = "encoder.patch_embed.proj.weight"
    torch.testing.assert_close(got[name], want[name].sum(1, keepdim=True))
    assert torch.equal(got["decoder_blocks.0.mlp.fc1.weight"], want["decoder_blocks.0.mlp.fc1.weight"])
    assert got["decoder_pred.bias"].shape == (16,)


# ---------------------------------------------------------------- a pickled configuration


@dataclasses.dataclass
class Settings:
    lr: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    lr: float = 1.0


class CfgNode(dict):
    """As yacs has it: a dict with attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__["immutable"] = True


class Ordered(collections.OrderedDict):
    pass


class Kind(str):
    pass


@pytest.fixture
def foreign(monkeypatch):
    """A module whose classes can be pickled, and that fails when it is touched afterwards."""
    module = types.ModuleType("foreign_config")
    made = [Settings, Frozen, CfgNode, Ordered, Kind]
    for kind in made:
        setattr(module, kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Alarm(types.ModuleType):
        def __getattr__(self, name):
            pytest.fail(f"{name} was looked up")
    return lambda: monkeypatch.setitem(sys.modules, module.__name__, Alarm(module.__name__))


CONFIGS = {
    "path": lambda: pathlib.PosixPath("/data"), "pure path": lambda: pathlib.PurePosixPath("/data"),
    "dataclass": lambda: Settings(2.0), "slots": lambda: Frozen(2.0),
    "yacs": lambda: CfgNode(model=CfgNode(name="vit"), sizes=[1, 2]), "text": lambda: Kind("a"),
    "ordered": lambda: Ordered(a=1), "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "partial": lambda: functools.partial(print, 1, end=""), "date": lambda: datetime.datetime(2026, 1, 1),
    "delta": lambda: datetime.timedelta(1), "function": lambda: functools.reduce, "class": lambda: Settings,
    "slice": lambda: slice(1), "range": lambda: range(3), "frozenset": lambda: frozenset([1]),
    "set": lambda: {1, 2}, "sets": lambda: [{1}, {2}], "counter": lambda: collections.Counter([1, 1]),
    "default of sets": lambda: collections.defaultdict(set), "complex": lambda: 1j, "bytes": lambda: b"ab",
    "version": lambda: torch.__version__,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR.__new__(torch.optim.lr_scheduler.StepLR),
    "numpy": lambda: torch.zeros(3).numpy(), "numpy scalar": lambda: torch.zeros(3).numpy()[0],
    "key": lambda: {pathlib.PosixPath("/data"): 1}, "enumeration": lambda: re.RegexFlag.A,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_configuration_is_replaced_and_the_weights_are_read(tmp_path, foreign, name, zipped):
    state, config = encoder_state(), CONFIGS[name]()
    torch.save({"model": state, "config": config, "args": {"inside": [config]}}, tmp_path / "a.pth",
               _use_new_zipfile_serialization=zipped)
    foreign()
    assert is_encoder(read_weights(tmp_path / "a.pth"), state)
    with pytest.raises(UserError, match="a.pth is refused: it asks for .*; where it was made, torch.save") \
            if name not in ("set", "sets", "counter", "complex", "bytes") \
            else pytest.raises(UserError, match="is not the state of a run"):
        read_checkpoint(tmp_path / "a.pth", ["step"])                   # of a run of ours: nothing foreign


def test_a_list_of_another_class_is_replaced_where_pytorch_can_or_refused_with_the_way_on(tmp_path):
    state = encoder_state()
    torch.save({"model": state, "meter": collections.deque([1, 2])}, tmp_path / "a.pth")
    appends = hasattr(torch._weights_only_unpickler.Unpickler, "_check_append_target")
    if appends:
        assert is_encoder(read_weights(tmp_path / "a.pth"), state)
    else:
        with pytest.raises(UserError, match=r"holds more than weights; where it was made, torch.save\("):
            read_weights(tmp_path / "a.pth")


def test_weights_in_a_dict_of_another_class_are_found(tmp_path, foreign):
    state = encoder_state()
    torch.save({"model": Ordered(state)}, tmp_path / "a.pth")
    torch.save(collections.defaultdict(list, state), tmp_path / "b.pth")
    foreign()
    for name in ("a.pth", "b.pth"):
        assert is_encoder(read_weights(tmp_path / name), state)


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_no_function_that_a_file_names_is_called(tmp_path):
    marker, state = tmp_path / "marker", encoder_state()
    code = f"open({str(marker)!r}, 'w')"
    calls = [Call(builtins.eval, code), Call(builtins.exec, code), Call(open, str(marker), "w"),
             Call(getattr, Call(builtins.__import__, "os"), "system"), Call(pathlib.Path.touch, marker),
             Call(functools.partial(builtins.eval, code)), Call(pickle.loads, b"x")]
    for call in calls:
        torch.save({"model": state, "config": call}, tmp_path / "a.pth")
        try:
            assert is_encoder(read_weights(tmp_path / "a.pth"), state)
        except UserError as error:                                      # a stand-in itself is called
            assert call in calls[4:6] and "saves the weights alone" in str(error)
        assert not marker.exists()
    pickle.loads(pickle.dumps(calls[0]))
    assert marker.exists()                                              # it would have been called


@pytest.mark.parametrize("asked", [
    lambda: Call(os.system, "true"), lambda: Call(sys.exit), lambda: Call(bytearray, 10 ** 9),
    lambda: Call(set, torch.zeros(1).expand(2 ** 30)), lambda: Call(torch.zeros, 2 ** 40),
    lambda: Call(collections.Counter, torch.zeros(1).expand(2 ** 30)),
    lambda: [{1}, Call(set, torch.zeros(1).expand(2 ** 30))]])
def test_what_would_grow_or_run_is_refused_with_the_line_that_saves_the_weights(tmp_path, asked):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(4)}, "config": asked()}, tmp_path / "a.pth")
    message = r"a.pth is refused: it asks for .*torch.save\(model.state_dict\(\), FILE\)"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "a.pth")


def test_a_pickled_model_is_named_and_the_line_that_saves_its_weights_too(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "a.pth")
    message = ("a.pth holds a torch.nn.modules.container.Sequential, whose class is not loaded: expected a "
               "dict of tensors; where it was made, torch.save(")
    with pytest.raises(UserError, match=re.escape(message)):
        read_weights(tmp_path / "a.pth")


def test_a_parameter_with_attributes_of_a_file_is_read_as_a_plain_tensor(tmp_path):
    state = encoder_state()
    state["norm.bias"] = torch.nn.Parameter(state["norm.bias"])
    state["norm.bias"].detach_ = 1
    for name in ("detach", "dim", "numel", "shape2"):
        state["norm.bias"].__dict__[name] = collections.OrderedDict
    torch.save({"model": state}, tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth").state["encoder.norm.bias"]
    assert type(read) is torch.Tensor and torch.equal(read, torch.Tensor.detach(state["norm.bias"]))


def test_weights_of_another_family_go_through_the_flags_of_a_stage(tmp_path):
    state = encoder_state()
    write_weights(tmp_path / "a.pth", to_family(below("encoder.", state), "hf")[0], "hf", {})
    said = []
    pretrained, cfg = open_flags(tmp_path / "a.pth", said)
    assert cfg.img_size == (16, 16) and cfg.patch_size == 4
    assert said == [f"{tmp_path / 'a.pth'} does not tell --mean and --std: ImageNet's are taken"]
    assert torch.equal(pretrained.encoder["cls_token"], state["cls_token"])


# ---------------------------------------------------------------- the flags


def test_every_stage_and_tool_that_reads_weights_chooses_and_adapts_them():
    for script in (train_pretrain, train_probe, train_finetune, evaluate, features, probe_layers):
        assert {"key", "adapt", "in_chans", "patch_size"} <= {field.name for field in
                                                              dataclasses.fields(script.Config)}
    for tool in (convert, analyze):
        assert "key" in {field.name for field in dataclasses.fields(tool.Config)}


def test_the_key_goes_from_the_command_line_to_the_loader(tmp_path, capsys):
    content = two_encoders()
    torch.save(content, tmp_path / "a.pth")
    flags = [str(tmp_path / "a.pth"), str(tmp_path / "b.pt"), "--key", "student"]
    convert.main(parse(convert.Config, flags))
    assert "a.pth, names of timm, from student.backbone: vit_test" in capsys.readouterr().out
    saved = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert torch.equal(saved["cls_token"], content["student"]["backbone.cls_token"])
    cfg = parse(train_probe.Config, ["--checkpoint", str(tmp_path / "a.pth"), "--key", "teacher"])
    pretrained, _ = open_pretrained(cfg, silent)
    assert torch.equal(pretrained.encoder["cls_token"], content["teacher"]["backbone.cls_token"])
    with pytest.raises(UserError, match="--checkpoint is not given: expected a run folder"):
        open_pretrained(parse(probe_layers.Config, []), silent)


@pytest.mark.parametrize("between", ["attn_pool.latent", "head_norm.bias", "bottleneck.bias", "pooler.bias"])
def test_a_classifier_with_more_than_a_linear_head_measures_nothing(tmp_path, between):
    state = encoder_state(num_classes=3)
    for name, more in (("linear", {}), ("more", {between: torch.zeros(4)})):
        torch.save(state | more, tmp_path / f"{name}.pth")
    pretrained = {name: read_pretrained(tmp_path / f"{name}.pth") for name in ("linear", "more")}
    model = build_like(pretrained["linear"], (16, 16), num_classes=3)
    load_classifier(model, pretrained["linear"], silent)
    assert torch.equal(model.head.weight, state["head.weight"])
    with pytest.raises(UserError, match=f"has {between.split('.')[0]} between its encoder and its head"):
        load_classifier(model, pretrained["more"], silent)
    build_encoder(pretrained["more"], (16, 16), silent)                 # which needs no head


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "input_norm.weight", "prompt_embed.weight"])
def test_what_comes_before_the_blocks_changes_the_function(tmp_path, name):
    torch.save(encoder_state() | {name: torch.ones(8)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=re.escape(name)):
        load_encoder(tmp_path / "a.pth", say=silent)
    torch.save(encoder_state() | {"masked_embed": torch.ones(1, 8)}, tmp_path / "b.pth")
    load_encoder(tmp_path / "b.pth", say=silent)
