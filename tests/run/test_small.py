"""Small by default where the model is small, and on request: which settings, and that a flag wins."""

import json
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from run_folders import state_of
from sources import ROOT

import train_detect
import train_finetune
import train_pretrain
import train_probe
import train_segment
from mff_min.config import check_batches, check_ranges, parse
from mff_min.errors import UserError
from mff_min.optim import make_schedule
from mff_min.vit import MODELS
from mff_run import small
from mff_run.resume import already_a_run, check_same_settings
from tools import study

STAGES = [train_pretrain, train_probe, train_finetune, train_segment, train_detect]
LARGE = ["vit_s", "vit_b", "vit_l", "vit_h"]


def config(*words, stage=train_pretrain):
    return parse(stage.Config, " ".join(words).split())


@pytest.mark.parametrize("model", LARGE)
def test_larger_models_keep_the_settings_of_the_paper(model):
    assert config("--model", model) == train_pretrain.Config(model=model)
    assert config("--model", model, "--no-small") == train_pretrain.Config(model=model)


@pytest.mark.parametrize("stage, batch", [(train_probe, 64), (train_finetune, 64), (train_segment, 32),
                                          (train_detect, 16)])
def test_the_other_stages_keep_the_settings_of_the_paper_until_they_are_asked(stage, batch):
    assert config(stage=stage) == stage.Config()
    asked = config("--small", stage=stage)
    assert asked.small and asked.global_batch == asked.batch_size == batch


def test_small_models_are_small_by_default():
    for model in ("vit_test", "vit_t"):
        given = config("--model", model)
        assert given == config("--model", model, "--small") and given.small
        assert config("--model", model, "--no-small") == train_pretrain.Config(model=model)
    assert set(small.PRETRAIN) == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_small_decoder_image_and_batch(model):
    cfg = config("--model", model, "--small")
    with torch.device("meta"):
        built = train_pretrain.build_model(cfg, torch.device("meta"))
    assert built.encoder.num_patches <= 144 and len(built.decoder_blocks) <= 3
    assert built.decoder_embed.out_features < built.encoder.embed_dim or model == "vit_test"
    assert cfg.global_batch <= 64 and cfg.epochs == 100


def test_300_images_of_ones_own_are_a_thousand_steps_and_not_days():
    cfg = config("--model vit_test")
    schedule = make_schedule(300, cfg.global_batch, cfg.batch_size, cfg.epochs, cfg.steps, cfg.warmup_epochs,
                             cfg.blr, cfg.lr, published=(800, 40))
    assert schedule.stop == 938 and schedule.accumulation == 1 and schedule.lr == 3e-3


@pytest.mark.parametrize("flags, want", [
    ("--img-size 64x32", dict(img_size=(64, 32))),
    ("--decoder-depth 8 --decoder-embed-dim 512 --decoder-num-heads 16",
     dict(decoder_depth=8, decoder_embed_dim=512, decoder_num_heads=16)),
    ("--lr 1e-4", dict(lr=1e-4)),
    ("--blr 1e-4", dict(blr=1e-4, lr=None)),
    ("--epochs 800", dict(epochs=800)),
    ("--steps 10", dict(steps=10, epochs=None)),
    ("--global-batch 4096", dict(global_batch=4096, batch_size=32)),
    ("--global-batch 4096 --batch-size 64", dict(global_batch=4096, batch_size=64)),
    ("--global-batch 20", dict(global_batch=20, batch_size=20)),
    ("--global-batch 36", dict(global_batch=36, batch_size=18)),
    ("--batch-size 8", dict(batch_size=8, global_batch=32)),
    ("--batch-size 64", dict(batch_size=64, global_batch=64)),
])
def test_a_flag_that_is_given_wins(flags, want):
    assert config("--model vit_test", flags) == replace(config("--model vit_test"), **want)


@pytest.mark.parametrize("flags, schedule, steps", [
    ("", 25, 600), ("--schedule 2", 2, None), ("--steps 9", 25, 9), ("--schedule 2 --steps 9", 2, 9)])
def test_a_schedule_in_epochs_wins_over_the_small_number_of_steps(flags, schedule, steps):
    cfg = config("--small", flags, stage=train_detect)
    assert (cfg.schedule, cfg.steps) == (schedule, steps)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 100])
@pytest.mark.parametrize("flags", ["", "--batch-size 6"])
def test_any_number_of_processes_has_a_batch_that_fits(monkeypatch, stage, ranks, flags):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cfg = config("--small", flags, stage=stage)
    check_ranges(cfg)
    check_batches(cfg.global_batch, cfg.batch_size, ranks)
    assert cfg.batch_size % 2 == 0 and cfg.global_batch <= max(64, cfg.batch_size * ranks)


