"""Operations on boxes: against loops over single boxes, and against torchvision where it is installed."""

import itertools
import math

import numpy as np
import pytest
import torch

from mff_tasks import boxes as ops


def random_boxes(generator, *shape, side=40.0, whole=False):
    """Boxes (*shape, 4) with sides from 1 on; whole: of whole numbers, whose overlaps have ties."""
    corners = torch.rand(*shape, 2, generator=generator) * side
    boxes = torch.cat([corners, corners + 1 + torch.rand(*shape, 2, generator=generator) * side / 2], dim=-1)
    return boxes.round() if whole else boxes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- overlap and coding

def overlap_of(a, b):
    """(shared area, area of a, area of b) of two boxes as lists."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])


def test_overlaps_are_those_of_single_pairs():
    a, b = random_boxes(generator(), 2, 5).double(), random_boxes(generator(1), 2, 7).double()
    found, of_first = ops.iou(a, b), ops.overlap(a, b)
    assert found.shape == of_first.shape == (2, 5, 7) and (found > 0).any() and (found == 0).any()
    for i, r, s in itertools.product(range(2), range(5), range(7)):
        shared, first, second = overlap_of(a[i, r].tolist(), b[i, s].tolist())
        assert math.isclose(found[i, r, s], shared / (first + second - shared), abs_tol=1e-15)
        assert math.isclose(of_first[i, r, s], shared / first, abs_tol=1e-15)
    assert ops.iou(a[0, :0], b[0]).shape == (0, 7) and ops.iou(a[0], b[0, :0]).shape == (5, 0)


def test_overlaps_are_torchvisions():
    tv = pytest.importorskip("torchvision.ops")
    for seed in range(50):
        a, b = (random_boxes(generator(2 * seed + i), 30, whole=seed % 2) for i in range(2))
        assert torch.equal(ops.iou(a, b), tv.box_iou(a, b))


def test_boxes_are_cut_at_the_edges_of_their_own_image():
    boxes = torch.tensor([[-3.0, -4, 50, 60], [5, 6, 7, 8], [70, 80, 90, 95]])
    assert ops.clip(boxes, (30, 20)).tolist() == [[0, 0, 20, 30], [5, 6, 7, 8], [20, 30, 20, 30]]
    sizes = torch.tensor([[30, 20], [7, 6], [90, 80]])
    assert ops.clip(boxes, sizes).tolist() == [[0, 0, 20, 30], [5, 6, 6, 7], [70, 80, 80, 90]]


WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_offsets_by_hand_and_back(weights):
    reference, boxes = torch.tensor([10.0, 20, 30, 60]), torch.tensor([12.0, 10, 22, 90])
    want = [(17 - 20) / 20, (50 - 40) / 40, math.log(10 / 20), math.log(80 / 40)]
    found = ops.encode(boxes, reference, weights)
    torch.testing.assert_close(found, torch.tensor([a * b for a, b in zip(want, weights, strict=True)]))
    many, others = random_boxes(generator(), 4, 100).double(), random_boxes(generator(1), 4, 100).double()
    back = ops.decode(ops.encode(many, others, weights), others, weights)
    torch.testing.assert_close(back, many, rtol=1e-12, atol=1e-12)


def test_a_side_grows_by_1000_in_16_at_most():
    boxes = ops.decode(torch.tensor([0.0, 0, 1e4, math.inf]), torch.tensor([0.0, 0, 16, 32]))
    torch.testing.assert_close(boxes[2:] - boxes[:2], torch.tensor([1000.0, 2000]))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_coding_is_torchvisions(weights):
    utils = pytest.importorskip("torchvision.models.detection._utils")
    coder = utils.BoxCoder(weights)
    for seed in range(20):
        boxes, reference = (random_boxes(generator(2 * seed + i), 200, side=1000) for i in range(2))
        deltas = torch.randn(200, 4, generator=generator(seed)) * torch.tensor(weights)
        torch.testing.assert_close(ops.encode(boxes, reference, weights),
                                   coder.encode([boxes], [reference])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ops.decode(deltas, reference, weights),
                                   coder.decode(deltas, [reference])[:, 0], rtol=1e-5, atol=1e-3)


def test_anchors_by_hand():
    found = ops.anchors((32,), (0.5, 1.0, 2.0), 4, (2, 3))
    long, short = 16 * math.sqrt(2), 8 * math.sqrt(2)
    cell = torch.tensor([[-long, -short, long, short], [-16, -16, 16, 16], [-short, -long, short, long]])
    want = torch.stack([cell + torch.tensor([4.0 * x, 4 * y] * 2) for y in range(2) for x in range(3)])
    torch.testing.assert_close(found, want.view(-1, 4))
    sides = found[:, 2:] - found[:, :2]
    torch.testing.assert_close(sides.prod(dim=1), torch.full((18,), 1024.0))


def test_anchors_are_torchvisions_but_for_its_rounding():
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    image_list = pytest.importorskip("torchvision.models.detection.image_list")
    sizes, ratios, strides = (32, 64, 128), (0.5, 1.0, 2.0), (4, 8, 16)
    grids = [(80 // stride, 48 // stride) for stride in strides]
    theirs = utils.AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * 3)
    want = theirs(image_list.ImageList(torch.zeros(1, 3, 80, 48), [(80, 48)]),
                  [torch.zeros(1, 1, *grid) for grid in grids])[0]
    found = [ops.anchors((size,), ratios, stride, grid)
             for size, stride, grid in zip(sizes, strides, grids, strict=True)]
    torch.testing.assert_close(torch.cat(found).round(), want, rtol=0, atol=0)


# ---------------------------------------------------------------- NMS

def greedy(boxes, scores, threshold, group):
    """Non-maximum suppression box by box, in torchvision's order of operations."""
    boxes, kept = boxes.numpy(), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in scores.argsort(descending=True, stable=True).tolist():
        x0, y0 = np.maximum(boxes[i, :2], boxes[kept, :2]).T
        x1, y1 = np.minimum(boxes[i, 2:], boxes[kept, 2:]).T
        shared = np.maximum(x1 - x0, np.float32(0)) * np.maximum(y1 - y0, np.float32(0))
        with np.errstate(invalid="ignore"):
            overlap = (shared / (area[kept] + area[i] - shared)).astype(np.float64)
        if not ((overlap > threshold) & (group[kept] == group[i]).numpy()).any():
            kept.append(i)
    return kept


