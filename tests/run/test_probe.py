"""Linear probing: the head, frozen weights, honest counts, cached features, bad input. See also test_run."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import furthest, noise_image
from PIL import Image
from run_folders import log_of, same_bits, state_of, torchrun
from sources import ROOT

import train_probe
from mff_data.crops import evaluation, single_draw
from mff_min.config import parse
from mff_min.errors import Fault, UserError
from mff_min.optim import LARS
from mff_min.probe import LinearProbe, accuracy, count_hits, knn_scores, logistic_scores
from mff_min.rng import Rng
from mff_min.vit import MODELS
from mff_run.process import run
from mff_weights.pretrained import build_encoder, build_fusion, read_pretrained
from tools import pack

SMALL = ("--data shapes:100 --global-batch 16 --batch-size 8 --log-every 1 --save-every 3 --blr 1 "
         "--device cpu").split()


@pytest.fixture
def probe(tmp_path, cache, pretrained):
    """probe(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
        flags = ["--checkpoint", str(pretrained), *SMALL, *folders, *flags]
        return train_probe.main(parse(train_probe.Config, flags))
    return call


# ---------------------------------------------------------------- the head and its numbers


def test_the_head_normalises_without_parameters_and_starts_small():
    head = LinearProbe(64, 10)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "head.weight": (10, 64), "head.bias": (10,)}
    assert head.norm.eps == 1e-6 and head.norm.momentum == 0.1 and head.norm.running_mean.shape == (64,)
    assert not head.head.bias.any() and head.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head(torch.rand(4, 64)).shape == (4, 10)


def test_one_step_is_the_one_computed_by_hand():
    head, x, y = LinearProbe(3, 2).double(), torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0])
    weight = head.head.weight.detach().numpy().copy()
    optimizer = LARS(head.parameters(), lr=2.0)
    F.cross_entropy(head(x), y).backward()
    optimizer.step()

    x = x.numpy()
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    logits = x @ weight.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (p - np.eye(2)[y]) / 4
    gradient = error.T @ x
    step = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient) * gradient
    np.testing.assert_allclose(head.head.weight.detach().numpy(), weight - 2 * step, rtol=1e-12)
    np.testing.assert_allclose(head.head.bias.detach().numpy(), -2 * error.sum(0), rtol=1e-12, atol=1e-15)


def test_hits_and_standard_errors_are_those_of_a_binomial():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6]]).repeat(4, 1)
    assert count_hits(scores, torch.tensor([0, 3, 1, -1])) == [4, 1, 2]     # -1, unreadable, is wrong
    assert count_hits(scores[:, :2], torch.tensor([0, 1, 1, 0])) == [4, 2, 4]
    with pytest.raises(Fault, match="the scores of 1 in 4 images are not finite"):
        count_hits(scores.masked_fill(torch.tensor([[0], [0], [1], [0]]).bool(), math.nan), torch.zeros(4))
    error = pytest.approx(100 * math.sqrt(0.25 * 0.75 / 400))
    want = dict(val_images=400, acc1=25.0, acc1_error=error, acc5=100.0, acc5_error=0.0)
    assert accuracy(400, 100, 400) == want


def test_logistic_regression_finds_its_optimum_whatever_the_scale_of_a_feature():
    x, y = torch.randn(200, 5) * torch.tensor([1, 10, 0.1, 1, 1]), torch.randint(0, 3, (200,))
    got, scaled = logistic_scores(x, y, 3, x), x * torch.tensor([7, 1, 100, 1, 1])
    torch.testing.assert_close(got, logistic_scores(scaled, y, 3, scaled), rtol=1e-2, atol=1e-2)
    standard = (x - x.mean(0)) / x.std(0)
    weight = torch.linalg.lstsq(torch.cat([standard, torch.ones(200, 1)], 1), got).solution[:-1]
    error = (got.softmax(1) - F.one_hot(y, 3)) / 200
    assert (standard.T @ error + 1e-3 * weight).abs().max() < 1e-4      # the gradient at an optimum is 0
    assert error.sum(0).abs().max() < 1e-4


