"""tools.analyze: what it draws is what runs hold, its taps are the model's own, and what it refuses."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import generated
import numpy as np
import pytest
import torch
from PIL import Image
from sources import ROOT

import train_finetune
import train_pretrain
import train_probe
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.kernels.ops import TORCH
from mff_min.mim import MaskedAutoencoder
from mff_min.targets import PixelTarget
from mff_run.process import run
from mff_weights.pretrained import build_encoder, build_fusion, read_pretrained
from tools import analyze, probe_layers
from tools.examine import look_at
from tools.figures import numbers_of

TABLE_4 = {1: "last", 2: "0,11", 4: "0,4,8,11", 6: "spread", 12: "all"}  # the paper's, by number of levels


def analyzed(*flags):
    """{figure: the numbers in it} of what tools.analyze draws."""
    written = analyze.main(parse(analyze.Config, [str(flag) for flag in flags]))
    for path in written.values():
        assert path.exists() and path.with_suffix(".svg").exists()
    return {name: json.loads(path.with_suffix(".json").read_text()) for name, path in written.items()}


def refused(*flags):
    """The one line that tools.analyze ends with, and its exit code must be 2."""
    cfg = parse(analyze.Config, [str(flag) for flag in flags])
    with pytest.raises(SystemExit) as end:
        run(analyze.main, cfg)
    assert end.value.code == 2


def make_run(folder, levels=6, lines=5, global_batch=32, **config):
    """A folder with the flags and the log of a pre-training run."""
    folder.mkdir(parents=True)
    config = dict(model="vit_test", global_batch=global_batch, out_indices=TABLE_4[levels], mask_ratio=0.75,
                  img_size=[16, 24], norm_pix_loss=True) | config
    (folder / "config.json").write_text(json.dumps(config))
    weights = np.random.default_rng(levels).dirichlet(np.ones(levels), lines).tolist()
    log = [dict(step=10 * (i + 1), epoch=i / 10, loss=1 / (i + 1), lr=1e-3, grad_norm=2.0, img_per_s=50.0 + i,
                data_wait=0.0, fusion_weights=weights[i]) for i in range(lines)]
    end = dict(done=True, step=50, loss=0.2, val_loss=0.3)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, end]))
    return log


def pretrain(folder, cache, *flags):
    """The folder, after two steps of a small model."""
    size = ("--model vit_test --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 --device cpu "
            "--data shapes:100 --global-batch 16 --batch-size 16 --steps 2")
    flags = [*size.split(), *flags, "--output-dir", str(folder), "--cache-dir", str(cache)]
    train_pretrain.main(parse(train_pretrain.Config, flags))
    return folder


@pytest.fixture(scope="module")
def mae(tmp_path_factory, cache):
    """The folder of a small MAE run, beside the MFF run that is `pretrained`."""
    return pretrain(tmp_path_factory.mktemp("mae"), cache, "--img-size", "16", "--out-indices", "last")


# ---------------------------------------------------------------- what runs wrote


def test_every_row_of_table_4_is_a_panel_of_one_figure(tmp_path):
    logs = {levels: make_run(tmp_path / f"m{levels}", levels) for levels in (6, 1, 12, 2, 4)}
    folders = [tmp_path / f"m{levels}" for levels in logs]
    found = analyzed(*folders, "--figures", "weights", "--output-dir", tmp_path / "out")["weights"]
    assert [panel["title"] for panel in found["panels"]] == [
        "m1: 1 level", "m2: 2 levels", "m4: 4 levels", "m6: 6 levels", "m12: 12 levels"]
    blocks = {1: [11], 2: [0, 11], 4: [0, 4, 8, 11], 6: [0, 2, 4, 6, 8, 11], 12: list(range(12))}
    for panel, levels in zip(found["panels"], blocks, strict=True):
        *series, equal = panel["series"] if levels > 1 else [*panel["series"], None]
        assert [line["name"] for line in series] == [f"block {block}" for block in blocks[levels]]
        for i, line in enumerate(series):
            want = [[32 * entry["step"], entry["fusion_weights"][i]] for entry in logs[levels]]
            assert line["points"] == want
        assert equal is None or {y for _, y in equal["points"]} == {1 / levels}
    assert "A weight is no measure of what a level contributes" in found["note"]


def test_runs_are_laid_over_one_another_by_images_seen(tmp_path, capsys):
    log = make_run(tmp_path / "a")
    make_run(tmp_path / "b", global_batch=64)
    bad = log[2] | dict(grad_norm=float("inf"))                         # as a float16 run has them
    with open(tmp_path / "b" / "log.jsonl", "a") as file:
        file.write(json.dumps(bad | dict(step=60)) + "\n")
    found = analyzed(tmp_path / "a", tmp_path / "b", "--figures", "curves", "--output-dir", tmp_path / "out")
    panels = {panel["y_label"]: panel["series"] for panel in found["curves"]["panels"]}
    assert list(panels) == ["loss", "learning rate", "gradient norm", "images a second"]
    a, b = panels["loss"]
    assert a["points"] == [[320 * (i + 1), 1 / (i + 1)] for i in range(5)]
    assert [x for x, _ in b["points"]] == [640, 1280, 1920, 2560, 3200, 3840]
    assert len(panels["gradient norm"][1]["points"]) == 5
    assert f"1 values of grad_norm in {tmp_path}/b are not finite and are left out" in capsys.readouterr().out


def test_a_torn_line_is_named_and_the_others_are_drawn(tmp_path, capsys):
    make_run(tmp_path / "a")
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    lines[2] = lines[2][:40]
    (tmp_path / "a" / "log.jsonl").write_text("\n".join([*lines, "3", "[1]"]) + "\n\xff{", encoding="latin1")
    found = analyzed(tmp_path / "a", "--figures", "curves")
    assert len(found["curves"]["panels"][0]["series"][0]["points"]) == 4
    said = capsys.readouterr().out
    assert f"warning: line 3 of {tmp_path}/a/log.jsonl is torn and is left out" in said
    assert all(f"line {number} of" in said for number in (7, 8, 9)) and said.count("warning") == 4


def rows_of_layers(layers, best):
    """What tools.probe_layers finds, in its form."""
    found = []
    for label in ("shape", "texture"):
        common = dict(label=label, val_images=100, acc1_error=2.0)
        found += [common | dict(kind=kind, layer=layer, acc1=best - 5 * (kind == "random") - i)
                  for kind in ("trained", "random") for i, layer in enumerate(layers)]
        found += [common | dict(kind=kind, layer=kind, acc1=10.0) for kind in ("pixels", "chance")]
    return found


def test_probes_of_two_runs_share_a_panel_for_each_label(tmp_path):
    """An MAE run has no fused feature, and the baselines are those of the first run."""
    layers, config = ["block 0", "block 11", "fused"], dict(model="vit_test", global_batch=8)
    for name, rows in (("mff", rows_of_layers(layers, 40.0)), ("mae", rows_of_layers(layers[:2], 30.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(rows=rows, margins={}, config=config)))
    found = analyzed(tmp_path / "mff.json", tmp_path / "mae.json", "--output-dir", tmp_path / "out")["layers"]
    assert [panel["title"] for panel in found["panels"]] == ["label: shape", "label: texture"]
    for panel in found["panels"]:
        assert panel["ticks"] == ["0", "11", "fused"]
        points = {}
        for line in panel["series"]:
            points.setdefault(line["name"], []).extend(line.get("points", []))
        assert points["mff"] == [[0, 40], [1, 39], [2, 38]] and points["mae"] == [[0, 30], [1, 29]]
        assert points["random weights"] == [[0, 35], [1, 34], [2, 33]]
    assert found["note"] == "The baselines are of mff."
    found = analyzed(tmp_path / "mae.json", tmp_path / "mff.json", "--output-dir", tmp_path / "out")["layers"]
    assert found["panels"][0]["ticks"] == ["0", "11", "fused"]
    assert found["note"] == "The baselines are of mae."


def test_a_label_that_the_first_run_lacks_has_a_panel(tmp_path):
    """A run is in the panels of its own labels, with its own number of images in the title."""
    rows = rows_of_layers(["block 0", "block 11"], 40.0)
    theirs = [row | dict(label="class" if row["label"] == "texture" else "shape", val_images=50) for row in
              rows_of_layers(["block 0", "block 11"], 30.0)]
    for name, of_run in (("a", rows), ("b", theirs)):
        record = dict(rows=of_run, margins={}, config=dict(model="vit_test", global_batch=8))
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = analyzed(tmp_path / "a.json", tmp_path / "b.json", "--output-dir", tmp_path / "out")["layers"]
    assert {panel["title"]: [line["name"] for line in panel["series"]] for panel in found["panels"]} == {
        "label: shape": ["a", "b", "random weights", "pixels", "chance"],
        "label: texture": ["a", "random weights", "pixels", "chance"],
        "label: class": ["b", "random weights", "pixels", "chance"]}
    assert found["panels"][2]["series"][0]["points"] == [[0, 30], [1, 29]]
    assert found["panels"][2]["series"][1]["points"] == [[0, 25], [1, 24]]
    assert "accuracy on 50 or 100 validation images" in found["title"]
    assert found["note"] == "The baselines are of a for shape, a for texture, b for class."


def test_a_probe_without_baselines_is_drawn_without_them(tmp_path):
    rows = [row for row in rows_of_layers(["block 0"], 40.0) if row["kind"] in ("trained", "chance")]
    config = dict(model="vit_test", global_batch=8)
    (tmp_path / "a.json").write_text(json.dumps(dict(rows=rows, margins={}, config=config)))
    found = analyzed(tmp_path / "a.json", "--output-dir", tmp_path / "out")["layers"]
    assert [line["name"] for line in found["panels"][0]["series"]] == ["a", "chance"]


def test_a_record_draws_what_its_folder_draws(tmp_path):
    """--record keeps the log and the metrics, so that a figure of results/ needs no run."""
    make_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(dict(step=50, val_loss=0.3)))
    assert analyzed(tmp_path / "a", "--record", tmp_path / "a.json") == {}
    assert json.loads((tmp_path / "a.json").read_text())["val_loss"] == 0.3
    found = [analyzed(path, "--figures", "weights,curves", "--output-dir", tmp_path / "out")
             for path in (tmp_path / "a", tmp_path / "a.json")]
    assert [found[0][name]["panels"] for name in found[0]] == [found[1][name]["panels"] for name in found[1]]


def test_the_line_that_probe_layers_prints_draws_its_layers(pretrained, cache, tmp_path, capsys):
    flags = "--layers 0,11 --data shapes:100 --device cpu --batch-size 50 --checkpoint".split()
    flags += [str(pretrained), "--output-dir", str(tmp_path / "layers"), "--cache-dir", str(cache)]
    probe_layers.main(parse(probe_layers.Config, flags))
    words, = re.findall("^python -m tools.analyze (.*) draws it$", capsys.readouterr().out, re.M)
    found = analyzed(*shlex.split(words))["layers"]
    assert [panel["title"] for panel in found["panels"]] == ["label: shape", "label: texture"]
    probe_layers.main(parse(probe_layers.Config, flags), baselines=False)      # a part of a study
    assert "tools.analyze" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", [train_probe, train_finetune])
def test_curves_are_drawn_of_the_stages_that_begin_with_an_encoder(stage, pretrained, cache, tmp_path):
    flags = "--data shapes:100 --global-batch 16 --batch-size 16 --steps 2 --log-every 1 --lr 1 --device cpu"
    flags = [*flags.split(), "--checkpoint", str(pretrained), "--output-dir", str(tmp_path / "a"),
             "--cache-dir", str(cache)]
    stage.main(parse(stage.Config, flags))
    found = analyzed(tmp_path / "a")                                    # all that there is material for
    assert list(found) == ["curves"]
    assert [x for x, _ in found["curves"]["panels"][0]["series"][0]["points"]] == [16, 32]


@pytest.mark.parametrize("paths, names", [
    ("x/mff", "mff"), ("results/demo.json", "demo"), ("x/mff x/mae", "mff mae"),
    ("x/MAE/seed0/pretrain x/MFF_MAE/seed0/pretrain", "MAE MFF_MAE"),
    ("x/MAE/0/pretrain x/MAE/1/pretrain x/MFF/0/pretrain", "MAE/0 MAE/1 MFF/0"),
    ("x/a/b/last x/c/b/end x/b/last", "a/b/last c/b/end x/b/last"), ("a/x.json b/x.json", "a b"),
    ("/a /b/a", "/ b"), ("a b/../a", None), ("a a.json", None),
])
def test_names_are_as_many_parts_of_paths_as_tell_them_apart(paths, names):
    found = analyze.short_names(paths.split())
    assert found == names.split() if names else len(set(found)) == 1


# ---------------------------------------------------------------- what encoders do


def test_taps_are_those_of_the_model(pretrained):
    """Blocks as they are, the last one normed, and fused what the decoder receives when nothing is masked."""
    weights = read_pretrained(pretrained)
    encoder = build_encoder(weights)
    fusion, images = build_fusion(weights, encoder), torch.randn(5, 3, 16, 16)
    taps, distances = look_at(encoder, fusion, images, TORCH)
    with torch.no_grad():
        levels = encoder.forward_blocks(encoder.embed(images), range(12))
        assert all(torch.equal(taps[f"block {i}"], level) for i, level in enumerate(levels))
        assert torch.equal(taps["normed"], encoder.forward_features(images))
        model = MaskedAutoencoder(encoder, fusion.out_indices, PixelTarget(4), decoder_embed_dim=16,
                                  decoder_depth=1, decoder_num_heads=2)
        model.proj_layers, model.proj_weights = fusion.proj_layers, fusion.proj_weights
        latent = model.encode(images, torch.arange(16).expand(5, -1))   # every patch is kept
        torch.testing.assert_close(taps["fused"], latent, rtol=1e-5, atol=1e-6)
    assert list(taps) == [*(f"block {i}" for i in range(12)), "normed", "fused"]
    assert distances.shape == (12, 2) and (distances > 0).all() and (distances < 12 * 2 ** 0.5).all()


def test_a_run_alone_gives_all_that_it_has_material_for(pretrained, cache, capsys, tmp_path):
    flags = ["--images", 12, "--batch-size", 5, "--cache-dir", cache]
    found = analyzed(pretrained, *flags, "--output-dir", tmp_path)
    assert list(found) == ["weights", "curves", "spectrum", "cka", "attention"]
    said = capsys.readouterr().out
    assert f"layers: without {pretrained}, which lacks metrics.json of tools.probe_layers" in said
    blocks, last, highest = found["spectrum"]["panels"]
    assert len(blocks["series"]) == 12 and [x for x, _ in blocks["series"][0]["points"]] == [0, 0.5]
    assert [line["name"] for line in last["series"]] == ["last block", "last block, normed",
                                                         "fused blocks, normed"]
    assert all(line["points"][0] == [0, 0] for line in blocks["series"] + last["series"])
    ends = [[i, line["points"][-1][1]] for i, line in enumerate(blocks["series"])]
    assert highest["series"][0]["points"] == ends
    assert "highest frequency, 0.500 pi" in highest["title"] and "12 unmasked images" in found["cka"]["note"]
    values = np.array(found["cka"]["panels"][0]["values"])
    assert values.shape == (12, 12) and np.allclose(values.diagonal(), 1) and np.allclose(values, values.T)
    dots = found["attention"]["panels"][0]["series"][2]
    assert dots["name"] == "a head" and len(dots["points"]) == 24


def test_two_runs_are_compared_on_the_same_images(pretrained, mae, cache, tmp_path):
    flags = ["--figures", "spectrum,cka,attention", "--images", 13, "--cache-dir", cache, "--names",
             "MFF,MAE", "--output-dir", tmp_path]
    found = analyzed(pretrained, mae, *flags, "--batch-size", 13)
    assert [(panel["x_label"], panel["y_label"]) for panel in found["cka"]["panels"]] == [
        ("block of MFF", "block of MFF"), ("block of MFF", "block of MAE"), ("block of MAE", "block of MAE")]
    assert len(found["attention"]["panels"]) == 2
    assert [panel["title"] for panel in found["spectrum"]["panels"][:4]] == [
        "MFF: every block", "MFF: before and after fusion", "MAE: every block", "MAE: no fusion"]
    again = analyzed(pretrained, mae, *flags, "--batch-size", 5)        # of 13, the last 3 join a batch
    for figure in ("spectrum", "attention"):                            # do not depend on the minibatch
        for panel, other in zip(found[figure]["panels"], again[figure]["panels"], strict=True):
            for line, more in zip(panel["series"], other["series"], strict=True):
                np.testing.assert_allclose(line["points"], more["points"], rtol=0, atol=1e-4)
    assert "13 unmasked images" in again["spectrum"]["note"]
    assert "only differences between curves tell something" in again["spectrum"]["note"]
    alone = analyzed(pretrained, *flags[:-4], "--output-dir", tmp_path, "--batch-size", 13)
    for line, more in zip(found["spectrum"]["panels"][0]["series"], alone["spectrum"]["panels"][0]["series"],
                          strict=True):
        assert line["points"] == more["points"]


def test_images_that_cannot_be_read_are_left_out(pretrained, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{i}.png")
    flags = ["--figures", "spectrum", "--data", tmp_path / "images", "--output-dir", tmp_path / "out"]
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    found = analyzed(pretrained, *flags)
    said = capsys.readouterr().out
    assert "8 unmasked images" in found["spectrum"]["note"]
    assert f"1 images cannot be read and are left out, {tmp_path}/images/3.png for one" in said
    (tmp_path / "images" / "3.png").unlink()
    assert analyzed(pretrained, *flags)["spectrum"]["panels"] == found["spectrum"]["panels"]
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="3 images can be read: expected 4 or more"):
        analyzed(pretrained, *flags)


@pytest.mark.parametrize("names", ["MFF", "MFF,MAE"])
def test_a_record_of_encoders_draws_what_they_draw(pretrained, mae, tmp_path, monkeypatch, names):
    """--record with figures of encoders keeps all that these show, so that results/ needs no encoder."""
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{i}.png")
    runs = [pretrained, mae][:len(names.split(","))]
    flags = [*runs, "--figures", "spectrum,cka,attention", "--names", names, "--images", 8, "--batch-size", 4,
             "--data", tmp_path / "images"]
    monkeypatch.setattr(analyze, "command", lambda *_: "the command")
    analyzed(*flags, "--output-dir", tmp_path / "a")
    assert analyzed(*flags, "--record", tmp_path / "features.json", "--output-dir", tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(analyze, "measure", lambda *_: pytest.fail("the encoders were run"))
    assert list(analyzed(tmp_path / "features.json", "--output-dir", tmp_path / "b")) == [
        "spectrum", "cka", "attention"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert list(analyzed(tmp_path / "features.json", "--figures", "attention", "--output-dir",
                         tmp_path / "c")) == ["attention"]


def test_a_record_of_encoders_says_what_was_measured_and_no_path(pretrained, mae, cache, tmp_path):
    path = tmp_path / "features.json"
    analyzed(pretrained, mae, "--figures", "cka", "--images", 8, "--cache-dir", cache, "--record", path)
    record = json.loads(path.read_text())
    assert (record["data"], record["images"], record["batch_size"]) == ("shapes:100", 8, 64)
    assert [each["name"] for each in record["encoders"]] == [pretrained.name, mae.name]
    for each in record["encoders"]:
        assert (each["model"], each["grid"], each["patch_size"]) == ("vit_test", [4, 4], 4)
        assert np.shape(each["distances"]) == (12, 2) and np.shape(each["amplitudes"]["block 11"]) == (2,)
    assert [(pair["across"], pair["up"]) for pair in record["cka"]] == [
        (pretrained.name, pretrained.name), (pretrained.name, mae.name), (mae.name, mae.name)]
    values = np.array(record["cka"][1]["values"])
    assert values.shape == (12, 12) and np.array_equal(values, values.round(5))
    assert {"commit", "torch", "device", "threads"} <= set(record["environment"])
    assert "argv" not in record["environment"] and str(pretrained.parent) not in path.read_text()
    found = analyzed(path, "--output-dir", tmp_path / "out")
    assert {name: figure["command"] for name, figure in found.items()} == {
        name: f"python -m tools.analyze {path} --figures {name}" for name in ("spectrum", "cka", "attention")}


@pytest.mark.parametrize("data, name", [
    ("shapes:100", "shapes:100"), ("/a/images/", "images"), ("cifar10:/a/cifar", "cifar10:cifar"),
    ("x/../b", "b"), (".", Path.cwd().name),
])
def test_data_is_named_without_its_folders(data, name):
    assert analyze.name_of(data) == name


def test_oblong_images_are_measured(tmp_path, cache):
    folder = pretrain(tmp_path / "oblong", cache, "--img-size", "16x24")
    found = analyzed(folder, "--images", 8, "--cache-dir", cache)
    assert [x for x, _ in found["spectrum"]["panels"][0]["series"][0]["points"]] == [0, 0.5]
    rows, columns = np.mgrid[:4, :6].reshape(2, -1)
    want = 4 * np.hypot(rows[:, None] - rows, columns[:, None] - columns).mean()
    assert found["attention"]["panels"][0]["series"][0]["points"][0][1] == pytest.approx(want)


# ---------------------------------------------------------------- commands and committed figures


def test_the_command_in_a_figure_draws_it_again(pretrained, cache, tmp_path):
    """It names the runs in the figure alone: another has no encoder."""
    make_run(tmp_path / "other")
    shown = ["--images", 8, "--batch-size", 4, "--names", "other,my run"]
    written = analyzed(tmp_path / "other", pretrained, *shown, "--cache-dir", cache, "--output-dir",
                       tmp_path / "a")
    assert {name: "other" in found["command"] for name, found in written.items()} == dict(
        weights=True, curves=True, spectrum=False, cka=False, attention=False)
    assert {name: "--images" in found["command"] for name, found in written.items()} == dict(
        weights=False, curves=False, spectrum=True, cka=True, attention=True)
    for name, found in written.items():
        words = shlex.split(found["command"])
        flags = words[3:]
        assert words[:3] == ["python", "-m", "tools.analyze"]
        analyzed(*flags, "--cache-dir", cache, "--output-dir", tmp_path / "b")
        a, b = (json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in "ab")
        assert a == b, name


def test_committed_figures_have_the_numbers_that_results_give():
    """Each that a document shows is there as SVG and as numbers, beside pictures of runs and a drawing."""
    others = {"demo.png", "demo_dark.png", "segmentation.png", "detection.png", "mff.svg"}
    folder, figures = ROOT / "docs" / "figures", generated.figures()
    stale = "run `python tests/generated.py`, as `make figures` does"
    assert len(figures) >= 2 and {path.name for path in folder.iterdir()} == {
        *others, *(f"{name}.{kind}" for name in figures for kind in ("svg", "json"))}, stale
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    shown = {name for text in texts for name in re.findall(r"figures/([\w.-]+\.\w+)", text)}
    assert shown == {*others, *(f"{name}.svg" for name in figures)}
    for name, (figure, command) in figures.items():
        assert (folder / f"{name}.json").read_text() == numbers_of(figure, command), f"{name}: {stale}"
        svg = (folder / f"{name}.svg").read_text()
        assert escape(command) in svg and "prefers-color-scheme: dark" in svg, f"{name}: {stale}"


def test_every_record_of_encoders_in_results_is_drawn(tmp_path):
    for name in ("features_b_seed0.json", "features_a_seed0.json", "demo.json", "features_a_seed1.json"):
        (tmp_path / name).write_text("")
    assert [flags.split()[0] for flags in generated.of_encoders(tmp_path)] == [
        "results/features_a_seed0.json", "results/features_b_seed0.json"]
    assert generated.of_encoders(tmp_path)[0].endswith("--prefix features_a_")
    assert set(generated.of_encoders(ROOT / "results")) <= set(generated.FIGURES)


def test_without_matplotlib_nothing_is_begun(pretrained, capsys, monkeypatch, tmp_path):
    """A record needs none of it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(analyze, "measure", lambda *_: pytest.fail("the encoders were run"))
    refused(pretrained, "--output-dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert "pip install -e '.[figures]'" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
    assert analyzed(pretrained, "--record", tmp_path / "a.json") == {} and (tmp_path / "a.json").exists()


# ---------------------------------------------------------------- bad input


def record_of_two_blocks(**changes):
    """A record of one encoder of 4 x 4 patches with two blocks of one head."""
    features = dict(name="a", model="vit_test", grid=[4, 4], patch_size=4, distances=[[1.0], [2.0]],
                    amplitudes={tap: [0.0, -1.0] for tap in ("block 0", "block 1", "normed")})
    similarity = dict(across="a", up="a", values=[[1.0, 0.5], [0.5, 1.0]])
    encoder, pair = ({name: changes.pop(name, value) for name, value in part.items()}
                     for part in (features, similarity))
    return dict(data="x", images=8, batch_size=8, encoders=[encoder], cka=[pair]) | changes


@pytest.fixture(scope="module")
def bad(tmp_path_factory, pretrained):
    """A folder of runs that each lack something."""
    folder = tmp_path_factory.mktemp("bad")
    make_run(folder / "run")
    (folder / "norun").mkdir()
    make_run(folder / "nolog")
    (folder / "nolog" / "log.jsonl").unlink()
    make_run(folder / "json")
    (folder / "json" / "metrics.json").write_text('{"rows": [')
    make_run(folder / "list")
    (folder / "list" / "config.json").write_text("[1]")
    make_run(folder / "config")
    (folder / "config" / "config.json").write_text("{}")
    make_run(folder / "nomodel")
    (folder / "nomodel" / "config.json").write_text('{"global_batch": 8}')
    make_run(folder / "other")
    (folder / "text.json").write_text("{}")
    for name, value in (("log", [1, 2]), ("log-object", {"step": 1}), ("config", "model, global_batch")):
        record = dict(config=dict(model="vit_test", global_batch=8)) | {name.partition("-")[0]: value}
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "features.json").write_text(json.dumps(record_of_two_blocks()))
    shutil.copytree(pretrained, folder / "wide")
    make_run(folder / "model", model="vit_g")
    make_run(folder / "levels", out_indices="all")
    make_run(folder / "indices", out_indices="some")
    return folder


