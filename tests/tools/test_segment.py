"""tools.segment and tools.evaluate on a finished segmenter: what they write, measure and refuse."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from images import noise_image
from masks import open_tree, write_tree
from PIL import Image

from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.kernels.ops import TORCH
from mff_min.vit import MODELS, VisionTransformer
from mff_run.files import write_tensors
from mff_tasks.attention import add_relative_positions
from mff_tasks.segmentation import class_colours, predictor
from mff_tasks.segmenter import find_segmenter, load_segmenter
from mff_tasks.upernet import Segmenter
from mff_weights.pretrained import Fusion
from tools import evaluate, segment

CPU = torch.device("cpu")
TOLD = dict(model="vit_test", img_size=(16, 24), patch_size=4, in_chans=3, width=6, rel_pos=True, fused=False,
            mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), white=None, reduce_zero_label=False)


def write_run(folder, classes=tuple("abcd"), trained=True, **changes):
    """A finished run's segmenter.pt, of random weights; returns (its path, the model)."""
    told = TOLD | changes
    torch.manual_seed(1)
    encoder = VisionTransformer(told["img_size"], in_chans=told["in_chans"], **MODELS["vit_test"])
    if told["rel_pos"]:
        add_relative_positions(encoder)
    fusion = Fusion((0, 6, 11), encoder.embed_dim) if told["fused"] else None
    model = Segmenter(encoder, len(classes), told["width"], fusion)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))           # else all logits are nearly equal
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": model.state_dict(), "config": told, "classes": list(classes)}
    write_tensors(folder / "segmenter.pt", content)
    return folder / "segmenter.pt", model.requires_grad_(False).eval()


def apply(run, images, out, *flags):
    line = [run, images, "--output-dir", out, "--device", "cpu", *flags]
    return segment.main(parse(segment.Config, list(map(str, line))))


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


@pytest.mark.parametrize("changes", [{}, dict(rel_pos=False), dict(fused=True, out_indices="0,6,11"),
                                     dict(in_chans=1, mean=(0.5,), std=(0.25,))])
def test_a_segmenter_comes_back_from_its_file_bit_for_bit(tmp_path, changes):
    path, model = write_run(tmp_path, **changes)
    assert find_segmenter(tmp_path) == find_segmenter(path) == path
    found = load_segmenter(path, CPU, TORCH)
    images = torch.randn(2, (TOLD | changes)["in_chans"], 16, 24)
    for got, want in zip(found.model(images), model(images), strict=True):
        assert torch.equal(got, want)
    assert found.classes == list("abcd") and found.mean == (TOLD | changes)["mean"]
    assert not found.model.training


@pytest.mark.parametrize("content, message", [
    (dict(model={}), "has no config, classes"),
    (dict(config=TOLD | dict(model="vit_x")), "is of model vit_x: expected one of vit_test"),
    (dict(config=TOLD | dict(width=None)), "has no sizes: expected patch_size, in_chans, width and img_size"),
    (dict(config=TOLD | dict(img_size=(16, 2.5))), "has no sizes: expected"),
    (dict(config=TOLD | dict(mean="dark")), "has no mean and std: expected numbers"),
    (dict(config=TOLD | dict(model=["vit_test"])), "is of model ['vit_test']: expected one of"),
    (dict(config=TOLD | dict(mean=(0.5, 0.5, math.nan))), "has no mean and std: expected numbers"),
    (dict(config=TOLD | dict(std=(1, 1, math.inf))), "has no mean and std: expected numbers"),
    (dict(config=TOLD | dict(mean=(10 ** 400,) * 3)), "has no mean and std: expected numbers"),
    (dict(config=TOLD | dict(fused=torch.zeros(2))), "has a fused or rel_pos that is no yes or no"),
    (dict(classes=["a", "b\nc", "d", "e"]), "has names of classes that are not: expected 1 to 200"),
    (dict(classes=["a", "b\ud800", "d", "e"]), "has names of classes that are not: expected 1 to 200"),
    (dict(classes=["a" * 10 ** 6, *"bcd"]), "has names of classes that are not: expected 1 to 200"),
    (dict(config=TOLD | dict(mean=(0.5,))), "--mean has 1 numbers: expected 3"),
    (dict(classes=[1, 2, 3, 4]), "has classes that are no text"),
    (dict(classes=list("aab")), "has 3 classes, a, a, b (3): expected 2 to 255, each once"),
    (dict(classes=list("abc")), "says vit_test, 16x24 pixels and width 6, and auxiliary_head"),
    (dict(config=TOLD | dict(width=10 ** 6)), "has no sizes: expected patch_size, in_chans"),
    (dict(config=TOLD | dict(width=65_535)), "width 65535, and auxiliary_head"),     # no memory is taken
    (dict(config=TOLD | dict(img_size=(65_532, 65_532))), "65532x65532 pixels and width 6, and encoder"),
    (dict(config=TOLD | dict(img_size=(15, 24))), "img_size 15x24 is not a multiple of patch_size 4"),
    (dict(config=TOLD | dict(rel_pos=False)), "and encoder.blocks.0.attn.relative"),
])
def test_a_file_that_is_no_segmenter_is_refused(tmp_path, finished, content, message):
    path = finished / "segmenter.pt"
    state = torch.load(path, weights_only=True) if set(content) != {"model"} else {}
    write_tensors(tmp_path / "segmenter.pt", state | content)
    with pytest.raises(UserError) as error:
        load_segmenter(tmp_path / "segmenter.pt", CPU, TORCH)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path, finished):
    state = torch.load(finished / "segmenter.pt", weights_only=True)
    weights = state["model"]
    del (short := dict(weights))["decode_head.conv_seg.bias"]
    broken = weights | {"decode_head.conv_seg.bias": torch.full((4,), torch.nan)}
    cases = (short, "decode_head.conv_seg.bias is missing"), (broken, "holds other values than finite")
    for model, message in cases:
        write_tensors(tmp_path / "segmenter.pt", state | dict(model=model))
        with pytest.raises(UserError, match=message):
            load_segmenter(tmp_path / "segmenter.pt", CPU, TORCH)


