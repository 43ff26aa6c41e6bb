"""Probes of every layer: the features, both baselines, labels, the table, and bad input."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import state_of
from sources import ROOT

from mff_min.config import parse
from mff_min.errors import Fault
from mff_min.kernels.ops import TORCH
from mff_min.mim import MaskedAutoencoder
from mff_min.targets import PixelTarget
from mff_run.process import run
from mff_weights.pretrained import build_encoder, build_fusion, read_pretrained
from tools import probe_layers
from tools.probe_layers import features_of_layers


@pytest.fixture
def probe(tmp_path, cache, pretrained):
    """probe(*flags, to="a") runs the tool in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a", **options):
        folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
        flags = ["--checkpoint", str(pretrained), *"--data shapes:100 --device cpu --batch-size 8".split(),
                 *folders, *flags]
        return probe_layers.main(parse(probe_layers.Config, flags), **options)
    return call


def test_layers_are_those_of_the_encoder_and_the_fused_feature_is_the_models(pretrained):
    saved = read_pretrained(pretrained)
    encoder = build_encoder(saved)
    fusion, images = build_fusion(saved, encoder), torch.rand(2, 3, 16, 16)
    model = MaskedAutoencoder(encoder, (0, 2, 4, 6, 8, 11), PixelTarget(4), decoder_embed_dim=16,
                              decoder_depth=1, decoder_num_heads=2)
    model.load_state_dict(state_of(pretrained)["model"])
    for pool, of in (("token", lambda x: x[:, 0]), ("avg", lambda x: x[:, 1:].mean(1))):
        found = features_of_layers(encoder, fusion, [3, 11], images, pool, TORCH)
        assert list(found) == ["block 3", "block 11", "fused"]
        torch.testing.assert_close(found["fused"], of(model.encode(images, None)))
        third, = encoder.forward_blocks(encoder.embed(images), [3])
        torch.testing.assert_close(found["block 3"], of(third))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layers_leave_a_table_and_a_json_with_both_baselines(probe, tmp_path, capsys, pool):
    metrics = probe("--layers", "0,11", "--pool", pool)
    rows = {(row["label"], row["kind"], row["layer"]) for row in metrics["rows"]}
    assert rows == {(label, kind, layer) for label in ("shape", "texture") for kind, layers in (
        ("trained", ("block 0", "block 11", "fused")), ("random", ("block 0", "block 11", "fused")),
        ("pixels", ("pixels",)), ("chance", ("chance",))) for layer in layers}
    output = capsys.readouterr().out
    for text in ("shape, trained", "texture, trained", "random weights", "\nfused ", "\npixels "):
        assert text in output
    assert re.search(r"\nchance +10\.0 \+- 0\.0 +12\.5 \+- 0\.0\n", output)
    assert f"python -m tools.analyze {tmp_path / 'a'} --figures layers draws it" in output
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["rows"] == metrics["rows"] and set(found["margins"]) == {"shape", "texture"}
    assert found["config"]["pool"] == pool and found["environment"]["world_size"] == 1


def test_without_baselines_layers_are_those_of_the_trained_encoder_and_the_same(probe, capsys):
    with_baselines = probe("--layers", "11")["rows"]
    metrics = probe("--layers", "11", to="alone", baselines=False)
    assert metrics["rows"] == [row for row in with_baselines if row["kind"] in ("trained", "chance")]
    assert metrics["margins"] == {} and "block 11" in capsys.readouterr().out


def test_all_layers_of_some_images_are_probed_and_the_seed_chooses_those(probe):
    metrics = probe("--images", "16", baselines=False)
    kinds = [(row["kind"], row["layer"]) for row in metrics["rows"] if row["label"] == "shape"]
    assert [layer for kind, layer in kinds if kind == "trained"] == [
        *(f"block {i}" for i in range(12)), "fused"]
    assert metrics["train_images"] == 16 and metrics["rows"][0]["val_images"] == 16
    assert probe("--images", "16", "--seed", "1", baselines=False)["rows"] != metrics["rows"]
    assert probe("--images", "16", baselines=False) == metrics          # the folder may be measured again


@pytest.fixture
def two_colours(tmp_path):
    """Folders of a dozen and of five images of two classes, which can be separated."""
    for split, count in (("train", 12), ("val", 5)):
        for name, value in (("black", 0), ("white", 255)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 20, 3), abs(value - i), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def test_what_can_be_separated_is_and_an_unreadable_validation_image_is_wrong(probe, two_colours):
    flags = ["--data", str(two_colours), "--layers", "5", "--max-bad", "0.1"]

    def trained(to):
        rows = probe(*flags, to=to)["rows"]
        assert {row["label"] for row in rows} == {"class"}
        return next(row for row in rows if row["kind"] == "trained")
    assert trained("whole")["acc1"] == 100
    (two_colours / "train" / "white" / "3.png").write_bytes(b"\x89PNG torn")
    (two_colours / "val" / "black" / "3.png").write_bytes(b"\x89PNG torn")
    row = trained("torn")
    assert (row["acc1"], row["val_images"]) == (90, 10)
    assert probe(*flags, to="again")["train_images"] == 23              # and a training image is left out
    with pytest.raises(Fault, match="more than --max-bad 0.01"):
        probe(*flags, "--max-bad", "0.01", to="strict")


def test_a_val_without_some_classes_is_measured_by_trains_list(probe, two_colours, capsys):
    shutil.rmtree(two_colours / "val" / "black")
    metrics = probe("--data", str(two_colours), "--layers", "5", baselines=False)
    row = next(row for row in metrics["rows"] if row["kind"] == "trained")
    assert (row["acc1"], row["val_images"]) == (100, 5)
    said = capsys.readouterr().out
    assert "warning: val has no images of black (1); labels are by train's 2 classes" in said


def test_weights_that_are_not_finite_have_no_accuracy(probe, pretrained, tmp_path):
    state = torch.load(pretrained / "encoder.pt", weights_only=True)
    state["model"]["blocks.3.mlp.fc1.bias"][0] = 3e38
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(Fault, match="features of 8 in 8 images are not finite"):
        probe("--checkpoint", str(tmp_path / "encoder.pt"), "--layers", "11")


@pytest.mark.parametrize("flags, message", [
    ("--checkpoint=", "--checkpoint is not given"), ("--images 1", "--images 1: expected more than 1"),
    ("--layers 13", "--layers 13: expected all, or numbers of blocks from 0 to 11"),
    ("--layers some", "--layers some: expected all"), ("--pool max", "invalid choice: 'max'"),
    ("--checkpoint LICENSE", "checkpoint LICENSE is a text of"), ("--data FLAT", "has no train folder"),
    ("--output-dir RUN", "holds a run, whose records this would replace: name another --output-dir"),
])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, cache, pretrained, capfd, monkeypatch, flags,
                                                 message):
    monkeypatch.chdir(ROOT)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "0.png")
    flags = flags.replace("FLAT", str(tmp_path / "flat")).replace("RUN", str(pretrained))
    flags = ["--checkpoint", str(pretrained), *"--data shapes:100 --device cpu --output-dir".split(),
             str(tmp_path / "a"), "--cache-dir", str(cache), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        run(probe_layers.main, parse(probe_layers.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


def test_layers_are_probed_in_one_process(probe, monkeypatch):
    class Two:
        size = 2

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass
    monkeypatch.setattr(probe_layers, "start_world", lambda *arguments, **options: Two())
    with pytest.raises(probe_layers.UserError, match="runs in one process: expected no --nproc-per-node"):
        probe()