@pytest.mark.parametrize("flags, message", [
    ("BAD/nowhere", "BAD/nowhere is no folder of a run: it holds no config.json"),
    ("BAD/norun", "BAD/norun is no folder of a run: it holds no config.json"),
    ("BAD/text.json", "BAD/text.json is of no run: its config is no object"),
    ("BAD/config --figures curves", "--figures curves: BAD/config lacks global_batch in its config"),
    ("BAD/config --figures weights", "--figures weights: BAD/config lacks global_batch in its config"),
    ("BAD/nomodel --figures weights", "--figures weights: BAD/nomodel lacks model in its config"),
    ("BAD/log.json", "BAD/log.json is of no run: its log is no list of objects"),
    ("BAD/log-object.json", "BAD/log-object.json is of no run: its log is no list of objects"),
    ("BAD/config.json", "BAD/config.json is of no run: its config is no object"),
    ("BAD/model", "BAD/model is of a model vit_g: expected one of vit_test, vit_t"),
    ("BAD/levels", "BAD/levels: its log has other levels than the 12 of its --out-indices"),
    ("BAD/indices", "BAD/indices: --out-indices some: expected spread, last, all"),
    ("BAD/run --output-dir BAD/text.json/x", "--output-dir BAD/text.json/x cannot be written"),
    ("BAD/list", "config.json holds a list: expected an object"),
    ("BAD/json", "BAD/json/metrics.json cannot be read: Expecting value"),
    ("BAD/nolog", "no figure can be drawn of what is there"),
    ("BAD/run BAD/nolog --figures weights", "--figures weights: BAD/nolog lacks fusion_weights in log.jsonl"),
    ("BAD/nolog --figures curves", "--figures curves: BAD/nolog lacks log.jsonl with a line of training"),
    ("BAD/run --figures curves,layers", "--figures layers: BAD/run lacks metrics.json of tools.probe_layers"),
    ("BAD/run --figures cka", "--figures cka: BAD/run lacks last.pt or encoder.pt of train_pretrain.py"),
    ("BAD/run --figures weight", "--figures weight: expected some of weights, curves, layers, spectrum"),
    ("BAD/run BAD/other --names a", "--names a: expected 2 names that differ, one a run"),
    ("BAD/run BAD/other --names a,a", "--names a,a: expected 2 names that differ, one a run"),
    ("BAD/run BAD/run", "two of BAD/run BAD/run would have one name: expected different runs, or --names"),
    ("BAD/run BAD/list/../run", "would have one name: expected different runs, or --names"),
    ("BAD/run BAD/other --record BAD/x.json", "expected one run, and a name that ends in .json"),
    ("BAD/run --record BAD/x.txt", "expected one run, and a name that ends in .json"),
    ("BAD/run --record BAD/none/x.json", "BAD/none/x.json cannot be written"),
    ("BAD/wide --figures cka --record BAD/none/x.json", "x.json cannot be written: BAD/none is no folder"),
    ("BAD/run BAD/other --figures weights --record BAD/x.json", "of several runs, --figures of spectrum"),
    ("BAD/wide --figures cka,weights --record BAD/x.json", "--figures of spectrum, cka, attention alone"),
    ("BAD/run --figures cka --record BAD/x.json", "--figures cka: BAD/run lacks last.pt or encoder.pt"),
    ("BAD/features.json BAD/run", "features.json is a record of encoders: expected no other run, no --names"),
    ("BAD/features.json --names b", "BAD/features.json is a record of encoders: expected no other run"),
    ("BAD/features.json --record BAD/x.json", "features.json is a record of encoders: expected no other run"),
    ("BAD/features.json --figures curves", "--figures curves: BAD/features.json lacks log.jsonl"),
    ("BAD/run --images 3", "--images 3: expected 4 or more"),
    ("BAD/wide --figures spectrum --device tpu", "--device tpu: expected auto, cpu"),
    ("BAD/wide --figures spectrum --data /nowhere", "data folder /nowhere does not exist"),
    (f"/tmp/{'n' * 300}", "nnn cannot be read: File name too long"),
])
def test_bad_input_is_one_line_before_anything_is_drawn(bad, capsys, flags, message):
    refused(*flags.replace("BAD", str(bad)).split())
    captured = capsys.readouterr()
    assert message.replace("BAD", str(bad)) in captured.err and captured.err.count("\n") == 1
    assert not list(bad.glob("**/figures"))