def test_a_variance_below_0_is_refused(tmp_path, finished):
    state = torch.load(finished / "segmenter.pt", weights_only=True)
    name = next(name for name in state["model"] if name.endswith("running_var"))
    model = state["model"] | {name: -state["model"][name]}
    write_tensors(tmp_path / "segmenter.pt", state | dict(model=model))
    with pytest.raises(UserError, match=f"{name} is below 0"):
        load_segmenter(tmp_path / "segmenter.pt", CPU, TORCH)


# ---------------------------------------------------------------- tools.segment


def test_a_disk_that_goes_away_is_waited_for(tmp_path, finished, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for name in "abc":
        noise_image(9, 9).save(images / f"{name}.png")
    whole = segment.whole_image
    back = threading.Timer(0.5, lambda: (tmp_path / "away").rename(images))

    def leave(*given):
        if images.exists():                                             # the first of them is read
            images.rename(tmp_path / "away")
            monkeypatch.setattr(segment, "whole_image", whole)
            back.start()
        return whole(*given)
    monkeypatch.setattr(segment, "whole_image", leave)
    found = apply(finished, images, tmp_path / "out")
    back.join()
    assert found == dict(images=3, unreadable={}) and len(list((tmp_path / "out/masks").iterdir())) == 3


def test_masks_and_overlays_are_written_for_own_images_at_their_own_size(tmp_path, finished):
    images = tmp_path / "images"
    for name, size in (("a.png", (40, 30)), ("b/c.jpg", (20, 90)), ("d.JPEG", (33, 1)),
                       ("large.jpg", (80, 120))):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(*size[::-1], seed=size[0]).save(images / name)
    (images / "notes.txt").write_text("no image")
    (images / "torn.png").write_bytes(b"\x89PNG no")
    found = apply(finished, images, tmp_path / "out")
    assert found == dict(images=5, unreadable={"torn.png": "a PNG, which cannot be decoded"})
    masks = {path.relative_to(tmp_path / "out/masks").as_posix(): Image.open(path)
             for path in (tmp_path / "out/masks").rglob("*.*")}
    assert {name: mask.size for name, mask in masks.items()} == {"a.png": (40, 30), "b/c.png": (20, 90),
                                                                 "d.png": (33, 1), "large.png": (80, 120)}
    assert all(mask.mode == "L" for mask in masks.values())
    assert (tmp_path / "out/classes.txt").read_text() == "a\nb\nc\nd\n"
    assert json.loads((tmp_path / "out/metrics.json").read_text())["unreadable"] == found["unreadable"]

    model = load_segmenter(finished / "segmenter.pt", CPU, TORCH)
    predict = predictor(model.model, 4, (16, 24), model.mean, model.std, 1, CPU, TORCH, torch.float32)
    pixels = Image.open(images / "a.png").resize((21, 16), Image.Resampling.BILINEAR)
    want = predict(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None], (30, 40))
    assert (np.asarray(masks["a.png"]) == want.numpy()).mean() > 0.97   # Pillow rounds elsewhere
    sheet = np.asarray(Image.open(tmp_path / "out/overlays/a.png"))
    assert sheet.shape[0] > 256 * 30 / 40 and sheet.shape[1] > 256
    for label in np.unique(want):                                       # each in the legend
        assert (sheet == class_colours()[label]).all(axis=2).any()


