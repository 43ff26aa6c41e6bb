"""Detection: that it learns, what it leaves, several ranks, bad input. See also test_run, tests/tasks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import state_of, torchrun
from sources import ROOT

import tools.evaluate
import train_detect
import train_pretrain
from mff_data.scenes import polygon_of, render_scenes
from mff_data.shapes import SHAPES
from mff_min.config import parse
from mff_min.kernels.ops import TORCH
from mff_min.optim import make_schedule, param_groups
from mff_run.log import read_log
from mff_run.process import run
from mff_weights.pretrained import read_pretrained

SMALL = ("--data shapes:40 --img-size 16 --window 2 --width 8 --proposals 32 --regions 16 --global-batch 8 "
         "--batch-size 4 --log-every 1 --lr 1e-3 --steps 4 --picture-images 2 --picture-every 99 "
         "--device cpu").split()
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}


@pytest.fixture
def detect(tmp_path, cache, pretrained):
    """detect(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
        flags = ["--checkpoint", str(pretrained), *SMALL, *folders, *flags]
        return train_detect.main(parse(train_detect.Config, flags))
    return call


def measure(tmp_path, cache, *flags, folder="a"):
    """The metrics of tools.evaluate of the run in this folder."""
    flags = ["--checkpoint", str(tmp_path / folder), "--output-dir", str(tmp_path / "measured"),
             "--cache-dir", str(cache), *"--data shapes:40 --device cpu".split(), *flags]
    return tools.evaluate.main(parse(tools.evaluate.Config, flags))


# ---------------------------------------------------------------- the run


def test_a_run_evaluates_draws_and_leaves_a_detector_that_is_measured_alike(detect, tmp_path, cache, capsys):
    metrics = detect("--eval-every", "2")
    log = read_log(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4] and log[-1]["done"]
    assert {"box_AP", "mask_AP", "val_images"} < set(log[2])
    assert {"loss", "lr", "grad_norm", *LOSSES} < set(log[0])
    assert log[0]["loss"] == pytest.approx(sum(log[0][name] for name in LOSSES), rel=1e-5)
    assert metrics["val_images"] == 8
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["box_AP"] == metrics["box_AP"] and "done: box AP" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "detection.png") as sheet:
        assert sheet.width > 2 * 16 and sheet.height > 2 * 16
    kept = torch.load(tmp_path / "a" / "detector.pt", weights_only=True)
    assert kept["classes"] == list(SHAPES) and len(kept["category_ids"]) == len(SHAPES)
    again = measure(tmp_path, cache)
    assert {name: again[name] for name in again if name.startswith(("box_", "mask_"))} == \
        {name: metrics[name] for name in metrics if name.startswith(("box_", "mask_"))}


def test_warm_up_is_a_twentieth_of_a_short_run(detect, tmp_path):
    detect("--steps", "40", "--data", "shapes:8", "--global-batch", "1", "--batch-size", "1")
    rates = [line["lr"] for line in read_log(tmp_path / "a" / "log.jsonl") if "lr" in line]
    assert len(rates) == 40 and rates[:2] == pytest.approx([rates[2] / 1000, rates[2] * 0.5005])
    assert rates[2:36] == pytest.approx([rates[2]] * 34) and rates[36] == pytest.approx(rates[2] / 10)


def scenes(folder, count):
    """A coco: tree of the first embedded scenes, the same for training and validation."""
    drawn, annotations = render_scenes("train", range(count)), []
    for i, row in enumerate(drawn["objects"]):
        for one in row[row[:, 0] >= 0]:
            corners = polygon_of(one)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=i, category_id=int(one[0]) + 1, iscrowd=0,
                bbox=[*corners.min(axis=0).tolist(), *np.ptp(corners, axis=0).tolist()],
                area=float((drawn["labels"][i] == one[0] + 1).sum()),
                segmentation=[corners.ravel().tolist()]))
    images = [dict(id=i, file_name=f"{i}.png", height=64, width=64) for i in range(count)]
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(SHAPES)]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
        (folder / split).mkdir()
        for i, image in enumerate(drawn["images"]):
            Image.fromarray(image).save(folder / split / f"{i}.png")