def test_logistic_regression_separates_what_can_be_separated():
    y = torch.arange(60) % 3
    x = F.one_hot(y, 3) + 0.05 * torch.randn(60, 3)
    assert count_hits(logistic_scores(x[:30], y[:30], 3, x[30:]), y[30:])[1] == 30


def test_neighbours_vote_by_their_cosine():
    train = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    votes = knn_scores(train, torch.tensor([0, 1, 1, 2]), 3, torch.tensor([[5.0, 0.0]]), k=2, temperature=0.5)
    want = torch.tensor([[1.0, math.exp((math.cos(math.pi / 4) - 1) / 0.5), 0.0]])
    torch.testing.assert_close(votes, want)


# ---------------------------------------------------------------- crops


def test_single_draw_draws_one_box_and_cuts_it_to_the_image():
    image = noise_image(40, 90)
    got = single_draw(image, (24, 32), Rng(1, 2))
    area, log_aspect, up, left, mirrored = Rng(1, 2).random(5)
    area = 40 * 90 * (0.08 + 0.92 * area)
    aspect = math.exp(math.log(3 / 4) + log_aspect * (math.log(4 / 3) - math.log(3 / 4)))
    w, h = min(round(math.sqrt(area * aspect)), 90), min(round(math.sqrt(area / aspect)), 40)
    y, x = int(up * (40 - h + 1)), int(left * (90 - w + 1))
    want = image.crop((x, y, x + w, y + h)).resize((32, 24), Image.Resampling.BICUBIC)
    want = want.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored < 0.5 else want
    assert furthest(got, want) <= 2                                     # rounded twice: see test_packed


def test_the_evaluation_crop_is_the_middle_224_of_256():
    image = noise_image(300, 500)
    want = image.resize((int(500 * 256 / 300), 256), Image.Resampling.BICUBIC)
    left = round((want.width - 224) / 2)
    want = want.crop((left, 16, left + 224, 240))
    assert np.array_equal(np.asarray(evaluation(image, (224, 224))), np.asarray(want))


@pytest.mark.parametrize("flags, crops", [
    (["--steps", "2"], ["single_draw", "evaluation"]), (["--knn", "3"], ["evaluation", "evaluation"]),
    (["--cache", "1", "--steps", "2"], ["single_draw", "evaluation"])])
def test_every_way_to_probe_measures_on_the_evaluation_crop(probe, monkeypatch, flags, crops):
    seen, views = [], train_probe.Views
    monkeypatch.setattr(train_probe, "Views", lambda *a, **more: seen.append(a[1]) or views(*a, **more))
    probe(*flags)
    assert seen == crops


# ---------------------------------------------------------------- where the encoder comes from


def test_a_run_an_export_and_a_bare_encoder_are_the_same_encoder(pretrained, tmp_path):
    bare = torch.load(pretrained / "encoder.pt", weights_only=True)["model"]
    torch.save(bare, tmp_path / "bare.pt")
    for path in (pretrained, pretrained / "encoder.pt", tmp_path / "bare.pt"):
        encoder = build_encoder(read_pretrained(path))
        assert same_bits(dict(encoder.state_dict()), dict(bare))
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    told = dict(model="vit_test", img_size=(16, 16), patch_size=4, in_chans=3)
    assert read_pretrained(tmp_path / "bare.pt").config == told         # by its shapes


def test_an_encoder_without_fusion_has_none(pretrained):
    assert build_fusion(read_pretrained(pretrained / "encoder.pt"), None) is None


# ---------------------------------------------------------------- runs


def test_frozen_means_frozen(probe, pretrained, monkeypatch):
    encoders, build = [], train_probe.build_encoder

    def remember(*arguments):
        encoders.append(build(*arguments))
        return encoders[-1]
    monkeypatch.setattr(train_probe, "build_encoder", remember)
    probe("--steps", "3")
    want = torch.load(pretrained / "encoder.pt", weights_only=True)["model"]
    assert same_bits(dict(encoders[0].state_dict()), dict(want))
    assert all(p.grad is None and not p.requires_grad for p in encoders[0].parameters())