def test_one_image_may_be_given_and_its_name_alone_counts(tmp_path, finished):
    noise_image(30, 40).save(tmp_path / "one.png")
    apply(finished / "segmenter.pt", tmp_path / "one.png", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["one.png", "one.png"]


def test_what_is_written_can_be_trained_on(tmp_path, finished):
    for split in ("training", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i in range(2):
            noise_image(30, 40, seed=i).save(tmp_path / "images" / split / f"{i}.jpg")
    apply(finished, tmp_path / "images", tmp_path / "out")
    (tmp_path / "out/masks").rename(tmp_path / "annotations")
    source = open_tree(tmp_path, names=str(tmp_path / "out/classes.txt"))
    assert source.classes == list("abcd") and source.open_mask(1).shape == (30, 40)


@pytest.mark.parametrize("make, message", [
    (lambda path: path / "nowhere", "nowhere does not exist: expected a folder of images, or images"),
    (lambda path: path / "empty", "holds no images (1 other files): expected files that end in"),
    (lambda path: path / "twice", "differ in their endings alone: a.jpg, a.png (2); what is written"),
    (lambda path: path / "torn", "none of the 1 images in "),
])
def test_images_that_are_none_are_refused(tmp_path, finished, make, message):
    for name in ("empty", "twice", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/a.txt").write_text("a")
    (tmp_path / "torn/a.png").write_text("a")
    for name in ("a.jpg", "a.png", "b.png"):
        noise_image(9, 9).save(tmp_path / "twice" / name)
    with pytest.raises(UserError) as error:
        apply(finished, make(tmp_path), tmp_path / "out")
    assert message in str(error.value)


def test_a_run_without_a_segmenter_and_a_full_output_folder_are_refused(tmp_path, finished):
    noise_image(9, 9).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no segmenter.pt: expected a finished run of train_segment.py"):
        apply(tmp_path, tmp_path / "a.png", tmp_path / "out")
    with pytest.raises(UserError, match="is there already and not an empty folder: name another"):
        apply(finished, tmp_path / "a.png", tmp_path)
    (tmp_path / "below").mkdir()
    noise_image(9, 9).save(tmp_path / "below/b.png")
    for out in (tmp_path / "out", tmp_path / "below/new/out"):
        with pytest.raises(UserError, match="and all below that is read as images: expected another folder"):
            apply(finished, tmp_path, out)
        assert not out.exists()


# ---------------------------------------------------------------- tools.evaluate


def test_a_segmenter_is_measured_on_masks_of_its_own_classes(tmp_path, finished, cache):
    write_tree(tmp_path / "tree", count=3)
    found = measure(finished, f"masks:{tmp_path}/tree", tmp_path / "out")
    assert list(found["iou"]) == list("abcd") and found["val_images"] == 3 and 0 <= found["mIoU"] < 70
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert saved["mIoU"] == found["mIoU"] and saved["iou"] == found["iou"]
    again = measure(finished / "segmenter.pt", f"masks:{tmp_path}/tree", tmp_path / "again", "--workers", 1,
                    "--batch-size", 2)
    assert again["iou"] == pytest.approx(found["iou"], abs=0.1)         # a rounding may change a pixel
    write_run(tmp_path / "shapes", classes=["background", "circle", "ring", "crescent", "triangle", "square",
                                            "star", "cross", "heart", "arrow", "flower"])
    found = measure(tmp_path / "shapes", "shapes:10", tmp_path / "third", "--cache-dir", cache)
    assert found["val_images"] == 2 and found["iou"].keys() >= {"background", "flower"}


def test_a_zero_label_that_was_left_out_in_training_is_left_out_in_the_measurement(tmp_path):
    write_tree(tmp_path / "tree", count=2, labels=(0, 1, 2))
    write_run(tmp_path / "run", classes=["sky", "sea"], reduce_zero_label=True)
    for path in (tmp_path / "tree/annotations/validation").iterdir():
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 1)).save(path)
    found = measure(tmp_path / "run", f"masks:{tmp_path}/tree", tmp_path / "out")
    assert found["mAcc"] == found["aAcc"] == pytest.approx(found["iou"]["sky"])        # the only label


@pytest.mark.parametrize("data, flags, message", [
    ("shapes:10", [], "--data shapes:10 has 11 classes, arrow, background, circle, "),
    ("ade20k:{}/tree", [], "tree has 150 classes"),
    ("masks:{}/tree", ["--img-size", "32"], "--img-size: {}/run/segmenter.pt is a segmenter, which has the"),
    ("masks:{}/tree", ["--robustness", "imagenet-a:x"], "--robustness: {}/run/segmenter.pt is a segmenter"),
    ("masks:{}/nowhere", [], "nowhere does not exist"), ("{}/tree", [], "expected shapes, shapes:COUNT"),
])
def test_data_and_flags_that_do_not_fit_a_segmenter_are_refused(tmp_path, cache, data, flags, message):
    write_tree(tmp_path / "tree", count=2)
    write_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        measure(tmp_path / "run", data.format(tmp_path), tmp_path / "out", "--cache-dir", cache, *flags)
    assert message.format(tmp_path) in str(error.value)
    assert not (tmp_path / "out").exists()
