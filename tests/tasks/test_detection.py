"""Detection measured and drawn: AP against pycocotools and by hand, evaluation with bad files, pictures."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_trees import write_tree
from PIL import ImageDraw

from mff_data.decode import AS_THEY_ARE
from mff_min.errors import Fault
from mff_min.kernels.ops import TORCH
from mff_run.log import BadSamples
from mff_run.world import World
from mff_tasks import detection
from mff_tasks.box_views import WholeBoxes
from mff_tasks.coco import open_boxes
from mff_tasks.detection import (
    KINDS,
    Found,
    Truth,
    above,
    at_home,
    average_precision,
    box_ious,
    detection_sheet,
    detector,
    entries,
    evaluate,
    mask_ious,
    match,
    measures,
    overlay,
    picture,
    shown,
    truth_of,
)
from mff_tasks.masks import box_of, decode, encode_all, targets

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


# ---------------------------------------------------------------- AP against pycocotools

IDS = [1, 3, 90]                                                        # of categories, with gaps


def random_blobs(draws, count, H, W, near=None):
    """(ellipses and rectangles as masks (count, H, W), of each the one of near that it is, moved, or -1)."""
    y, x = np.indices((H, W))
    found, like = [], np.full(count, -1)
    for i in range(count):
        if near is not None and len(near) and draws.random() < 0.8:
            like[i] = draws.integers(len(near))
            found.append(np.roll(near[like[i]], draws.integers(-3, 4, 2) // 2, axis=(0, 1)))
            continue
        a, b = draws.uniform(2, [W, H]) / draws.choice([2, 5, 9])
        u, v = (x - draws.uniform(0, W)) / a, (y - draws.uniform(0, H)) / b
        found.append(u ** 2 + v ** 2 < 1 if i % 2 else np.maximum(abs(u), abs(v)) < 1)
    return np.array(found, bool).reshape(count, H, W), like


def boxes_around(masks):
    boxes = box_of(masks).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def random_images(seed, images=25):
    """(Found, Truth) of images with crowds, ties of scores, objects of all sizes, and over 100 detections."""
    draws, found = np.random.default_rng(seed), []
    for i in range(images):
        H, W = draws.integers(30, 160, 2)
        masks, _ = random_blobs(draws, draws.integers(0, 7), H, W)
        masks = masks[masks.any(axis=(1, 2))]
        boxes = boxes_around(masks)
        labels = draws.integers(0, 2 + (i % 3 == 0), len(masks))        # the last class is rare
        true_labels = np.append(labels, 0)
        area = masks.sum(axis=(1, 2)).astype(np.float64)
        truth = Truth(labels, boxes, encode_all(torch.tensor(masks)), draws.random(len(masks)) < 0.2, area)
        count = 130 if i == 3 else draws.integers(0, 14)
        answers, like = random_blobs(draws, count, H, W, masks)
        boxes = boxes_around(answers) + draws.choice([0, 0.37], (count, 4))
        scores = draws.integers(0, 20, count) / 20
        labels = np.where(draws.random(count) < 0.1, 2, 0 if i == 3 else true_labels[like])
        found.append((Found(labels, scores, boxes, encode_all(torch.tensor(answers))), truth))
    return found


def coco_stats(pairs, kind):
    """The twelve numbers of pycocotools, and AP per class, of (Found, Truth) of images."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    annotations, results = [], []
    for i, (found, truth) in enumerate(pairs):
        for j, label in enumerate(truth.labels):
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=IDS[label],
                                    bbox=truth.boxes[j].tolist(), segmentation=truth.masks[j],
                                    area=float(truth.area[j]), iscrowd=int(truth.crowd[j])))
        results += entries(found, i, IDS)
    if kind == "mask":                                                  # else the areas of boxes count
        results = [{k: v for k, v in each.items() if k != "bbox"} for each in results]
    with contextlib.redirect_stdout(None):
        truth = coco.COCO()
        truth.dataset = json.loads(json.dumps(dict(
            images=[dict(id=i, height=1, width=1) for i in range(len(pairs))], annotations=annotations,
            categories=[dict(id=number, name=str(number)) for number in IDS])))
        truth.createIndex()
        run = cocoeval.COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))),
                                dict(box="bbox", mask="segm")[kind])
        run.evaluate()
        run.accumulate()
        run.summarize()
    each = run.eval["precision"][:, :, :, 0, -1]                        # (T, 101, G)
    return run.stats, [values[values > -1] for values in np.moveaxis(each, 2, 0)]


