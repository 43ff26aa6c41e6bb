"""The embedded scenes: what their docstrings claim."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mff_data.scenes import MOST, OUTLINES, RADIUS, load_scenes, polygon_of, render_scenes
from mff_data.shapes import DISTANCE, SHAPES

SIZE = 64


@pytest.fixture(scope="module")
def samples():
    return render_scenes("train", range(600))


def objects_of(samples):
    """[(i, object)] of all images."""
    return [(i, one) for i, row in enumerate(samples["objects"]) for one in row if one[0] >= 0]


def drawn(polygon, fine=8):
    """The pixels (S, S) that a polygon covers by more than half, by Pillow on a finer grid."""
    sheet = Image.new("1", (SIZE * fine, SIZE * fine))
    ImageDraw.Draw(sheet).polygon([tuple(point * fine) for point in polygon], fill=1)
    return np.asarray(sheet).reshape(SIZE, fine, SIZE, fine).mean(axis=(1, 3)) > 0.5


def test_a_sample_does_not_depend_on_the_chunk_or_the_order():
    together = render_scenes("val", range(30, 50))
    alone = [render_scenes("val", [i]) for i in range(49, 29, -1)][::-1]
    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]))


def test_train_and_val_share_no_image(samples):
    val = {image.tobytes() for image in render_scenes("val", range(200))["images"]}
    assert len(val) == 200 and not val & {image.tobytes() for image in samples["images"]}


def test_every_image_has_one_to_four_objects_and_every_class_is_common(samples):
    counts = (samples["objects"][..., 0] >= 0).sum(axis=1)
    assert set(counts) == set(range(1, MOST + 1)) and np.bincount(counts)[1:].min() > 60
    there = np.int64(samples["objects"][..., 0] >= 0)
    assert (np.diff(there, axis=1) <= 0).all()                          # objects first, then none
    classes = np.bincount([int(one[0]) for _, one in objects_of(samples)], minlength=len(SHAPES))
    assert classes.min() > 0.7 * classes.mean()


def test_objects_lie_in_the_image_and_do_not_touch(samples):
    for row in samples["objects"]:
        row = row[row[:, 0] >= 0]
        _, x, y, radius, _ = row.T
        assert (np.minimum(x, y) - radius > 0).all() and (np.maximum(x, y) + radius < SIZE).all()
        assert (RADIUS[0] * SIZE <= radius).all() and (radius <= RADIUS[1] * SIZE).all()
        apart = np.hypot(x - x[:, None], y - y[:, None]) - radius - radius[:, None]
        assert (apart[~np.eye(len(row), dtype=bool)] > 1).all()


def test_corners_lie_on_the_edges_that_are_drawn():
    for name, outline in OUTLINES.items():
        assert np.abs(DISTANCE[name](*outline.T)).max() < 1e-12, name
        middle = (outline + np.roll(outline, 1, axis=0)) / 2            # of each side; of an arc, beside it
        assert np.abs(DISTANCE[name](*middle.T)).max() < (0.25 if name == "ring" else 0.02), name


def test_polygons_cover_what_is_labelled(samples):
    total = np.zeros((len(SHAPES), 2))
    for i in range(200):
        found = np.zeros((SIZE, SIZE), np.uint8)
        for one in samples["objects"][i][samples["objects"][i][:, 0] >= 0]:
            found[drawn(polygon_of(one))] = one[0] + 1
        for k in range(len(SHAPES)):
            a, b = found == k + 1, samples["labels"][i] == k + 1
            total[k] += (a & b).sum(), (a | b).sum()
    assert (total[:, 0] / total[:, 1] > 0.96).all()


def test_hue_is_a_hint_of_the_class_and_the_background_is_nearly_grey(samples):
    right, back = [], []
    for i, one in objects_of(samples):
        pixels = samples["images"][i][samples["labels"][i] == one[0] + 1] / 255
        hue = colorsys.rgb_to_hsv(*pixels.mean(axis=0))[0]
        right.append(hue)
        red, green, blue = samples["images"][i][samples["labels"][i] == 0].mean(axis=0)
        back.append(max(red, green, blue) - min(red, green, blue))
    own = np.array([one[0] for _, one in objects_of(samples)])
    hues = np.exp(2j * np.pi * np.array(right))
    means = np.array([hues[own == k].mean() for k in range(len(SHAPES))])
    nearest = np.abs(hues[:, None] - means / np.abs(means)).argmin(axis=1)
    assert 0.5 < (nearest == own).mean() < 0.8                          # not enough alone
    assert np.mean(back) < 25


def test_the_cache_returns_what_is_drawn(tmp_path):
    lines = []
    found = load_scenes(tmp_path, "val", 10, 32, lines.append)
    want = render_scenes("val", range(10), 32)
    assert all(np.array_equal(found[name], want[name]) for name in want)
    assert lines[-1].startswith("scenes val: 10 / 10 images")
    load_scenes(tmp_path, "val", 10, 32, pytest.fail)


def test_bad_arguments_are_refused_by_value(tmp_path):
    for arguments, named in ((("test", [0]), "'test'"), (("train", [0], 16), "size 16")):
        with pytest.raises(ValueError, match=named):
            render_scenes(*arguments)
    with pytest.raises(ValueError, match="count 0"):
        load_scenes(tmp_path, "train", 0)
