"""What training and evaluation see of images with masks: random crops, and whole images.

The augmentation is mmsegmentation's for ADE20K; docs/parity.md says where it differs.

Shapes: C H W, of an image or a crop; h w of the part of it that the image fills.
"""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mff_data import crops
from mff_data.decode import DECODE_ERRORS, reason_of
from mff_data.outages import Patience
from mff_data.views import Views
from mff_min import rng
from mff_min.augment import fill_color
from mff_tasks.ade20k import IGNORED, check_sizes, open_pair

# ---------------------------------------------------------------- training crops


class MaskViews(Views):
    """Random crops of images and masks with the published augmentation: label is (H, W) uint8.

    The image is scaled, cropped, flipped and given other colours; where it is smaller than the crop, what is
    left is the mean colour, and IGNORED in the label.
    """

    def __init__(self, source, size, in_chans, num_noise, seed, mean):
        super().__init__(source, "mask", size, in_chans, num_noise, seed)
        self.fill = torch.tensor(fill_color(mean), dtype=torch.uint8)[:, None, None]

    @property
    def item_bytes(self):
        return super().item_bytes + self.size[0] * self.size[1]

    def load(self, shown):
        image, mask = open_pair(self.source, shown)
        return crops.to_mode(image, self.in_chans), mask

    def view(self, image, label, epoch, index):
        draws = rng.Rng(self.seed, rng.CROP, epoch, index)
        box, size = scaled_box(label, self.size, draws)
        pixels = torch.from_numpy(crops.resized_part(image, box, size, "bilinear"))     # (h, w, C)
        pixels = pixels.permute(2, 0, 1)                                # (C, h, w)
        labels = torch.from_numpy(nearest(label, box, size))            # (h, w)
        if draws.uniform() < 0.5:
            pixels, labels = pixels.flip(2), labels.flip(1)
        pixels = distort(pixels, rng.Rng(self.seed, rng.AUGMENT, epoch, index))
        return dict(image=padded(pixels, self.size, self.fill),
                    label=padded(labels, self.size, torch.tensor(IGNORED, dtype=torch.uint8)))


def scaled_box(mask, size, draws, scale=(0.5, 2.0), most=0.75, tries=10):
    """((top, left, height, width) of a random part of a mask, the (height, width) it is scaled to).

    The image would be scaled, aspect kept, by r ~ U(scale) times what brings its shorter side to that of the
    crop and its longer side to at most four times as much; the part is a crop of this size out of it. It is
    drawn again, at most ten times, while one class has most of its labelled pixels or more.
    """
    H, W = mask.shape
    height, width = scaled_sides(H, W, min(size) * draws.uniform(*scale))
    h, w = min(size[0], height), min(size[1], width)
    part_h, part_w = max(round(h * H / height), 1), max(round(w * W / width), 1)
    for attempt in range(tries + 1):
        top, left = draws.integer(0, height - h + 1), draws.integer(0, width - w + 1)
        top, left = min(round(top * H / height), H - part_h), min(round(left * W / width), W - part_w)
        if attempt == tries or is_varied(mask[top:top + part_h, left:left + part_w], most):
            return (top, left, part_h, part_w), (h, w)


def scaled_sides(H, W, side):
    """(height, width) of an image whose shorter side becomes `side`, its longer 4 * side at most."""
    factor = min(side / min(H, W), 4 * side / max(H, W))
    return tuple(max(int(length * factor + 0.5), 1) for length in (H, W))


def is_varied(mask, most):
    """Whether a part of a mask has several classes, and none of them that share of its labelled pixels."""
    counts = Image.fromarray(np.ascontiguousarray(mask)).histogram()[:IGNORED]
    return sum(map(bool, counts)) > 1 and max(counts) < most * sum(counts)


def nearest(mask, box, size):
    """The part of a mask in box (top, left, height, width) at this size: each pixel's nearest one, (h, w)."""
    rows, columns = (start + ((np.arange(count) + 0.5) * length / count).astype(int)
                     for start, length, count in zip(box[:2], box[2:], size, strict=True))
    return np.take(mask[rows], columns, axis=1)


def padded(x, size, fill):
    """x (..., h, w), with fill below it and to its right where it is smaller than size."""
    h, w = x.shape[-2:]
    if (h, w) == size:
        return x
    out = fill.expand(*x.shape[:-2], *size).clone()                     # (..., H, W)
    out[..., :h, :w] = x
    return out


