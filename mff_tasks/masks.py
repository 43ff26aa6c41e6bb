"""Masks of objects: COCO's polygons and run lengths, the targets of a mask head, its answers pasted back.

Polygons are filled by COCO's own rule, which no drawing library has. Run lengths (RLE) go down the columns,
one column after the other, and begin with a run of zeros, which may be empty.

Shapes: H W of a mask, N masks, m corners of a polygon, R boxes (x0, y0, x1, y1), r of them, S side of a mask
head's answer.
"""

import numpy as np
import torch

# ---------------------------------------------------------------- polygons

FINE = 5                                                                # steps of an outline per pixel


def rasterise(polygons, H, W):
    """The union of polygons as a mask (H, W) bool: bit for bit that of COCO's pycocotools.

    A polygon is x0, y0, x1, y1, ... in pixels, flat or (m, 2). Its corners may lie outside the image. Raises
    ValueError for fewer than three corners and for numbers that are not finite.
    """
    mask = np.zeros((H, W), bool)
    for polygon in polygons:
        column, row = crossings(corners(polygon), H, W)
        if not len(column):
            continue
        # Every column is crossed an even number of times, so that nothing outside this box is inside.
        left, top = column.min(), row.min()
        width, height = column.max() + 1 - left, row.max() - top
        turns = np.bincount((column - left) * height + row - top, minlength=width * height)
        inside = np.cumsum(turns[:width * height].astype(np.uint8), dtype=np.uint8) & 1     # overflow is even
        mask[top:top + height, left:left + width] |= inside.reshape(width, height).T.astype(bool)
    return mask


