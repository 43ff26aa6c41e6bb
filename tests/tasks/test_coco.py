"""Images with objects: COCO's files and their faults, the embedded scenes, jittered and whole images."""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_trees import CATEGORIES, COLOURS, annotation, content, polygon, write_tree
from PIL import Image
from sources import ROOT

from mff_data.shapes import SHAPES
from mff_data.sources import check_output, fingerprint
from mff_data.views import advice_if_late, collate, make_loader
from mff_min import rng
from mff_min.errors import UserError
from mff_min.stream import Stream
from mff_tasks.box_views import (
    BoxViews,
    WholeBoxes,
    fitted,
    jittered_box,
    packed,
    seen_mask,
    targets,
    unpacked,
)
from mff_tasks.coco import Objects, match_classes, open_boxes
from mff_tasks.masks import box_of, encode, rasterise

MEAN = (0.485, 0.456, 0.406)
GREY = (124, 116, 104)                                                  # MEAN in 8 bits


def open_tree(root, split="train", say=lambda text: None, **options):
    return open_boxes(f"coco:{root}", split, "nowhere", say, **options)


def refusal(work, *arguments, **options):
    """The text of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as error:
        work(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- sources


def test_objects_are_those_of_the_file_by_image(tmp_path):
    write_tree(tmp_path, count=8, change=lambda found: [found[name].reverse() for name in found])
    for split in ("train", "val"):
        said = []
        source = open_tree(tmp_path, split, said.append)
        found = json.loads((tmp_path / f"annotations/instances_{split}2017.json").read_text())
        assert source.classes == list(CATEGORIES.values()) and source.category_ids == [1, 3, 4, 90]
        entries = {entry["id"]: entry for entry in found["images"]}
        wanted = {image: [one for one in found["annotations"] if one["image_id"] == image
                          and (split == "val" or not one["iscrowd"])] for image in entries}
        if split == "train":
            wanted = {image: ones for image, ones in wanted.items() if ones}
        assert source.image_ids.tolist() == list(wanted) and len(source) == len(wanted)
        assert source.num_objects == sum(map(len, wanted.values()))
        for i, (image, ones) in enumerate(wanted.items()):
            objects, entry = source.objects(i), entries[image]
            assert source.size(i) == objects.size == (entry["height"], entry["width"])
            assert source.name(i) == str(tmp_path / f"{split}2017" / entry["file_name"])
            ids = [source.category_ids[label] for label in objects.labels]
            assert ids == [one["category_id"] for one in ones]
            assert objects.bbox.tolist() == [one["bbox"] for one in ones]
            assert objects.area.tolist() == [one["area"] for one in ones]
            assert objects.crowd.tolist() == [bool(one["iscrowd"]) for one in ones]
            for segment, one in zip(objects.segments, ones, strict=True):
                if one["iscrowd"]:
                    assert segment["counts"] == one["segmentation"]["counts"]
                else:
                    assert [part.ravel().tolist() for part in segment] == one["segmentation"]
            assert np.array_equal(objects.boxes[:, 2:], objects.bbox[:, :2] + objects.bbox[:, 2:])
        last = f"{split}: {len(source)} images with {source.num_objects} objects of 4 classes in "
        assert said[-1] == f"{last}{tmp_path}/{split}2017"


def test_training_leaves_out_crowds_and_images_without_objects(tmp_path):
    write_tree(tmp_path, count=8)
    said = []
    train, val = open_tree(tmp_path, say=said.append), open_tree(tmp_path, "val")
    assert said[0] == "train: 1 image without objects and 1 crowd are left out, which evaluation alone uses"
    assert len(train) == 7 and len(val) == 8
    assert not any(train.objects(i).crowd.any() for i in range(7))
    assert val.objects(6).crowd.sum() == 1 and len(val.objects(7).labels) == 0
    assert val.objects(7).boxes.shape == (0, 4) and val.objects(7).masks().shape == (0, *val.size(7))


@pytest.mark.parametrize("splits, images", [
    (("train2017", "val2017"), ""), (("train", "val"), ""), (("train2014", "val2014"), ""),
    (("train_own", "val-2"), ""), (("train2017", "val2017"), "images"),
])
def test_the_layouts_of_a_tree_are_found(tmp_path, splits, images):
    write_tree(tmp_path, splits=splits, images=images)
    train, val = open_tree(tmp_path), open_tree(tmp_path, "val", num_classes=4)
    assert train.origin == str(tmp_path / images / splits[0]) and len(train) == 5 and len(val) == 6
    assert train.open(0).size == train.size(0)[::-1]
    match_classes(train, val)


def test_an_export_with_a_file_beside_the_images_is_read_after_the_lines_of_the_documents(
        tmp_path, monkeypatch):
    """Such exports count annotations from 0."""
    write_tree(tmp_path, splits=("train", "valid"))
    for split in ("train", "valid"):
        path = tmp_path / f"annotations/instances_{split}.json"
        found = json.loads(path.read_text())
        for one in found["annotations"]:
            one["id"] -= 1
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(found))
        path.unlink()
    lines, = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/detect.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "docs/detect.md", "exec"), {})
    assert len(open_tree(tmp_path)) == 5 and len(open_tree(tmp_path, "val")) == 6


def test_masks_are_those_of_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    write_tree(tmp_path)
    source = open_tree(tmp_path, "val")
    oracle = coco.COCO(str(tmp_path / "annotations/instances_val2017.json"))
    for i, image in enumerate(source.image_ids.tolist()):
        wanted = [oracle.annToMask(one) for one in oracle.loadAnns(oracle.getAnnIds([image]))]
        assert np.array_equal(source.objects(i).masks(), np.array(wanted).reshape(-1, *source.size(i)))


def test_segments_of_every_form_are_exact(tmp_path):
    """Two digits, many digits, parts, crossed lines, run lengths as numbers and as text."""
    mask = np.zeros((72, 96), bool)
    mask[10:30, 20:50] = mask[40:42, 60:] = True
    lengths = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]]))).tolist()
    counts = np.diff([0, *lengths, mask.size]).tolist()
    crossed = [10.0, 10.0, 40.0, 40.0, 40.0, 10.0, 10.0, 40.0]
    parts = [[10.1, 10.0, 20.7, 10.3, 15.9, 30.0], [50.0, 50.0, 60.0, 50.0, 60.0, 60.0, 50.0, 60.0]]
    box = dict(bbox=[1, 1, 60, 50], area=7)
    forms = [dict(segmentation=parts), dict(segmentation=[crossed]), dict(segmentation=encode(mask)),
             dict(segmentation=dict(size=[72, 96], counts=counts)),
             dict(segmentation=dict(size=[72, 96], counts=[*counts, 0]))]
    for digits in (0.0, 1e-9):                                          # are kept as hundredths, or as floats
        def change(found, digits=digits):
            last = 1 / 3 if digits else 0.33
            more = dict(segmentation=[[10 + digits, 10.0, 20.0, 10.0, 15.0, last]])
            found["annotations"] = [annotation(i + 1, 7, 3, crossed) | form | box
                                    for i, form in enumerate([*forms, more])]
        write_tree(tmp_path, change=change)
        source = open_tree(tmp_path)
        assert source.annotations.numbers.dtype == (np.float64 if digits else np.int32)
        objects = source.objects(0)
        masks = objects.masks()
        assert np.array_equal(masks[0], rasterise(parts, 72, 96)) and masks[0].sum() > 100
        assert np.array_equal(masks[1], rasterise([crossed], 72, 96)) and masks[1].sum() > 200
        assert np.array_equal(masks[2], mask) and np.array_equal(masks[3], mask)
        assert np.array_equal(masks[4], mask)
        assert [part.ravel().tolist() for part in objects.segments[0]] == parts
        assert objects.segments[5][0][0, 0] == 10 + digits


def test_a_changed_annotation_file_is_other_data(tmp_path):
    write_tree(tmp_path)
    before = fingerprint(open_tree(tmp_path))
    assert len(before) == 5 and torch.equal(before, fingerprint(open_tree(tmp_path)))
    path = tmp_path / "annotations/instances_train2017.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(found))
    assert not torch.equal(before, fingerprint(open_tree(tmp_path)))


def test_the_embedded_scenes_have_objects(tmp_path):
    train = open_boxes("shapes:20", "train", tmp_path, len)
    val = open_boxes("shapes:20", "val", tmp_path, len, num_classes=10)
    assert len(train) == 20 and len(val) == 4 and train.classes == list(SHAPES)
    assert train.category_ids == list(range(1, 11)) and train.image_ids[0] == 1
    assert train.num_objects == sum(len(train.objects(i).labels) for i in range(20)) > 20
    for i in range(20):
        objects = train.objects(i)
        masks = objects.masks()
        assert train.size(i) == objects.size == train.open(i).shape[:2] and not objects.crowd.any()
        assert np.array_equal(masks.sum(axis=(1, 2)), objects.area) and (objects.area > 20).all()
        assert np.abs(box_of(masks) - objects.boxes).max() <= 1.01
    assert not torch.equal(fingerprint(train), fingerprint(open_boxes("shapes:25", "train", tmp_path, len)))


def test_no_output_lies_among_images_or_annotations(tmp_path):
    source = open_tree(write_tree(tmp_path))
    for place in ("train2017", "train2017/run", "annotations/run"):
        with pytest.raises(UserError, match="and all below that is read as images: expected another folder"):
            check_output(tmp_path / place, [source])
    check_output(tmp_path / "run", [source])


def test_no_advice_is_to_pack_images_with_objects(tmp_path):
    assert advice_if_late(open_tree(write_tree(tmp_path)), 2) == "more --workers would help"


# ---------------------------------------------------------------- bad input

CORNERS = polygon(1, 20, 20, 9)


def altered(what, **values):
    """A change of the first image, annotation or category of an annotation file."""
    return lambda found: found[what][0].update(values)


def added(what, **values):
    """A change that appends a copy of the first entry with other values."""
    return lambda found: found[what].append(found[what][0] | values)


REFUSED = {
    "annotation id 0": (altered("annotations", id=0), "has annotation ids below 1: 0 (1); expected numbers "),
    "negative id": (altered("annotations", id=-3), "has annotation ids below 1: -3 (1); expected numbers "),
    "id twice": (added("annotations"), "uses an annotation id more than once: "),
    "id is text": (altered("annotations", id="7"), 'annotations[0].id: "7": expected a whole number'),
    "no image_id": (lambda found: found["annotations"][0].pop("image_id"), "annotations[0]: a dict: expected "
                    "an object with image_id"),
    "absent image": (altered("annotations", image_id=8), "annotations of images that it does not list: "),
    "absent category": (altered("annotations", category_id=2), "of categories that it does not list: "),
    "box of three": (altered("annotations", bbox=[1, 2, 3]), "annotations[0].bbox: a list: expected four nu"),
    "box of text": (altered("annotations", bbox=[1, 2, "3", 4]), "bbox: a list: expected four numbers, x, y"),
    "box of NaN": (altered("annotations", bbox=[1, math.nan, 3, 4]), "has a bbox or an area that is not fin"),
    "box of Inf": (altered("annotations", bbox=[1, 2, math.inf, 4]), "has a bbox or an area that is not fin"),
    "area of NaN": (altered("annotations", area=math.nan), "has a bbox or an area that is not finite, or hu"),
    "area of 1e11": (altered("annotations", area=1e11), "has a bbox or an area that is not finite, or huge"),
    "area of text": (altered("annotations", area="5"), 'annotations[0].area: "5": expected a number'),
    "no area": (lambda found: found["annotations"][0].pop("area"), "annotations[0] without area: expected"),
    "no mask": (lambda found: found["annotations"][0].pop("segmentation"), "without segmentation: expected"),
    "mask is null": (altered("annotations", segmentation=None), "segmentation: null: expected a list"),
    "crowd of 2": (altered("annotations", iscrowd=2), "annotations[0].iscrowd: 2: expected 0 or 1"),
    "flat polygon": (altered("annotations", segmentation=CORNERS), "segmentation[0]: 29.0: expected a list"),
    "text in polygon": (altered("annotations", segmentation=[[*CORNERS[1:], "9"]]), '"9": expected a number'),
    "polygon of NaN": (altered("annotations", segmentation=[[*CORNERS[1:], math.nan]]), "that are not finit"),
    "polygon of Inf": (altered("annotations", segmentation=[[*CORNERS[1:], -math.inf]]), "that are not fini"),
    "polygon of lists": (altered("annotations", segmentation=[[[1, 2], [3, 4], [5, 6]]]), "[0][0]: a list:"),
    "image id twice": (added("images", file_name="b.png"), "uses an image id more than once: 7 (1); expect"),
    "file twice": (added("images", id=99), "uses a file_name of an image more than once: 000007.png (1)"),
    "image without id": (lambda found: found["images"][0].pop("id"), "images[0] without id: expected one"),
    "height 0": (altered("images", height=0), "images[0].height: 0: expected a whole number of pixels, 1"),
    "height of a million": (altered("images", height=10 ** 6), "height: 1000000: expected a whole number"),
    "more than max_pixels": (altered("images", height=10 ** 5, width=10 ** 5), "lists images of more than 8"),
    "corner far away": (altered("annotations", segmentation=[[*CORNERS[2:], 9, -1e6]]), "finite, or huge: "),
    "box far away": (altered("annotations", bbox=[0, 0, 1e6, 5]), "has a bbox or an area that is not finite"),
    "path up": (altered("images", file_name="../a.png"), "a file_name that leaves the folder of the images:"),
    "absolute path": (altered("images", file_name="/a.png"), "has a file_name that leaves the folder of the"),
    "zero byte": (altered("images", file_name="a\0.png"), "images[0].file_name: "),
    "category id twice": (added("categories", name="other"), "uses a category id more than once: 1 (1); exp"),
    "category name twice": (added("categories", id=5), "uses the name of a category more than once: disc (1"),
    "category of control": (altered("categories", name="a\nb"), "expected a name of at most 200 letters, wi"),
    "no categories": (lambda found: found["categories"].clear(), "no categories: expected one or more"),
    "no annotations": (lambda found: found.pop("annotations"), "holds an object without annotations: expec"),
    "panoptic": (lambda found: found["annotations"][0].pop("category_id"), "annotations[0] without category"),
    "elsewhere": (lambda found: found.update(more=[found["annotations"][0]]), "objects with image_id outsid"),
    "no images": (lambda found: [found[name].clear() for name in ("images", "annotations")], "has no image"),
    "no objects": (lambda found: found["annotations"].clear(), "has no image with an object that is no crow"),
    "crowds alone": (lambda found: [one.update(iscrowd=1) for one in found["annotations"]], "that is no cr"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_not_clear_is_refused(tmp_path, name, split):
    """--max-bad allows none of it: it is not clear what belongs together."""
    change, message = REFUSED[name]
    write_tree(tmp_path, change=change)
    said = refusal(open_tree, tmp_path, split, max_bad=0.9)
    assert message in said and f"instances_{split}2017.json" in said


DROPPED = {
    "no polygon": (dict(segmentation=[]), "no polygon"),
    "empty polygon": (dict(segmentation=[[]]), "a polygon of fewer than three points, or of an odd number"),
    "two points": (dict(segmentation=[CORNERS[:4]]), "a polygon of fewer than three points, or of an odd nu"),
    "odd polygon": (dict(segmentation=[CORNERS[:-1]]), "a polygon of fewer than three points, or of an odd "),
    "one of two": (dict(segmentation=[CORNERS, CORNERS[:4]]), "a polygon of fewer than three points, or of"),
    "point": (dict(segmentation=[[5, 5, 5, 5, 5, 5]]), "a polygon of no area"),
    "line": (dict(segmentation=[[5, 5, 9, 5, 20, 5]]), "a polygon of no area"),
    "polygon outside": (dict(segmentation=[[-9, 5, -2, 5, -2, 20]]), "a polygon outside the image"),
    "box of no width": (dict(bbox=[5, 5, 0, 9]), "a box of no area"),
    "box of negative height": (dict(bbox=[5, 5, 9, -4]), "a box of no area"),
    "box outside": (dict(bbox=[-20, 5, 20, 9]), "a box outside the image"),
    "box above": (dict(bbox=[5, -20, 20, 20]), "a box outside the image"),
    "box to the right": (dict(bbox=[96, 5, 20, 9]), "a box outside the image"),
    "box below": (dict(bbox=[5, 72, 20, 9]), "a box outside the image"),
    "area below 0": (dict(area=-5), "an area below 0"),
    "RLE of another size": (dict(segmentation=dict(size=[72, 95], counts=[72 * 95])), "an RLE of another si"),
    "RLE too short": (dict(segmentation=dict(size=[72, 96], counts=[5])), "an RLE of 5 pixels: expected the"),
    "RLE of zeros": (dict(segmentation=dict(size=[72, 96], counts=[72 * 96])), "an RLE without a pixel"),
    "RLE below 0": (dict(segmentation=dict(size=[72, 96], counts=[-5])), "an RLE with a run below 0"),
    "RLE of text": (dict(segmentation=dict(size=[72, 96], counts="\x01")), "an RLE with a letter that stan"),
    "RLE cut": (dict(segmentation=dict(size=[72, 96], counts="o")), "an RLE that ends within a number"),
    "RLE of NaN": (dict(segmentation=dict(size=[72, 96], counts=[math.nan])), "an RLE without counts"),
    "RLE of nothing": (dict(segmentation={}), "an RLE without a size"),
    "RLE of a half": (dict(segmentation=dict(size=[72, 96], counts=[0.5, 6911.5])), "an RLE without counts"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_objects_of_no_use_are_left_out_and_named_or_refused(tmp_path, name):
    values, reason = DROPPED[name]

    def change(found):
        good = annotation(1, 7, 3, CORNERS)
        wrong = [good | dict(id=number) | values for number in (70, 71)]
        found["annotations"] = [good, *wrong, good | dict(id=4)]
    write_tree(tmp_path, change=change)
    said = []
    for split in ("train", "val"):
        source = open_tree(tmp_path, split, said.append, max_bad=0.5)
        assert len(source.objects(0).labels) == source.num_objects == 2
        assert all(part[0].ravel().tolist() == CORNERS for part in source.objects(0).segments)
    told = next(text for text in said if text.startswith("warning: "))
    assert told.startswith("warning: train: 2 of 4 objects are of no use and left out (")
    assert f"({reason}" in told and "annotation 70, 71 (2)" in told
    text = refusal(open_tree, tmp_path, max_bad=0.49)
    assert "has 2 of 4 objects that are of no use, more than --max-bad 0.49 allows (" in text
    assert reason in text


def test_an_object_that_is_partly_outside_is_kept(tmp_path):
    """COCO's boxes and polygons leave the image by a fraction of a pixel, and some lines cross."""
    crossed = [-4.0, 10.0, 40.0, 40.0, 40.0, 10.0, -4.0, 40.0]

    def change(found):
        found["annotations"] = [annotation(1, 7, 3, crossed)]
    source = open_tree(write_tree(tmp_path, change=change), max_bad=0)
    objects = source.objects(0)
    assert objects.boxes.tolist() == [[-4, 10, 40, 40]]
    coco = pytest.importorskip("pycocotools.mask")
    assert np.array_equal(objects.masks()[0], coco.decode(coco.frPyObjects([crossed], 72, 96))[..., 0])