@pytest.mark.parametrize("flags", ["--batch-size 0", "--global-batch 0", "--global-batch -4"])
def test_batches_that_cannot_be_are_left_to_the_check(flags):
    config("--small", flags)


def chosen(said):
    """The flags that a run says it has chosen."""
    return re.search(r"^for a small machine: (.*) \(--no-small: the paper's settings\)$", said, re.M)[1]


def test_what_was_chosen_is_said_as_flags_and_kept_with_the_run(tmp_path, cache, capsys):
    tuning = small.taken(config("--small", stage=train_finetune), small.FINETUNE)
    assert tuning == "--global-batch 64 --lr 0.001 --batch-size 64"
    assert small.taken(config("--model vit_t"), small.of_model("vit_t")).endswith(
        "--lr 0.001 --epochs 100 --batch-size 64")
    common = ["--data shapes:40 --device cpu --picture-images 1 --steps 1 --decoder-depth 1 --lr 1e-3",
              f"--output-dir {tmp_path} --cache-dir {cache}"]
    train_pretrain.main(config("--model vit_test", *common))
    flags = chosen(capsys.readouterr().out)
    assert flags == ("--img-size 48x48 --decoder-embed-dim 64 --decoder-num-heads 2 --global-batch 32 "
                     "--batch-size 32")
    again = config("--model vit_test --no-small", flags, *common)
    assert again == replace(config("--model vit_test", *common), small=False)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["decoder_embed_dim"] == 64 and saved["img_size"] == [48, 48] and saved["small"]
    # A run of old has no such setting, and goes on all the same.
    state = state_of(tmp_path)
    del state["config"]["small"]
    torch.save(state, tmp_path / "last.pt")
    train_pretrain.main(config("--model vit_test --resume auto", *common))


def test_the_command_to_try_is_the_one_that_was_typed_on_the_same_device(monkeypatch):
    monkeypatch.setattr("sys.argv", ["../my repo/train_pretrain.py"])
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": types.SimpleNamespace(__spec__=None)})
    for stage, flags in ((train_pretrain, "--model vit_l"), (train_finetune, ""),
                         (train_segment, "--reduce-zero-label --num-classes 3")):
        command = small.instead(config(flags, "--device cpu", stage=stage), 1.0)
        assert command.startswith("python '../my repo/train_pretrain.py' --") and " --device cpu " in command
    assert " --num-classes 3 --reduce-zero-label --steps " in command


def test_a_warning_of_few_images_names_small_where_it_lowers_the_batch():
    few = make_schedule(50, 1024, 64, 10, None, None, 1e-3, None, published=(100, 5)).plan(0)
    assert few.endswith("; --small or --global-batch lowers it")
    few = make_schedule(50, 64, 64, 10, None, None, 1e-3, None, published=(100, 5)).plan(0)
    assert few.endswith("; --global-batch lowers it")


@pytest.mark.parametrize("before, now, flag", [
    ("--model vit_s --small", "--model vit_s", "--small"),
    ("--model vit_test --no-small", "--model vit_test", "--no-small"),
])
def test_a_run_of_the_other_settings_names_the_flag_to_add(tmp_path, before, now, flag):
    saved = vars(config(before))
    if not saved["small"]:
        del saved["small"]                                              # as a run of old
    (tmp_path / "config.json").write_text(json.dumps(saved))
    cfg = config(now, f"--output-dir {tmp_path}")
    hint = re.escape(f"(the run began with {flag}: add it)")
    with pytest.raises(UserError, match=f"give the same flags again {hint}, or --allow-change"):
        check_same_settings(cfg, saved)
    assert re.search(f"add --resume auto to go on with it {hint}, or name another", already_a_run(cfg))
    check_same_settings(config(now, flag), saved)
    assert "began" not in already_a_run(config(now, flag, f"--output-dir {tmp_path}"))


@pytest.mark.parametrize("preset", study.PRESETS)
def test_the_studies_give_all_that_a_small_machine_would_change(preset):
    for stage, flags in study.PRESETS[preset].items():
        if stage in ("pretrain", "linear", "finetune"):
            cfg = config(flags, stage=study.MODULES[stage])
            assert cfg == replace(config(flags, "--no-small", stage=study.MODULES[stage]), small=cfg.small)


def test_the_demo_of_the_makefile_is_the_one_that_was_recorded():
    flags = re.search(r"^SMALL = (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    recorded = json.loads((ROOT / "results" / "demo.json").read_text())["config"]
    cfg = config(flags, "--steps 450 --picture-images 5 --output-dir runs/demo")
    assert len(flags.split()) == 2
    known = recorded.keys() & vars(cfg).keys()                          # a flag may have gone since
    assert json.loads(json.dumps({name: getattr(cfg, name) for name in known})) == {
        name: recorded[name] for name in known} and len(known) > 30