def nms_case(seed, count, whole=True):
    """(boxes, scores, group): whole numbers and few scores, so that both have ties."""
    g = generator(seed)
    boxes = random_boxes(g, count, side=float(torch.randint(8, 60, (), generator=g)), whole=whole)
    scores = torch.rand(count, generator=g)
    if whole:
        scores = (scores * 10).floor() / 10
    return boxes, scores, torch.randint(0, 4, (count,), generator=g)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7])
def test_nms_is_greedy(threshold, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 16)                               # groups begin in the middle of one
    for seed in range(60):
        boxes, scores, group = nms_case(seed, 1 + seed % 40, whole=seed % 3)
        assert ops.nms(boxes, scores, threshold, group).tolist() == greedy(boxes, scores, threshold, group)
        alone = torch.zeros_like(group)
        assert ops.nms(boxes, scores, threshold).tolist() == greedy(boxes, scores, threshold, alone)


def test_nms_is_torchvisions_on_thousands_of_sets():
    tv = pytest.importorskip("torchvision.ops")
    for seed in range(2400):
        boxes, scores, _ = nms_case(seed, 1 + seed % 70, whole=seed % 4)
        threshold = (0.1, 0.3, 0.45, 0.5, 0.6, 0.7, 0.9, 1 / 3)[seed % 8]
        assert torch.equal(ops.nms(boxes, scores, threshold), tv.nms(boxes, scores, threshold)), seed