@pytest.mark.parametrize("change", [
    dict(encoders=[]), dict(encoders="a"), dict(encoders=[1]), dict(encoders=[{}]), dict(grid=[4]),
    dict(grid=4), dict(grid=[8, 8]), dict(distances=[]), dict(distances=[1.0, 2.0]),
    dict(distances=[[1.0], [1.0, 2.0]]), dict(distances=[[1.0]] * 3), dict(distances=[["far"], ["near"]]),
    dict(amplitudes=[]), dict(amplitudes={"block 0": [0.0, 1.0], "block 1": [0.0, 1.0]}),
    dict(patch_size=None), dict(up="b"),
    dict(values=[[1.0, 0.5]]), dict(values=[[1.0, float("nan")]] * 2), dict(cka=[1]), dict(cka=None),
], ids=str)
def test_a_record_of_encoders_that_is_not_whole_is_refused(tmp_path, capsys, change):
    path, flags = tmp_path / "features.json", ["--output-dir", tmp_path / "out"]
    path.write_text(json.dumps(record_of_two_blocks(**change)))
    refused(path, *flags)
    assert capsys.readouterr().err == f"error: {path} is no whole record of encoders\n"
    path.write_text(json.dumps(record_of_two_blocks()))
    assert len(analyzed(path, *flags, "--figures", "cka")) == 1


