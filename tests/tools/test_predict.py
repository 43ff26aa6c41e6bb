"""tools.predict: its classes are those that tools.evaluate counts, by name or by number; what it refuses."""

import csv
import json
import math
import os

import pytest
import torch
from images import noise_image

import train_finetune
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.vit import MODELS, VisionTransformer
from mff_run.process import run
from tools import convert, evaluate, predict


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ and val/ with three classes of images, of several sizes."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 4)):
        for j, name in enumerate(("cat", "dog, or wolf", "=eel")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = noise_image(20 + 9 * i, 25, seed=i)
                image = image.point([min(255, value // 3 + 70 * j) for value in range(256)] * 3)
                image.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained, images):
    """The folder of a fine-tuned run, which knows some of its images."""
    folder = tmp_path_factory.mktemp("finetuned")
    flags = (f"--checkpoint {pretrained} --data {images} --output-dir {folder} --global-batch 24 "
             f"--batch-size 24 --lr 2e-3 --steps 12 --rand-augment 0 --mixup 0 --cutmix 0").split()
    train_finetune.main(parse(train_finetune.Config, flags))
    return folder


def apply(checkpoint, images, out, *flags):
    line = [checkpoint, images, "--output-dir", out, "--device", "cpu", *flags]
    return predict.main(parse(predict.Config, list(map(str, line))))


def test_predictions_are_those_that_evaluate_counts(tmp_path, images, finished):
    flags = ["--checkpoint", finished, "--data", images, "--output-dir", tmp_path / "a", "--device", "cpu"]
    metrics = evaluate.main(parse(evaluate.Config, list(map(str, flags))))
    found = apply(finished, images / "val", tmp_path / "out", "--batch-size", 5)["images"]
    assert len(found) == metrics["val_images"] == 12
    hits = [image["name"].split("/")[0] == image["top"][0]["class"] for image in found]
    assert 100 * sum(hits) / 12 == pytest.approx(metrics["acc1"]) and 4 < sum(hits)
    for image in found:
        values = [row["probability"] for row in image["top"]]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        assert {row["class"] for row in image["top"]} == {"cat", "dog, or wolf", "=eel"}
    assert json.loads((tmp_path / "out/predictions.json").read_text())["images"] == found
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"], row["class"], float(row["probability"])) for row in rows] == [
        (image["name"], str(i + 1), row["class"], row["probability"])
        for image in found for i, row in enumerate(image["top"])]


def test_a_classifier_without_names_gives_numbers_and_says_so(tmp_path, images, finished, capsys):
    named = apply(finished, images / "val", tmp_path / "named")["images"]
    weights = torch.load(finished / "classifier.pt", weights_only=True)
    torch.save(weights["model"], tmp_path / "timm.pth")
    capsys.readouterr()
    found = apply(tmp_path / "timm.pth", images / "val", tmp_path / "out", "--top", 2)["images"]
    output = capsys.readouterr().out
    assert "timm.pth does not name its classes: outputs are numbers from 0 on; --classes FILE" in output
    assert "output 1 " in output and "the 2 likeliest classes of 12 of 12 images" in output
    assert [[row["output"] for row in image["top"]] for image in found] == [
        [row["output"] for row in image["top"][:2]] for image in named]
    assert {row["class"] for image in found for row in image["top"]} == {None}
    (tmp_path / "names.txt").write_text("eel\ncat\ndog\n")
    names = "--classes", tmp_path / "names.txt"
    for image in apply(tmp_path / "timm.pth", images / "val", tmp_path / "third", *names)["images"]:
        assert all(row["class"] == ["eel", "cat", "dog"][row["output"]] for row in image["top"])


def test_names_of_transformers_are_read_and_its_placeholders_are_none(tmp_path, images):
    state = VisionTransformer(16, num_classes=3, **MODELS["vit_test"]).state_dict()
    torch.save(dict(model=state, classes=["cat", "dog", "=eel"]), tmp_path / "classifier.pt")
    given = [str(tmp_path / "classifier.pt"), str(tmp_path / "hf"), "--to", "hf"]
    convert.main(parse(convert.Config, given))
    found = apply(tmp_path / "hf", images / "val/cat", tmp_path / "out")["images"]
    assert {row["class"] for image in found for row in image["top"]} == {"cat", "dog", "=eel"}
    assert predict.names_beside(tmp_path / "hf/model.safetensors", 4) == []
    (tmp_path / "config.json").write_text(json.dumps(dict(id2label={"0": "LABEL_0", "1": "LABEL_1"})))
    assert predict.names_beside(tmp_path / "any.pth", 2) == []


def test_what_cannot_be_read_is_named_and_odd_names_of_files_come_back(tmp_path, images, finished, capsys):
    (tmp_path / "own").mkdir()
    odd = os.fsdecode(b"a\xff\n,\".png")
    for name in ("b.png", "b.jpg", odd):                                # two of one stem
        noise_image(30, 30).save(tmp_path / "own" / "x.png")
        (tmp_path / "own/x.png").rename(tmp_path / "own" / name)
    (tmp_path / "own/torn.png").write_bytes(b"\x89PNG no")
    found = apply(finished, tmp_path / "own", tmp_path / "out")
    assert found["unreadable"] == {"torn.png": "a PNG, which cannot be decoded"}
    assert [image["name"] for image in found["images"]] == [odd, "b.jpg", "b.png"]
    output = capsys.readouterr().out
    assert "warning: torn.png cannot be read" in output and "classes of 3 of 4 images" in output
    with open(tmp_path / "out/predictions.csv", newline="", errors="surrogateescape") as file:
        assert next(csv.DictReader(file))["image"] == odd
    assert json.loads((tmp_path / "out/predictions.json").read_text())["images"] == found["images"]


@pytest.mark.parametrize("checkpoint, path, flags, message", [
    ("pretrained", "val", "", "holds no classifier: expected what train_finetune.py writes"),
    ("finished", "nowhere", "", "nowhere does not exist: expected a folder of images, or images"),
    ("finished", "val", "--classes names.txt", "names its classes: expected no --classes"),
    ("segmenter", "val", "", "segmenter predicts masks, not classes: expected a run of train_finetune.py"),
    ("detector", "val", "", "detector predicts boxes, not classes: expected a run of train_finetune.py"),
    ("finished", "torn", "", "none of the 1 images in torn can be read: the first is torn.png (a PNG, which"),
])
def test_bad_input_is_one_line_and_code_2(tmp_path, images, finished, pretrained, capfd, monkeypatch,
                                          checkpoint, path, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("segmenter", "detector", "torn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.pt").write_bytes(b"")
    (tmp_path / "torn/torn.png").write_bytes(b"\x89PNG no")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    folders = dict(pretrained=pretrained, finished=finished)
    line = [folders.get(checkpoint, checkpoint), images / path if path == "val" else path, "--device", "cpu",
            "--output-dir", "out", *flags.split()]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(predict.main, parse(predict.Config, list(map(str, line))))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_logits_that_are_not_finite_are_a_fault(tmp_path, images, finished):
    weights = torch.load(finished / "classifier.pt", weights_only=True)
    weights["model"] = {name: value * 1e30 for name, value in weights["model"].items()}
    torch.save(weights, tmp_path / "huge.pth")
    with pytest.raises(SystemExit) as stop:
        line = [str(tmp_path / "huge.pth"), str(images / "val"), "--output-dir", str(tmp_path / "out")]
        run(predict.main, parse(predict.Config, line))
    assert stop.value.code == 3 and not (tmp_path / "out/predictions.json").exists()


def test_probabilities_are_the_softmax_of_the_logits():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    (rows,), total = predict.rows_of(logits, list("abcd"), 9), logits.double().exp().sum().item()
    assert [row["class"] for row in rows] == list("bdca") and [row["output"] for row in rows] == [1, 3, 2, 0]
    for row, value in zip(rows, (3, 2, 1, 0), strict=True):
        assert row["probability"] == pytest.approx(math.exp(value) / total)
    with pytest.raises(UserError):
        apply("nowhere", ".", ".")
