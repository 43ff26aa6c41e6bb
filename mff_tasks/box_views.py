"""What training and evaluation see of images with objects: large-scale jitter, and whole images.

The augmentation is ViTDet's (arXiv 2203.16527, A.2), which is that of arXiv 2012.07177. The image stands at
the top left of its view; below it and to its right is the mean colour.

Shapes: B images, C H W of a view, h w of the part that the image fills, N objects of an image, M of a batch,
H0 W0 an image's own size, Q = ceil(W / 8) bytes of a row of bits.
"""

import math

import numpy as np
import torch
from torch.utils.data import Dataset

from mff_data import crops
from mff_data.decode import DECODE_ERRORS, reason_of
from mff_data.outages import Patience
from mff_data.views import Views
from mff_min import rng
from mff_min.augment import fill_color
from mff_tasks.coco import open_pair
from mff_tasks.mask_views import nearest, padded
from mff_tasks.masks import box_of, decode, rasterise

SCALE = 0.1, 2.0                                                        # of the image that just fits a view

# ---------------------------------------------------------------- training


class BoxViews(Views):
    """Views by large-scale jitter: image (C, H, W) uint8, boxes (N, 4), labels (N,), masks (N, H, Q) uint8.

    A box is the one around the part of its mask that is in view; objects of which no pixel is are left out,
    and so are crowds. masks are bits, which `targets` makes masks of.
    """

    def __init__(self, source, size, in_chans, num_noise, seed, mean, scale=SCALE):
        super().__init__(source, "boxes", size, in_chans, num_noise, seed)
        self.scale = scale
        self.fill = torch.tensor(fill_color(mean), dtype=torch.uint8)[:, None, None]

    @property
    def item_bytes(self):
        """Bytes of an item with as many objects as images have on average."""
        objects = self.source.num_objects / max(len(self.source), 1)
        return super().item_bytes + int(objects * (self.size[0] * row_bytes(self.size[1]) + 24))

    def load(self, shown):
        image, objects = open_pair(self.source, shown)
        return crops.to_mode(image, self.in_chans), objects

    def view(self, image, objects, epoch, index):
        draws = rng.Rng(self.seed, rng.CROP, epoch, index)
        box, size, flipped = jittered_box(crops.sides(image), self.size, self.scale, draws)
        pixels = torch.from_numpy(crops.resized_part(image, box, size, "bilinear"))     # (h, w, C)
        pixels = pixels.permute(2, 0, 1)                                # (C, h, w)
        pixels = pixels.flip(2) if flipped else pixels
        boxes, labels, bits = [], [], []
        for segment, label, crowd in zip(objects.segments, objects.labels, objects.crowd, strict=True):
            mask = None if crowd else seen_mask(segment, box, size, flipped)            # (h, w)
            if mask is not None and mask.any():
                boxes.append(box_of(mask))
                labels.append(label)
                bits.append(packed(mask, self.size))
        nothing = np.zeros((0, self.size[0], row_bytes(self.size[1])), np.uint8)
        return dict(image=padded(pixels, self.size, self.fill),
                    boxes=torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
                    labels=torch.tensor(labels, dtype=torch.int64),
                    masks=torch.from_numpy(np.stack(bits) if bits else nothing))


def jittered_box(sides, size, scale, draws):
    """((top, left, height, width) of a part of an image, the (h, w) it is scaled to, whether it is mirrored).

    The image, mirrored half of the time, would be scaled, aspect kept, by s ~ U(scale) times what fits it
    into size; of what is larger than that a part is cut out, at one random fraction of the room on both axes.
    The part's own sides are whole pixels of the file.
    """
    flipped, factor, place = draws.uniform() < 0.5, draws.uniform(*scale), draws.uniform()
    whole = fitted(sides, size, factor)
    part, box = tuple(map(min, whole, size)), []
    for axis in (0, 1):
        length, offset = sides[axis], round(place * (whole[axis] - part[axis]))
        if axis and flipped:
            offset = whole[axis] - part[axis] - offset
        count = max(round(part[axis] * length / whole[axis]), 1)
        box.append((min(round(offset * length / whole[axis]), length - count), count))
    (top, height), (left, width) = box
    return (top, left, height, width), part, flipped


