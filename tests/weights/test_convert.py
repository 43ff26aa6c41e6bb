"""tools.convert as a user runs it: what it prints, what it writes, what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sources import ROOT

import train_pretrain
import train_probe
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.mim import MaskedAutoencoder
from mff_min.targets import PixelTarget
from mff_min.vit import MODELS, VisionTransformer, resize_pos_embed
from mff_run.process import run
from mff_weights.checkpoint import load_encoder, read_processor, read_weights
from mff_weights.families import part_of
from mff_weights.pretrained import build_encoder, read_pretrained, settings_of
from tools import convert

SIZE = MODELS["vit_test"]


def state_of(levels, **options):
    """The state of a small whole model with random values."""
    encoder = VisionTransformer(16, **SIZE, **options)
    model = MaskedAutoencoder(encoder, range(12 - levels, 12), PixelTarget(encoder.patch_size),
                              decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with whole models and an encoder, which is where we are."""
    for levels, name in ((6, "mff.pt"), (1, "mae.pt")):
        state = state_of(levels)
        torch.save({"model": state, "config": {"decoder_num_heads": 2}}, tmp_path / name)
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if "encoder." in name}
    torch.save(encoder, tmp_path / "encoder.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(flags):
    return convert.main(parse(convert.Config, flags.split()))


def test_the_script_prints_one_table_and_what_it_wrote(folder):
    command = [sys.executable, "-m", "tools.convert", "mff.pt", "timm.safetensors", "--to", "timm"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "mff.pt, names of ours, from model.encoder: vit_test, 16x16 pixels in patches of 4",
        "  loaded        150", "  left behind    31  fusion x11, decoder x20",
        "timm.safetensors: 150 tensors, names of timm"]


def test_the_target_of_every_family_has_its_container(folder):
    for to, path in (("mae", "model"), ("mmpretrain", "state_dict"), ("ours", "model"), ("hf", None)):
        converted(f"mae.pt {to}.pth --to {to}")
        saved = torch.load(f"{to}.pth", weights_only=True)
        assert set(saved) == {path} | ({"config"} if to == "ours" else set()) if path else len(saved) > 100
        assert read_weights(f"{to}.pth").family == to


def test_a_folder_for_transformers_is_there_whole_or_not_at_all(folder, monkeypatch):
    converted("mae.pt whole --to hf")
    config = json.loads((folder / "whole" / "config.json").read_text())
    assert config["architectures"] == ["ViTMAEForPreTraining"] and config["layer_norm_eps"] == 1e-6
    assert config["decoder_num_attention_heads"] == config["num_attention_heads"] == 2
    assert config["image_size"] == 16
    converted("mff.pt alone --to hf --part encoder")
    config = json.loads((folder / "alone" / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"] and "decoder_hidden_size" not in config

    def full(path, value):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert, "write_json", full)
    with pytest.raises(OSError):
        converted("mae.pt again --to hf")
    assert sorted(os.listdir()) == ["alone", "encoder.pth", "mae.pt", "mff.pt", "whole"]


@pytest.mark.parametrize("name, fits, differs", [
    ("hidden_act", "gelu", "relu"), ("layer_norm_eps", 1e-12, 1e-2), ("num_attention_heads", 2, 4)])
def test_a_config_of_transformers_that_computes_something_else_is_refused(folder, name, fits, differs):
    converted("encoder.pth theirs --to hf")
    config = json.loads((folder / "theirs" / "config.json").read_text())
    for value in (fits, differs):
        (folder / "theirs" / "config.json").write_text(json.dumps(config | {name: value}))
        if value == fits:
            read_pretrained("theirs")
        else:
            with pytest.raises(UserError, match=f"config.json says {name} {value}, with which"):
                read_pretrained("theirs")


def test_a_folder_has_an_image_processor_that_transformers_reads_and_we_do(folder, capsys):
    transformers = pytest.importorskip("transformers")
    state = VisionTransformer((16, 24), **SIZE).state_dict()
    config = dict(img_size=(16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.save({"model": state, "config": config}, "own.pt")
    converted("own.pt own --to hf")
    processor = transformers.ViTImageProcessor.from_pretrained("own")
    assert (processor.size["height"], processor.size["width"]) == (16, 24) and processor.resample == 3
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    assert "ViT" in type(transformers.AutoImageProcessor.from_pretrained("own")).__name__
    white = np.full((40, 40, 3), 255, np.uint8)
    pixels = processor(white, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 24)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    torch.testing.assert_close(pixels[0, :, 0, 0], (1 - mean) / std)

    told = json.loads((folder / "own" / "preprocessor_config.json").read_text())
    told |= dict(size=dict(height=32, width=32), image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (folder / "own" / "preprocessor_config.json").write_text(json.dumps(told))
    settings = settings_of(read_pretrained("own"))
    assert settings == dict(img_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), white=None)
    capsys.readouterr()
    encoder = build_encoder(read_pretrained("own"))
    assert encoder.grid == (8, 8) and "encoder.pos_embed from 4x6 to 8x8 patches" in capsys.readouterr().out
    converted("own again.pt")
    assert torch.load("again.pt", weights_only=True)["config"]["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("told, want", [
    (dict(size=24, image_mean=[0.5], image_std=[1]), dict(img_size=(24, 24), mean=(0.5,), std=(1,))),
    (dict(do_normalize=False, image_mean=[0.5]), dict(mean=(0.0,), std=(1.0,))),
    (dict(do_normalize=False), dict(mean=(0.0,) * 3, std=(1.0,) * 3)),
    (dict(size={"shortest_edge": 256}, do_center_crop=True, crop_size={"height": 24, "width": 32}),
     dict(img_size=(24, 32))), (dict(), {}), ([], "a list: expected an object"),
     (dict(size={"longest_edge": 9}), {}),
    (dict(do_rescale=False), "do_rescale false"),
    (dict(size="big"), "img_size ['big', 'big']: expected numbers"), (dict(size=10 ** 9), "expected numbers"),
    (dict(image_std=[0.5, "x"]), "std [0.5, 'x']: expected numbers; without the file, --img-size, --mean"),
])
def test_what_image_processors_say_is_read_or_refused(folder, told, want):
    (folder / "p.json").write_text(json.dumps(told))
    if isinstance(want, dict):
        assert read_processor(folder / "p.json") == want
    else:
        with pytest.raises(UserError) as refused:
            read_processor(folder / "p.json")
        assert want in str(refused.value)


def test_positions_of_both_parts_are_resampled_on_request(folder):
    found = converted("mff.pt big.pt --img-size 24x32")
    assert found["resized"] == ["decoder_pos_embed", "encoder.pos_embed"]
    read = read_weights("big.pt")
    assert read.state["encoder.pos_embed"].shape == (1, 49, 64) and read.config["img_size"] == (24, 32)
    assert load_encoder("big.pt", say=lambda text: None).grid == (6, 8)


def test_the_names_of_classes_go_with_a_classifier(folder):
    state = VisionTransformer(16, num_classes=3, **SIZE).state_dict()
    classes = ["cat", "dog", "\u00e9l\u00e9phant"]
    torch.save({"model": state, "config": {}, "classes": classes}, "classifier.pt")
    for flags in ("classifier.pt a.safetensors --to mmpretrain", "a.safetensors b.pt", "b.pt c --to hf"):
        converted(flags)
    assert torch.load("b.pt", weights_only=True)["classes"] == classes
    config = json.loads((folder / "c" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "\u00e9l\u00e9phant"}
    assert config["label2id"]["dog"] == 1 and config["architectures"] == ["ViTForImageClassification"]


def test_what_has_no_place_is_let_go_on_request(folder):
    found = converted("mff.pt mae.pth --to mae --allow-missing")
    assert len(found["lost"]) == 11 and read_weights("mae.pth").family == "mae"


@pytest.mark.parametrize("flags, message", [
    ("nowhere.pt x.pt", "checkpoint nowhere.pt does not exist"),
    ("nowhere.safetensors x.pt", "checkpoint nowhere.safetensors does not exist"),
    (". x.pt", ". holds none of last.pt, classifier.pt, encoder.pt, model.safetensors, pytorch_model.bin"),
    ("torn.pt x.pt", "checkpoint torn.pt cannot be read"),
    ("torn.safetensors x.pt", "checkpoint torn.safetensors cannot be read"),
    ("resnet.pt x.pt", "resnet.pt is of no known family (ours, MAE, timm, mmpretrain, Transformers): "
                       "expected a ViT, with a tensor named patch_embed.proj.weight or patch_embed.proj"),
    ("resnet.pt x.pt", "anywhere in the file; it holds conv1.weight, bn1.weight, fc.bias ..."),
    ("empty.pt x.pt", "it holds nothing ..."), ("list.pt x.pt", "holds a list: expected a dict"),
    ("evil.pt x.pt", "checkpoint evil.pt is refused: it asks for posix.system"),
    ("odd.pt x.pt", "odd.pt fits no model size: it is 24 wide and has 3 blocks; width x blocks of the "
                    "models: vit_test 64 x 12, vit_t 192 x 12"),
    ("flat.pt x.pt", "flat.pt has a patch projection of shape (64,): expected (width, channels, side"),
    ("broken.pt x.pt", "is of another model: encoder.blocks.5.mlp.fc1.weight has shape (255, 64), here (256"),
    ("more.pt x.pt", "does not go over whole; unexpected: reg_token, without which it would compute "
                     "something else (register tokens); expected a plain ViT: docs/weights.md; --allow"),
    ("less.pt x.pt", "does not go over whole; missing: encoder.blocks.*.attn.qkv.bias x12"),
    ("encoder.pth x.pt --part whole", "encoder.pth holds an encoder alone: --part whole needs a decoder"),
    ("mff.pt x.pt --part whole --to timm", "--part whole: timm has no decoder"),
    ("mff.pt x.pt --to mae", "lost: proj_weights, proj_layers.*.weight x5, proj_layers.*.bias x5; --part en"),
    ("bare_mae.pt x --to hf", "the decoder is 16 wide and its number of heads is not known: give --decoder"),
    ("mff.pt x.onnx", "x.onnx: expected a name that ends in .safetensors, .pth, .pt, .bin"),
    ("mff.pt mae.pt", "mae.pt is there already: name another, or remove it"),
    ("mff.pt no/x.pt", "no/x.pt cannot be written: no is no folder"),
    ("mff.pt x.pt --img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
    ("mff.pt x.pt --to keras", "--to: invalid choice"), ("mff.pt", "required: TARGET"),
    ("mff.pt x.pt y.pt", "unknown flag y.pt"),
])
def test_bad_input_gets_one_line_and_code_2_and_writes_nothing(folder, capfd, flags, message):
    (folder / "torn.pt").write_bytes((folder / "mff.pt").read_bytes()[:5000])
    converted("mff.pt whole.safetensors")
    (folder / "torn.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-9])
    encoder = torch.load("encoder.pth", weights_only=True)
    odd = VisionTransformer(16, 4, 24, 3, 3).state_dict()

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'ran'}",)
    names = ("conv1.weight", "bn1.weight", "fc.bias", "fc.weight")
    files = dict(resnet={name: torch.zeros(1) for name in names},
                 empty={}, list=[1], evil={"model": Malicious()}, odd=odd,
                 flat={"patch_embed.proj.weight": torch.zeros(64)},
                 broken=encoder | {"blocks.5.mlp.fc1.weight": torch.zeros(255, 64)},
                 more=encoder | {"reg_token": torch.zeros(1, 4, 64)},
                 less={name: value for name, value in encoder.items() if "qkv.bias" not in name},
                 bare_mae={"model": torch.load("mae.pt", weights_only=True)["model"]})
    for name, saved in files.items():
        torch.save(saved, f"{name}.pt")
    before = sorted(os.listdir())
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(convert.main, parse(convert.Config, flags.split()))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert sorted(os.listdir()) == before


def test_damaged_files_are_refused_or_read_and_never_end_otherwise(folder):
    generator, outcomes = np.random.default_rng(0), []
    whole = (folder / "encoder.pth").read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for at in generator.integers(0, len(whole), 3):
            damaged[at if generator.random() < 0.3 else at % 4000] ^= int(generator.integers(1, 256))
        cut = int(generator.integers(1, len(whole)))
        (folder / "damaged.pth").write_bytes(damaged[:cut] if generator.random() < 0.3 else damaged)
        try:
            read_weights("damaged.pth")
            outcomes.append("read")
        except UserError as error:
            outcomes.append("refused")
            assert "\n" not in str(error)
    assert outcomes.count("refused") > 20


# ---------------------------------------------------------------- stages that start from weights


STAGE = ("--data shapes:100 --global-batch 16 --batch-size 16 --steps 1 --device cpu --output-dir run "
         "--cache-dir")
DECODER = "--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2"


@pytest.mark.parametrize("flags, lacking", [
    ("whole.pth --to mmpretrain", []), ("whole.safetensors --to mmpretrain", []),
    ("whole.pth --to mae --allow-missing", ["fusion"]), ("whole --to hf --allow-missing", ["fusion"]),
    ("encoder.safetensors --to timm", ["fusion", "decoder"]),
])
def test_pretraining_goes_on_from_any_family_and_says_what_was_not_there(pretrained, cache, tmp_path, capsys,
                                                                         monkeypatch, flags, lacking):
    monkeypatch.chdir(tmp_path)
    converted(f"{pretrained} {flags}")
    capsys.readouterr()
    train_pretrain.main(parse(train_pretrain.Config, [
        *DECODER.split(), *STAGE.split(), str(cache), "--init-from", flags.split()[0], "--lr", "1e-30",
        "--weight-decay", "0", "--seed", "9"]))
    said = capsys.readouterr().out
    assert ("the decoder starts from random weights" in said) == ("decoder" in lacking)
    assert ("its projections start from random weights" in said) == ("fusion" in lacking)
    want = torch.load(pretrained / "last.pt", weights_only=True)["model"]
    got = torch.load("run/last.pt", weights_only=True)["model"]
    random = {name for name in want if part_of(name) in lacking and "pos_embed" not in name}
    for name, tensor in want.items():
        if name not in random:
            assert torch.equal(got[name], tensor), name
    assert not any(torch.equal(got[name], want[name]) for name in random if name.endswith("proj.weight"))


def test_pretraining_goes_on_at_another_size_from_resampled_positions(pretrained, cache, tmp_path, capsys,
                                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*DECODER.replace("16", "24x16", 1).split(), *STAGE.split(), str(cache)]
    train_pretrain.main(parse(train_pretrain.Config, [*flags, "--init-from", str(pretrained)]))
    assert "resized         2  decoder_pos_embed, encoder.pos_embed" in capsys.readouterr().out
    want = torch.load(pretrained / "last.pt", weights_only=True)["model"]["encoder.pos_embed"]
    got = torch.load("run/last.pt", weights_only=True)["model"]["encoder.pos_embed"]
    assert torch.equal(got, resize_pos_embed(want, (4, 4), (6, 4)))


@pytest.mark.parametrize("flags", ["a.pth --to mae --allow-missing", "a --to hf --part encoder",
                                   "a.safetensors --to mmpretrain"])
def test_a_probe_of_any_family_is_that_of_the_run(pretrained, cache, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    converted(f"{pretrained} {flags}")
    found = []
    for checkpoint in (str(pretrained), flags.split()[0]):
        stage = STAGE.replace("--output-dir run", f"--output-dir run{len(found)}").split()
        metrics = train_probe.main(parse(train_probe.Config, [
            *stage, str(cache), "--knn", "5", "--img-size", "16", "--checkpoint", checkpoint]))
        found.append({name: metrics[name] for name in ("acc1", "acc5", "val_images")})
    assert found[0] == found[1]


def test_a_probe_refuses_what_it_does_not_know(folder, cache):
    encoder = torch.load("encoder.pth", weights_only=True)
    torch.save(encoder | {"reg_token": torch.zeros(1, 4, 64)}, "more.pth")
    with pytest.raises(UserError, match="more.pth does not go over whole; unexpected: reg_token"):
        train_probe.main(parse(train_probe.Config, [*STAGE.split(), str(cache), "--checkpoint", "more.pth"]))
