"""Masks of objects: polygons and run lengths against pycocotools, targets and pasting as defined."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mff_tasks import masks
from mff_tasks.masks import (
    area,
    box_of,
    counts_of,
    decode,
    encode,
    encode_all,
    from_turns,
    paste,
    rasterise,
    sample_weights,
    targets,
    turns_of,
)

# ---------------------------------------------------------------- polygons


def random_polygon(draws, H, W, kind):
    """Corners (m, 2) of a polygon that crosses itself and leaves the image; of some kinds on a grid."""
    m, spread = draws.integers(3, 14), draws.choice([0.5, 1, 2, 6, 300])
    points = draws.normal(size=(m, 2)) * spread * (W / 2, H / 2) + (W / 2, H / 2)
    if kind == 3:
        points[draws.integers(m)] = points[draws.integers(m)]
    return np.round(points * (1, 2, 10)[kind]) / (1, 2, 10)[kind] if kind < 3 else points


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
def test_polygons_are_filled_as_by_pycocotools_bit_for_bit():
    coco, draws, filled = pytest.importorskip("pycocotools.mask"), np.random.default_rng(0), 0
    for i in range(1500):
        H, W = draws.integers(1, 60, 2).tolist()
        polygons = [random_polygon(draws, H, W, i % 5).ravel().tolist() for _ in range(1 + i % 2)]
        want = coco.decode(coco.merge(coco.frPyObjects(polygons, H, W))).astype(bool)
        got = rasterise(polygons, H, W)
        assert got.dtype == bool and np.array_equal(got, want), (H, W, polygons)
        filled += got.any()
    assert filled > 1000


GOLDEN = """
..........
..........
...####...
...#####..
....#####.
....#####.
.....###..
.....###..
......#...
......#...
..........
..........
"""


def drawn(mask):
    return "\n".join("".join(".#"[pixel] for pixel in row) for row in mask.astype(int))


def test_a_golden_polygon():
    polygon = [2.6, 1.7, 6.5, 2.2, 9.1, 5.0, 6.2, 10.2]
    assert drawn(rasterise([polygon], 12, 10)) == GOLDEN.strip()
    assert drawn(rasterise([np.reshape(polygon, (4, 2))], 12, 10)) == GOLDEN.strip()
    assert drawn(rasterise([polygon[6:] + polygon[:6]], 12, 10)) == GOLDEN.strip()


def test_polygons_of_one_object_are_united_and_one_that_crosses_itself_is_even_odd():
    square, other = [1, 1, 6, 1, 6, 6, 1, 6], [4, 4, 9, 4, 9, 9, 4, 9]
    both = rasterise([square, other], 10, 10)
    assert both.sum() == 25 + 25 - 4
    twice = rasterise([square + square], 10, 10)
    assert not twice.any() and rasterise([], 4, 5).shape == (4, 5)


def test_an_object_around_or_beside_the_image_costs_no_more_than_the_image():
    far = 8e8
    assert rasterise([[-far, -far, far, -far, far, far, -far, far]], 9, 7).all()
    assert rasterise([[-far, -far, far, -far, 3, far]], 9, 7).all()
    assert not rasterise([[far, 1, far, 8, far / 2, 5]], 9, 7).any()


@pytest.mark.parametrize("polygon, found", [
    ([1, 2, 3, 4], "of 4 numbers"), ([1, 2, 3, 4, 5, 6, 7], "of 7 numbers"), ([], "of 0 numbers"),
    ([1, 2, 3, 4, 5, float("nan")], "not finite"), ([1, 2, 3, 4, 5, 1e300], "beyond 1e9"),
    (["a"] * 6, "no list of numbers"), ([[1, 2, 3], [1, 2, 3]], r"shape \(2, 3\)"), (None, "shape"),
    ([10 ** 400] * 6, "no list of numbers"), ([[1, 2], [3]], "no list of numbers"),
])
def test_what_is_no_polygon_is_refused(polygon, found):
    with pytest.raises(ValueError, match=found):
        rasterise([polygon], 9, 9)


# ---------------------------------------------------------------- run lengths


def random_masks(draws, count, H, W):
    """Masks (count, H, W) bool: noise of all densities, and all, none, first and last pixel."""
    found = draws.random((count, H, W)) < draws.random((count, 1, 1)) ** 3
    found[0], found[1] = True, False
    found[2, 0, 0], found[3, -1, -1] = True, True
    return found


def test_rle_both_ways_as_in_pycocotools():
    coco, draws = pytest.importorskip("pycocotools.mask"), np.random.default_rng(1)
    for H, W in ((1, 1), (1, 9), (9, 1), (13, 17), (40, 31), (300, 200)):
        found = random_masks(draws, 12, H, W)
        want = coco.encode(np.asfortranarray(found.transpose(1, 2, 0).astype(np.uint8)))
        assert [rle["counts"].decode() for rle in want] == [rle["counts"] for rle in
                                                            encode_all(torch.tensor(found))]
        on_device = turns_of(torch.tensor(found))
        for mask, rle, turns in zip(found, want, on_device, strict=True):
            assert from_turns(turns, mask.shape) == encode(mask)
            assert np.array_equal(decode(rle), mask) and np.array_equal(decode(encode(mask)), mask)
            assert area(rle) == mask.sum() == coco.area(rle)
            plain = dict(size=[H, W], counts=counts_of(rle).tolist())   # uncompressed
            assert np.array_equal(decode(plain), mask) and area(dict(rle, counts=counts_of(rle))) == area(rle)
            assert coco.frPyObjects(plain, H, W)["counts"] == rle["counts"]


def test_golden_rle():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1:3] = True
    assert encode(mask) == {"size": [3, 4], "counts": "42102"}
    assert counts_of(encode(mask)).tolist() == [4, 2, 1, 2, 3]
    large = dict(size=[1000, 3000], counts=[5, 1000000, 40, 1999000, 955])
    short = dict(large, counts="5Pb`n0X1hb_n0cl0")
    assert masks.compress(np.array(large["counts"])) == short["counts"]
    assert counts_of(short).tolist() == large["counts"]
    assert area(large) == 2999000 and encode_all(torch.zeros(0, 3, 4, dtype=torch.bool)) == []
    assert turns_of(torch.zeros(0, 3, 4, dtype=torch.bool)) == []


@pytest.mark.parametrize("rle, found", [
    (None, "without a size"), ({}, "without a size"),
    *(({"size": size, "counts": [12]}, "without a size")
      for size in ([3], [3, 0], [3.0, 4], "34", [3, 10 ** 9])),
    ({"size": [3, 4]}, "without counts"),
    *(({"size": [3, 4], "counts": counts}, found) for counts, found in (
        ([5, 6], "of 11 pixels: expected the 12 of its size 3x4"), ([5, 6, 9], "of over 12 pixels"),
        ([], "of 0 pixels"), ([10 ** 30, 12], "of over 12 pixels"), ([-5, 17], "below 0"),
        ([5, 7.0], "without counts"), ([True, 11], "without counts"), (5, "without counts"),
        (np.array([5.0, 7.0]), "without counts"), ("", "without a run"), ("4@", "below 0"),
        ("4212p", "letter that stands for no number"), ("42 1", "letter that stands for no number"),
        ("421\ud800", "pixels"), ("421\xe9", "letter"), ("4P", "ends within a number"), ("4" * 99, "pixels"),
        ("P" * 60 + "0", "of 61 letters"))),
])
def test_a_broken_rle_is_refused(rle, found):
    for read in (decode, area):
        with pytest.raises(ValueError, match=found):
            read(rle)


def test_damaged_text_is_a_mask_or_refused():
    """Whatever the letters, the answer is a mask of that size, or a ValueError."""
    draws, read = np.random.default_rng(2), 0
    for _ in range(2000):
        text = list(encode(random_masks(draws, 4, 6, 7)[2])["counts"])
        text[draws.integers(len(text))] = chr(draws.integers(40, 120))
        try:
            assert decode(dict(size=[6, 7], counts="".join(text))).shape == (6, 7)
            read += 1
        except ValueError as error:
            assert str(error).startswith("an RLE")
    assert 0 < read < 1900


def test_the_box_of_a_mask():
    found = np.zeros((4, 9, 12), bool)
    found[1, 3:5, 2:9] = True
    found[2, 8, 11] = True
    found[3] = True
    want = [[0, 0, 0, 0], [2, 3, 9, 5], [11, 8, 12, 9], [0, 0, 12, 9]]
    assert box_of(found).tolist() == want and box_of(found[1]).tolist() == want[1]
    assert box_of(found[:0]).shape == (0, 4)


# ---------------------------------------------------------------- targets and pasting


def random_boxes(draws, count, H, W, least=0.0):
    """Boxes (count, 4) float32 within an image."""
    x, y = (np.sort(draws.uniform(0, side, (count, 2)), axis=1) for side in (W, H))
    x[:, 1], y[:, 1] = np.minimum(x[:, 1] + least, W), np.minimum(y[:, 1] + least, H)
    return torch.tensor(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1), dtype=torch.float32)


def blobs(draws, count, H, W):
    """Masks (count, H, W) bool of smooth shapes."""
    noise = torch.tensor(draws.normal(size=(count, 1, 5, 5)), dtype=torch.float32)
    return F.interpolate(noise, (H, W), mode="bicubic")[:, 0] > 0


def mean_read(mask, box, size):
    """RoIAlign of one mask by its definition: a loop over bins and samples, in float64."""
    H, W = mask.shape
    x0, y0, x1, y1 = (float(side) for side in box)
    rows, columns = max(int(np.ceil((y1 - y0) / size)), 1), max(int(np.ceil((x1 - x0) / size)), 1)

    def at(y, x):
        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
        top, left = int(y), int(x)
        below, right, dy, dx = min(top + 1, H - 1), min(left + 1, W - 1), y - top, x - left
        return ((1 - dy) * ((1 - dx) * mask[top, left] + dx * mask[top, right])
                + dy * ((1 - dx) * mask[below, left] + dx * mask[below, right]))
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            out[i, j] = np.mean([at(y0 - 0.5 + (i + (a + 0.5) / rows) * (y1 - y0) / size,
                                    x0 - 0.5 + (j + (b + 0.5) / columns) * (x1 - x0) / size)
                                 for a in range(rows) for b in range(columns)])
    return out


@pytest.mark.parametrize("size, H, W", [(7, 20, 33), (4, 70, 50), (5, 1, 9)])
def test_targets_are_the_definition(size, H, W):
    draws = np.random.default_rng(3)
    found = blobs(draws, 5, H, W)
    boxes, index = random_boxes(draws, 12, H, W), torch.tensor(draws.integers(0, 5, 12))
    boxes[0], boxes[1] = torch.tensor([0, 0, W, H]), torch.tensor([3, 0, 3, 1])         # all, and nothing
    got = targets(found, boxes, index, size)
    want = np.stack([mean_read(found[i].double().numpy(), box, size)
                     for i, box in zip(index, boxes, strict=True)])
    clear = np.abs(want - 0.5) > 2e-4
    assert got.shape == (12, size, size) and clear.mean() > 0.8
    assert np.array_equal(got.numpy()[clear], want[clear] >= 0.5)
    weights = sample_weights(boxes[:, 0], boxes[:, 2], size, W)
    assert torch.allclose(weights.sum(dim=2), torch.ones(12, size)) and (weights > -1e-6).all()


def test_targets_are_those_of_torchvision_and_need_no_more_memory_at_once(monkeypatch):
    ops = pytest.importorskip("torchvision.ops")
    draws, found = np.random.default_rng(4), blobs(np.random.default_rng(5), 6, 90, 130)
    boxes, index = random_boxes(draws, 200, 90, 130), torch.tensor(draws.integers(0, 6, 200))
    rois = torch.cat([index[:, None].float(), boxes], dim=1)
    want = ops.roi_align(found[:, None].float(), rois, (28, 28), sampling_ratio=0, aligned=True)[:, 0]
    got = targets(found, boxes, index, 28)
    clear = (want - 0.5).abs() > 2e-4
    assert clear.float().mean() > 0.97 and torch.equal(got[clear], (want >= 0.5).float()[clear])
    monkeypatch.setattr(masks, "MOST", 90 * 130 * 7)
    assert torch.equal(targets(found, boxes, index, 28), got)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(targets(found, boxes, index, 28), got)
    assert targets(found, boxes[:0], index[:0], 28).shape == (0, 28, 28)


def test_a_mask_within_its_own_box_is_all_ones():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 5:25, 8:38] = True
    assert targets(mask, torch.tensor([[8.0, 5, 38, 25]]), torch.tensor([0]), 14).all()


@pytest.mark.parametrize("size", [(50, 70), (1, 1), (33, 8)])
def test_pasting_is_grid_sample_in_any_number_of_parts(size, monkeypatch):
    (H, W), draws = size, np.random.default_rng(6)
    boxes = random_boxes(draws, 20, H, W, least=0.5)
    boxes[:3] += torch.tensor([-5.5, -7, 9, 4])                         # beyond the image
    probs = torch.tensor(draws.random((20, 28, 28)), dtype=torch.float32)
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    x, y = ((torch.arange(n) + 0.5 - a) / (b - a) * 2 - 1 for n, a, b in ((W, x0, x1), (H, y0, y1)))
    grid = torch.stack([x[:, None].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=3)
    want = F.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]
    got = paste(probs, boxes, (H, W))
    clear = (want - 0.5).abs() > 1e-3
    assert got.shape == (20, H, W) and clear.float().mean() > 0.9
    assert torch.equal(got[clear], (want >= 0.5)[clear])
    monkeypatch.setattr(masks, "MOST", H * W * 3)
    assert torch.equal(paste(probs, boxes, (H, W)), got)
    assert paste(probs[:0], boxes[:0], (H, W)).shape == (0, H, W)


def test_a_box_without_area_pastes_nothing():
    boxes = torch.tensor([[3.0, 3, 3, 9], [2, 5, 8, 5]])
    assert not paste(torch.ones(2, 28, 28), boxes, (12, 12)).any()


def test_a_mask_that_is_cut_out_and_pasted_is_nearly_itself():
    draws = np.random.default_rng(7)
    mask = blobs(draws, 8, 56, 56)
    boxes = torch.tensor(box_of(mask.numpy())).float()
    back = paste(targets(mask, boxes, torch.arange(8), 28), boxes, (56, 56))
    assert ((back & mask).sum() / (back | mask).sum()) > 0.9