def distort(pixels, draws):
    """Photometric distortion (SSD, arXiv 1512.02325): (C, h, w) uint8 -> same.

    Each of these with probability 1/2: brightness +- 32; contrast times 0.5 to 1.5, before the colours or
    after them; of three channels saturation times 0.5 to 1.5, and hue +- 18 of 180.
    """
    lighter, harder, first, richer, turned = (draws.uniform() < 0.5 for _ in range(5))
    brightness, contrast = draws.uniform(-32, 32), draws.uniform(0.5, 1.5)
    saturation, hue = draws.uniform(0.5, 1.5), draws.uniform(-18, 18) / 30      # in sixths of a turn
    coloured = (richer or turned) and len(pixels) == 3
    if not (lighter or harder or coloured):
        return pixels

    def changed(x):
        if lighter:
            x = (x + brightness).clamp_(0, 255)
        if harder and first:
            x = (x * contrast).clamp_(0, 255)
        if coloured:
            x = shift_colours(x, saturation if richer else 1.0, hue if turned else 0.0)
        if harder and not first:
            x = (x * contrast).clamp_(0, 255)
        return x.round().to(torch.uint8)
    rows = pixels.contiguous().split(64, dim=1)                         # that stay in a cache
    return torch.cat([changed(part.float()) for part in rows], dim=1)


def shift_colours(x, saturation, hue):
    """RGB x (3, H, W) of 0 ... 255 whose HSV saturation is multiplied, at most to 1, and whose hue is turned.

    hue is in sixths of a turn, at most one.
    """
    value, least = x.amax(0), x.amin(0)                                 # each (H, W)
    span = (value - least).clamp_min(1e-3)                              # of grey: it is 0 whatever its hue
    factor = (value / span).clamp_max_(saturation)                      # saturation: (value - least) / value
    if not hue:
        return value - (value - x) * factor
    red, green, blue = x
    angle = torch.where(value == red, (green - blue) / span, torch.where(
        value == green, 2 + (blue - red) / span, 4 + (red - green) / span)) + hue       # (H, W)
    chroma = (value - least) * factor
    # A channel is highest within a sixth of a turn of its own hue, and lowest from two sixths on.
    turns = [(angle - own).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1) for own in (0, 2, 4)]
    return value - chroma * torch.stack(turns)                          # (3, H, W)


# ---------------------------------------------------------------- whole images


def whole_image(image, side):
    """The pixels (C, h, w) of an image whose shorter side becomes `side`, its longer 4 * side at most."""
    H, W = crops.sides(image)
    size = scaled_sides(H, W, side)
    return torch.from_numpy(crops.resized_part(image, (0, 0, H, W), size, "bilinear")).permute(2, 0, 1)


class WholeMasks(Dataset):
    """What evaluation sees of a source with masks: image (C, h, w), whole, and label (H, W) at its own size.

    Of an image that cannot be read there is one pixel; of a mask, a label without classes. bad names them.
    """

    def __init__(self, source, size, in_chans):
        self.source, self.side, self.in_chans = source, min(size), in_chans
        self.patience = Patience(source, lambda index: open_pair(source, index))
        self.item_bytes = (in_chans + 1) * 4 * self.side ** 2           # of the longest image

    def __getitem__(self, key):
        _, index = key
        image = torch.zeros(self.in_chans, 1, 1, dtype=torch.uint8)
        bad, nothing = [], torch.full((1, 1), IGNORED, dtype=torch.uint8)
        label = nothing
        try:
            mask = self.patience.read(index, lambda: self.source.open_mask(index))      # (H, W)
            label = torch.from_numpy(np.array(mask))
            image = self.patience.read(index, lambda: self.whole(index, mask))          # (C, h, w)
        except DECODE_ERRORS as error:
            name = getattr(error, "file", None)
            if name:                                                    # the mask, or its size
                label = nothing
            name = name or self.source.name(index)
            bad.append((name, reason_of(error, name)))
        return dict(image=image, label=label, noise=torch.zeros(0), bad=bad)

    def whole(self, index, mask):
        """The pixels (C, h, w) of an image, which has the mask's size (H, W)."""
        image = self.source.open(index)
        check_sizes(self.source, index, image, mask)
        return whole_image(crops.to_mode(image, self.in_chans), self.side)