@pytest.mark.slow
def test_eight_scenes_are_learned_to_an_ap50_of_20_in_a_hundred_steps_and_to_an_ap_of_30(detect, tmp_path):
    scenes(tmp_path / "data", 8)
    metrics = detect("--data", f"coco:{tmp_path / 'data'}",
                     *"--img-size 64 --window 8 --width 32 --proposals 200 --regions 64 --scale 1,1 "
                      "--lr 2e-3 --layer-decay 1 --drop-path 0 --clip-grad 1 --warmup-steps 10 "
                      "--batch-size 8 --global-batch 8 --steps 250 --eval-every 100 --log-every 10".split())
    after, = (line for line in read_log(tmp_path / "a" / "log.jsonl")
              if line["step"] == 100 and "box_AP50" in line)
    assert after["box_AP50"] > 20
    assert metrics["box_AP"] > 30 and metrics["mask_AP"] > 15


# ---------------------------------------------------------------- the optimizer


def test_layer_decay_makes_fourteen_groups_of_twelve_blocks(pretrained):
    cfg = parse(train_detect.Config, ["--checkpoint", str(pretrained), "--width", "8", "--img-size", "16"])
    model = train_detect.build_model(cfg, read_pretrained(pretrained), 10, TORCH, lambda text: None)
    groups = param_groups(model, 0.1, 0.7, 12, undecayed=("encoder.pos_embed",))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert len({*scales.values()}) == 14 and set(scales) == dict(model.named_parameters()).keys()
    assert scales["encoder.pos_embed"] == pytest.approx(0.7 ** 13) and decays["encoder.pos_embed"] == 0
    assert scales["encoder.blocks.11.attn.rel_pos_h"] == pytest.approx(0.7)
    assert decays["encoder.blocks.11.attn.rel_pos_h"] == 0.1
    assert all(scale == 1 for name, scale in scales.items() if not name.startswith("encoder."))


def test_the_published_schedule_has_46094_steps_of_64_images():
    cfg = train_detect.Config()
    schedule = make_schedule(118_000, cfg.global_batch, 64, cfg.schedule, None, 0, None, cfg.lr, None)
    assert schedule.stop == 46_094
    assert [train_detect.step_lr(step, 1.0, 46_094, 250) for step in (40_972, 44_386, 44_387)] == \
        pytest.approx([0.1, 0.1, 0.01])


# ---------------------------------------------------------------- several ranks


def test_two_sharded_ranks_train_as_one_process_and_evaluate_as_one(detect, tmp_path, cache, pretrained):
    alone = detect()
    words = ["--checkpoint", str(pretrained), *SMALL, "--cache-dir", str(cache)]
    torchrun(2, "train_detect.py", *words, "--fsdp", "--output-dir", str(tmp_path / "two"))
    one, two = (state_of(tmp_path / name)["model"] for name in ("a", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3)
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["val_images"] == alone["val_images"] == 8
    again = measure(tmp_path, cache, folder="two")                         # by one process
    assert again["box_AR100"] > 0
    assert {name: again[name] for name in again if name.startswith(("box_", "mask_"))} == \
        {name: together[name] for name in together if name.startswith(("box_", "mask_"))}


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
    ("--schedule 0", "--schedule 0.0: expected more than 0"),
    ("--window 0", "--window 0: expected more than 0"),
    ("--drop-path 1", "--drop-path 1: expected 0.99 or less"),
    ("--fsdp", "--fsdp spreads the parameters over processes, and this is the only one"),
    ("--fused --checkpoint MAE", "--fused: checkpoint MAE/last.pt holds no fusion; expected one that was "),
    ("--data imagenet", "--data imagenet"),
    ("--data coco:/nowhere", "/nowhere"),
    ("--num-classes 7", "--num-classes 7"),
    ("--img-size 4", "cannot be halved"),
    ("--warmup-steps 4", "--warmup-steps 4: expected fewer than the run's 4 steps"),
])
def test_bad_input_gets_one_line_and_exit_code_2(pretrained, mae, tmp_path, cache, capfd, monkeypatch, flags,
                                                 message):
    monkeypatch.chdir(ROOT)
    flags = ["--checkpoint", str(pretrained), *SMALL, "--output-dir", str(tmp_path / "a"), "--cache-dir",
             str(cache), *flags.replace("MAE", str(mae)).split()]
    with pytest.raises(SystemExit) as stop:
        run(train_detect.main, parse(train_detect.Config, flags))
    error, = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and message.replace("MAE", str(mae)) in error
    assert not (tmp_path / "a").exists()


def test_the_fused_feature_may_make_the_pyramid(detect, tmp_path, cache):
    metrics = detect("--fused")
    assert {"fusion.proj_weights", "fusion.proj_layers.0.weight"} <= state_of(tmp_path / "a")["model"].keys()
    assert torch.load(tmp_path / "a" / "detector.pt", weights_only=True)["config"]["fused"]
    assert measure(tmp_path, cache)["box_AP"] == metrics["box_AP"]
