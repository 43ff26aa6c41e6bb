"""Operations on boxes, as detectron2 and torchvision define them: overlap, coding, NMS, matching, RoIAlign.

What is unusual about this one: all of it is plain tensor operations, without a loop over boxes. NMS is exact
and greedy, in blocks that bound its memory. RoIAlign is one weighted sum of rows of a table, for all levels
and images at once; its gradients are added in a fixed order. No function draws random numbers: sample takes
the caller's noise. Where detectron2 and torchvision differ, this is ViTDet's choice (arXiv 2203.16527).

A box is (x0, y0, x1, y1) in pixels, half open: its width is x1 - x0.

Shapes: B images, D width, R boxes, S other boxes, A anchors, F levels, N bins of a box per side, K numbers
per bin.
"""

import math

import torch
import torch.nn.functional as F

LARGEST_GROWTH = math.log(1000 / 16)                                    # of a side, in decode
BLOCK = 256                                                             # boxes that NMS decides at once

# ---------------------------------------------------------------- overlap


def areas(boxes):
    """Areas of boxes (..., R, 4): (..., R)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a, b):
    """The area that each pair of boxes shares: a (..., R, 4), b (..., S, 4) -> (..., R, S)."""
    # one coordinate after the other in memory: a CPU takes eight pairs at once
    x0, y0, x1, y1 = a.movedim(-1, 0).contiguous()[..., None]           # each (..., R, 1)
    u0, v0, u1, v1 = b.movedim(-1, 0).contiguous()[..., None, :]        # each (..., 1, S)
    width = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)     # (..., R, S)
    return width.mul_(torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0))


def iou(a, b):
    """Intersection over union of each pair: a (..., R, 4), b (..., S, 4) -> (..., R, S).

    Two boxes without area have NaN, as in torchvision.
    """
    shared = intersection(a, b)                                         # (..., R, S)
    union = (areas(a)[..., :, None] + areas(b)[..., None, :]).sub_(shared)
    return shared.div_(union)


def overlap(a, b):
    """Intersection over the area of the first box: the overlap with a crowd (COCO) -> (..., R, S)."""
    return intersection(a, b).div_(areas(a)[..., :, None])


def clip(boxes, size):
    """Boxes (..., 4) cut at the edges of an image: size is (height, width), or a tensor (..., 2) of them."""
    limit = torch.as_tensor(size, dtype=boxes.dtype, device=boxes.device)[..., [1, 0, 1, 0]]    # (..., 4)
    return boxes.clamp(min=0).minimum(limit)

# ---------------------------------------------------------------- coding


def centres(boxes):
    """Centre x, centre y, width and height of boxes (..., 4): each (...)."""
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def encode(boxes, reference, weights=(1.0, 1.0, 1.0, 1.0)):
    """Boxes as offsets from reference boxes (R-CNN, arXiv 1311.2524, app. C): (..., 4), (..., 4) -> (..., 4).

    The four offsets, of centre x, centre y, log width and log height, are multiplied by weights.
    """
    (x, y, width, height), (u, v, across, down) = centres(boxes), centres(reference)
    deltas = (x - u) / across, (y - v) / down, (width / across).log(), (height / down).log()
    return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)], dim=-1)


def decode(deltas, reference, weights=(1.0, 1.0, 1.0, 1.0)):
    """The inverse of encode: deltas (..., 4), reference (..., 4) -> boxes (..., 4).

    A side grows by a factor of 1000 / 16 at most, so that an untrained head gives no infinite boxes.
    """
    u, v, across, down = centres(reference)
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(dim=-1), weights, strict=True))
    x, y = dx * across + u, dy * down + v
    half_width = 0.5 * (dw.clamp(max=LARGEST_GROWTH).exp() * across)
    half_height = 0.5 * (dh.clamp(max=LARGEST_GROWTH).exp() * down)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def anchors(sizes, ratios, stride, grid, device=None):
    """Anchors of one level, row by row of its grid (rows, columns): (A, 4) float32.

    Each cell has one per size and ratio: a size is the square root of an area, a ratio is height / width. The
    first cell's centre is (0, 0) (detectron2's offset 0). Sides are not rounded; torchvision rounds them.
    """
    sides = torch.tensor([(size / ratio ** 0.5, size * ratio ** 0.5) for size in sizes for ratio in ratios],
                         dtype=torch.float64)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) * stride for n in grid), indexing="ij")
    cells = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
    return (cells + torch.cat([-sides, sides], dim=1) / 2).view(-1, 4).float().to(device)       # (A, 4)

# ---------------------------------------------------------------- NMS


def nms(boxes, scores, threshold, group=None):
    """Indices of the boxes that greedy non-maximum suppression keeps, by falling score, int64.

    A box is dropped if its IoU with a kept box of a higher score is above threshold. Of equal scores the
    earlier box is first. boxes (R, 4), scores (R,). With group (R,) int64 (an image, a level, a class, or a
    number for their combination), boxes only drop those of their own group.

    Boxes are taken in blocks. In a block, "keep what no kept box drops" is repeated until nothing changes:
    after i rounds the first i boxes are decided, so it ends, mostly after a few.
    """
    by_score = scores.argsort(descending=True, stable=True)             # (R,)
    order = by_score if group is None else by_score[group[by_score].argsort(stable=True)]
    group = torch.zeros_like(order) if group is None else group[order]
    boxes, R = boxes[order], len(order)
    size = BLOCK if boxes.device.type == "cpu" else 2 * BLOCK           # a GPU wants few launches
    first = torch.searchsorted(group, group[::size].contiguous()).tolist()      # of each block's first group
    limit = below(threshold, boxes.dtype)
    keep = torch.ones(R, dtype=torch.bool, device=boxes.device)

    def drops(a, b):
        """1 where a box of a may drop one of b, else 0: as numbers, since comparisons to bool are slow."""
        return iou(a, b).gt_(limit)
    for start, begin in zip(range(0, R, size), first, strict=True):
        here = slice(start, start + size)
        block, groups = boxes[here], group[here]
        earlier = boxes[begin:start][keep[begin:start]]                 # kept, of the block's first group
        alive = (drops(earlier, block).sum(dim=0) == 0) | (groups != groups[0])
        among = drops(block, block).triu_(1).mul_(groups[:, None] == groups)
        kept, before = alive, None
        while before is None or not torch.equal(kept, before):
            before, kept = kept, alive & (kept.to(among.dtype) @ among == 0)
        keep[here] = kept
    found = torch.empty_like(keep)
    found[order] = keep
    return by_score[found[by_score]]


def below(threshold, dtype):
    """The largest number of a type that is not above threshold, a Python float.

    x > below(threshold) equals the comparison in float64, as in torchvision, for every x of that type: 0.3 in
    float32 is above 0.3, so that an IoU of three tenths would not be.
    """
    limit = torch.tensor(threshold, dtype=dtype)
    return limit.item() if limit.item() <= threshold else limit.nextafter(limit - 1).item()

# ---------------------------------------------------------------- matching and sampling


def match(quality, low, high, allow_low_quality=False):
    """The truth that each anchor is trained on: quality (R, A), of R true boxes -> (A,) int64.

    It is the index of the best true box where its quality is high or more, -1 (background) below low and -2
    (ignored) between. allow_low_quality: an anchor that is the best one of a true box, ties included, gets
    its own best true box, however low that is. Without true boxes all is background.
    """
    R, A = quality.shape
    if R == 0:
        return torch.full((A,), -1, device=quality.device)
    best, index = quality.max(dim=0)                                    # (A,), (A,)
    labels = index.where(best >= high, torch.where(best >= low, -2, -1))
    if allow_low_quality:
        is_best = (quality == quality.amax(dim=1, keepdim=True)).any(dim=0)     # (A,)
        labels = index.where(is_best, labels)
    return labels


def sample(labels, count, positive_fraction, noise):
    """Indices of the positive and of the negative anchors that a loss is taken of: two int64 tensors.

    labels (A,) are match's. Positive ones are count * positive_fraction at most, and negative ones fill up to
    count. noise (A,), uniform, decides: those of the smallest noise are taken.
    """
    def fewest(chosen, most):
        index = chosen.nonzero()[:, 0]
        return index[noise[index].argsort(stable=True)[:most]]
    positive = fewest(labels >= 0, int(count * positive_fraction))
    return positive, fewest(labels == -1, count - len(positive))

# ---------------------------------------------------------------- RoIAlign


def levels_of(boxes, num_levels, canonical_size=224):
    """The level that each box (R, 4) is read from: (R,) int64, 0 the finest (FPN, arXiv 1612.03144, eq. 1).

    A box of canonical_size pixels belongs to level 2, one of half that side to level 1. A box that is not
    finite, of a run that diverges, gets a level too.
    """
    # 4 and - 2 are the paper's k_0 and its finest level: the sum is rounded as in detectron2.
    level = (4 + (areas(boxes).sqrt() / canonical_size + 1e-8).log2()).floor() - 2
    return level.nan_to_num().clamp(0, num_levels - 1).long()


def taps(start, length, cells, size, samples):
    """Where the samples of one axis read, and their weights: each (R, N, 2 * samples), N = size bins.

    start and length (R,) are a box's, in cells of its level, of which there are cells (R,). Each bin has so
    many samples at equal distances, and each of those is linear between two cells. A sample more than one
    cell outside has weight 0; others outside read the edge.
    """
    bins = torch.arange(size, device=start.device)
    steps = torch.arange(samples, device=start.device) + 0.5
    width = (length / size)[:, None]                                    # (R, 1)
    at = (start[:, None] + bins * width)[..., None] + (steps * width / samples)[:, None]
    last = (cells - 1).to(at.dtype)[:, None, None]                      # (R, 1, 1)
    inside = (at >= -1) & (at <= last + 1)                              # NaN is outside
    at = at.clamp(min=0).minimum(last).where(inside, 0)
    low = at.floor()
    places = torch.stack([low, (low + 1).minimum(last)], dim=-1)        # (R, N, samples, 2)
    share = at - low                                                    # (R, N, samples)
    weights = torch.stack([1 - share, share], dim=-1) * inside[..., None] / samples
    return places.flatten(2).int(), weights.flatten(2)


def roi_align(levels, boxes, image_index, strides, size, samples=2, canonical_size=224):
    """Features of boxes, (R, D, size, size) in float32 or wider (Mask R-CNN, arXiv 1703.06870, aligned).

    levels are F maps (B, D, rows, columns) with their strides, the finest first; each box (R, 4), of the
    image image_index (R,) int64, is read from the level that levels_of chooses. A bin is the mean of
    samples * samples bilinear samples. Boxes get no gradient. The result is channels last in memory.

    Each bin is a weighted sum of K = (2 * samples) ** 2 rows of one table of all cells. Its gradient is added
    up in the order of the rows: unlike atomic additions, two runs give the same.
    """
    table = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)        # (B, cells, D)
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    grids = [x.shape[-2:] for x in levels]
    begins = [sum(rows * columns for rows, columns in grids[:i]) for i in range(len(levels))]
    numbers = [(*grid, begin, 1 / stride) for grid, begin, stride in zip(grids, begins, strides, strict=True)]
    numbers = torch.tensor(numbers, dtype=torch.float64).to(boxes.device)           # (F, 4)
    with torch.no_grad():
        chosen = numbers[levels_of(boxes, len(levels), canonical_size)]             # (R, 4)
        rows, columns, begin = chosen[:, :3].int().unbind(dim=1)                    # each (R,)
        scaled = boxes.to(table.dtype) * chosen[:, 3:].to(table.dtype)  # (R, 4)
        (x0, y0), sides = (scaled[:, :2] - 0.5).unbind(dim=1), (scaled[:, 2:] - 0.5) - (scaled[:, :2] - 0.5)
        y, y_weights = taps(y0, sides[:, 1], rows, size, samples)
        x, x_weights = taps(x0, sides[:, 0], columns, size, samples)
        begin = begin + image_index.int() * table.shape[1]
        y = begin[:, None, None] + y * columns[:, None, None]
        index = y[:, :, None, :, None] + x[:, None, :, None, :]         # (R, N, N, 2 * samples, 2 * samples)
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
    index, weights = index.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)   # each (R * N * N, K)
    found = F.embedding_bag(index, table.flatten(0, 1), per_sample_weights=weights, mode="sum")
    return found.view(-1, size, size, table.shape[2]).permute(0, 3, 1, 2)           # (R, D, N, N)