def fitted(sides, size, scale=1.0):
    """The (height, width) of an image that is scaled to fit into size, and then by scale; 1 at least."""
    factor = scale * min(side / own for side, own in zip(size, sides, strict=True))
    return tuple(max(int(own * factor + 0.5), 1) for own in sides)


def seen_mask(segment, box, size, flipped):
    """The mask (h, w) bool of an object in the part of its image in box, at this size.

    A polygon is moved and filled there; run lengths are filled at the image's size, and each pixel of the
    view takes its nearest one.
    """
    (top, left, height, width), (h, w) = box, size
    if isinstance(segment, dict):
        mask = nearest(decode(segment), box, size)                      # (h, w)
        return mask[:, ::-1] if flipped else mask
    x_scale, y_scale = w / width, h / height
    moved = [(polygon - [left, top]) * [x_scale, y_scale] for polygon in segment]
    if flipped:
        moved = [[w, 0] + polygon * [-1, 1] for polygon in moved]
    return rasterise(moved, h, w)


def row_bytes(width):
    return -(-width // 8)


def packed(mask, size):
    """A mask (h, w) bool as bits of a view of this size (H, W), 0 outside: (H, Q) uint8."""
    bits = np.zeros((size[0], row_bytes(size[1])), np.uint8)            # (H, Q)
    part = np.packbits(mask, axis=1)
    bits[:part.shape[0], :part.shape[1]] = part
    return bits


def unpacked(bits, width):
    """The masks (M, H, W) bool of bits (M, H, Q) uint8, where these are."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(2)[..., :width]       # (M, H, W)


def targets(batch, width, device):
    """The objects of each image of a batch of this width, on a device: dicts of boxes, labels and masks.

    boxes (N, 4) are float32, x0, y0, x1, y1 in pixels of the view; labels (N,) int64; masks (N, H, W) bool.
    """
    counts = batch["count"].tolist()
    moved = {name: batch[name].to(device, non_blocking=True) for name in ("boxes", "labels", "masks")}
    moved["masks"] = unpacked(moved["masks"], width)                    # (M, H, W)
    columns = [column.split(counts) for column in moved.values()]
    return [dict(zip(moved, column, strict=True)) for column in zip(*columns, strict=True)]


# ---------------------------------------------------------------- evaluation


def fitted_image(image, size):
    """The pixels (C, h, w) of an image, scaled to fit into size."""
    sides = crops.sides(image)
    pixels = crops.resized_part(image, (0, 0, *sides), fitted(sides, size), "bilinear")
    return torch.from_numpy(pixels).permute(2, 0, 1)


class WholeBoxes(Dataset):
    """Whole images for evaluation, scaled to fit into size and padded: image (C, H, W) uint8.

    size is the (h, w) that the image fills, and original its own (H0, W0) by the annotations. Of an image
    that cannot be read, size is (1, 1), and bad names it.
    """

    def __init__(self, source, size, in_chans, mean):
        self.source, self.size, self.in_chans = source, size, in_chans
        self.fill = torch.tensor(fill_color(mean), dtype=torch.uint8)[:, None, None]
        self.patience = Patience(source, lambda index: open_pair(source, index))
        self.item_bytes = in_chans * math.prod(size)

    def __getitem__(self, key):
        _, index = key
        pixels, bad = self.fill, []                                     # (C, 1, 1)
        try:
            pixels = self.patience.read(index, lambda: self.whole(index))       # (C, h, w)
        except DECODE_ERRORS as error:
            name = self.source.name(index)
            bad.append((name, reason_of(error, name)))
        return dict(image=padded(pixels, self.size, self.fill), size=pixels.shape[1:],
                    original=self.source.size(index), noise=torch.zeros(0), bad=bad)

    def whole(self, index):
        """The pixels (C, h, w) of an image."""
        image, _ = open_pair(self.source, index)
        return fitted_image(crops.to_mode(image, self.in_chans), self.size)