def measured(pairs, kind, classes=("a", "b", "c")):
    return average_precision([match(*pair, kind) for pair in pairs], classes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_ap_is_that_of_pycocotools(kind, seed):
    pairs = random_images(seed)
    stats, per_class = coco_stats(pairs, kind)
    got = measured(pairs, kind)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
    for name, want in zip(names, stats[:9], strict=True):
        assert got[name] == pytest.approx(100 * want, abs=1e-10) if want > -1 else got[name] is None, name
    for value, want in zip(got["classes"].values(), per_class, strict=True):
        assert value == pytest.approx(100 * want.mean(), abs=1e-10) if len(want) else value is None
    assert 5 < got["AP"] < 95 and got["APs"] != got["AP"] and got["AR1"] < got["AR100"]
    assert sum(truth.crowd.any() for _, truth in pairs) > 2


def test_ious_are_those_of_pycocotools():
    coco, draws = pytest.importorskip("pycocotools.mask"), np.random.default_rng(0)
    for _ in range(40):
        H, W = draws.integers(1, 50, 2)
        (found, _), (truth, _) = random_blobs(draws, 6, H, W), random_blobs(draws, 5, H, W)
        boxes, others = (draws.integers(0, 9, (count, 4)) / 2 for count in (6, 5))
        crowd = draws.random(5) < 0.4
        rles = [encode_all(torch.tensor(each)) for each in (found, truth)]
        assert np.array_equal(mask_ious(*rles, crowd), coco.iou(*rles, crowd.tolist()))
        kept = boxes[:, 2:].all(axis=1)
        want = np.reshape(coco.iou(boxes[kept], others, crowd.tolist()), (kept.sum(), 5))
        assert np.array_equal(box_ious(boxes[kept], others, crowd), want)
    for measure, (found, truth) in ((box_ious, (boxes, others)), (mask_ious, rles)):
        assert measure(found[:0], truth, crowd).shape == (0, 5)
        assert measure(found, truth[:0], crowd[:0]).shape == (6, 0)


# ---------------------------------------------------------------- AP by hand


def squares(*boxes, scores=None, labels=None, crowd=None, side=200):
    """A Found of boxes (x, y, width, height) in whole pixels with their masks, or without scores a Truth."""
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        mask[y:y + h, x:x + w] = True
    labels, rles = np.array(labels or [0] * len(boxes), np.int64), encode_all(torch.tensor(masks))
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    if scores is not None:
        return Found(labels, np.array(scores, np.float64), boxes, rles)
    crowd = np.array(crowd or [False] * len(boxes), bool)
    return Truth(labels, boxes, rles, crowd, boxes[:, 2] * boxes[:, 3])


A, B, FAR = (10, 10, 40, 40), (100, 100, 50, 50), (150, 10, 30, 30)
HAND_MADE = {
    "perfect": (squares(A, scores=[.9]), squares(A), 100, 100),
    "IoU .775": (squares((10, 10, 40, 31), scores=[.9]), squares(A), 60, 100),
    "false positive above": (squares(FAR, A, scores=[.9, .8]), squares(A), 50, 50),
    "one of two": (squares(A, scores=[.9]), squares(A, B), 100 * 51 / 101, 100 * 51 / 101),
    "duplicate below": (squares(A, A, scores=[.9, .8]), squares(A), 100, 100),
    "nothing": (squares(scores=[]), squares(A), 0, 0),
    "of another class": (squares(A, scores=[.9], labels=[1]), squares(A), 0, 0),
    "a crowd takes many": (squares((0, 0, 9, 9), (20, 20, 9, 9), A, scores=[.9, .8, .7]),
                           squares((0, 0, 100, 100), B, A, crowd=[True, False, False]), 100 * 51 / 101,
                           100 * 51 / 101),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made_cases(case, kind):
    found, truth, ap, ap50 = HAND_MADE[case]
    got = measured([(found, truth)], kind, ["a", "b"])
    assert got["AP"] == pytest.approx(ap, abs=1e-9) and got["AP50"] == pytest.approx(ap50, abs=1e-9)
    assert got["classes"] == {"a": pytest.approx(ap), "b": None} and got["AP_error"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_count_by_themselves(kind):
    """A small, a medium and a large object, of which the large one is missed."""
    small, medium, large = (0, 0, 20, 20), (30, 30, 60, 60), (95, 95, 100, 100)
    got = measured([(squares(small, medium, scores=[.5, .4]), squares(small, medium, large))], kind, ["a"])
    assert (got["APs"], got["APm"], got["APl"]) == (pytest.approx(100), pytest.approx(100), 0)
    got = measured([(squares(small, scores=[.5]), squares(small))], kind, ["a"])
    assert got["APm"] is got["APl"] is None and got["AR1"] == got["AR100"] == 100


def test_the_error_of_ap_is_the_jackknife_over_images():
    pairs = random_images(11, images=8)
    values = np.array([measured(pairs[:i] + pairs[i + 1:], "box")["AP"] for i in range(8)])
    want = math.sqrt(7 / 8 * ((values - values.mean()) ** 2).sum())
    assert measured(pairs, "box")["AP_error"] == pytest.approx(want, rel=1e-9) and want > 0


def test_the_jackknife_tells_how_much_ap_varies_from_sample_to_sample():
    """Images of one object and two detections, of which each is right or wrong."""
    draws, values, errors = np.random.default_rng(2), [], []
    places = [A, FAR]
    for _ in range(40):
        pairs = []
        for _ in range(80):
            hits = draws.random(2) < (0.5, 0.2)
            found = squares(*(places[0 if hit else 1] for hit in hits), scores=draws.random(2) + (0.3, 0))
            pairs.append((found, squares(A)))
        found = measured(pairs, "box", ["a"])
        values.append(found["AP"])
        errors.append(found["AP_error"])
    assert 0.7 < np.mean(errors) / np.std(values) < 1.4


def test_without_an_object_nothing_is_measured():
    for truth in (squares(), squares(A, crowd=[True])):
        pair = {kind: match(squares(A, scores=[.9]), truth, kind) for kind in KINDS}
        with pytest.raises(Fault, match="no object that counts"):
            measures([pair], ["a"])


# ---------------------------------------------------------------- evaluation


class Knowing(torch.nn.Module):
    """A model that knows the objects of a source's images by their pixels, but for the first `drop` ones.

    With wrong it calls what it finds first in every second image by the name of the next class.
    """

    def __init__(self, source, img_size, drop=0, wrong=False):
        super().__init__()
        views = WholeBoxes(source, img_size, 3, CFG.mean)
        self.images = [views[0, i]["image"].float() / 255 for i in range(len(source))]
        self.source, self.drop, self.wrong, self.seen = source, drop, wrong, []

    def detect(self, images, sizes):
        return [self.answer(*each) for each in zip(images, sizes, strict=True)]

    def answer(self, image, size):
        self.seen.append((tuple(image.shape), size))
        index = int(np.argmin([float((own - image).abs().sum()) for own in self.images]))
        objects = self.source.objects(index)
        kept = np.flatnonzero(~objects.crowd)[self.drop:]
        (h, w), (H, W), boxes = size, objects.size, torch.tensor(objects.boxes[kept])
        probs = targets(torch.tensor(objects.masks()[kept]), boxes, torch.arange(len(kept)), 28)
        labels = torch.tensor(objects.labels[kept])
        labels[:1] = (labels[:1] + self.wrong * index % 2) % 3
        return dict(boxes=(boxes * torch.tensor([w / W, h / H, w / W, h / H])).float(), masks=probs,
                    scores=torch.linspace(0.9, 0.5, len(kept)), labels=labels)


CFG = SimpleNamespace(img_size=(96, 96), batch_size=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), in_chans=3,
                      workers=0, timeout=60.0, picture_images=3)


def open_tree(folder, **options):
    data = f"coco:{write_tree(folder, **options)}"
    return open_boxes(data, "val", folder, lambda text: None, AS_THEY_ARE, 0.5)


def measure(source, folder, world=ALONE, cfg=CFG, path=None, **options):
    bad = BadSamples(folder, world, len(source), 0.9)
    model = Knowing(source, cfg.img_size, **options)
    return evaluate(model, source, cfg, world, TORCH, torch.float32, bad, path), set(bad.seen), model


def test_a_model_that_knows_the_objects_has_an_ap_near_100_at_the_images_own_sizes(tmp_path):
    source = open_tree(tmp_path)
    found, bad, model = measure(source, tmp_path)
    assert found["box_AP"] > 99 and found["mask_AP50"] > 99 and found["mask_AP"] > 60 and not bad
    assert found["val_images"] == 6 and found["box_classes"]["nowhere"] is None
    assert all(shape == (3, 96, 96) and max(size) == 96 for shape, size in model.seen)
    assert shown(found).startswith(f"box AP {found['box_AP']:.2f} +- ")
    assert shown(found).endswith("of 6 validation images")
    assert measure(source, tmp_path, drop=1)[0]["box_AP"] < 80


def falling(content):
    """Give the images of an annotation file ids that fall."""
    for entry, name in [(each, "id") for each in content["images"]] + [(each, "image_id") for each in
                                                                       content["annotations"]]:
        entry[name] = 1000 - entry[name]


def test_results_are_in_cocos_format_and_have_the_same_ap_in_pycocotools(tmp_path):
    """Ids of images fall here: pycocotools sorts by them, and detections of one score keep that order."""
    source, path = open_tree(tmp_path, count=9, change=falling), tmp_path / "results.json"
    found, _, _ = measure(source, tmp_path, wrong=True, path=path)
    results = json.loads(path.read_text())
    assert {each["image_id"] for each in results} <= set(source.image_ids)
    assert {each["category_id"] for each in results} <= {1, 3, 4}       # the file's own
    assert all(set(each) == {"image_id", "category_id", "bbox", "score", "segmentation"} for each in results)
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(None):
        truth = coco.COCO(tmp_path / "annotations" / "instances_val2017.json")
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            kept = [{k: v for k, v in each.items() if kind == "bbox" or k != "bbox"} for each in results]
            run = cocoeval.COCOeval(truth, truth.loadRes(kept), kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
            for i, key in enumerate(("AP", "AP50", "AP75", "APs")):
                assert found[f"{name}_{key}"] == pytest.approx(100 * run.stats[i], abs=1e-10)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_without_detections_and_named(tmp_path, workers):
    source = open_tree(tmp_path)
    cfg = SimpleNamespace(**vars(CFG) | dict(workers=workers))
    whole, model = measure(source, tmp_path, cfg=cfg)[0], Knowing(source, cfg.img_size)
    (tmp_path / "val2017" / "000007.png").write_text("no image")
    bad = BadSamples(tmp_path, ALONE, len(source), 0.9)
    found = evaluate(model, source, cfg, ALONE, TORCH, torch.float32, bad)
    assert [name.split("/")[-1] for name in bad.seen] == ["000007.png"]
    assert found["val_images"] == whole["val_images"] == 6 and len(source.objects(0).labels)
    assert found["box_AR100"] < whole["box_AR100"]


def test_every_image_counts_once_on_any_number_of_ranks(tmp_path):
    source = open_tree(tmp_path)
    want, _, _ = measure(source, tmp_path, drop=1)
    for size in (2, 3, 7):
        gathered = []

        class Rank(World):
            def all_gather(self, value, gathered=gathered):
                if self.held:                                           # the first are the bad samples
                    gathered.append(value)
                self.held.append(value)
                return [value] if value is self.held[0] else gathered
        for rank in range(size):                                        # the last has the parts of all
            with contextlib.suppress(KeyError):                         # those of later ranks are missing
                found, _, _ = measure(source, tmp_path, Rank(rank, size, 0, CPU), drop=1)
        assert found == want and sorted(i for part in gathered for i in part) == list(range(6))


def test_answers_are_brought_to_the_original_image_and_those_without_area_are_left_out():
    boxes = torch.tensor([[10.0, 5, 30, 25], [-9, -9, 200, 200], [70, 0, 80, 30], [5, 5, 5, 9]])
    answer = dict(boxes=boxes, scores=torch.tensor([0.9, 0.8, 0.7, 0.6]), labels=torch.tensor([3, 1, 2, 0]),
                  masks=torch.ones(4, 28, 28))
    found = at_home(answer, (30, 60), (90, 120))                        # 3 times as high, 2 times as wide
    assert found.labels.tolist() == [3, 1] and found.scores.tolist() == [0.9, 0.8]
    assert found.boxes.tolist() == [[20, 15, 40, 60], [0, 0, 120, 90]]
    assert decode(found.masks[0])[15:75, 20:60].all() and decode(found.masks[0]).sum() == 60 * 40
    assert [rle["size"] for rle in found.masks] == [[90, 120]] * 2
    nothing = at_home({name: value[:0] for name, value in answer.items()}, (30, 60), (90, 120))
    assert nothing.boxes.shape == (0, 4) and nothing.masks == [] and len(nothing.labels) == 0


def test_masks_are_pasted_in_parts(monkeypatch):
    draws = np.random.default_rng(0)
    boxes = torch.tensor([[x, x, x + 20, x + 30] for x in range(9)], dtype=torch.float32)
    answer = dict(boxes=boxes, scores=torch.linspace(0.9, 0.1, 9), labels=torch.arange(9),
                  masks=torch.tensor(draws.random((9, 28, 28)), dtype=torch.float32))
    want = at_home(answer, (50, 50), (70, 40))
    monkeypatch.setattr(detection, "MOST", 70 * 40 * 2)
    assert at_home(answer, (50, 50), (70, 40)).masks == want.masks and len(want.masks) == 9


@pytest.mark.parametrize("name", ["scores", "boxes"])
def test_answers_that_are_not_finite_are_no_answers(name):
    class Diverged(torch.nn.Module):
        def detect(self, images, sizes):
            answer = dict(boxes=torch.ones(2, 4), scores=torch.ones(2))
            answer[name] = answer[name] * math.nan
            return [answer]
    detect = detector(Diverged(), CFG.mean, CFG.std, CPU, TORCH, torch.float32)
    with pytest.raises(Fault, match="the detections of 1 in 1 images are not finite"):
        detect(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), [(9, 9)], [(9, 9)])


def test_the_truth_of_polygons_and_of_run_lengths(tmp_path):
    source = open_tree(tmp_path)
    for i in range(len(source)):
        objects = source.objects(i)
        truth = truth_of(objects)
        for mask, rle in zip(objects.masks(), truth.masks, strict=True):
            assert np.array_equal(decode(rle), mask)


# ---------------------------------------------------------------- pictures


def written_texts(draw):
    """What draw() writes: (its result, [(left, top, text)])."""
    written, original = [], ImageDraw.ImageDraw.text

    def note(self, place, text, *rest, **options):
        written.append((self._image, *self.textbbox(place, text, font=options.get("font")), text))
        return original(self, place, text, *rest, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", note)
        return draw(), written


def test_a_sheet_shows_truth_and_detections_with_masks_boxes_names_and_scores():
    classes = ["cat", "a class of a very long name indeed"]
    truth = squares(A, B, (0, 0, 200, 200), crowd=[False, False, True], labels=[0, 1, 0])
    found = squares((170, 2, 30, 40), (0, 150, 60, 50), scores=[0.876, 0.1], labels=[1, 0])
    image = np.full((200, 200, 3), 128, np.uint8)
    sheet, written = written_texts(lambda: detection_sheet([(image, truth, found)], classes, "step 3"))
    texts = [text for *_, text in written]
    assert {"step 3", "image", "truth", "detections", "cat", "cat (crowd)", "cat 10"} <= {*texts}
    assert f"{classes[1]} 88" in texts
    for tile, left, top, right, bottom, text in written:
        assert 0 <= left and right <= tile.width and 0 <= top and bottom <= tile.height, text
    pixels = np.asarray(sheet).reshape(-1, 3).astype(int)
    for label in (0, 1):
        assert (pixels == detection.class_colours()[label + 1]).all(axis=1).sum() > 50      # outlines
    assert len(above(found).labels) == 1 and above(found, 0.9).masks == []


def test_an_image_without_objects_is_shown_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (300, 260, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(overlay(image, (300, 260), Found(), [])), image)


def test_more_classes_than_colours_are_drawn():
    found = squares(A, scores=[0.9], labels=[999])
    names, image = [str(i) for i in range(1000)], np.zeros((200, 200, 3), np.uint8)
    assert overlay(image, (200, 200), found, names).size == (256, 256)


def test_a_picture_leaves_out_what_cannot_be_read(tmp_path):
    source = open_tree(tmp_path)
    model = Knowing(source, CFG.img_size)

    def draw():
        return picture(model, source, 6, CFG, CPU, TORCH, torch.float32, "step 3")
    sheet, written = written_texts(draw)
    assert any(text.startswith("disc 9") or text.startswith("box 9") or text.startswith("triangle 9")
               for *_, text in written)
    (tmp_path / "val2017" / "000007.png").write_text("no image")
    assert draw().height < sheet.height
    for path in (tmp_path / "val2017").iterdir():
        path.write_text("no image")
    assert draw() is None