def test_polygons_that_cross_themselves_are_counted_named_and_filled_by_cocos_rule(tmp_path):
    """What a line goes around twice is outside; lines that touch or go back do not cross."""
    bow, twice = [10, 10, 40, 40, 40, 10, 10, 40], [*CORNERS, *polygon(1, 24, 20, 9)]
    kept = [CORNERS, [10, 10, 40, 10, 40, 40, 25, 10], [10, 10, 40, 10, 40, 40, 40, 10, 10, 40]]

    def change(found):
        every = [bow, *kept, twice]
        found["annotations"] = [annotation(i, 7, 3, corners) for i, corners in enumerate(every, 1)]
    said = []
    source = open_tree(write_tree(tmp_path, change=change), say=said.append)
    told = "train: 2 of 5 objects looked at have polygons that cross themselves: annotation 1, 5 (2); they a"
    assert any(text.startswith(told) for text in said)
    masks = source.objects(0).masks()
    assert masks.shape == (5, 72, 96) and masks[0, 25, 12] and masks[0, 25, 38] and not masks[0, 38, 25]
    assert not masks[4, 20, 22] and masks[4, 20, 12] and masks[4, 20, 32]


@pytest.mark.parametrize("box, apart", [([20, 20, 30, 20], False), ([15, 18, 36, 28], False),
                                        ([20, 20, 50, 40], True), ([50, 50, 30, 20], True)])
