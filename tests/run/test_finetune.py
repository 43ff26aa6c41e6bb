"""Fine-tuning: what is loaded and what is new, averages, measuring, and bad input. See also test_run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import state_of
from sources import ROOT

import tools.evaluate
import train_finetune
from mff_data.sources import open_data
from mff_data.views import Views, collate
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD, draw_mix, mix_arguments, rand_augment
from mff_min.config import parse
from mff_min.errors import Fault, UserError
from mff_min.kernels.ops import TORCH
from mff_min.rng import MIX, Rng
from mff_min.stream import Stream
from mff_min.vit import resize_pos_embed
from mff_run.log import read_log
from mff_run.process import run
from mff_weights.pretrained import build_vit, load_classifier, load_for_tuning, read_pretrained

SMALL = ("--data shapes:100 --global-batch 16 --batch-size 8 --log-every 1 --save-every 3 --lr 1e-3 "
         "--steps 4 --device cpu").split()


@pytest.fixture
def finetune(tmp_path, cache, pretrained):
    """finetune(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
        flags = ["--checkpoint", str(pretrained), *SMALL, *folders, *flags]
        return train_finetune.main(parse(train_finetune.Config, flags))
    return call


@pytest.fixture
def evaluate(tmp_path, cache):
    """evaluate(*flags, to="b") measures the classifier in the folder a; returns the metrics."""
    def call(*flags, to="b"):
        flags = ["--checkpoint", str(tmp_path / "a"), "--output-dir", str(tmp_path / to), "--cache-dir",
                 str(cache), *"--data shapes:100 --device cpu --batch-size 8".split(), *flags]
        return tools.evaluate.main(parse(tools.evaluate.Config, flags))
    return call


# ---------------------------------------------------------------- what is loaded


def test_the_encoder_is_loaded_and_the_head_is_new(pretrained):
    saved = read_pretrained(pretrained)
    model = build_vit("vit_test", (16, 16), 4, 3, num_classes=7, global_pool="avg")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_for_tuning(model, saved)
    for name, value in model.state_dict().items():
        want = before[name] if name.startswith(("head.", "fc_norm.")) else saved.encoder[name]
        assert torch.equal(value, want), name
    token = build_vit("vit_test", (16, 16), 4, 3, num_classes=7, global_pool="token")
    load_for_tuning(token, saved)
    assert torch.equal(token.norm.weight, saved.encoder["norm.weight"])


@pytest.mark.parametrize("img_size, grid", [((32, 32), (8, 8)), ((16, 24), (4, 6))])
def test_another_image_size_resizes_the_positions(pretrained, img_size, grid):
    saved = read_pretrained(pretrained)
    model = build_vit("vit_test", img_size, 4, 3, num_classes=7, global_pool="avg")
    load_for_tuning(model, saved)
    assert torch.equal(model.pos_embed, resize_pos_embed(saved.encoder["pos_embed"], (4, 4), grid))


def test_positions_of_unknown_sides_are_a_square_or_refused(pretrained, tmp_path):
    bare = torch.load(pretrained / "encoder.pt", weights_only=True)["model"]
    torch.save(bare, tmp_path / "square.pt")
    model = build_vit("vit_test", (32, 32), 4, 3, num_classes=7, global_pool="avg")
    load_for_tuning(model, read_pretrained(tmp_path / "square.pt"))
    assert torch.equal(model.pos_embed, resize_pos_embed(bare["pos_embed"], (4, 4), (8, 8)))
    torch.save(bare | {"pos_embed": torch.zeros(1, 13, 64)}, tmp_path / "oblong.pt")
    with pytest.raises(UserError, match=r"has positions of shape \(1, 13, 64\): expected"):
        read_pretrained(tmp_path / "oblong.pt")


# ---------------------------------------------------------------- the run


def test_a_run_learns_evaluates_and_explains_itself(finetune, tmp_path, capsys):
    metrics = finetune("--epochs", "0.64", "--eval-every", "0.3", "--ema", "0.5")
    log = read_log(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4] and log[-1]["done"]
    assert {"acc1", "acc5", "ema_acc1"} < set(log[2]) and {"loss", "lr", "grad_norm", "epoch"} < set(log[0])
    assert metrics["val_images"] == metrics["ema_val_images"] == 20
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["acc1"] == metrics["acc1"] and found["config"]["img_size"] == [16, 16]
    output = capsys.readouterr().out
    assert "done: acc1" in output and "100 images of shapes:100, 10 classes" in output
    state = torch.load(tmp_path / "a" / "classifier.pt", weights_only=True)
    assert state["classes"][0] == "circle" and len(state["classes"]) == 10
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(16, 4, embed_dim=64, depth=12, num_heads=2, num_classes=10,
                                           global_pool="avg")
    theirs.load_state_dict(state["model"], strict=True)


def test_sixteen_images_are_learned_by_heart(finetune, tmp_path):
    """A recipe without anything that hides the images reaches every one of them, in training and on them."""
    for split in ("train", "val"):
        for i in range(16):
            folder = tmp_path / "data" / split / f"class {i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    plain = ("--crop center --mixup 0 --cutmix 0 --rand-augment 0 --smoothing 0 --drop-path 0 "
             "--layer-decay 1 --weight-decay 0 --batch-size 16 --steps 80 --lr 2e-3").split()
    metrics = finetune("--data", str(tmp_path / "data"), *plain)
    assert metrics["acc1"] == 100 and metrics["loss"] < 0.1