@pytest.mark.parametrize("count", [600, 1500, 3000])
def test_nms_of_many_boxes_is_torchvisions(count):
    tv = pytest.importorskip("torchvision.ops")
    boxes, scores, group = nms_case(count, count)
    boxes = boxes * 8                                                   # exact, so that ties stay
    assert torch.equal(ops.nms(boxes, scores, 0.5), tv.nms(boxes, scores, 0.5))
    scores = torch.rand(count, generator=generator(1))                  # batched_nms keeps no order of ties
    assert torch.equal(ops.nms(boxes, scores, 0.5, group), tv.batched_nms(boxes, scores, group, 0.5))


def test_a_long_chain_is_decided_box_by_box():
    """Each box drops the next alone: every second one stays, however many rounds that takes."""
    start = torch.arange(1200.0) * 4
    boxes = torch.stack([start, torch.zeros(1200), start + 10, torch.ones(1200)], dim=1)
    kept = ops.nms(boxes, torch.arange(1200.0, 0, -1), 0.4)             # neighbours share 6 of 14
    assert kept.tolist() == list(range(0, 1200, 2))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nms_ends_for_boxes_of_a_run_that_diverges(wrong):
    boxes, scores, group = nms_case(1, 700)
    boxes[::3], scores[::5] = wrong, wrong
    assert len(ops.nms(boxes, scores, 0.5, group)) <= 700
    assert ops.nms(torch.full((5, 4), wrong), torch.full((5,), wrong), 0.5).tolist() == list(range(5))


