"""Segmentation: that it learns, what it leaves, several ranks, bad input. See also test_run, tests/tasks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import state_of, torchrun
from sources import ROOT

import tools.evaluate
import train_pretrain
import train_segment
from mff_data.shapes import SHAPES, render
from mff_min.config import parse
from mff_min.kernels.ops import TORCH
from mff_min.optim import param_groups
from mff_run.log import read_log
from mff_run.process import run
from mff_weights.pretrained import read_pretrained

SMALL = ("--data shapes:40 --img-size 16 --width 8 --global-batch 8 --batch-size 4 --log-every 1 --lr 1e-3 "
         "--steps 4 --picture-images 2 --picture-every 99 --device cpu").split()


@pytest.fixture
def segment(tmp_path, cache, pretrained):
    """segment(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
        flags = ["--checkpoint", str(pretrained), *SMALL, *folders, *flags]
        return train_segment.main(parse(train_segment.Config, flags))
    return call


def measure(tmp_path, cache, *flags):
    """The metrics of tools.evaluate of the run in the folder a."""
    flags = ["--checkpoint", str(tmp_path / "a"), "--output-dir", str(tmp_path / "measured"), "--cache-dir",
             str(cache), *"--data shapes:40 --device cpu".split(), *flags]
    return tools.evaluate.main(parse(tools.evaluate.Config, flags))


# ---------------------------------------------------------------- the run


def test_a_run_evaluates_draws_and_leaves_a_segmenter_that_is_measured_alike(segment, tmp_path, cache,
                                                                             capsys):
    metrics = segment("--eval-every", "2")
    log = read_log(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4] and log[-1]["done"]
    assert {"mIoU", "val_images"} < set(log[2]) and {"loss", "lr", "grad_norm"} < set(log[0])
    assert metrics["val_images"] == 8 and 0 <= metrics["mIoU"] <= 100
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["mIoU"] == metrics["mIoU"] and list(found["iou"]) == ["background", *SHAPES]
    assert "done: mIoU" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "segmentation.png") as sheet:
        assert sheet.width > 3 * 16 and sheet.height > 2 * 16
    assert measure(tmp_path, cache)["mIoU"] == metrics["mIoU"]


def test_warm_up_is_a_twentieth_of_a_short_run(segment, tmp_path):
    segment("--steps", "40", "--data", "shapes:8", "--global-batch", "2", "--batch-size", "2")
    rates = [line["lr"] for line in read_log(tmp_path / "a" / "log.jsonl") if "lr" in line]
    assert len(rates) == 40 and rates[0] < 2e-9 and rates[1] == pytest.approx(1e-3 / 2 * 39 / 40, rel=1e-5)
    assert rates[2:] == pytest.approx([1e-3 * (1 - step / 40) for step in range(2, 40)])


def coloured(folder, counts):
    """A masks: tree of images of 32 pixels, of shapes that have the colour of their class, one of three."""
    for split, count in counts.items():
        drawn = render("train" if split == "training" else "val", range(count), size=64)
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            label, (x0, y0, x1, y1) = 1 + drawn["shape"][i] % 3, drawn["box"][i] + (-4, -4, 4, 4)
            image, mask = drawn["images"][i] // 2, drawn["mask"][i] * np.uint8(label)
            image[..., label - 1] += np.uint8(120) * drawn["mask"][i]   # (64, 64, 3)
            for kind, pixels in ("images", image), ("annotations", mask):
                cut = Image.fromarray(pixels[max(y0, 0):y1, max(x0, 0):x1])
                cut.resize((32, 32), Image.Resampling.NEAREST).save(folder / kind / split / f"{i}.png")


def test_forty_steps_reach_a_mean_iou_of_45_and_two_and_a_half_times_the_start(segment, tmp_path):
    coloured(tmp_path / "data", dict(training=96, validation=16))
    flags = ("--img-size 32 --width 24 --global-batch 8 --batch-size 8 --no-rel-pos --warmup-steps 0 "
             f"--drop-path 0 --layer-decay 0.8 --data masks:{tmp_path / 'data'}").split()
    start = segment(*flags, "--steps", "1", "--lr", "1e-9", to="start")["mIoU"]
    reached = segment(*flags, "--steps", "40", "--lr", "1e-2")["mIoU"]
    assert reached > 45 and reached > 2.5 * start