def corners(polygon):
    """A polygon's corners (m, 2) float64. Raises ValueError where there are fewer than three."""
    try:
        points = np.asarray(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a polygon that is no list of numbers: expected x0, y0, x1, y1, ...") from None
    if points.ndim not in (1, 2) or points.ndim == 2 and points.shape[1] != 2:
        raise ValueError(f"a polygon of shape {points.shape}: expected x0, y0, x1, y1, ...")
    if points.size % 2 or points.size < 6:
        raise ValueError(f"a polygon of {points.size} numbers: expected an even count, at least 6")
    if not (np.abs(points) < 1e9).all():
        raise ValueError("a polygon with a number that is not finite, or beyond 1e9: expected pixels")
    return points.reshape(-1, 2)


def crossings(points, H, W):
    """(column, row): where a polygon's outline crosses the columns of pixels, each (count,) int64.

    COCO draws the outline on a grid FINE times as fine. It crosses column c where it goes from fine column
    5 c + 2 to 5 c + 3, or back; the pixels below change sides. Row H is the end of a column.
    """
    start = np.trunc(FINE * points + 0.5)                               # (m, 2): as a cast to int rounds
    end = np.roll(start, -1, axis=0)
    along = np.abs(end - start)
    flat = along[:, 0] >= along[:, 1]                                   # (m,): goes along x more than along y
    major = np.where(flat, 0, 1)
    edges = np.arange(len(points))
    swap = start[edges, major] > end[edges, major]
    start, end = np.where(swap[:, None], end, start), np.where(swap[:, None], start, end)
    low, high = np.minimum(start, end)[:, 0], np.maximum(start, end)[:, 0]
    first = np.maximum(np.ceil((low - 2) / FINE), 0).astype(np.int64)   # (m,): columns that an edge crosses
    last = np.minimum(np.floor((high - 3) / FINE), W - 1).astype(np.int64)
    counts = np.maximum(last - first + 1, 0)
    edge = np.repeat(edges, counts)                                     # (count,)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    (x, y), (dx, dy), flat = start[edge].T, (end - start)[edge].T, flat[edge]
    with np.errstate(divide="ignore", invalid="ignore"):                # where the other slope is used
        rise, run = dy / dx, dx / dy
        # Of a steep edge: the step with which it passes, guessed and put right by the rounding that COCO has.
        guess = np.floor((FINE * column + 2.5 - x) / run)
        guess = np.where(flat, 0, guess)
        steps = guess[:, None] + np.arange(-2, 3)                       # (count, 5)
        right = (x[:, None] + run[:, None] * steps + 0.5 >= FINE * column[:, None] + 3).sum(axis=1)
        rising = guess + 2 - right                                      # the last step on the left
        falling = guess - 3 + right                                     # the last step on the right
        steep = y + np.where(run > 0, rising, falling)
        t = FINE * column + 2 - x
        shallow = np.minimum(np.trunc(y + rise * t + 0.5), np.trunc(y + rise * (t + 1) + 0.5))
    fine = np.where(flat, shallow, steep)
    return column, np.ceil(np.clip((fine + 0.5) / FINE - 0.5, 0, H)).astype(np.int64)


# ---------------------------------------------------------------- run lengths


def encode(mask):
    """The compressed RLE of a mask (H, W) bool: {"size": [H, W], "counts": text}."""
    flat = np.asarray(mask).ravel(order="F")
    return from_turns(np.flatnonzero(np.append(flat[:1], flat[1:] != flat[:-1])), mask.shape)


def encode_all(masks):
    """The compressed RLE of each of the masks (N, H, W) bool, a tensor. A GPU finds the runs itself."""
    if masks.device.type == "cpu":
        return [encode(mask) for mask in masks.numpy()]
    return [from_turns(turns, masks.shape[1:]) for turns in turns_of(masks)]


def turns_of(masks):
    """Where the runs of each of the masks (N, H, W) begin, found where the masks are: N arrays."""
    flat = masks.mT.flatten(1)                                          # (N, W * H)
    turns = torch.cat([flat[:, :1], flat[:, 1:] != flat[:, :-1]], dim=1)
    owner, place = turns.nonzero().T.cpu().numpy()
    return np.split(place, np.searchsorted(owner, np.arange(1, len(masks))))[:len(masks)]


def from_turns(turns, size):
    """The RLE of a mask of this size, from where its values change; a 1 at the beginning is a change."""
    counts = np.diff(np.concatenate([[0], turns, [size[0] * size[1]]]))
    return dict(size=list(size), counts=compress(counts))


def decode(rle):
    """The mask (H, W) bool of an RLE, compressed or not. Raises ValueError where it is broken."""
    counts = counts_of(rle)
    H, W = rle["size"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(W, H).T


def area(rle):
    """The pixels in an RLE's mask. Raises ValueError where it is broken."""
    return int(counts_of(rle)[1::2].sum())


def counts_of(rle):
    """The run lengths of an RLE, int64. Raises ValueError where it is broken; makes no mask."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not isinstance(size, list | tuple) or len(size) != 2 \
            or not all(type(side) is int and 0 < side < 2 ** 16 for side in size):
        raise ValueError("an RLE without a size: expected [height, width], each 1 to 65535")
    counts, pixels = rle.get("counts"), size[0] * size[1]
    if isinstance(counts, str | bytes):
        counts = decompress(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        counts = np.array([min(max(count, -1), 2 ** 40) for count in counts], np.int64)     # of any size
    elif isinstance(counts, np.ndarray) and counts.dtype.kind in "iu":
        counts = counts.astype(np.int64)
    else:
        raise ValueError("an RLE without counts: expected a text, or a list of whole numbers")
    if (counts < 0).any():
        raise ValueError("an RLE with a run below 0")
    total = int(counts.sum()) if (counts <= pixels).all() else int(counts.max())
    if total != pixels:
        raise ValueError(f"an RLE of {'over ' * (total > pixels)}{min(total, pixels)} pixels: expected the "
                         f"{pixels} of its size {size[0]}x{size[1]}")
    return counts


LETTERS = 7                                                             # of a number, at most: 35 bits


def compress(counts):
    """Run lengths as COCO's text: from the fourth on their change over two runs, five bits per letter."""
    values = np.array(counts, np.int64)
    values[3:] -= counts[1:-2]
    bounds = 16 << 5 * np.arange(LETTERS - 1)                           # what one letter holds, two, ...
    length = 1 + ((values[:, None] >= bounds) | (values[:, None] < -bounds)).sum(axis=1)
    place = np.arange(LETTERS)
    letters = values[:, None] >> 5 * place & 31 | np.where(place < length[:, None] - 1, 32, 0)
    return (letters[place < length[:, None]] + 48).astype(np.uint8).tobytes().decode()


def decompress(text):
    """The run lengths of COCO's text, int64. Raises ValueError where it is broken."""
    content = text.encode(errors="replace") if isinstance(text, str) else text
    letters = np.frombuffer(content, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(letters < 32)
    if ((letters < 0) | (letters > 63)).any():
        raise ValueError("an RLE with a letter that stands for no number: expected those from 0 to o")
    if not len(ends) or ends[-1] != len(letters) - 1:
        raise ValueError("an RLE that ends within a number" if len(letters) else "an RLE without a run")
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends + 1 - starts
    if length.max() > LETTERS:
        raise ValueError(f"an RLE with a number of {length.max()} letters: expected {LETTERS} at most")
    place = np.arange(len(letters)) - np.repeat(starts, length)
    values = np.add.reduceat((letters & 31) << 5 * place, starts)
    values -= np.where(letters[ends] & 16, 1 << 5 * length, 0)          # the sign
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


def box_of(masks):
    """The boxes (..., 4) int64 around masks (..., H, W) bool, half open; four zeros for an empty mask."""
    sides = []
    for axis in (-2, -1):
        line = masks.any(axis=axis)                                     # (..., W), then (..., H)
        last = line.shape[-1] - line[..., ::-1].argmax(axis=-1)
        sides.append((line.argmax(axis=-1), np.where(line.any(axis=-1), last, 0)))
    (x0, x1), (y0, y1) = sides
    return np.stack([x0, y0, x1, y1], axis=-1)


# ---------------------------------------------------------------- the mask head's targets and answers

MOST = 2 ** 26                                                          # numbers that are held at once


def targets(masks, boxes, index, size):
    """What a mask head shall answer: the parts of masks in boxes, (R, S, S) float32, each 0 or 1. S is size.

    masks (N, H, W) bool, boxes (R, 4) within them, index (R,) int64: the mask of a box. A pixel is 1 where
    the mean of the mask, read by RoIAlign (arXiv 1703.06870) without rounding and with a sample per pixel or
    more, is a half at least: detectron2's BitMasks.crop_and_resize.
    """
    H, W = masks.shape[-2:]
    found = [masks.new_zeros(0, size, size, dtype=torch.float32)]
    with torch.autocast(masks.device.type, enabled=False):
        for part, chosen in chunks(boxes, index, most=MOST // (H * W)):
            down = sample_weights(part[:, 1], part[:, 3], size, H)      # (r, S, H)
            across = sample_weights(part[:, 0], part[:, 2], size, W)    # (r, S, W)
            found.append(down @ masks[chosen].float() @ across.mT)      # (r, S, S)
    return (torch.cat(found) >= 0.5 - 1e-4).float()                     # a tie is inside, also when rounded


def sample_weights(start, stop, size, length):
    """How much each pixel of a line counts in RoIAlign's bins from start to stop: (R, S, length) float32.

    A bin has n samples, evenly spread, at most a pixel apart; each is read between the two nearest pixels, or
    from the last one at an end of the line. Sums over samples have a closed form: with q(x) = sum of
    max(x - y, 0) over the samples y, the pixels up to p have the weight (q(p + 1) - q(p)) / n.
    """
    start, stop = (x.double()[:, None, None] for x in (start, stop))    # (R, 1, 1): q is of large numbers
    n = ((stop - start) / size).ceil().clamp_min(1)
    gap = ((stop - start) / (size * n)).clamp_min(1e-9)
    bins = torch.arange(size, device=start.device)[:, None]             # (S, 1)
    first = start - 0.5 + (bins * n + 0.5) * gap                        # (R, S, 1): of a bin's samples
    x = torch.arange(length, device=start.device)                       # (length,)
    left = ((x - first) / gap).ceil().clamp_min(0).minimum(n)           # (R, S, length): samples left of x
    q = left * (x - first) - gap * left * (left - 1) / 2
    upto = q.diff(dim=2) / n                                            # (R, S, length - 1)
    edge = torch.zeros_like(q[..., :1])
    return torch.cat([edge, upto, edge + 1], dim=2).diff(dim=2).float()


def paste(mask_probs, boxes, size, threshold=0.5):
    """Where a mask head's answers, at the places of their boxes, reach the threshold: (R, H, W) bool.

    mask_probs (R, S, S), boxes (R, 4), size (H, W). A pixel is read between the four nearest answers, outside
    of which is 0: detectron2's paste_masks_in_image.
    """
    H, W = size
    found = [boxes.new_zeros(0, H, W, dtype=torch.bool)]
    with torch.autocast(boxes.device.type, enabled=False):
        for probs, part in chunks(mask_probs.float(), boxes.float(), most=MOST // (H * W)):
            down = pixel_weights(part[:, 1], part[:, 3], probs.shape[1], H)     # (r, H, S)
            across = pixel_weights(part[:, 0], part[:, 2], probs.shape[2], W)   # (r, W, S)
            found.append(down @ probs @ across.mT >= threshold)         # (r, H, W)
    return torch.cat(found)


def pixel_weights(start, stop, size, length):
    """How much each of size answers from start to stop counts for the pixels of a line: (R, length, size)."""
    start, span = start[:, None], (stop - start).clamp_min(1e-6)[:, None]
    place = torch.arange(length, device=start.device) + 0.5             # (length,): a pixel's centre
    place = (place - start) / span * size - 0.5                         # (R, length): among the answers
    return (1 - (place[..., None] - torch.arange(size, device=start.device)).abs()).clamp_min(0)


def chunks(*tensors, most):
    """Parts of tensors of one length, in step, at most so many rows long."""
    return zip(*(tensor.split(max(most, 1)) for tensor in tensors), strict=True)