@pytest.mark.parametrize("flags, message", [
    ("--output-dir /proc/self", "--output-dir /proc/self cannot be written: "),     # not even by root
    ("--record /proc/self/x.json", "--record /proc/self cannot be written: "),
])
def test_a_folder_that_cannot_be_written_is_refused_before_encoders_are_run(pretrained, cache, capsys,
                                                                            monkeypatch, flags, message):
    monkeypatch.setattr(analyze, "examine", lambda *_: pytest.fail("the encoders were run"))
    refused(pretrained, "--figures", "spectrum", "--cache-dir", cache, *flags.split())
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_models_of_different_sizes_are_not_compared_by_cka(pretrained, tmp_path, cache, capsys):
    other = pretrain(tmp_path / "other", cache, "--img-size", "32")
    common = [pretrained, other, "--images", 8, "--cache-dir", cache, "--output-dir", tmp_path / "out"]
    refused(*common, "--figures", "attention,cka")
    said = capsys.readouterr().err
    assert "--figures cka needs runs of one size: " in said and said.count("\n") == 1
    assert "4 x 4 patches of 4" in said and "8 x 8 patches of 4" in said
    assert not (tmp_path / "out").exists()
    assert "cka" not in analyzed(*common)                               # the others are drawn
    assert "cka: left out, it needs runs of one size" in capsys.readouterr().out
    path = tmp_path / "features.json"
    refused(*common, "--figures", "cka", "--record", path)
    assert analyzed(*common, "--figures", "spectrum,cka,attention", "--record", path) == {}
    assert "cka: left out, it needs runs of one size" in capsys.readouterr().out
    assert list(analyzed(path, "--output-dir", tmp_path / "out")) == ["spectrum", "attention"]
    assert f"cka: without {path}, which lacks cka: it was recorded without" in capsys.readouterr().out


def test_the_script_runs_from_the_shell(tmp_path):
    make_run(tmp_path / "a")
    said = subprocess.run([sys.executable, "-m", "tools.analyze", tmp_path / "a"], cwd=ROOT, text=True,
                          capture_output=True)
    assert said.returncode == 0 and f"{tmp_path}/a/figures/weights.png, .svg, .json" in said.stdout
    assert "spectrum: without" in said.stdout and said.stderr == ""
    assert {path.name for path in (tmp_path / "a" / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("weights", "curves") for suffix in ("png", "svg", "json")}
