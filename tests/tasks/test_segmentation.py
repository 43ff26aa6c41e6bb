"""Segmentation measured and drawn: IoU, sliding windows, evaluation with bad files, pictures."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masks import COLOURS, Painted, blocks, open_tree, write_tree
from PIL import Image, ImageFont

from mff_min.errors import Fault
from mff_min.kernels.ops import TORCH
from mff_run.log import BadSamples
from mff_run.world import World
from mff_tasks import segmentation
from mff_tasks.ade20k import IGNORED
from mff_tasks.mask_views import WholeMasks
from mff_tasks.segmentation import (
    class_colours,
    classes_at,
    evaluate,
    iou,
    painted,
    picture,
    pixel_counts,
    predictor,
    segmentation_sheet,
    shown,
    slide,
    windows_over,
)

ALONE = World(0, 1, 0, torch.device("cpu"))
CPU = torch.device("cpu")


# ---------------------------------------------------------------- IoU


def brute_force(preds, labels, num_classes):
    """(mIoU, mAcc, aAcc, [IoU]) by a loop over pixels, in percent."""
    both, truth, pred = (np.zeros(num_classes) for _ in range(3))
    for p, t in zip(np.concatenate([x.ravel() for x in preds]), np.concatenate([x.ravel() for x in labels]),
                    strict=True):
        if t == IGNORED:
            continue
        truth[t] += 1
        if p < num_classes:
            pred[p] += 1
        both[t] += p == t
    per_class = [100 * both[g] / (truth[g] + pred[g] - both[g]) if truth[g] + pred[g] else None
                 for g in range(num_classes)]
    occurring = [x for x in per_class if x is not None]
    recalls = [100 * both[g] / truth[g] for g in range(num_classes) if truth[g]]
    return np.mean(occurring), np.mean(recalls), 100 * both.sum() / truth.sum(), per_class


def test_miou_is_that_of_a_loop_over_pixels_with_ignored_pixels_and_absent_classes():
    """Class 4 is nowhere, 5 is predicted on ignored pixels alone, 6 is predicted and never true."""
    draws = np.random.default_rng(0)
    labels = [draws.choice([0, 1, 2, 3, IGNORED], (13 + i, 17)).astype(np.uint8) for i in range(5)]
    preds = [np.where(draws.random(label.shape) < 0.5, label, draws.choice([0, 1, 2, 6], label.shape))
             for label in labels]
    for pred, label in zip(preds, labels, strict=True):
        pred[label == IGNORED] = 5
    preds[3][:] = IGNORED                                               # an image that could not be read
    counts = torch.stack([pixel_counts(torch.tensor(pred), torch.tensor(label), 7)
                          for pred, label in zip(preds, labels, strict=True)])
    found = iou(counts, list("abcdefg"))
    *means, per_class = brute_force(preds, labels, 7)
    assert np.allclose([found["mIoU"], found["mAcc"], found["aAcc"]], means, rtol=1e-12)
    assert list(found["iou"]) == list("abcdefg") and found["val_images"] == 5
    assert [x and round(x, 9) for x in found["iou"].values()] == [x and round(x, 9) for x in per_class]
    assert found["iou"]["e"] is found["iou"]["f"] is None and found["iou"]["g"] == 0
    assert shown(found).startswith(f"mIoU {means[0]:.2f} +- ")
    assert shown(found).endswith("of 5 validation images")


def test_the_error_of_miou_is_the_jackknife_over_images():
    draws = np.random.default_rng(1)
    labels = [draws.choice([0, 1, 2], (8, 8)).astype(np.uint8) for _ in range(9)]
    preds = [np.where(draws.random((8, 8)) < 0.2 + 0.08 * i, label, 0) for i, label in enumerate(labels)]
    labels.append(np.full((8, 8), IGNORED, np.uint8))                   # changes nothing
    preds.append(np.zeros((8, 8), np.uint8))
    counts = torch.stack([pixel_counts(torch.tensor(p), torch.tensor(t), 3)
                          for p, t in zip(preds, labels, strict=True)])
    without = [brute_force(preds[:i] + preds[i + 1:9], labels[:i] + labels[i + 1:9], 3)[0] for i in range(9)]
    want = math.sqrt(8 / 9 * ((without - np.mean(without)) ** 2).sum())
    found = iou(counts, list("abc"))
    assert found["mIoU_error"] == pytest.approx(want, rel=1e-9) and found["val_images"] == 9
    assert iou(counts[:1], list("abc"))["mIoU_error"] == 0


def test_the_jackknife_tells_how_much_miou_varies_from_sample_to_sample():
    draws, values, errors = np.random.default_rng(2), [], []
    for _ in range(200):
        truth = draws.integers(50, 100, (40, 1))
        hits = (truth * draws.beta(4, 2, (40, 1))).astype(int)          # of two classes, an image at a time
        other = truth - hits
        counts = np.stack([np.concatenate([hits, 2 * hits], 1), np.concatenate([truth, 2 * truth], 1),
                           np.concatenate([hits + other, 2 * hits], 1)], axis=1)
        found = iou(torch.tensor(counts), ["a", "b"])
        values.append(found["mIoU"])
        errors.append(found["mIoU_error"])
    assert 0.85 < np.mean(errors) / np.std(values) < 1.15


def test_without_a_labelled_pixel_nothing_is_measured():
    with pytest.raises(Fault, match="no pixel of the validation images has a class"):
        iou(torch.zeros(3, 3, 2, dtype=torch.int64), ["a", "b"])


# ---------------------------------------------------------------- windows


def local(images):
    """Logits at half the resolution."""
    return F.avg_pool2d(images, 2)


def placed(images):
    """Logits that depend on the place in the window."""
    h, w = images.shape[-2:]
    ramp = torch.arange(h * w, dtype=torch.float32).view(1, 1, h, w) / (h * w)
    return torch.cat([images[:, :1] + ramp, images[:, 1:2] * ramp], dim=1)


def test_one_window_is_the_whole_image():
    image = torch.randn(1, 3, 24, 32)
    want = F.interpolate(local(image), (24, 32), mode="bilinear", align_corners=False)
    assert torch.equal(slide(local, image, (24, 32), (16, 21)), want)


@pytest.mark.parametrize("size", [(40, 70), (24, 33), (25, 100), (100, 32), (47, 47)])
def test_windows_are_averaged_where_they_overlap_in_any_order_and_any_number_at_once(size, monkeypatch):
    (H, W), (h, w), image = size, (24, 32), torch.randn(1, 3, *size)
    total, count = np.zeros((2, H, W)), np.zeros((H, W))
    tops, lefts = (sorted({min(i * step, length - side) for i in range(99) if (i - 1) * step + side < length})
                   for length, side, step in ((H, h, 16), (W, w, 21)))
    for top in tops:
        for left in lefts:
            total[:, top:top + h, left:left + w] += placed(image[:, :, top:top + h, left:left + w])[0].numpy()
            count[top:top + h, left:left + w] += 1
    assert (count > 0).all()
    for order in (sorted, lambda x: sorted(x, reverse=True)):
        monkeypatch.setattr(segmentation, "windows_over", lambda *a, order=order: order(windows_over(*a)))
        for batch_size in (1, 3, 100):
            got = slide(placed, image, (h, w), (16, 21), batch_size)
            assert np.allclose(got[0].numpy(), total / count, atol=1e-5)


def test_the_last_window_ends_with_the_image():
    assert windows_over(512, 512, 341) == [0] and windows_over(300, 512, 341) == [0]
    assert windows_over(513, 512, 341) == [0, 1] and windows_over(853, 512, 341) == [0, 341]
    assert windows_over(854, 512, 341) == [0, 341, 342]                 # ceil((854 - 512) / 341) + 1 of them
    assert windows_over(1535, 512, 341) == [0, 341, 682, 1023]


def test_an_image_smaller_than_the_window_is_padded_with_the_mean_and_cut_off():
    image, seen = torch.randn(1, 3, 10, 40), []

    def look(images):
        seen.append(images)
        return placed(images)
    got = slide(look, image, (24, 32), (16, 21))
    assert got.shape == (1, 2, 10, 40) and [tuple(x.shape) for x in seen] == [(1, 3, 24, 32)] * 2
    assert torch.equal(seen[0][..., :10, :], image[..., :32]) and not seen[0][..., 10:, :].any()


@pytest.mark.parametrize("size", [(40, 60), (13, 9), (7, 90), (1, 1)])
def test_classes_at_a_size_are_those_of_logits_at_that_size(size):
    logits = torch.randn(1, 5, 17, 23)
    want = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    for most in (2 ** 26, 5 * size[1] * 3, 1):                          # all rows at once, three, one
        got = classes_at(logits, size, most)
        chosen = want.gather(0, got[None])[0]
        assert got.shape == size
        assert (chosen >= want.max(dim=0).values - 1e-5).all()          # but for ties by rounding


# ---------------------------------------------------------------- evaluation


class NearestColour(torch.nn.Module):
    """A segmenter that knows the painted colours: logits are minus the distances, at a fourth of the size."""

    def __init__(self, classes=4, pool=1):
        super().__init__()
        self.colours, self.pool = torch.tensor(COLOURS[:classes] / 255, dtype=torch.float32), pool

    def forward(self, images):
        distance = (images[:, None] - self.colours[None, :, :, None, None]).square().sum(dim=2)
        return F.avg_pool2d(-distance, self.pool), None


CFG = SimpleNamespace(img_size=(48, 48), batch_size=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), in_chans=3,
                      workers=0, timeout=60.0, picture_images=3)


def measure(source, folder, world=ALONE, cfg=CFG):
    bad = BadSamples(folder, world, len(source), 0.9)
    return evaluate(NearestColour(), source, cfg, world, TORCH, torch.float32, bad), set(bad.seen)


def test_a_model_that_knows_the_colours_has_an_miou_near_100_at_the_images_own_sizes(tmp_path):
    source = Painted([blocks(60 + 9 * i, 200 - 20 * i, (0, 1, 2, 3, IGNORED), seed=i, side=20)
                      for i in range(4)])
    found, bad = measure(source, tmp_path)
    assert found["mIoU"] > 90 and found["aAcc"] > 95 and found["val_images"] == 4 and not bad
    source.masks = [np.roll(mask, 20, axis=1) for mask in source.masks]
    source.open = lambda i: COLOURS[np.roll(source.masks[i], -20, axis=1)]          # the truth is another
    assert measure(source, tmp_path)[0]["mIoU"] < 50


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_a_miss_and_an_unreadable_mask_is_left_out_and_named(tmp_path, workers):
    write_tree(tmp_path, count=6, labels=(0, 1, 2, 3))
    source = open_tree(tmp_path, "val", num_classes=4)
    cfg = SimpleNamespace(**vars(CFG) | dict(workers=workers))
    whole, _ = measure(source, tmp_path, cfg=cfg)
    (tmp_path / "images/validation/002.jpg").write_text("no image")
    (tmp_path / "annotations/validation/004.png").write_bytes(b"")
    Image.new("L", (9, 9)).save(tmp_path / "annotations/validation/005.png")
    found, bad = measure(source, tmp_path, cfg=cfg)
    assert {name.split("/")[-1] for name in bad} == {"002.jpg", "004.png", "005.png"}
    assert found["val_images"] == 4 and whole["val_images"] == 6
    pixels = [source.open_mask(i).size for i in range(4)]
    assert found["aAcc"] == pytest.approx(whole["aAcc"] * (1 - pixels[2] / sum(pixels)), abs=1.5)


def test_every_image_counts_once_on_any_number_of_ranks(tmp_path):
    source = Painted([blocks(50, 70, (0, 1, 2, 3), seed=i, side=9) for i in range(5)])
    want, _ = measure(source, tmp_path)
    for size in (2, 3, 5):
        gathered = []

        class Rank(World):
            def all_gather(self, value, gathered=gathered):
                counts = [v for v in value.values() if isinstance(v, torch.Tensor)]     # else bad samples
                gathered.extend([value] * bool(counts))
                return gathered if counts else [value]
        for rank in range(size):                                        # the last has the parts of all
            with contextlib.suppress(KeyError):                         # those of later ranks are missing
                found, _ = measure(source, tmp_path, Rank(rank, size, 0, CPU))
        assert found == want and sorted(i for part in gathered for i in part) == list(range(5))


def test_the_image_is_scaled_to_the_short_side_and_to_four_times_it_at_most():
    source = Painted([np.zeros(size, np.uint8) for size in ((60, 90), (300, 30), (24, 24), (1000, 10))])
    views = WholeMasks(source, (48, 64), 3)
    sizes = [tuple(views[0, i]["image"].shape) for i in range(4)]
    assert sizes == [(3, 48, 72), (3, 192, 19), (3, 48, 48), (3, 192, 2)]
    assert [tuple(views[0, i]["label"].shape) for i in range(4)] == [mask.shape for mask in source.masks]


def test_logits_that_are_not_finite_are_no_answers():
    class Diverged(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 4, 8, 8), math.nan), None
    predict = predictor(Diverged(), 4, CFG.img_size, CFG.mean, CFG.std, 1, CPU, TORCH, torch.float32)
    with pytest.raises(Fault, match="the scores of 1 in 1 images are not finite"):
        predict(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), (48, 48))


# ---------------------------------------------------------------- pictures


def test_every_class_has_a_colour_of_its_own_that_depends_on_its_number_alone():
    colours = class_colours().astype(int)
    assert colours.shape == (256, 3) and len(np.unique(colours, axis=0)) == 256
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 999 * np.eye(256, dtype=int)
    assert apart[:16, :16].min() > 40 and apart[:150, :150].min() > 8
    mask = np.array([[0, 3], [IGNORED, 3]], np.uint8)
    assert (painted(mask)[mask != IGNORED] == colours[mask[mask != IGNORED]]).all()
    hatched = painted(np.full((9, 9), IGNORED, np.uint8))
    assert len(np.unique(hatched)) == 2                                 # lines, in no class's colour


def test_a_sheet_shows_image_truth_and_prediction_with_the_classes_that_occur():
    draws = np.random.default_rng(0)
    masks = [blocks(40 + 60 * i, 80, (0, 1, 2, IGNORED), seed=i) for i in range(2)]
    rows = [(COLOURS[mask], mask, np.where(mask == IGNORED, 7, mask)) for mask in masks]
    classes = [f"class {i} of {'many ' * draws.integers(1, 5)}words" for i in range(9)]
    written, measured = [], ImageFont.load_default(segmentation.TEXT)

    def note(draw, place, text, *rest, **options):
        written.append((*place, place[0] + measured.getlength(text), text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation.ImageDraw.ImageDraw, "text", note)
        sheet = segmentation_sheet(rows, classes, "step 3")
    texts = {text for *_, text in written}
    assert {"step 3", "image", "truth", "prediction", "no class", classes[7]} <= texts
    assert not {classes[3], classes[8]} & texts                         # they do not occur
    for i, (left, top, right, text) in enumerate(written):
        assert 0 <= left and right <= sheet.width and top + segmentation.TEXT <= sheet.height, text
        for other_left, other_top, other_right, _ in written[:i]:       # none overlaps another
            assert abs(top - other_top) >= segmentation.TEXT or right < other_left or other_right < left
    pixels = np.asarray(sheet).reshape(-1, 3)
    for label in (0, 1, 2, 7):
        assert (pixels == class_colours()[label]).all(axis=1).any()


def test_a_picture_leaves_out_what_cannot_be_read(tmp_path):
    write_tree(tmp_path, count=6)
    source = open_tree(tmp_path, num_classes=4)
    def drawn():
        return picture(NearestColour(), source, CFG.picture_images, CFG, CPU, TORCH, torch.float32, "step 1")
    sheets = [drawn()]
    for i in (0, 2):
        (tmp_path / f"images/training/{i:03}.jpg").write_text("no")
        sheets.append(drawn())
    heights = [sheet.height for sheet in sheets]
    assert heights[0] > heights[1] > heights[2]
    (tmp_path / "annotations/training/004.png").write_text("no")
    assert drawn() is None