def test_a_run_learns_evaluates_and_explains_itself(probe, tmp_path):
    metrics = probe("--epochs", "3", "--eval-every", "1")
    log = log_of(tmp_path / "a")
    evaluated = [line["step"] for line in log if "acc1" in line]
    assert evaluated == [7, 13, 19] and log[-1]["done"] and metrics["step"] == 19       # 6.25 an epoch
    assert metrics["val_images"] == 20 and log[-1]["acc1"] == metrics["acc1"]
    assert {"acc1", "acc1_error", "acc5", "acc5_error"} < set(log[-1])
    assert log[0]["loss"] == pytest.approx(math.log(10), rel=0.02)      # ten classes, small weights
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["acc5"] == metrics["acc5"] and found["config"]["pool"] == "token" and found["environment"]


def test_what_can_be_separated_is(probe, tmp_path):
    for split, count in (("train", 12), ("val", 5)):
        for name, value in (("black", 0), ("white", 255)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 20, 3), abs(value - i), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    flags = ["--data", str(tmp_path / "data")]
    # LARS turns a weight by about lr / 1000 of its length in a step, and biases by plain gradients: batches
    # that hold all images are balanced, so that a high rate is safe.
    steps = ["--steps", "40", "--lr", "3", "--global-batch", "24", "--batch-size", "24"]
    assert probe(*flags, *steps)["acc1"] == 100
    assert probe(*flags, *steps, "--cache", "1", to="cached")["acc1"] == 100
    assert probe(*flags, "--knn", "3", to="knn")["acc1"] == 100


