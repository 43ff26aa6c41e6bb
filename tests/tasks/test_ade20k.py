"""Images with masks: how they are found, paired and checked, the published augmentation, and bad files."""

import colorsys
import io
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import noise_image
from masks import Painted, blocks, open_tree, write_tree
from PIL import Image

from mff_data.decode import DECODE_ERRORS
from mff_data.scenes import render_scenes
from mff_data.sources import check_output, fingerprint
from mff_data.views import advice_if_late, make_loader
from mff_min import rng
from mff_min.errors import UserError
from mff_min.stream import Stream
from mff_tasks import mask_views
from mff_tasks.ade20k import ADE20K_CLASSES, IGNORED, open_masks, open_pair
from mff_tasks.mask_views import MaskViews, distort, is_varied, nearest, scaled_box, shift_colours

MEAN = (0.485, 0.456, 0.406)


def refusal(work, *arguments, **options):
    """The text of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as error:
        work(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- sources


def test_ade20ks_masks_become_150_classes_and_0_is_none_of_them(tmp_path):
    write_tree(tmp_path, labels=(0, 1, 77, 150))
    source = open_tree(tmp_path, kind="ade20k")
    raw = np.asarray(Image.open(tmp_path / "annotations/training/001.png")).astype(int)
    assert np.array_equal(source.open_mask(1), np.where(raw == 0, IGNORED, raw - 1))
    assert len(set(source.classes)) == len(source.classes) == 150 == len(ADE20K_CLASSES)
    assert [source.classes[i] for i in (0, 76, 149)] == ["wall", "boat", "flag"]
    assert source.open(1).size == raw.shape[::-1] and source.name(1).endswith("images/training/001.jpg")


@pytest.mark.parametrize("splits, below, above", [
    (("training", "validation"), "", ""), (("train", "val"), "", ""), (("training", "val"), "a/b", ""),
    (("training", "validation"), "", "ADEChallengeData2016"),
])
def test_the_layouts_of_a_tree_are_found(tmp_path, splits, below, above):
    root = write_tree(tmp_path / above, splits=splits, below=below)
    said = []
    train = open_tree(tmp_path, say=said.append)
    val = open_tree(tmp_path, "val", num_classes=4)
    assert len(train) == len(val) == 4 and train.classes == val.classes == list("0123")
    assert val.mask_name(2) == str(root / "annotations" / splits[1] / below / "002.png")
    assert said[-1] == f"train: 4 images with masks of 4 classes in {root}/images/{splits[0]}"
    assert "the largest label is 3, in " in said[0] and "--num-classes 4" in said[0]
    assert len(fingerprint(train)) == 4 and not torch.equal(fingerprint(train), fingerprint(val))


def test_the_embedded_scenes_have_masks(tmp_path):
    train = open_masks("shapes:10", "train", tmp_path, len)
    assert train.classes[:2] == ["background", "circle"] and len(train.classes) == 11 and len(train) == 10
    want = render_scenes("train", range(10))
    for i in range(10):
        assert (train.open_mask(i) == want["labels"][i]).all() and (train.open(i) == want["images"][i]).all()
        assert train.open_mask(i).dtype == np.uint8 and train.open_mask(i).shape == train.open(i).shape[:2]
    assert len(open_masks("shapes:10", "val", tmp_path, len, num_classes=11)) == 2


def test_classes_have_the_names_of_a_file_and_0_can_be_no_class(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "names.txt").write_text("# of the data\nsky\n\ntree, small\nroad\n")
    source = open_tree(tmp_path, names=str(tmp_path / "names.txt"), reduce_zero_label=True, num_classes=3)
    assert source.classes == ["sky", "tree, small", "road"]
    raw = np.asarray(Image.open(tmp_path / "annotations/training/000.png"))
    want = np.where((raw == 0) | (raw == 255), IGNORED, raw.astype(int) - 1)
    assert np.array_equal(source.open_mask(0), want)
    assert open_tree(tmp_path, reduce_zero_label=True).classes == list("012")


def test_no_output_lies_among_images_or_masks(tmp_path):
    source = open_tree(write_tree(tmp_path))
    for place in ("images/training", "images/training/run", "annotations/training/new/run"):
        with pytest.raises(UserError, match="and all below that is read as images: expected another folder"):
            check_output(tmp_path / place, [source])
    check_output(tmp_path / "run", [source])


def test_no_advice_is_to_pack_images_with_masks(tmp_path):
    source = open_tree(write_tree(tmp_path))
    assert advice_if_late(source, 2) == "more --workers would help"


# ---------------------------------------------------------------- bad input


def test_missing_partners_are_named_in_both_directions(tmp_path):
    write_tree(tmp_path, count=9)
    for i in range(7):
        (tmp_path / f"annotations/training/{i:03}.png").unlink()
    (tmp_path / "images/training/008.jpg").unlink()
    said = refusal(open_tree, tmp_path)
    assert "images without an annotation: images/training/000.jpg, " in said and "004.jpg, ... (7)" in said
    assert "annotations without an image: annotations/training/008.png (1); expected pairs" in said


def test_names_of_the_full_ade20k_are_told(tmp_path):
    write_tree(tmp_path)
    for path in (tmp_path / "annotations" / "training").iterdir():
        path.rename(path.with_stem(f"{path.stem}_seg"))
    assert "_seg are the full ADE20K's: expected ADEChallengeData2016" in refusal(open_tree, tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda root: (root / "images/training").rename(root / "images/a"), "images has a, validation (2): e"),
    (lambda root: (root / "images/train").mkdir(), "has train, training, validation (3): expected one of"),
    (lambda root: (root / "annotations/validation").rename(root / "x"), "has training (1): expected one"),
    (lambda root: (root / "annotations").rename(root / "labels"), "annotations is no folder: expected one"),
    (lambda root: [path.unlink() for path in root.glob("annotations/training/*")], "no file that ends in .p"),
    (lambda root: [path.rename(path.with_suffix(".tif")) for path in root.glob("annotations/training/*")],
     "(4 others: 4 .tif)"),
    (lambda root: [path.unlink() for path in root.glob("images/training/*")], "holds no file that ends in "),
    (lambda root: noise_image(9, 9).save(root / "images/training/000.png"), "two images called 000: images/"),
])
def test_a_tree_that_is_none_is_refused(tmp_path, change, message):
    root = write_tree(tmp_path)
    change(root)
    assert message in refusal(open_tree, root)


@pytest.mark.parametrize("spec, options, message", [
    ("masks:", {}, "--data masks:: expected shapes, shapes:COUNT, ade20k:DIR or masks:DIR"),
    ("{}", {}, "expected shapes, shapes:COUNT, ade20k:DIR or masks:DIR"),
    ("masks:{}/no", {}, "/no does not exist: expected one with images/{training,validation}/*"),
    ("masks:{}/names.txt", {}, "/names.txt is a file: expected one with images/"),
    ("shapes:3", {}, "shapes:COUNT with COUNT of at least 5"),
    ("ade20k:{}", dict(names="{}/names.txt"), "--names is for masks:DIR"),
    ("shapes", dict(reduce_zero_label=True), "--reduce-zero-label is for masks:DIR"),
    ("ade20k:{}", dict(num_classes=21), "--num-classes 21: --data ade20k:{} has 150 classes; expected"),
    ("masks:{}", dict(num_classes=1), "--num-classes 1: expected 2 to 255"),
    ("masks:{}", dict(num_classes=256), "--num-classes 256: expected 2 to 255"),
    ("masks:{}", dict(names="{}/names.txt", num_classes=3), "names.txt has 4 classes; expected that number"),
    ("masks:{}", dict(names="{}/twice.txt"), "has names more than once: b (1); expected"),
    ("masks:{}", dict(names="{}/none.txt"), "none.txt has 0 lines: expected 2 to 255"),
    ("masks:{}", dict(names="{}/escape.txt"), r"escape.txt, line 2, is 'b\x1b[31m': expected a name in"),
    ("masks:{}", dict(names="{}/latin.txt"), r"latin.txt, line 1, is '\udce9': expected a name in UTF-8"),
    ("masks:{}", dict(names="{}/absent.txt"), "absent.txt cannot be read: No such file"),
    ("masks:{}", dict(num_classes=3), "000.png: label 3: expected 0 to 2, or 255 for pixels of no class; "
     "of masks:DIR, --num-classes or --names of train_segment.py says how"),
])
def test_a_flag_that_does_not_fit_is_refused(tmp_path, spec, options, message):
    write_tree(tmp_path)
    for name, text in dict(names="a\nb\nc\nd\n", twice="a\nb\nb\n", none="# a\n").items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "escape.txt").write_text("a\nb\x1b[31m\nc\nd\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\nb\nc\nd\n")
    options = {key: value.format(tmp_path) if isinstance(value, str) else value
               for key, value in options.items()}
    said = refusal(open_masks, spec.format(tmp_path), "train", tmp_path / "cache", len, **options)
    assert message.replace("{}", str(tmp_path)) in said


def as_png(image):
    """The bytes of a PNG, or of a JPEG where image is a pair with its name."""
    file = io.BytesIO()
    image, kind = image if isinstance(image, tuple) else (image, "PNG")
    image.save(file, kind)
    return file.getvalue()


def two_bits(size):
    """A grey PNG of two bits per pixel, which Pillow spreads over 0 ... 255."""
    image = Image.new("P", size, 1)
    image.putpalette([0, 0, 0, 85, 85, 85, 170, 170, 170, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, "PNG", bits=2)
    content = bytearray(file.getvalue())
    content[25] = 0                                                     # colour type: grey instead of palette
    header = bytes(content[12:29])
    content[29:33] = zlib.crc32(header).to_bytes(4, "big")
    return bytes(content)


WRONG = {
    "palette": (lambda size: as_png(Image.new("P", size, 2)), "a mask with a palette: expected 8-bit gr"),
    "rgb": (lambda size: as_png(Image.new("RGB", size)), "a mask of mode RGB: expected 8-bit grey value"),
    "rgba": (lambda size: as_png(Image.new("RGBA", size)), "a mask of mode RGBA: expected"),
    "alpha": (lambda size: as_png(Image.new("LA", size)), "a mask of mode LA: expected 8-bit"),
    "deep": (lambda size: as_png(Image.fromarray(np.ones(size[::-1], np.uint16))), "a mask of mode I;16"),
    "one bit": (lambda size: as_png(Image.new("1", size)), "a mask of mode 1: expected 8-bit grey values"),
    "two bits": (two_bits, "a mask of mode L (L;2): expected 8-bit grey values"),
    "jpeg": (lambda size: as_png((Image.new("L", size), "JPEG")), "a JPEG file: expected a PNG, which keeps"),
    "label": (lambda size: as_png(Image.new("L", size, 4)), "label 4: expected 0 to 3, or 255"),
    "size": (lambda size: as_png(Image.new("L", (size[0] - 1, size[1]))), "a mask of 89 x 48 pixels for an "
             "image of 90 x 48: expected the same size; Pillow's mask.resize(image.size, "),
    "turned": (lambda size: as_png(Image.new("L", size[::-1])), "a mask of 48 x 90 pixels for an image of "
               "90 x 48: expected the same size; the image's EXIF orientation, which is ignored here, may "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_mask_is_refused_before_training_with_its_name(tmp_path, kind):
    write_tree(tmp_path)
    content, message = WRONG[kind]
    path = tmp_path / "annotations/training/000.png"
    path.write_bytes(content(Image.open(path).size))
    said = refusal(open_tree, tmp_path, num_classes=4)
    assert said.startswith(f"{path}: {message}")
    assert said.endswith("(1 such among 4 masks looked at, more than --max-bad 0.01 allows)")
    source = open_tree(tmp_path, num_classes=4, max_bad=0.25)           # the run replaces it
    with pytest.raises(DECODE_ERRORS) as error:
        open_pair(source, 0)
    assert error.value.file == str(path)


@pytest.mark.parametrize("content, options, message", [
    (lambda size: as_png(Image.new("RGB", size)), {}, "000.png: a mask of mode RGB: expected"),
    (lambda size: as_png(Image.new("RGB", size)), dict(max_bad=1.0), "RGB: expected"),
    (lambda size: b"no image", {}, "000.png cannot be read (not an image); none of 4 images with"),
    (lambda size: as_png(Image.new("L", size, 255)), {}, "none of 4 masks looked at in "),
    (lambda size: as_png(Image.new("L", size, 255)), dict(num_classes=3), "a class, all are 255: expected "
     "labels of classes; write their numbers into the masks"),
    (lambda size: as_png(Image.new("L", size)), dict(num_classes=3, reduce_zero_label=True), "255 or 0: exp"),
    (lambda size: as_png(Image.new("L", size)), {}, "have no label above 0: expected two classes or more"),
])
@pytest.mark.parametrize("split, folder", [("train", "training"), ("val", "validation")])
def test_masks_that_are_all_of_no_use_are_refused(tmp_path, split, folder, content, options, message):
    write_tree(tmp_path)
    for path in (tmp_path / "annotations" / folder).iterdir():
        path.write_bytes(content(Image.open(path).size))
    assert message in refusal(open_tree, tmp_path, split, **options)


@pytest.mark.parametrize("labels, options, warned", [
    ((0, 255), dict(num_classes=2), True), ((0, 1, 255), dict(num_classes=2), False),
    ((1, 255), dict(num_classes=2), False), ((0, 1), {}, False),
    ((0, 1, 255), dict(num_classes=2, reduce_zero_label=True), False),
])
def test_black_and_white_masks_are_told_that_white_is_no_class(tmp_path, labels, options, warned):
    write_tree(tmp_path, labels=labels)
    said = []
    open_tree(tmp_path, say=said.append, **options)
    assert [text for text in said if text.startswith("warning")] == warned * [
        f"warning: 4 masks looked at in {tmp_path}/images/training hold 0 and 255 alone, and 255 is no "
        f"class: where it marks objects, write 1 in its place"]


def test_one_wrong_mask_among_many_is_left_to_the_run(tmp_path):
    write_tree(tmp_path, count=70)
    for i in range(2):                                                  # every second mask is looked at
        (tmp_path / f"annotations/training/{2 * i:03}.png").write_bytes(as_png(Image.new("RGB", (9, 9))))
        if i == 0:
            assert len(open_tree(tmp_path, num_classes=4)) == 70
    assert "000.png: a mask of mode RGB" in refusal(open_tree, tmp_path, num_classes=4)


def damage(root, split="training"):
    """One image or mask for each way of being bad; returns the names of the files."""
    def at(kind, i, ending):
        return root / kind / split / f"{i:03}.{ending}"
    good = at("images", 1, "jpg").read_bytes()
    at("images", 1, "jpg").write_bytes(good[:len(good) // 3])
    at("images", 2, "jpg").write_text("no image at all")
    good = at("annotations", 4, "png").read_bytes()
    at("annotations", 4, "png").write_bytes(good[:len(good) // 2])
    at("annotations", 5, "png").write_bytes(b"")
    bad = {"001.jpg", "002.jpg", "004.png", "005.png"}
    for i, (content, _) in enumerate(WRONG.values(), 10):
        path = at("annotations", i, "png")
        size = Image.open(path).size
        path.write_bytes(content(size))
        bad.add(path.name)
    at("annotations", 30, "png").unlink()
    at("annotations", 30, "png").symlink_to(root / "nowhere.png")
    return bad | {"030.png"}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_and_mismatched_files_are_replaced_and_named_and_workers_change_no_bit(tmp_path, workers):
    write_tree(tmp_path, count=40)
    names = damage(tmp_path)
    source = open_tree(tmp_path, num_classes=4, max_bad=0.5)
    views = MaskViews(source, (32, 48), 3, 4, 0, MEAN)
    batches = list(make_loader(views, Stream(40, 20, 20, 0, 0, 4), workers, False))
    bad = dict(entry for batch in batches for entry in batch["bad"])
    assert {name.rsplit("/", 1)[1] for name in bad} == names
    where = {name.rsplit("/", 1)[1]: name for name in bad}
    assert "/annotations/training/" in where["010.png"] and "/images/training/" in where["001.jpg"]
    assert "a mask with a palette" in bad[where["010.png"]]
    again = list(make_loader(views, Stream(40, 20, 20, 0, 0, 4), 0, False))
    for a, b in zip(batches, again, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        assert a["label"].shape == (20, 32, 48) and a["label"].dtype == torch.uint8
    assert any(batch["replaced"].any() for batch in batches)


# ---------------------------------------------------------------- augmentation


def colours_of(item):
    """{label: the colours of its pixels that are away from its edges}, and how many such pixels there are."""
    label, most = item["label"], F.max_pool2d(item["label"][None].float(), 7, 1, 3)[0]
    least = -F.max_pool2d(-item["label"][None].float(), 7, 1, 3)[0]
    found, inner = {}, (least == most).nonzero()
    for y, x in inner:
        found.setdefault(int(label[y, x]), set()).add(tuple(item["image"][:, y, x].tolist()))
    return found, len(inner)


@pytest.mark.parametrize("size, height, width", [((64, 64), 100, 130), ((48, 96), 70, 60),
                                                 ((64, 64), 40, 40)])
def test_labels_painted_into_the_image_stay_aligned_through_every_step(size, height, width):
    """Each label keeps a colour of its own: scaling, crop, flip, padding and distortion move both alike."""
    source = Painted([blocks(height, width, (0, 1, 2, 3), seed=i, side=20) for i in range(3)])
    views, seen = MaskViews(source, size, 3, 0, 0, MEAN), 0
    for epoch in range(12):
        for i in range(3):
            found, inner = colours_of(views[epoch, i])
            seen += inner
            # Resizing is off by one level at most, and distortion may treble it; other labels differ by 40.
            assert all((np.ptp(list(colours), axis=0) <= 6).all() for colours in found.values()), found
            assert found.get(IGNORED, {(124, 116, 104)}) == {(124, 116, 104)}       # the mean colour
    assert seen > 36 * size[0] * size[1] / 5


def test_a_view_is_the_whole_chain_by_hand(monkeypatch):
    """Of a view without distortion: the box scaled, by nearest pixel for the mask, flipped, padded."""
    monkeypatch.setattr(mask_views, "distort", lambda pixels, draws: pixels)
    mask = blocks(40, 50, (0, 1, 2), side=7)
    views = MaskViews(Painted([mask]), (64, 48), 3, 0, 0, MEAN)
    flips = 0
    for epoch in range(8):
        draws = rng.Rng(0, rng.CROP, epoch, 0)
        (top, left, H, W), (h, w) = scaled_box(mask, (64, 48), draws)
        want = np.full((64, 48), IGNORED, np.uint8)
        for y in range(h):
            for x in range(w):
                want[y, x] = mask[top + math.floor((y + 0.5) * H / h), left + math.floor((x + 0.5) * W / w)]
        if draws.uniform() < 0.5:
            flips += 1
            want[:h, :w] = want[:h, :w][:, ::-1]
        item = views[epoch, 0]
        assert np.array_equal(item["label"].numpy(), want)
        assert (item["image"].permute(1, 2, 0)[want == IGNORED] == torch.tensor([124, 116, 104])).all()
    assert 0 < flips < 8


def test_the_scale_is_the_published_one():
    """0.5 to 2 times what brings the short side to the crop's, the long side to four times it at most."""
    for H, W in ((300, 400), (400, 300), (100, 900)):
        mask = np.indices((H, W)).sum(axis=0).astype(np.uint8) % 7      # nothing is drawn again
        ratios = []
        for i in range(300):
            draws = rng.Rng(1, i)
            r = rng.Rng(1, i).uniform(0.5, 2)
            (top, left, part_h, part_w), (h, w) = scaled_box(mask, (64, 64), draws)
            height, width = (int(n * min(256 * r / max(H, W), 64 * r / min(H, W)) + 0.5) for n in (H, W))
            assert (h, w) == (min(64, height), min(64, width))
            assert abs(part_h - h * H / height) <= 1 and abs(part_w - w * W / width) <= 1
            assert 0 <= top <= H - part_h and 0 <= left <= W - part_w
            ratios.append(r)
        assert min(ratios) < 0.52 and max(ratios) > 1.97 and abs(np.mean(ratios) - 1.25) < 0.08


