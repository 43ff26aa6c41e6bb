"""tools.detect and tools.evaluate on a finished detector: what they write, measure and refuse."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from coco_trees import write_tree
from images import noise_image
from PIL import Image

from mff_data.shapes import SHAPES
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.kernels.ops import TORCH
from mff_min.vit import MODELS, VisionTransformer
from mff_run.files import write_tensors
from mff_tasks.attention import add_windows
from mff_tasks.detector import find_detector, load_detector
from mff_tasks.masks import decode
from mff_tasks.rcnn import MaskRCNN
from mff_weights.pretrained import Fusion
from tools import detect, evaluate

CPU = torch.device("cpu")
TOLD = dict(model="vit_test", img_size=(16, 24), patch_size=4, in_chans=3, width=8, window=2, proposals=40,
            regions=16, fused=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), white=None)
CLASSES, IDS = ["disc", "box", "triangle", "nowhere"], [1, 3, 4, 90]    # as coco_trees has them


def write_run(folder, classes=CLASSES, ids=None, **changes):
    """A finished run's detector.pt, of random weights; returns (its path, the model)."""
    told = TOLD | changes
    torch.manual_seed(1)
    encoder = VisionTransformer(told["img_size"], in_chans=told["in_chans"], **MODELS["vit_test"])
    add_windows(encoder, told["window"])
    fusion = Fusion((0, 6, 11), encoder.embed_dim) if told["fused"] else None
    model = MaskRCNN(encoder, len(classes), told["width"], fusion, TORCH, told["proposals"], told["regions"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))           # else nothing is found
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": model.state_dict(), "config": told, "classes": list(classes),
               "category_ids": ids or IDS[:len(classes)]}
    write_tensors(folder / "detector.pt", content)
    return folder / "detector.pt", model.requires_grad_(False).eval()


def apply(run, images, out, *flags):
    line = [run, images, "--output-dir", out, "--device", "cpu", *flags]
    return detect.main(parse(detect.Config, list(map(str, line))))