def test_an_unreadable_validation_image_counts_as_wrong(probe, tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((20, 20, 3), 255 * (name == "a"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data" / "val" / "a" / "3.png").write_bytes(b"\x89PNG torn")
    # As above: else the weights that it starts from would decide, which differ between versions of PyTorch.
    flags = ["--data", str(tmp_path / "data"), "--steps", "40", "--lr", "3", "--batch-size", "16"]
    for way in ([], ["--cache", "1"], ["--knn", "1"]):
        metrics = probe(*flags, *way, "--max-bad", "0.1", to="-".join(["run", *way]))
        assert metrics["val_images"] == 16 and metrics["acc1"] == 100 * 15 / 16
    with pytest.raises(Fault, match="more than --max-bad 0.01"):
        probe(*flags, to="strict")


def test_cached_and_direct_features_of_a_view_are_the_same(probe, monkeypatch):
    seen, forward = [], LinearProbe.forward

    def remember(self, features):
        if self.training:
            seen.append(features.clone())
        return forward(self, features)
    monkeypatch.setattr(LinearProbe, "forward", remember)
    probe("--steps", "4")
    direct, _ = seen[:], seen.clear()
    probe("--steps", "4", "--cache", "1", to="cached")
    assert len(direct) == len(seen) == 8                                # 64 of 100 images: within one epoch
    for a, b in zip(direct, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)          # other batches: sums in another order


def test_with_a_view_an_epoch_the_cache_is_the_protocol_and_learning_rates_do_not_mix(probe):
    want = probe("--epochs", "2", "--steps", "12")
    got = probe("--epochs", "2", "--steps", "12", "--cache", "2", "--cache-lrs", "0.01,1,0.1", to="cached")
    assert [tried["blr"] for tried in got["tried"]] == pytest.approx([0.01, 1, 0.1])
    for key in ("acc1", "acc5", "val_images"):
        assert got["tried"][1][key] == want[key]
    assert got["acc1"] == max(tried["acc1"] for tried in got["tried"])


def test_a_head_that_diverges_is_left_out_and_when_all_do_there_is_no_accuracy(probe, capsys):
    flags = ["--steps", "12", "--cache", "1", "--cache-lrs"]
    want = probe(*flags, "0.1")
    got = probe(*flags, "1e40,0.1", to="b")
    assert "blr 1e+40: it has diverged, and is left out" in capsys.readouterr().out
    assert got["tried"] == want["tried"] and got["acc1"] == want["acc1"]
    with pytest.raises(Fault, match="every head has diverged: expected a lower --blr"):
        probe(*flags, "1e40", to="c")


@pytest.mark.parametrize("way", ["", "--cache 1", "--knn 3"])
def test_features_that_are_not_finite_have_no_accuracy(probe, pretrained, tmp_path, way):
    state = torch.load(pretrained / "encoder.pt", weights_only=True)
    state["model"]["blocks.3.mlp.fc1.bias"][0] = 3e38                   # the norm after it overflows
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(Fault, match="features of 8 in 8 images are not" if way else "loss is nan at step 1;"):
        probe("--checkpoint", str(tmp_path / "encoder.pt"), "--steps", "2", *way.split())


def test_weights_that_are_not_finite_are_refused(probe, pretrained, tmp_path):
    state = torch.load(pretrained / "encoder.pt", weights_only=True)
    state["model"]["blocks.3.mlp.fc1.bias"][0] = math.nan
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(UserError, match=r"has NaN or infinity in encoder.blocks.\*.mlp.fc1.bias"):
        probe("--checkpoint", str(tmp_path / "encoder.pt"), "--steps", "2")


def test_fewer_views_than_epochs_are_called_an_approximation(probe, capsys):
    probe("--epochs", "2", "--steps", "1", "--cache", "1")
    assert "1 views for 2 epochs: an approximation of the protocol" in capsys.readouterr().out


def test_neighbours_print_their_number(probe, capsys):
    metrics = probe("--knn", "5")
    assert metrics["k"] == 5 and metrics["val_images"] == 20
    assert "5 neighbours of 100: acc1" in capsys.readouterr().out


@pytest.mark.slow
def test_every_validation_image_is_counted_once_on_two_ranks(pretrained, tmp_path, cache):
    """103 images do not divide by two; the head is trained on one rank, and both evaluate it."""
    flags = ["--checkpoint", str(pretrained), *SMALL, "--data", "shapes:515", "--steps", "6",
             "--cache-dir", str(cache), "--output-dir", str(tmp_path / "a")]
    want = train_probe.main(parse(train_probe.Config, flags))
    assert want["val_images"] == 103
    assert "steps 6 to 6" in torchrun(2, "train_probe.py", *flags, "--resume", "auto")
    got = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert got["environment"]["world_size"] == 2
    assert {key: got[key] for key in want} == want


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of inputs that are each wrong in one way."""
    folder = tmp_path_factory.mktemp("bad")
    for name, classes in (("differ/train", "abc"), ("differ/val", "abd"), ("empty/train", "ab"),
                          ("flat", ".")):
        for label in classes:
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name / label / "0.png")
    (folder / "empty" / "val").mkdir()
    (folder / "cifar").mkdir()
    for i in range(1, 6):
        (folder / "cifar" / f"data_batch_{i}.bin").write_bytes(bytes([i]) + bytes(3072))
    (folder / "cifar" / "test_batch.bin").write_bytes(bytes([200]) + bytes(3072))
    torch.save({"model": {"head.weight": torch.zeros(2)}}, folder / "headless.pt")
    (folder / "norun").mkdir()
    return folder


@pytest.mark.parametrize("flags, message", [
    ("--checkpoint BAD/headless.pt", "is of no known family"),
    ("--checkpoint BAD/norun", "holds none of last.pt, classifier.pt, encoder.pt"),
    ("--checkpoint /nowhere", "checkpoint /nowhere does not exist"),
    ("--checkpoint LICENSE", "checkpoint LICENSE is a text of"),
    ("--checkpoint=", "--checkpoint is not given"),
    (f"--checkpoint /tmp/{'n' * 300}", "nnn cannot be read: File name too long"),
    ("--data BAD/differ", "val has classes that train has not: d (1); train has a, b, c (3); exp"),
    ("--data BAD/empty", "holds no images"),
    ("--data BAD/flat", "has no train folder"),
    ("--data cifar10:BAD/cifar", "label 200 of CIFAR-10 val 0 is outside the 10 classes of the head"),
    ("--img-size 30", "img_size 30x30 is not a multiple of patch_size 4"),
    ("--batch-size 1 --global-batch 1", "--batch-size 1: expected 2 or more"),
    ("--knn 5 --cache 1", "--cache and --knn are two ways to probe"),
    ("--cache-lrs 1,2", "--cache-lrs: expected numbers above 0, and --cache with them"),
    ("--cache 1 --cache-lrs 0,1", "--cache-lrs: expected numbers above 0"),
    ("--pool max", "invalid choice: 'max'"),
])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, cache, pretrained, bad, capfd, monkeypatch, flags,
                                                 message):
    monkeypatch.chdir(ROOT)
    folders = ["--output-dir", str(tmp_path / "a"), "--cache-dir", str(cache)]
    flags = ["--checkpoint", str(pretrained), *SMALL, "--steps", "2", *folders,
             *flags.replace("BAD", str(bad)).split()]
    with pytest.raises(SystemExit) as stop:
        run(train_probe.main, parse(train_probe.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags", ["--epochs 60 --blr 30", "--cache 1 --epochs 60 --blr 30", "--knn 1"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_val_without_some_classes_is_probed_by_trains_list(probe, tmp_path, capsys, flags, packed):
    """And the images lie in splits of other names, with a class folder that is empty."""
    root = tmp_path / "data"
    for split, names in (("Train", "abc"), ("Validation", "bc")):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                colour = (120 * "abc".index(name), 240 - 120 * "abc".index(name), 9 * i)
                Image.new("RGB", (16, 16), colour).save(root / split / name / f"{i}.png")
    (root / "Train" / "d").mkdir()
    data = root
    if packed:
        data = tmp_path / "pack"
        pack.main(parse(pack.Config, [str(root), str(data)]))
    metrics = probe("--data", str(data), "--batch-size", "16", *flags.split())
    assert (metrics["acc1"], metrics["val_images"]) == (100, 16)
    said = capsys.readouterr().out
    assert "warning: train has no images of d (1); labels are by train's 4 classes" in said
    assert "warning: val has no images of a, d (2); labels are by train's 4 classes" in said
    assert f"train: 24 images of 4 classes in {data / ('train.pack' if packed else 'Train')}" in said


def test_a_probe_keeps_its_classes_and_goes_on_in_their_order(probe, tmp_path):
    for split in ("train", "val"):
        for name in ("1", "2", "10"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / split / name / "0.png")
        lines = [f"{name}/0.png {name}\n" for name in ("1", "2", "10")]
        (tmp_path / "data" / f"{split}.txt").write_text("".join(lines))
    probe("--data", f"list:{tmp_path / 'data'}", "--steps", "1")
    assert state_of(tmp_path / "a")["classes"] == ["1", "2", "10"]
    changed = ["--resume", "auto", "--allow-change", "data,steps"]
    probe("--data", str(tmp_path / "data"), "--steps", "2", *changed)
    assert state_of(tmp_path / "a")["classes"] == ["1", "2", "10"]


def test_a_probe_is_no_encoder_and_a_classifiers_head_is_left_behind(probe, pretrained, tmp_path, capsys):
    probe("--steps", "1")
    with pytest.raises(UserError, match="is of no known family .*; it holds data, model.norm.running_mean"):
        probe("--checkpoint", str(tmp_path / "a"), "--steps", "1", to="b")
    state = torch.load(pretrained / "encoder.pt", weights_only=True)
    state["model"]["head.weight"] = torch.zeros(10, MODELS["vit_test"]["embed_dim"])
    torch.save(state, tmp_path / "timm.pt")
    probe("--checkpoint", str(tmp_path / "timm.pt"), "--steps", "1", to="c")
    assert "timm.pt, names of timm, from model\n  loaded        150\n  left behind     1  head\n" \
        in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["--steps 1", "--cache 1 --steps 1", "--knn 3"])
def test_another_image_size_resamples_positions_in_every_mode_and_says_so(probe, mode, capsys):
    metrics = probe("--img-size", "24x32", *mode.split())
    assert metrics["val_images"] == 20
    assert "resized         1  encoder.pos_embed from 4x4 to 6x8 patches" in capsys.readouterr().out


def test_a_resumed_probe_keeps_the_settings_it_began_with(probe):
    probe("--steps", "1")
    message = r"other settings:\n.*\n  pool        token  avg\n  batch_size  8      16\n"
    with pytest.raises(UserError, match=message):
        probe("--steps", "1", "--pool", "avg", "--batch-size", "16", "--resume", "auto")