def test_a_crop_that_one_class_fills_is_drawn_again_at_most_ten_times(monkeypatch):
    asked = []
    monkeypatch.setattr(mask_views, "is_varied", lambda x, most: asked.append(x) or len(asked) == 4)
    scaled_box(np.zeros((100, 100), np.uint8), (32, 32), rng.Rng(0))
    assert len(asked) == 4
    asked.clear()
    monkeypatch.setattr(mask_views, "is_varied", lambda part, most: asked.append(part.shape))
    scaled_box(np.zeros((100, 100), np.uint8), (32, 32), rng.Rng(0))
    assert len(asked) == 10


@pytest.mark.parametrize("counts, varied", [
    ({0: 74, 1: 26}, True), ({0: 75, 1: 25}, False), ({0: 100}, False), ({255: 90, 1: 6, 2: 4}, True),
    ({255: 60, 1: 40}, False), ({255: 100}, False), ({3: 30, 4: 30, 5: 40}, True),
])
def test_a_part_is_varied_where_no_class_has_three_quarters_of_the_labelled_pixels(counts, varied):
    mask = np.repeat(list(counts), list(counts.values())).astype(np.uint8).reshape(10, 10)
    assert is_varied(mask, 0.75) == varied
    assert is_varied(np.tile(mask, 2)[:, :10], 0.75) == varied          # a part of an array