def measure(run, data, out, *flags):
    line = ["--checkpoint", run, "--data", data, "--output-dir", out, "--device", "cpu", *flags]
    return evaluate.main(parse(evaluate.Config, list(map(str, line))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_run(folder)
    return folder


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("changes", [{}, dict(fused=True, out_indices="0,6,11"), dict(window=3, proposals=9),
                                     dict(in_chans=1, mean=(0.5,), std=(0.25,))])
def test_a_detector_comes_back_from_its_file_bit_for_bit(tmp_path, changes):
    path, model = write_run(tmp_path, **changes)
    assert find_detector(tmp_path) == find_detector(path) == path
    found, ids = load_detector(path, CPU, TORCH)
    images = torch.randn(2, (TOLD | changes)["in_chans"], 16, 24)
    for got, want in zip(*(each.detect(images, [(16, 24), (9, 24)]) for each in (found.model, model)),
                         strict=True):
        assert len(want["labels"]) and got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert found.classes == CLASSES and ids == IDS and found.mean == (TOLD | changes)["mean"]
    assert not found.model.training


@pytest.mark.parametrize("content, message", [
    (dict(model={}), "has no config, classes, category_ids"),
    (dict(config=TOLD | dict(model="vit_x")), "is of model vit_x: expected one of vit_test"),
    (dict(config=TOLD | dict(window=None)), "has no sizes: expected patch_size, in_chans, width, window"),
    (dict(config=TOLD | dict(proposals=0)), "has no sizes: expected"),
    (dict(config=TOLD | dict(regions=2.5)), "has no sizes: expected"),
    (dict(config=TOLD | dict(fused=3)), "has a fused that is no yes or no"),
    (dict(config=TOLD | dict(mean=(0.5, 0.5, math.nan))), "has no mean and std: expected numbers"),
    (dict(classes=["a", "b\nc", "d", "e"]), "has names of classes that are not: expected 1 to 200"),
    (dict(classes=list("aab")), "has 3 classes, a, a, b (3): expected 1 to 65536, each once"),
    (dict(classes=list("abc")), "says vit_test, 16x24 pixels and width 8, and box_predictor"),
    (dict(config=TOLD | dict(width=65_535)), "width 65535, and backbone"),     # no memory is taken
    (dict(config=TOLD | dict(window=5)), "and encoder.blocks.0.attn.rel_pos"),
    (dict(config=TOLD | dict(img_size=(4, 24))), "cannot be halved"),
    (dict(category_ids=[1, 3, 4]), "has category_ids that are not those of its 4 classes: expected a whole"),
    (dict(category_ids=[1, 3, 4, 4]), "has category_ids that are not those of its 4 classes"),
    (dict(category_ids=[1, 3, 4, 4.5]), "has category_ids that are not those of its 4 classes"),
    (dict(category_ids="1234"), "has category_ids that are not those of its 4 classes"),
])
def test_a_file_that_is_no_detector_is_refused(tmp_path, finished, content, message):
    path = finished / "detector.pt"
    state = torch.load(path, weights_only=True) if set(content) != {"model"} else {}
    write_tensors(tmp_path / "detector.pt", state | content)
    with pytest.raises(UserError) as error:
        load_detector(tmp_path / "detector.pt", CPU, TORCH)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path, finished):
    state = torch.load(finished / "detector.pt", weights_only=True)
    weights = state["model"]
    del (short := dict(weights))["box_predictor.cls_score.bias"]
    broken = weights | {"box_predictor.cls_score.bias": torch.full((5,), torch.nan)}
    cases = (short, "box_predictor.cls_score.bias is missing"), (broken, "holds other values than finite")
    for model, message in cases:
        write_tensors(tmp_path / "detector.pt", state | dict(model=model))
        with pytest.raises(UserError, match=message):
            load_detector(tmp_path / "detector.pt", CPU, TORCH)


# ---------------------------------------------------------------- tools.detect


def test_pictures_and_results_are_written_for_own_images_at_their_own_size(tmp_path, finished):
    images = tmp_path / "images"
    for name, size in (("a.png", (40, 30)), ("b/c.jpg", (20, 90)), ("d.JPEG", (33, 1))):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(*size[::-1], seed=size[0]).save(images / name)
    (images / "notes.txt").write_text("no image")
    (images / "torn.png").write_bytes(b"\x89PNG no")
    found, out = apply(finished, images, tmp_path / "out", "--least-score", "0"), tmp_path / "out"
    assert found["images"] == 4 and found["unreadable"] == {"torn.png": "a PNG, which cannot be decoded"}
    sizes = {path.relative_to(out / "pictures").as_posix(): Image.open(path).size
             for path in (out / "pictures").rglob("*.*")}
    assert sizes == {"a.png": (256, 192), "b/c.png": (57, 256), "d.png": (256, 8)}
    told = json.loads((out / "images.json").read_text())
    assert told["images"] == [dict(id=1, file_name="a.png", height=30, width=40),
                              dict(id=2, file_name="b/c.jpg", height=90, width=20),
                              dict(id=3, file_name="d.JPEG", height=1, width=33)]
    assert [(each["id"], each["name"]) for each in told["categories"]] == [*zip(IDS, CLASSES, strict=True)]
    results = json.loads((out / "results.json").read_text())
    assert len(results) == found["detections"] > 10
    sides = {each["id"]: [each["height"], each["width"]] for each in told["images"]}
    for each in results:
        H, W = sides[each["image_id"]]
        x, y, width, height = each["bbox"]
        assert each["segmentation"]["size"] == [H, W] == list(decode(each["segmentation"]).shape)
        assert 0 <= x < x + width <= W + 1e-3 and 0 <= y < y + height <= H + 1e-3
        assert each["category_id"] in IDS and 0.05 <= each["score"] <= 1
    assert json.loads((out / "metrics.json").read_text())["unreadable"] == found["unreadable"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
def test_results_can_be_read_by_pycocotools(tmp_path, finished):
    coco = pytest.importorskip("pycocotools.coco")
    noise_image(30, 40).save(tmp_path / "one.png")
    found = apply(finished / "detector.pt", tmp_path / "one.png", tmp_path / "out")
    with contextlib.redirect_stdout(None):
        truth = coco.COCO(tmp_path / "out/images.json")
        results = truth.loadRes(str(tmp_path / "out/results.json"))
    assert len(results.anns) == found["detections"] > 0
    assert results.annToMask(results.anns[1]).shape == (30, 40)


def test_pictures_show_what_reaches_the_least_score(tmp_path, finished):
    noise_image(30, 40).save(tmp_path / "one.png")
    pictures = []
    for least in ("0", "1"):
        apply(finished, tmp_path / "one.png", tmp_path / least, "--least-score", least)
        pictures.append(np.asarray(Image.open(tmp_path / least / "pictures/one.png")))
    assert (pictures[0] != pictures[1]).any()


def test_an_image_is_seen_as_in_evaluation(tmp_path, cache):
    """The same detections, whether the tool reads the images or an evaluation."""
    write_tree(tmp_path / "tree", count=3)
    write_run(tmp_path / "run", img_size=(48, 48))
    apply(tmp_path / "run", tmp_path / "tree/val2017", tmp_path / "out")
    measure(tmp_path / "run", f"coco:{tmp_path}/tree", tmp_path / "measured", "--batch-size", 1)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "measured"))
    assert len(one) == len(two) > 0
    for mine, other in zip(one, two, strict=True):
        assert {name: mine[name] for name in mine if name != "image_id"} == \
            {name: other[name] for name in other if name != "image_id"}