def test_nms_of_nothing_and_of_boxes_without_area():
    assert ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
    assert ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5, torch.zeros(0, dtype=torch.int64)).tolist() == []
    points = torch.tensor([[3.0, 3, 3, 3]] * 3)                         # their IoU, 0 / 0, is above nothing
    assert ops.nms(points, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist() == [1, 2, 0]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the bytes of the largest result of an operation."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.bytes = max(self.bytes, x.nbytes if isinstance(x, torch.Tensor) else 0)
        return out


def test_nms_of_ten_thousand_boxes_makes_no_matrix_of_all_pairs():
    boxes = random_boxes(generator(), 10_000, side=3000.0)              # few overlap: nearly all are kept
    with Largest() as largest:
        kept = ops.nms(boxes, torch.rand(10_000, generator=generator()), 0.9)
    assert len(kept) > 9000 and largest.bytes <= 10_000 * ops.BLOCK * 4


# ---------------------------------------------------------------- matching and sampling

def matched(quality, low, high, allow):
    """match, anchor by anchor."""
    labels = []
    for column in quality.T:
        best = int(np.argmax(column))
        label = best if column[best] >= high else -2 if column[best] >= low else -1
        if allow and any(column[r] == quality[r].max() for r in range(len(quality))):
            label = best
        labels.append(label)
    return labels


@pytest.mark.parametrize("low, high, allow", [(0.3, 0.7, True), (0.3, 0.7, False), (0.5, 0.5, False)])
def test_matches_are_those_of_single_anchors(low, high, allow):
    for seed in range(40):
        quality = (torch.rand(1 + seed % 5, 30, generator=generator(seed)) * 20).round() / 20    # ties
        found = ops.match(quality, low, high, allow)
        assert found.tolist() == matched(quality.numpy(), np.float32(low), np.float32(high), allow)
    assert ops.match(torch.zeros(0, 4), low, high, allow).tolist() == [-1] * 4


def test_matches_are_torchvisions():
    utils = pytest.importorskip("torchvision.models.detection._utils")
    for seed in range(200):
        low, high, allow = [(0.3, 0.7, True), (0.3, 0.7, False), (0.5, 0.5, False)][seed % 3]
        quality = ops.iou(*(random_boxes(generator(2 * seed + i), n, whole=seed % 2)
                            for i, n in enumerate((1 + seed % 7, 80))))
        assert torch.equal(ops.match(quality, low, high, allow), utils.Matcher(high, low, allow)(quality))


def test_the_smallest_noise_is_sampled():
    labels = torch.tensor([-1, 0, -2, 3, -1, 0, -1, 2, -1, -2])
    noise = torch.tensor([0.9, 0.5, 0.0, 0.1, 0.2, 0.3, 0.8, 0.6, 0.4, 0.0])
    positive, negative = ops.sample(labels, 4, 0.5, noise)
    assert (positive.tolist(), negative.tolist()) == ([3, 5], [4, 8])
    positive, negative = ops.sample(labels, 5, 0.5, noise)              # 2.5 are two
    assert (positive.tolist(), negative.tolist()) == ([3, 5], [4, 8, 6])
    positive, negative = ops.sample(labels, 20, 0.5, noise)             # too few of both
    assert (positive.tolist(), negative.tolist()) == ([3, 5, 1, 7], [4, 8, 6, 0])
    positive, negative = ops.sample(torch.full((10,), -1), 4, 0.5, noise)       # negatives fill up
    assert (len(positive), len(negative)) == (0, 4)
    positive, negative = ops.sample(torch.zeros(10, dtype=torch.int64), 4, 0.5, noise)
    assert (len(positive), len(negative)) == (2, 0)


def test_each_anchor_is_sampled_as_often():
    labels, counts = torch.tensor([0] * 8 + [-1] * 24), torch.zeros(32)
    for seed in range(2000):
        chosen = ops.sample(labels, 8, 0.25, torch.rand(32, generator=generator(seed)))
        counts[torch.cat(chosen)] += 1
    for part, share in ((counts[:8], 2 / 8), (counts[8:], 6 / 24)):
        assert (part / 2000 - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 2000)


# ---------------------------------------------------------------- RoIAlign

STRIDES = 4, 8, 16, 32


def maps(B=2, D=3, height=96, width=64, dtype=torch.float32):
    """Levels of B images of height x width pixels, with gradients."""
    return [torch.randn(B, D, height // stride, width // stride, generator=generator(stride)).to(dtype)
            .requires_grad_() for stride in STRIDES]


def aligned(x, box, stride, size, samples):
    """RoIAlign of one box on one map (D, rows, columns), sample by sample."""
    (_, rows, columns), out = x.shape, torch.zeros(x.shape[0], size, size, dtype=x.dtype)
    x0, y0, x1, y1 = (value / stride - 0.5 for value in box)

    def corners(at, cells):
        if at < -1 or at > cells:
            return []
        at = min(max(at, 0), cells - 1)
        low = int(at)
        return [(low, 1 - (at - low)), (min(low + 1, cells - 1), at - low)]
    for row, column, i, j in itertools.product(range(size), range(size), range(samples), range(samples)):
        at_y = y0 + (row + (i + 0.5) / samples) * (y1 - y0) / size
        at_x = x0 + (column + (j + 0.5) / samples) * (x1 - x0) / size
        for (y, a), (u, b) in itertools.product(corners(at_y, rows), corners(at_x, columns)):
            out[:, row, column] += a * b * x[:, y, u] / samples ** 2
    return out


def roi_boxes(seed=0, count=40):
    """Boxes of all sizes, of which some leave the image of 96 x 64 pixels or lie outside."""
    g = generator(seed)
    centre = torch.rand(count, 2, generator=g) * torch.tensor([90.0, 120]) - 12
    sides = 2 ** (torch.rand(count, 2, generator=g) * 7)
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=1), torch.arange(count) % 2


@pytest.mark.parametrize("size, samples", [(3, 2), (2, 1), (2, 3)])
def test_roi_align_is_that_of_single_samples(size, samples):
    levels = maps(dtype=torch.float64)
    boxes, images = roi_boxes(count=16)
    boxes = boxes.double()
    chosen = ops.levels_of(boxes, 4, 20)
    assert len(chosen.unique()) == 4
    want = torch.stack([aligned(levels[k][b], box.tolist(), STRIDES[k], size, samples)
                        for box, k, b in zip(boxes, chosen.tolist(), images.tolist(), strict=True)])
    found = ops.roi_align(levels, boxes, images, STRIDES, size, samples, 20)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [7, 14])