def test_the_average_is_the_one_computed_by_hand(finetune, tmp_path):
    found = {}
    for steps in ("1", "2", "3"):
        finetune("--epochs", "0.64", "--steps", steps, "--ema", "0.75", to=steps)
        found[steps] = state_of(tmp_path / steps)
    want = found["1"]["model"]["blocks.3.mlp.fc1.weight"]
    for steps in ("2", "3"):
        want = 0.75 * want + 0.25 * found[steps]["model"]["blocks.3.mlp.fc1.weight"]
    got = found["3"]["average"]["module.blocks.3.mlp.fc1.weight"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    export = torch.load(tmp_path / "3" / "classifier_ema.pt", weights_only=True)["model"]
    assert torch.equal(export["blocks.3.mlp.fc1.weight"], got)


def test_layers_learn_at_their_own_rates(finetune, tmp_path):
    """AdamW's first step moves a weight by its learning rate at most: in block i, decay ** (12 - i) of lr."""
    flags = ["--warmup-epochs", "0", "--weight-decay", "0", "--layer-decay", "0.5", "--steps", "1"]
    finetune(*flags, to="a")
    finetune(*flags, "--lr", "1e-30", to="b")
    moved, still = (state_of(tmp_path / to)["model"] for to in "ab")
    for name, scale in (("blocks.11.mlp.fc2.weight", 0.5), ("blocks.8.mlp.fc2.weight", 0.5 ** 4),
                        ("patch_embed.proj.weight", 0.5 ** 13), ("head.weight", 1)):
        step = (moved[name] - still[name]).abs().max().item()
        assert 0.8 * 1e-3 * scale < step < 1.001 * 1e-3 * scale + 1e-7, name     # weights are rounded to 1e-7


STILL = ["--lr", "1e-30", "--weight-decay", "0", "--steps", "1"]


def test_random_weights_start_from_the_sizes_and_nothing_else(finetune, tmp_path, capsys):
    finetune(*STILL, to="a")
    finetune(*STILL, "--random-init", to="b")
    assert "from random weights" in capsys.readouterr().out
    torch.manual_seed(0)
    fresh = build_vit("vit_test", (16, 16), 4, 3, num_classes=10, global_pool="avg").state_dict()
    tuned, random = (state_of(tmp_path / to)["model"] for to in "ab")
    assert tuned.keys() == random.keys() == fresh.keys()
    for name in fresh.keys() - {"head.weight"}:
        assert torch.equal(random[name], fresh[name]), name
    assert not torch.equal(tuned["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])
    for state in (tuned, random):                                       # MAE's: N(0, 2e-5), truncated
        assert state["head.weight"].std().item() == pytest.approx(2e-5, rel=0.1)
        assert not state["head.bias"].any()


def test_the_optimizer_and_the_first_loss_are_those_of_the_recipe(finetune, tmp_path, pretrained, cache):
    metrics = finetune("--steps", "1", "--batch-size", "16", "--layer-decay", "0.5")
    groups = state_of(tmp_path / "a")["optimizer"]["param_groups"]
    found = {name: group for group in groups for name in group["names"]}
    assert found["pos_embed"]["weight_decay"] == found["cls_token"]["weight_decay"] == 0
    assert found["head.weight"]["weight_decay"] == 0.05 and found["head.bias"]["weight_decay"] == 0
    assert found["blocks.3.mlp.fc1.weight"]["lr_scale"] == 0.5 ** 9
    assert {group["betas"] for group in groups} == {(0.9, 0.999)}

    torch.manual_seed(0)
    model = build_vit("vit_test", (16, 16), 4, 3, num_classes=10, global_pool="avg", drop_path=0.1)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    load_for_tuning(model, read_pretrained(pretrained))
    source = open_data("shapes:100", "train", str(cache), print)
    views = Views(source, "inception", (16, 16), 3, 24, 0, rand_augment)
    batch = collate([views[key] for key in next(iter(Stream(100, 16, 16, 0, 0, 1)))])
    mix = draw_mix(Rng(0, MIX, 0, 0), 16, 16, 0.8, 1.0)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = TORCH.prepare(batch["image"], mean, std, **mix_arguments(mix, 16, "cpu"))
    logits = model(images, batch["noise"].view(16, 12, 2))
    hard = torch.nn.functional.one_hot(batch["label"], 10) * 0.9 + 0.01
    soft = mix.lam * hard + (1 - mix.lam) * hard.flip(0)
    want = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-6) and 0 < mix.lam < 1


def test_the_seed_decides_everything_and_each_part_of_the_recipe_matters(finetune, tmp_path):
    losses = {}
    for flags in ("", "--seed 1", "--mixup 0", "--cutmix 0", "--smoothing 0", "--drop-path 0.5", "--reprob 1",
                  "--rand-augment 0", "--rand-augment 5", "--repeats 2", "--crop simple",
                  "--global-pool token", "--layer-decay 0.5", "--img-size 24", "--dtype bfloat16"):
        losses[flags] = finetune("--steps", "3", *flags.split(), to=flags)["loss"]
    assert finetune("--steps", "3", to="again")["loss"] == losses[""]
    assert len(set(losses.values())) == len(losses), losses


def test_recomputation_changes_the_loss_by_rounding_alone(finetune):
    want = finetune("--steps", "3", to="plain")["loss"]
    assert finetune("--steps", "3", "--grad-checkpointing", to="b")["loss"] == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------- measuring


def test_measuring_a_checkpoint_gives_what_its_run_ended_with(finetune, evaluate, tmp_path):
    want = finetune("--steps", "4", to="a")
    for checkpoint in (tmp_path / "a", tmp_path / "a" / "classifier.pt"):
        got = evaluate("--checkpoint", str(checkpoint), to="measured")
        assert got == {name: want[name] for name in got} and "acc1" in got
    assert not (tmp_path / "measured" / "last.pt").exists()
    bare = torch.load(tmp_path / "a" / "classifier.pt", weights_only=True)["model"]
    torch.save(bare, tmp_path / "bare.pt")                              # as others publish theirs
    got = evaluate("--checkpoint", str(tmp_path / "bare.pt"), to="measured")
    assert got == {name: want[name] for name in got}


def test_a_classifier_is_measured_at_another_image_size(finetune, evaluate, tmp_path):
    finetune("--steps", "1")
    metrics = evaluate("--img-size", "24")
    assert metrics["val_images"] == 20
    saved = read_pretrained(tmp_path / "a")
    model = build_vit("vit_test", (24, 24), 4, 3, num_classes=10, global_pool="avg")
    load_classifier(model, saved)
    assert torch.equal(model.head.weight, saved.encoder["head.weight"])


def test_the_evaluation_crop_is_the_middle_224_of_256(finetune, evaluate, monkeypatch):
    crops, views = [], train_finetune.Views
    monkeypatch.setattr(train_finetune, "Views", lambda *a, **more: crops.append(a[1]) or views(*a, **more))
    finetune("--steps", "1", "--crop", "simple", "--ema", "0.9")
    evaluate()
    assert crops == ["simple", "evaluation", "evaluation", "evaluation"]


def test_an_unreadable_validation_image_counts_as_wrong(finetune, evaluate, tmp_path):
    for split, count in (("train", 4), ("val", 4)):
        for i in range(count):
            folder = tmp_path / "data" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (255 * (i % 2), 0, 0)).save(folder / f"{i}.png")
    flags = ["--data", str(tmp_path / "data"), "--steps", "20", "--mixup", "0", "--cutmix", "0",
             "--layer-decay", "1", "--rand-augment", "0"]
    assert finetune(*flags)["acc1"] == 100
    (tmp_path / "data" / "val" / "a" / "0.png").write_bytes(b"torn")
    assert evaluate("--data", str(tmp_path / "data"), "--max-bad", "0.5")["acc1"] == 75
    with pytest.raises(Fault, match="1 of 4 images cannot be read"):
        evaluate("--data", str(tmp_path / "data"), to="c")


# ---------------------------------------------------------------- other data


def class_folders(root, names, count=2, size=16):
    """An image in each of these class folders whose colour is its class's: {name: colour} of all classes."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (size, size), (40 * k, 255 - 40 * k, 30)).save(root / name / f"{name}_{i}.png")


WNIDS = ["n01", "n02", "n03", "n04", "n05"]


@pytest.fixture
def imagenet(tmp_path):
    """A tree of five classes that one colour tells apart."""
    for split in ("train", "val"):
        class_folders(tmp_path / "imagenet" / split, WNIDS)
    return tmp_path / "imagenet"


PLAIN = ("--mixup 0 --cutmix 0 --rand-augment 0 --drop-path 0 --layer-decay 1 --batch-size 16 --steps 60 "
         "--lr 2e-3").split()


@pytest.mark.slow
def test_a_subset_trains_on_what_it_names_and_keeps_all_classes(finetune, imagenet, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("# two of ten\nn02/n02_0.png\nn05_1.png\n\n")
    flags = ["--data", str(imagenet), *PLAIN]
    assert finetune(*flags, "--subset", str(tmp_path / "few.txt"))["acc1"] == 40
    assert "2 images of" in (output := capsys.readouterr().out) and "5 classes" in output
    assert finetune(*flags, to="all")["acc1"] == 100


@pytest.mark.slow
def test_robustness_finds_the_logit_of_each_folder(finetune, evaluate, imagenet, tmp_path, capsys):
    """Three of five classes, and labels from 0 that are not the checkpoint's."""
    finetune("--data", str(imagenet), *PLAIN)
    whole, part = tmp_path / "r", tmp_path / "part"
    class_folders(whole, WNIDS)
    for name in WNIDS[2:]:
        (part / name).parent.mkdir(exist_ok=True)
        (whole / name).rename(part / name)
    assert evaluate("--robustness", f"imagenet-r:{part}", to="r")["acc1"] == 100
    output = capsys.readouterr().out
    assert "imagenet-r, acc1 %" in output and "published" in output
    (part / "n03").rename(part / "swap")
    (part / "n04").rename(part / "n03")
    (part / "swap").rename(part / "n04")
    assert evaluate("--robustness", f"imagenet-r:{part}", to="swapped")["acc1"] == pytest.approx(100 / 3)
    saved = json.loads((tmp_path / "swapped" / "metrics.json").read_text())
    assert saved["acc1"] == pytest.approx(100 / 3)


@pytest.mark.slow
def test_corruptions_are_measured_and_a_part_of_them_has_no_mce(finetune, evaluate, imagenet, tmp_path,
                                                                capsys):
    finetune("--data", str(imagenet), *PLAIN)
    for severity in "12345":
        class_folders(tmp_path / "c" / "weather" / "fog" / severity, WNIDS)
    metrics = evaluate("--robustness", f"imagenet-c:{tmp_path / 'c'}", to="c1")
    assert metrics["ce"] == {"fog": 0.0} and metrics["mce"] is None and len(metrics["missing"]) == 70
    assert "no mCE without" in capsys.readouterr().out


@pytest.mark.slow
def test_a_val_without_some_classes_is_measured_by_trains_list(finetune, evaluate, imagenet, capsys):
    shutil.rmtree(imagenet / "val" / "n01")
    flags = ["--data", str(imagenet)]
    warning = "warning: val has no images of n01 (1); labels are by train's 5 classes"
    assert finetune(*flags, *PLAIN)["acc1"] == 100 and warning in capsys.readouterr().out
    metrics = evaluate(*flags)
    assert (metrics["acc1"], metrics["val_images"]) == (100, 8)
    assert "warning: the data has no images of n01 (1); labels are by checkpoint" in capsys.readouterr().out


def test_a_run_goes_on_in_the_order_of_its_own_classes(finetune, tmp_path):
    """Numbers in a list stand in their own order, folders in that of the alphabet."""
    names = ["1", "2", "10"]
    for split in ("train", "val"):
        class_folders(tmp_path / "data" / split, names)
        lines = [f"{name}/{name}_{i}.png {name}\n" for name in names for i in range(2)]
        (tmp_path / "data" / f"{split}.txt").write_text("".join(lines))
    finetune("--data", f"list:{tmp_path / 'data'}", "--steps", "1")
    assert state_of(tmp_path / "a")["classes"] == names
    more = ["--resume", "auto", "--allow-change", "data,steps", "--steps", "2"]
    finetune("--data", str(tmp_path / "data"), *more)
    assert state_of(tmp_path / "a")["classes"] == names and state_of(tmp_path / "a")["step"] == 2


@pytest.fixture
def numbered(tmp_path):
    """Class folders 1 to 12, of which 2 has 11 images, and classifiers that always say output 1."""
    class_folders(tmp_path / "data" / "val", [str(i) for i in range(1, 13)], count=1, size=8)
    for i in range(1, 11):
        shutil.copy(tmp_path / "data" / "val" / "2" / "2_0.png", tmp_path / "data" / "val" / "2" / f"{i}.png")
    state = build_vit("vit_test", (8, 8), 4, 3, num_classes=12).state_dict()
    state["head.weight"].zero_()
    state["head.bias"].copy_(torch.eye(12)[1])
    content = dict(model=state, config=dict(model="vit_test", img_size=(8, 8), patch_size=4))
    torch.save(content, tmp_path / "unnamed.pt")
    torch.save(content | dict(classes=sorted(str(i) for i in range(1, 13))), tmp_path / "text.pt")
    return tmp_path


def test_class_folders_that_are_numbers_count_by_their_numbers_where_a_classifier_has_no_names(
        evaluate, numbered, capsys):
    flags = ["--data", str(numbered / "data"), "--checkpoint"]
    assert evaluate(*flags, str(numbered / "unnamed.pt"))["acc1"] == 50
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert "as timm sorts them, so output 1 is 2. torchvision sorts them as text, and there it is 10." in said
    assert "--classes FILE" in said
    (numbered / "names.txt").write_text("\n".join(sorted(map(str, range(1, 13)))))
    names = ["--classes", str(numbered / "names.txt")]
    assert evaluate(*flags, str(numbered / "unnamed.pt"), *names)["acc1"] == pytest.approx(100 / 22)
    assert evaluate(*flags, str(numbered / "text.pt"))["acc1"] == pytest.approx(100 / 22)   # its own list
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(UserError, match="names its classes: expected no --classes"):
        evaluate(*flags, str(numbered / "text.pt"), *names)
    (numbered / "names.txt").write_text("2\n1\n")
    with pytest.raises(UserError, match="names.txt names 2 classes, and the classifier has 12 outputs"):
        evaluate(*flags, str(numbered / "unnamed.pt"), *names)


def test_a_measurement_replaces_no_run(finetune, evaluate, imagenet):
    finetune("--data", str(imagenet), "--steps", "1")
    with pytest.raises(UserError, match="holds a run, whose records this would replace"):
        evaluate("--data", str(imagenet), to="a")


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    """A folder of inputs that are each wrong in one way."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, classes in (("good/train", "ab"), ("good/val", "ab"), ("differ/train", "abc"),
                          ("differ/val", "abd"), ("flat", "."), ("unsplit/train", "az")):
        for label in classes:
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name / label / f"{label.strip('.')}0.png")
    (folder / "absent.txt").write_text("".join(f"x{i}.png\n" for i in range(7)) + "a/a0.png\n")
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(bytes(3072))
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    classifier = build_vit("vit_test", (16, 16), 4, 3, num_classes=2).state_dict()
    config = dict(model="vit_test", img_size=(16, 16), patch_size=4)
    torch.save(dict(model=classifier, config=config, classes=["a", "z"]), folder / "az.pt")
    torch.save(dict(model=classifier, config=config), folder / "unnamed.pt")
    return folder


@pytest.mark.parametrize("flags, message", [
    ("--checkpoint=", "--checkpoint is not given"),
    ("--batch-size 3 --global-batch 3", "--batch-size 3 is odd: mixup and cutmix mix pairs"),
    ("--data WRONG/differ", "val has classes that train has not: d (1); train has a, b, c (3)"),
    ("--data WRONG/flat", "has no train folder"),
    ("--data cifar10:WRONG", "3072 bytes"),
    ("--data WRONG/good --subset WRONG/absent.txt", "x0.png, x1.png, x2.png, x3.png, x4.png, ... (7)"),
    ("--data WRONG/good --subset WRONG/none.txt", "none.txt"),
    ("--drop-path 1", "--drop-path 1: expected 0.99 or less"),
    ("--smoothing 1", "--smoothing 1: expected 0.99 or less"),
    ("--rand-augment 11", "--rand-augment 11: expected 10 or less"),
    ("--mixup -1", "--mixup -1.0: expected 0 or more"),
    ("--layer-decay 0", "--layer-decay 0.0: expected more than 0"),
])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, cache, pretrained, wrong, capfd, monkeypatch,
                                                 flags, message):
    monkeypatch.chdir(ROOT)
    folders = ["--output-dir", str(tmp_path / "a"), "--cache-dir", str(cache)]
    flags = ["--checkpoint", str(pretrained), *SMALL, *folders, *flags.replace("WRONG", str(wrong)).split()]
    with pytest.raises(SystemExit) as stop:
        run(train_finetune.main, parse(train_finetune.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags, message", [
    ("--checkpoint=", "--checkpoint is not given"), ("", "whose folder has segmenter.pt"),
    ("--checkpoint WRONG/az.pt --batch-size 0", "--batch-size 0: expected more than 0"),
    ("--checkpoint WRONG/az.pt --img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
    ("--checkpoint WRONG/az.pt --data WRONG/unsplit", "has no val folder"),
    ("--checkpoint WRONG/az.pt --data WRONG/good", "the data has classes that checkpoint"),
    ("--checkpoint WRONG/unnamed.pt --data WRONG/differ", "has 2 outputs and does not name them"),
    ("--checkpoint WRONG/unnamed.pt --data list:WRONG", "has no val.txt: expected train.txt and val.txt"),
    ("--robustness imagenet-a:WRONG/good/val --checkpoint WRONG/az.pt", "that the checkpoint has not: b"),
    ("--robustness imagenet-q:WRONG --checkpoint WRONG/az.pt", "expected NAME:DIR"),
    ("--random-init", "unknown flag --random-init"),
])
def test_a_bad_measurement_gets_one_line_and_exit_code_2(tmp_path, cache, pretrained, wrong, capfd, flags,
                                                         message):
    flags = ["--checkpoint", str(pretrained), "--data", "shapes:100", "--device", "cpu", "--output-dir",
             str(tmp_path / "a"), "--cache-dir", str(cache), *flags.replace("WRONG", str(wrong)).split()]
    with pytest.raises(SystemExit) as stop:
        run(tools.evaluate.main, parse(tools.evaluate.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


def test_settings_that_may_change_do(finetune, tmp_path):
    flags = ["--steps", "3", "--epochs", "10"]
    finetune(*flags)
    changed = "--weight-decay 0.5 --layer-decay 0.9 --ema 0.9 --dtype bfloat16 --steps 5".split()
    named = "weight_decay,layer_decay,ema,dtype,steps"
    finetune(*flags, "--resume", "auto", *changed, "--allow-change", named)
    groups = state_of(tmp_path / "a")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.9 ** 13)
    with pytest.raises(UserError, match="the resumed optimizer does not fit"):
        finetune(*flags, *changed, "--layer-decay", "1", "--resume", "auto", "--allow-change", "layer_decay")


def test_a_run_goes_on_with_the_classes_and_settings_it_began_with(finetune, imagenet):
    flags = ["--data", str(imagenet), "--resume", "auto"]
    finetune(*flags, "--steps", "1")
    with pytest.raises(UserError, match=r"other settings:\n.*\n  mixup    0.8    0.5\n"):
        finetune(*flags, "--steps", "1", "--mixup", "0.5")
    for split in ("train", "val"):
        (imagenet / split / "n05").rename(imagenet / split / "n06")
    with pytest.raises(UserError, match=r"train has classes that the run in .* has not: n06 \(1\)"):
        finetune(*flags, "--steps", "1")