def test_nearest_is_pillows():
    mask = noise_image(23, 31).convert("L")
    for size in ((23, 31), (64, 50), (10, 12)):
        want = np.asarray(mask.resize(size[::-1], Image.Resampling.NEAREST))
        assert np.array_equal(nearest(np.asarray(mask), (0, 0, 23, 31), size), want)


def test_colours_are_shifted_as_colorsys_does():
    x = torch.from_numpy(np.array(noise_image(20, 20))).permute(2, 0, 1).float()
    x[:, 0, :5] = torch.tensor([0.0, 255, 7, 128, 1])                   # greys
    for saturation, hue in ((1, 0), (0.5, 0), (1.5, 0), (1, 0.6), (1.5, -0.6), (0.7, 0.3)):
        got = shift_colours(x, saturation, hue)
        for y, row in enumerate(x.permute(1, 2, 0)):
            for c, pixel in enumerate(row):
                h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
                want = colorsys.hsv_to_rgb((h + hue / 6) % 1, min(saturation * s, 1), v)
                assert torch.allclose(got[:, y, c], 255 * torch.tensor(want), atol=1e-3)


def test_photometric_distortion_is_the_published_formula():
    """Against its steps one by one on float64, for many keys; each of four changes comes half of the time."""
    image = torch.from_numpy(np.array(noise_image(70, 9))).permute(2, 0, 1)         # more than one strip
    seen = np.zeros(5)
    for key in range(200):
        draws = rng.Rng(3, key)
        on = np.array([draws.uniform() < 0.5 for _ in range(5)])
        brightness, contrast = 64 * draws.uniform() - 32, 0.5 + draws.uniform()
        saturation, hue = 0.5 + draws.uniform(), (36 * draws.uniform() - 18) / 30
        seen += on
        x = image.double()
        if on[0]:
            x = (x + brightness).clamp(0, 255)
        if on[1] and on[2]:
            x = (x * contrast).clamp(0, 255)
        if on[3] or on[4]:
            x = shift_colours(x, saturation if on[3] else 1.0, hue if on[4] else 0.0)
        if on[1] and not on[2]:
            x = (x * contrast).clamp(0, 255)
        assert (distort(image, rng.Rng(3, key)).double() - x).abs().max() <= 0.5 + 1e-3
    assert (abs(seen - 100) < 4 * math.sqrt(50)).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels_keep_their_colours_and_change_in_brightness(channels):
    image = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8)
    changed = [distort(image, rng.Rng(0, i)) for i in range(20)]
    assert all(one.shape == image.shape for one in changed)
    assert any(not torch.equal(one, image) for one in changed)


def test_a_mask_view_is_a_function_of_seed_epoch_and_index_and_draws_nothing_else():
    source = Painted([blocks(60, 80, (0, 1, 2, 3), seed=i) for i in range(3)])
    before = torch.get_rng_state()

    def view(seed, epoch, index):
        return MaskViews(source, (32, 32), 3, 6, seed, MEAN)[epoch, index]
    first, again = view(0, 0, 1), view(0, 0, 1)
    assert all(torch.equal(first[name], again[name]) for name in ("image", "label", "noise"))
    for other in ((0, 1, 1), (1, 0, 1), (0, 0, 2)):
        assert not torch.equal(view(*other)["image"], first["image"])
        assert not torch.equal(view(*other)["noise"], first["noise"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bytes_of_masks_count_for_shared_memory():
    source = Painted([blocks(60, 80, (0, 1))])
    assert MaskViews(source, (32, 48), 3, 6, 0, MEAN).item_bytes == 3 * 32 * 48 + 32 * 48 + 4 * 6