def test_roi_align_and_its_gradients_are_torchvisions(size):
    tv = pytest.importorskip("torchvision.ops")
    for seed in range(20):
        levels, (boxes, images) = maps(), roi_boxes(seed)
        if seed % 2:
            boxes = boxes.round()                                       # samples on the edges themselves
        chosen = ops.levels_of(boxes, 4, 40)
        want = torch.zeros(len(boxes), 3, size, size)
        for k, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
            here = (chosen == k).nonzero()[:, 0]
            rois = torch.cat([images[here, None].float(), boxes[here]], dim=1)
            want = want.index_put((here,), tv.roi_align(level, rois, size, 1 / stride, 2, aligned=True))
        found = ops.roi_align(levels, boxes, images, STRIDES, size, 2, 40)
        assert found.shape == want.shape and (want.flatten(1) == 0).all(dim=1).any()    # some lie outside
        torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5)
        cotangent = torch.randn(want.shape, generator=generator(seed))
        torch.testing.assert_close(torch.autograd.grad(found, levels, cotangent),
                                   torch.autograd.grad(want, levels, cotangent), rtol=1e-5, atol=2e-4)


def test_the_level_of_a_box_is_detectron2s():
    """floor(4 + log2(sqrt(area) / 224 + 1e-8)), between p2 and p5."""
    sides = [1, 55, 56, 57, 111, 112, 113, 223, 224, 225, 447, 448, 2000]
    boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
    want = [min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2 for side in sides]
    assert ops.levels_of(boxes, 4).tolist() == want == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    poolers = pytest.importorskip("torchvision.ops.poolers")
    boxes = random_boxes(generator(), 5000, side=800.0)
    assert torch.equal(ops.levels_of(boxes, 4), poolers.LevelMapper(2, 5, eps=1e-8)([boxes]))


def test_boxes_get_no_gradient_and_none_may_be_there():
    levels, (boxes, images) = maps(), roi_boxes()
    out = ops.roi_align(levels, boxes.requires_grad_(), images, STRIDES, 3)
    out.sum().backward()
    assert boxes.grad is None
    out = ops.roi_align(levels, boxes[:0], images[:0], STRIDES, 3)
    assert out.shape == (0, 3, 3, 3)
    grads = torch.autograd.grad(out.sum(), levels)
    assert not any(grad.any() for grad in grads)


def test_two_gradients_are_bit_equal_and_halves_are_read_in_float32():
    boxes, images = roi_boxes()
    grads = []
    for _ in range(2):
        levels = maps()
        ops.roi_align(levels, boxes, images, STRIDES, 7).square().sum().backward()
        grads.append([level.grad for level in levels])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    half = [level.detach().bfloat16() for level in levels]
    found = ops.roi_align(half, boxes, images, STRIDES, 7)
    assert found.dtype == torch.float32
    assert torch.equal(found, ops.roi_align([x.float() for x in half], boxes, images, STRIDES, 7))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
def test_boxes_of_a_run_that_diverges_read_nothing_out_of_range(wrong):
    levels, (boxes, images) = maps(), roi_boxes()
    boxes[::2, 2] = wrong
    out = ops.roi_align(levels, boxes, images, STRIDES, 3)
    out.sum().backward()
    assert out.isfinite().all()
    assert torch.equal(out[1::2], ops.roi_align(levels, boxes[1::2], images[1::2], STRIDES, 3))