def test_a_box_that_its_polygons_contradict_is_named(tmp_path, box, apart):
    """The third is x0, y0, x1, y1 of the polygon."""
    def change(found):
        corners = [20.0, 20.0, 50.0, 20.0, 50.0, 40.0, 20.0, 40.0]
        found["annotations"] = [annotation(i, 7, 3, corners) for i in (1, 2, 3)]
        found["annotations"][1]["bbox"] = box
    said = []
    open_tree(write_tree(tmp_path, change=change), say=said.append, max_bad=0)
    told = [text for text in said if text.startswith("warning: train: the bbox of 1 of 3 objects over")]
    assert len(told) == apart and all("annotation 2 (1); training takes boxes" in text for text in told)


def test_a_polygon_of_thousands_of_corners_costs_no_matrix_of_all_pairs(tmp_path):
    angle = 2 * np.pi * np.arange(4000) / 4000
    traced = (40 + 25 * np.stack([np.cos(angle), np.sin(angle)], axis=1)).ravel().tolist()

    def change(found):
        found["annotations"] = [annotation(1, 7, 3, traced)]
    write_tree(tmp_path, change=change)
    tracemalloc.start()
    source = open_tree(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.num_objects == 1 and peak < 4000 ** 2                 # bytes: an eighth of such a matrix


def test_five_are_named_of_many(tmp_path):
    def change(found):
        found["annotations"] = [annotation(i, 7, 3, CORNERS) | dict(image_id=i) for i in range(101, 109)]
    said = refusal(open_tree, write_tree(tmp_path, change=change))
    assert "does not list: 101, 102, 103, 104, 105, ... (8); expected the images of all" in said


@pytest.mark.parametrize("text, message", [
    (b"", "cannot be read: Expecting value"), (b"[]", "holds a list: expected an object"),
    (b'{"images": [], "images": []}', "it names images twice"), (b"\xff", "it is no UTF-8"),
    (b'{"a": ' * 60 + b"1" + b"}" * 60, "it is nested too deeply"), (b"{}", "without images: expected one"),
])
def test_a_file_that_is_no_annotation_file_is_refused(tmp_path, text, message):
    write_tree(tmp_path)
    (tmp_path / "annotations/instances_train2017.json").write_bytes(text)
    assert message in refusal(open_tree, tmp_path)


def rename_folder(root):
    (root / "train2017").rename(root / "elsewhere")


@pytest.mark.parametrize("change, message", [
    (lambda root: (root / "annotations").rename(root / "notes"), "has none called instances_train*.json"),
    (lambda root: (root / "annotations").rename(root / "notes"), "; docs/detect.md, Own data, shows how to"),
    (lambda root: (root / "annotations/instances_train2014.json").write_text("{}"),
     "instances_train2014.json, instances_train2017.json (2) called instances_train*.json: expected one"),
    (rename_folder, "train2017 is a folder: expected the images of instances_train2017.json there"),
    (lambda root: [path.write_text("no image") for path in root.glob("train2017/*")], "none of 5 images tha"),
    (lambda root: [path.unlink() for path in root.glob("train2017/*")], "6 of 6 images that "),
])
def test_a_tree_that_is_none_is_refused(tmp_path, change, message):
    change(write_tree(tmp_path))
    assert message in refusal(open_tree, tmp_path)


@pytest.mark.parametrize("spec, options, message", [
    ("coco:", {}, "--data coco:: expected shapes, shapes:COUNT or coco:DIR"),
    ("{}", {}, "expected shapes, shapes:COUNT or coco:DIR, in DIR annotations/instances_{train,val}*.json"),
    ("coco:{}/no", {}, "/no does not exist: expected one with annotations/"),
    ("coco:{}/file", {}, "/file is a file: expected one with annotations/"),
    ("shapes:3", {}, "shapes:COUNT with COUNT of at least 5"),
    ("coco:{}", dict(num_classes=5), "--num-classes 5: --data coco:{} has 4 classes; expected that number,"),
    ("shapes:10", dict(num_classes=11), "--num-classes 11: --data shapes:10 has 10 classes"),
])
def test_a_wrong_data_flag_is_refused(tmp_path, spec, options, message):
    write_tree(tmp_path)
    (tmp_path / "file").touch()
    said = refusal(open_boxes, spec.replace("{}", str(tmp_path)), "train", tmp_path, len, **options)
    assert message.replace("{}", str(tmp_path)) in said.replace(f"{tmp_path}/annotations", "annotations")


def test_a_listed_image_that_is_absent_counts_as_unreadable(tmp_path):
    write_tree(tmp_path, count=10)
    for name in ("000017", "000027"):
        (tmp_path / f"train2017/{name}.png").unlink()
    text = refusal(open_tree, tmp_path)
    assert "2 of 10 images that " in text and "000017.png, 000027.png (2), more than --max-bad 0.01" in text
    said = []
    source = open_tree(tmp_path, say=said.append, max_bad=0.2)
    assert len(source) == 9
    assert "count as images that cannot be read: 000017.png, 000027.png (2)" in said[0]


def test_a_file_of_another_size_than_its_annotations_is_counted_and_named(tmp_path):
    write_tree(tmp_path, count=10)
    names = [tmp_path / f"train2017/0000{i}7.png" for i in range(3)]
    for path in names:
        Image.open(path).resize((50, 40)).save(path)
    text = refusal(open_tree, tmp_path)
    assert f"{names[0]}: 50 x 40 pixels, and the annotations say 96 x 72: expected the same size" in text
    assert "(3 such among 9 images looked at, more than --max-bad 0.01 allows)" in text
    source = open_tree(tmp_path, max_bad=0.5)
    bad = BoxViews(source, (32, 32), 3, 0, 0, MEAN)[0, 0]["bad"]
    assert bad[0][0] == str(names[0]) and "50 x 40 pixels, and the annotations say" in bad[0][1]


def test_a_turned_photograph_is_told_of_its_orientation(tmp_path):
    write_tree(tmp_path)
    for path in tmp_path.glob("train2017/*"):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    assert "same size; its EXIF orientation, which is ignored here" in refusal(open_tree, tmp_path)


def test_categories_of_both_splits_must_be_the_same(tmp_path):
    write_tree(tmp_path / "a")
    write_tree(tmp_path / "b", change=lambda found: found["categories"][3].update(id=91))
    write_tree(tmp_path / "c", change=lambda found: found["categories"][0].update(name="ball"))
    train = open_tree(tmp_path / "a")
    match_classes(train, open_tree(tmp_path / "a", "val"))
    text = refusal(match_classes, train, open_tree(tmp_path / "b", "val"))
    assert "differ, by id 90: nowhere and none, 91: none and nowhere (2); expected the same" in text
    assert "by id 1: disc and ball (1)" in refusal(match_classes, train, open_tree(tmp_path / "c", "val"))


# ---------------------------------------------------------------- damaged files


def test_damaged_files_are_replaced_and_named_and_workers_change_no_bit(tmp_path):
    write_tree(tmp_path, count=41)
    names = set()
    for i in (3, 20):                                                   # 5 % of 40 with objects
        path = tmp_path / f"train2017/{10 * i + 7:06}.png"
        path.write_bytes(path.read_bytes()[:60])
        names.add(str(path))
    source = open_tree(tmp_path, max_bad=0.5)
    assert len(source) == 40
    views = BoxViews(source, (32, 48), 3, 4, 0, MEAN)
    runs = [list(make_loader(views, Stream(40, 20, 20, 0, 0, 4), workers, False)) for workers in (0, 2)]
    for a, b in zip(*runs, strict=True):
        for name in ("image", "boxes", "labels", "masks", "count", "noise", "replaced"):
            assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype
        assert a["bad"] == b["bad"] and a["masks"].shape[1:] == (32, 6)
        assert len(a["labels"]) == len(a["boxes"]) == len(a["masks"]) == a["count"].sum()
    assert {name for batch in runs[0] for name, _ in batch["bad"]} == names
    assert sum(int(batch["replaced"].sum()) for batch in runs[0]) == 4


def test_an_unreadable_image_of_validation_has_one_pixel_and_a_name(tmp_path):
    write_tree(tmp_path)
    path = tmp_path / "val2017/000017.png"
    path.write_bytes(b"no image")
    source = open_tree(tmp_path, "val", max_bad=0.5)
    [batch] = make_loader(WholeBoxes(source, (64, 64), 3, MEAN), [[(0, 0), (0, 1)]], 0, False)
    assert batch["replaced"].tolist() == [False, True] and batch["size"].tolist() == [[48, 64], [1, 1]]
    assert batch["original"].tolist() == [[72, 96], [73, 95]] and batch["bad"][0][0] == str(path)
    assert (batch["image"][1] == torch.tensor(GREY)[:, None, None]).all()


# ---------------------------------------------------------------- training views


class Painted:
    """A source in memory: a coloured square, disc and triangle each, on grey."""

    short_side, notes, is_split, num_objects = 0, (), True, 6

    def __init__(self, rle=False):
        self.found, self.drawn = content(3, seed=4)
        self.rle = rle

    def __len__(self):
        return 2

    def open(self, i):
        return np.array(self.drawn[i])

    def size(self, i):
        return self.open(i).shape[:2]

    def name(self, i):
        return f"painted {i}"

    def objects(self, i):
        image = self.found["images"][i]
        ones = [one for one in self.found["annotations"] if one["image_id"] == image["id"]]
        segments = [one["segmentation"] if one["iscrowd"] else
                    [np.array(part).reshape(-1, 2) for part in one["segmentation"]] for one in ones]
        if self.rle:
            segments = [encode(rasterise(one, *self.size(i))) if isinstance(one, list) else one
                        for one in segments]
        return Objects(self.size(i), np.array([one["category_id"] for one in ones]),
                       *(np.array([one[name] for one in ones], kind)
                         for name, kind in (("bbox", float), ("iscrowd", bool), ("area", float))), segments)


def eroded(mask, by):
    """The pixels of a mask (H, W) all of whose neighbours within so many pixels are in it."""
    return F.max_pool2d(F.pad(1 - mask.float()[None], [by] * 4, value=1.0), 2 * by + 1, 1)[0] == 0


@pytest.mark.parametrize("size", [(96, 96), (64, 120)])
@pytest.mark.parametrize("rle", [False, True])
def test_masks_and_boxes_stay_on_their_objects(size, rle):
    """Each class has a colour of its own: scaling, cut, mirror and padding move pixels and masks alike."""
    views, inside, outside = BoxViews(Painted(rle), size, 3, 0, 0, MEAN, scale=(0.3, 2.0)), 0, 0
    colours = torch.tensor([COLOURS[kind] for kind in COLOURS]).float()
    for epoch in range(40):
        for i in range(2):
            item = views[epoch, i]
            masks = unpacked(item["masks"], size[1])
            pixels = item["image"].permute(1, 2, 0).float()             # (H, W, 3)
            assert item["boxes"].tolist() == box_of(masks.numpy()).tolist() and masks.any(dim=(1, 2)).all()
            for mask, label in zip(masks, item["labels"].tolist(), strict=True):
                core = pixels[eroded(mask, 3)]
                inside += len(core)
                assert ((core - torch.tensor(COLOURS[label])).abs() <= 3).all()
            rest = pixels[eroded(~masks.any(dim=0), 3)]                 # no object's colour is there
            outside += len(rest)
            assert (torch.cdist(rest, colours) > 60).all()
    assert inside > 10_000 and outside > 100_000


def test_a_polygon_is_moved_by_what_the_pixels_are():
    """On each axis by the scale of the part, which is a whole number of the file's pixels; then mirrored."""
    square = np.array([[14, 12], [24, 12], [24, 17], [14, 17]])
    box, size = (2, 4, 20, 40), (40, 60)                                # twice as high, half as wide again
    moved = rasterise([[15, 20, 30, 20, 30, 30, 15, 30]], 40, 60)
    assert np.array_equal(seen_mask([square], box, size, False), moved) and moved.sum() == 150
    assert np.array_equal(seen_mask([square], box, size, True)[:, ::-1], moved)
    whole = rasterise([square], 30, 50)
    assert np.array_equal(seen_mask(encode(whole), box, (20, 40), False), whole[2:22, 4:44])
    assert np.array_equal(seen_mask(encode(whole), box, (20, 40), True), whole[2:22, 4:44][:, ::-1])


def test_the_jitter_is_the_published_one():
    """detectron2's ResizeScale and FixedSizeCrop, by hand: one random place in the room of both axes."""
    factors, flips = [], 0
    for H, W in ((300, 400), (400, 300), (90, 900)):
        for i in range(300):
            mirrored, s, place = rng.Rng(1, i).random(3)
            s = 0.1 + 1.9 * s
            scale = min(64 * s / H, 96 * s / W)
            whole = [max(int(side * scale + 0.5), 1) for side in (H, W)]
            want = [min(whole[0], 64), min(whole[1], 96)]
            room = [whole[axis] - want[axis] for axis in (0, 1)]
            box, size, flipped = jittered_box((H, W), (64, 96), (0.1, 2), rng.Rng(1, i))
            top, left, height, width = box
            assert list(size) == want and flipped == (mirrored < 0.5)
            first = left if not flipped else W - left - width           # in the mirrored image
            for start, length, own, axis in ((top, height, H, 0), (first, width, W, 1)):
                assert abs(length - want[axis] * own / whole[axis]) <= 1
                assert abs(start - round(place * room[axis]) * own / whole[axis]) <= 1.01
            assert 0 <= top <= H - height and 0 <= left <= W - width
            factors.append(s)
            flips += flipped
    assert min(factors) < 0.15 and max(factors) > 1.95 and 380 < flips < 520


def test_the_image_lies_at_the_top_left_and_the_rest_is_the_mean_colour():
    views, filled = BoxViews(Painted(), (96, 96), 3, 0, 0, MEAN), 0
    grey = torch.tensor(GREY)[:, None, None]
    for epoch in range(20):
        _, (h, w), _ = jittered_box(views.source.size(0), (96, 96), (0.1, 2), rng.Rng(0, rng.CROP, epoch, 0))
        image = views[epoch, 0]["image"]
        assert (image[:, h:] == grey).all() and (image[:, :, w:] == grey).all()
        filled += (image[:, :h, :w] != grey).any()
        assert not unpacked(views[epoch, 0]["masks"], 96)[:, h:].any()
    assert filled == 20


def test_objects_out_of_view_and_crowds_are_left_out():
    views = BoxViews(Painted(), (64, 64), 3, 0, 0, MEAN, scale=(2.0, 2.0))
    full = [int((~views.source.objects(i).crowd).sum()) for i in range(2)]
    counts = np.array([[len(views[epoch, i]["labels"]) for i in range(2)] for epoch in range(30)])
    assert (counts.max(axis=0) <= full).all() and counts.min() < min(full)
    wide = BoxViews(Painted(), (64, 64), 3, 0, 0, MEAN, scale=(1.0, 1.0))
    assert [len(wide[0, i]["labels"]) for i in range(2)] == full
    assert views.source.objects(1).crowd.sum() == 1


def test_a_view_is_a_function_of_seed_epoch_and_index_and_draws_nothing_else():
    before = torch.get_rng_state()

    def view(seed, epoch, index):
        return BoxViews(Painted(), (64, 64), 3, 6, seed, MEAN)[epoch, index]
    first, again = view(0, 0, 1), view(0, 0, 1)
    for name in ("image", "boxes", "labels", "masks", "noise"):
        assert torch.equal(first[name], again[name])
    for other in ((0, 1, 1), (1, 0, 1), (0, 0, 0)):
        assert not torch.equal(view(*other)["image"], first["image"])
        assert not torch.equal(view(*other)["noise"], first["noise"])
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_travel_as_bits():
    masks = np.random.default_rng(0).random((5, 20, 30)) < 0.4
    bits = torch.from_numpy(np.stack([packed(mask[:17, :27], (20, 30)) for mask in masks]))
    assert bits.shape == (5, 20, 4) and bits.dtype == torch.uint8
    got = unpacked(bits, 30)
    assert got.dtype == torch.bool and got.shape == (5, 20, 30)
    assert np.array_equal(got[:, :17, :27].numpy(), masks[:, :17, :27]) and not got[:, 17:].any()
    assert not got[:, :, 27:].any() and unpacked(bits[:0], 30).shape == (0, 20, 30)


def test_a_batch_becomes_the_objects_of_each_image():
    views = BoxViews(Painted(), (64, 64), 3, 2, 0, MEAN)
    items = [views[epoch, i] for epoch in range(3) for i in range(2)]
    nothing = {name: items[0][name][:0] for name in ("boxes", "labels", "masks")}
    items[2:4] = [items[2] | nothing, items[3] | nothing]
    found = targets(collate(items), 64, torch.device("cpu"))
    assert len(found) == 6
    for item, one in zip(items, found, strict=True):
        assert torch.equal(one["boxes"], item["boxes"]) and one["boxes"].dtype == torch.float32
        assert torch.equal(one["labels"], item["labels"]) and one["labels"].dtype == torch.int64
        assert torch.equal(one["masks"], unpacked(item["masks"], 64)) and one["masks"].shape[1:] == (64, 64)
    empty = targets(collate([item | nothing for item in items]), 64, torch.device("cpu"))
    assert [one["masks"].shape for one in empty] == [(0, 64, 64)] * 6


def test_the_bytes_of_masks_count_for_shared_memory():
    views = BoxViews(Painted(), (32, 50), 3, 6, 0, MEAN)
    assert views.item_bytes == 3 * 32 * 50 + 4 * 6 + 3 * (32 * 7 + 24)  # three objects per image


# ---------------------------------------------------------------- whole images


@pytest.mark.parametrize("size, filled", [((64, 64), (48, 64)), ((48, 96), (48, 64)),
                                          ((200, 128), (96, 128))])
def test_whole_images_fit_and_keep_their_aspect(size, filled):
    source = Painted()
    item = WholeBoxes(source, size, 3, MEAN)[0, 0]
    assert source.size(0) == (72, 96) and tuple(item["size"]) == filled == fitted((72, 96), size)
    assert item["image"].shape == (3, *size) and item["original"] == (72, 96) and not item["bad"]
    h, w = filled
    assert (item["image"][:, h:] == torch.tensor(GREY)[:, None, None]).all()
    assert (item["image"][:, :, w:] == torch.tensor(GREY)[:, None, None]).all()
    want = torch.from_numpy(source.open(0)).permute(2, 0, 1)[None]
    want = F.interpolate(want, filled, mode="bilinear", antialias=True)[0]
    assert torch.equal(item["image"][:, :h, :w], want)


def test_whole_images_of_any_aspect_are_at_least_a_pixel():
    assert fitted((1, 5000), (64, 64)) == (1, 64) and fitted((5000, 3), (64, 64)) == (64, 1)
    assert fitted((480, 640), (1024, 1024)) == (768, 1024)