# ---------------------------------------------------------------- the optimizer


def test_layer_decay_makes_fourteen_groups_of_twelve_blocks(pretrained):
    cfg = parse(train_segment.Config, ["--checkpoint", str(pretrained), "--width", "8", "--img-size", "16"])
    model = train_segment.build_model(cfg, read_pretrained(pretrained), 11, TORCH, lambda text: None)
    groups = param_groups(model, 0.05, 0.65, 12)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert len({*scales.values()}) == 14 and set(scales) == dict(model.named_parameters()).keys()
    assert scales["encoder.pos_embed"] == pytest.approx(0.65 ** 13)
    assert scales["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.65 ** 12)
    assert scales["encoder.blocks.11.attn.relative_position_bias_table"] == pytest.approx(0.65)
    assert all(scale == 1 for name, scale in scales.items() if not name.startswith("encoder."))


# ---------------------------------------------------------------- several ranks


def test_two_sharded_ranks_train_as_one_process(segment, tmp_path, cache, pretrained):
    segment()
    words = ["--checkpoint", str(pretrained), *SMALL, "--cache-dir", str(cache)]
    said = torchrun(2, "train_segment.py", *words, "--fsdp", "--output-dir", str(tmp_path / "two"))
    assert "done: mIoU" in said
    one, two = (state_of(tmp_path / name)["model"] for name in ("a", "two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {name for name in one if "running_" in name or "num_batches" in name}:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two" / "segmenter.pt").exists()


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def mae(tmp_path_factory, cache):
    """The folder of a pre-training run without a fusion."""
    folder = tmp_path_factory.mktemp("mae")
    flags = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
             "--data shapes:40 --global-batch 8 --batch-size 8 --steps 1 --out-indices last --device cpu")
    flags = [*flags.split(), "--output-dir", str(folder), "--cache-dir", str(cache)]
    train_pretrain.main(parse(train_pretrain.Config, flags))
    return folder


@pytest.mark.parametrize("flags, message", [
    ("--steps 0", "--steps 0: expected more than 0"),
    ("--batch-size 1", "--batch-size 1: BatchNorm needs two crops or more"),
    ("--drop-path 1", "--drop-path 1: expected 0.99 or less"),
    ("--fsdp", "--fsdp spreads the parameters over processes, and this is the only one"),
    ("--fused --checkpoint MAE", "--fused: checkpoint MAE/last.pt holds no fusion; expected one that was "),
    ("--data imagenet", "--data imagenet"),
    ("--data ade20k:/nowhere", "/nowhere"),
    ("--warmup-steps 4", "--warmup-steps 4: expected fewer than --steps 4"),
])
def test_bad_input_gets_one_line_and_exit_code_2(pretrained, mae, tmp_path, cache, capfd, monkeypatch, flags,
                                                 message):
    monkeypatch.chdir(ROOT)
    flags = ["--checkpoint", str(pretrained), *SMALL, "--output-dir", str(tmp_path / "a"), "--cache-dir",
             str(cache), *flags.replace("MAE", str(mae)).split()]
    with pytest.raises(SystemExit) as stop:
        run(train_segment.main, parse(train_segment.Config, flags))
    error, = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and message.replace("MAE", str(mae)) in error
    assert not (tmp_path / "a").exists()


def test_a_segmenter_of_other_fused_levels_is_built_again(segment, tmp_path, cache):
    flags = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
             "--data shapes:40 --global-batch 8 --batch-size 8 --steps 1 --out-indices 5,11 --device cpu")
    flags = [*flags.split(), "--output-dir", str(tmp_path / "two"), "--cache-dir", str(cache)]
    train_pretrain.main(parse(train_pretrain.Config, flags))
    metrics = segment("--checkpoint", str(tmp_path / "two"), "--fused")
    assert measure(tmp_path, cache)["mIoU"] == metrics["mIoU"]


def test_the_fused_feature_may_take_the_place_of_the_last_level(segment, tmp_path):
    segment("--fused")
    assert {"fusion.proj_weights", "fusion.proj_layers.0.weight"} <= state_of(tmp_path / "a")["model"].keys()
    assert torch.load(tmp_path / "a" / "segmenter.pt", weights_only=True)["config"]["fused"]