def test_a_run_without_a_detector_a_full_output_folder_and_no_images_are_refused(tmp_path, finished):
    noise_image(9, 9).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no detector.pt: expected a finished run of train_detect.py"):
        apply(tmp_path, tmp_path / "a.png", tmp_path / "out")
    with pytest.raises(UserError, match="is there already and not an empty folder: name another"):
        apply(finished, tmp_path / "a.png", tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist: expected a folder of images, or images"):
        apply(finished, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="--least-score -1.0: expected 0 or more"):
        apply(finished, tmp_path / "a.png", tmp_path / "out", "--least-score", "-1")
    with pytest.raises(UserError, match="--least-score 50.0: expected 1 or less"):
        apply(finished, tmp_path / "a.png", tmp_path / "out", "--least-score", "50")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.bmp")
    with pytest.raises(UserError, match="what is written for them would have one name"):
        apply(finished, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- tools.evaluate


def test_a_detector_is_measured_on_objects_of_its_own_classes(tmp_path, cache):
    write_tree(tmp_path / "tree", count=4)
    write_run(tmp_path / "run")
    found = measure(tmp_path / "run", f"coco:{tmp_path}/tree", tmp_path / "out")
    assert list(found["box_classes"]) == list(found["mask_classes"]) == CLASSES and found["val_images"] == 4
    assert 0 <= found["box_AP"] < 60 and found["box_classes"]["nowhere"] is None
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert saved["box_AP"] == found["box_AP"] and saved["mask_classes"] == found["mask_classes"]
    ids = {each["image_id"] for each in json.loads((tmp_path / "out/results.json").read_text())}
    assert ids == {7, 17, 27, 37}
    again = measure(tmp_path / "run/detector.pt", f"coco:{tmp_path}/tree", tmp_path / "again", "--workers", 1,
                    "--batch-size", 2)
    assert again["box_AP"] == pytest.approx(found["box_AP"], abs=0.1)   # a rounding may change an order
    write_run(tmp_path / "shapes", classes=SHAPES, ids=[*range(1, len(SHAPES) + 1)])
    found = measure(tmp_path / "shapes", "shapes:10", tmp_path / "third", "--cache-dir", cache)
    assert found["val_images"] == 2 and list(found["box_classes"]) == list(SHAPES)


@pytest.mark.parametrize("data, flags, message", [
    ("shapes:10", [], "--data shapes:10 has 10 classes, arrow, circle, "),
    ("coco:{}/tree", ["--img-size", "32"], "--img-size: {}/run/detector.pt is a detector, which has the"),
    ("coco:{}/tree", ["--robustness", "imagenet-a:x"], "--robustness: {}/run/detector.pt is a detector"),
    ("coco:{}/nowhere", [], "nowhere"), ("{}/tree", [], "expected shapes"),
])
def test_data_and_flags_that_do_not_fit_a_detector_are_refused(tmp_path, cache, data, flags, message):
    write_tree(tmp_path / "tree", count=3)
    write_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        measure(tmp_path / "run", data.format(tmp_path), tmp_path / "out", "--cache-dir", cache, *flags)
    assert message.format(tmp_path) in str(error.value)
    assert not (tmp_path / "out").exists()
