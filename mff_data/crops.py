"""Crops, flips and channel conversion of one image.

Every crop takes (image, size, rng), with size (height, width) and rng an Rng of the sample. An image is
Pillow's or an array (H, W, C) of uint8, which is read and never changed; a crop is a new array of that size.
Random parts are resized by PyTorch, whole images by Pillow: docs/data.md, "Where the pixels are made".
Normalisation is not here: uint8 travels to the device and `ops.prepare` normalises there.

Shapes: C H W, H' W' the sides of a crop.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mff_data.decode import MAX_PIXELS
from mff_min.augment import MODES

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def random_resized(image, size, rng):
    """A random part of the image, resized, and flipped half of the time.

    MAE, A.1; the crop is Inception's (arXiv 1409.4842).
    """
    return flip(resized_part(image, random_resized_box(*sides(image), rng), size), rng)


def inception(image, size, rng):
    """random_resized of parts from 8 % of the area on, as for training with labels (arXiv 1409.4842)."""
    return flip(resized_part(image, random_resized_box(*sides(image), rng, scale=(0.08, 1.0)), size), rng)


def single_draw(image, size, rng):
    """A random part of the image, resized, and flipped half of the time: MAE's crop for linear probing."""
    return flip(resized_part(image, single_draw_box(*sides(image), rng), size), rng)


def simple(image, size, rng):
    """The shorter side resized to the crop, padded by reflection, cropped at random and flipped.

    PixMIM's crop (arXiv 2303.02416). Unlike random_resized it keeps most of the object in view, which under a
    75 % mask is little enough.
    """
    padding = 4
    image = to_array(resize_to_cover(image, size, BILINEAR))            # (H, W, C)
    top = rng.integer(0, image.shape[0] + 2 * padding - size[0] + 1) - padding
    left = rng.integer(0, image.shape[1] + 2 * padding - size[1] + 1) - padding
    return flip(reflected(image, top, left, size), rng)


def center(image, size, rng=None):
    """The middle of the image at the scale at which the crop just fits; nothing random."""
    return middle(resize_to_cover(image, size, BICUBIC), size)


def evaluation(image, size, rng=None):
    """The crop that accuracies are measured on: the middle of the image at the scale of cut_from."""
    return middle(resize_to_cover(image, cut_from(size), BICUBIC), size)


def cut_from(size):
    """(height, width) of what evaluation cuts a crop of this size out of, by MAE's rule.

    Up to 224 pixels it is side / 0.875, the fraction cut off: 256 for 224. Above 224 it is the crop itself.
    The shorter side decides for both sides of a rectangle, of which MAE has none.
    """
    return tuple(side * 8 // 7 for side in size) if min(size) <= 224 else size


def middle(image, size):
    """The middle of an image that is not smaller than size; of odd margins as torchvision's CenterCrop."""
    (height, width), image = size, to_array(image)
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return np.array(image[top:top + height, left:left + width])


CROPS = {"random_resized": random_resized, "inception": inception, "single_draw": single_draw,
         "simple": simple, "center": center, "evaluation": evaluation}


def random_resized_box(height, width, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random part: area uniform in scale, log aspect uniform in ratio.

    Where ten tries find no part that fits, it is the largest centred one whose aspect is in ratio, as in
    torchvision.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))      # width / height
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integer(0, height - h + 1), rng.integer(0, width - w + 1), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def single_draw_box(height, width, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random part: a draw that is cut to what fits (BYOL, arXiv 2006.07733).

    random_resized_box tries again where a draw does not fit.
    """
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))      # width / height
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    return rng.integer(0, height - h + 1), rng.integer(0, width - w + 1), h, w


def sides(image):
    """(height, width) of an image, which of a file that is not decoded yet are its header's."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def to_array(image):
    """The pixels of an image: (H, W, C) of uint8."""
    return np.atleast_3d(np.asarray(image))


def to_pillow(pixels):
    """The Pillow image with these pixels, an array (H, W, C)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def resized_part(image, box, size, mode="bicubic"):
    """The part of an image in box (top, left, height, width), antialiased: an array (H', W', C).

    By PyTorch, whose resize of uint8 rounds more coarsely than Pillow's: docs/parity.md, "Pixels". A file
    that can be decoded at a fraction of its size leaves a box that begins between pixels, and is Pillow's.
    """
    scale = decode_smaller(image, box, size)
    if scale > 1:
        top, left, height, width = (value / scale for value in box)
        box = left, top, min(left + width, image.width), min(top + height, image.height)
        return np.array(to_array(image.resize(size[::-1], Image.Resampling[mode.upper()], box=box)))
    part = np.array(cut(image, box))                                    # (height, width, C)
    x = torch.from_numpy(part)[None].permute(0, 3, 1, 2)                # (1, C, height, width)
    x = F.interpolate(x, size, mode=mode, antialias=True)               # (1, C, H', W')
    return x[0].permute(1, 2, 0).contiguous().numpy()


def decode_smaller(image, box, size):
    """Have a JPEG that is not decoded yet come at 1/2, 1/4 or 1/8 of its size; returns the divisor, or 1.

    At least two pixels are left for each pixel of the crop on both axes, so that what the decoder's own
    averaging changes stays small: docs/parity.md, "Pixels".
    """
    fits = min(box[2] // size[0], box[3] // size[1]) // 2
    scale = next((scale for scale in (8, 4, 2) if scale <= fits), 1)
    if scale == 1 or getattr(image, "format", None) not in ("JPEG", "MPO"):
        return 1
    drafted = image.draft(None, (image.width // scale, image.height // scale))
    return scale if drafted else 1                                      # None: it is decoded already


def cut(image, box):
    """The pixels of an image in box (top, left, height, width): (height, width, C), of an array a view."""
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        return image[top:top + height, left:left + width]
    return to_array(image.crop((left, top, left + width, top + height)))


def reflected(image, top, left, size):
    """size pixels of an array (H, W, C) from (top, left) on; past its edges stands its reflection."""
    (height, width), (H, W) = size, image.shape[:2]
    up, down = inside(top, height, H)
    first, last = inside(left, width, W)
    out = np.empty((height, width, image.shape[2]), np.uint8)           # (height, width, C)
    out[up:down, first:last] = image[top + up:top + down, left + first:left + last]
    for i in (*range(up), *range(down, height)):                        # few: rows are copied one by one
        out[i, first:last] = image[reflection(top + i, H), left + first:left + last]
    if last - first < width:
        rows = reflection(np.arange(top, top + height), H)              # (height,)
        for j in (*range(first), *range(last, width)):
            out[:, j] = image[:, reflection(left + j, W)][rows]
    return out


def inside(start, count, size):
    """The range of the pixels start, start + 1, ... that lie in a line of this size, counted from start."""
    first = min(max(-start, 0), count)
    return first, max(min(size - start, count), first)


def reflection(at, size):
    """Where what is seen at this place, or these, of a reflected line of this size stands in the line."""
    period = max(2 * (size - 1), 1)
    at = abs(at) % period
    return np.minimum(at, period - at)


def resize_to_cover(image, size, resample):
    """The image scaled by Pillow, aspect kept, to the smallest size that covers (height, width).

    One side fits exactly; of the other a fraction of a pixel is cut off, as in torchvision's Resize. An image
    of that size is returned as it is. Raises ValueError where that is more than MAX_PIXELS.
    """
    (height, width), (H, W) = size, sides(image)
    new = (height, height * W // H) if height * W >= width * H else (width * H // W, width)
    if new == (H, W):
        return image
    if new[0] * new[1] > MAX_PIXELS:                                    # a line of pixels, say
        raise ValueError(f"{W} x {H} pixels would become {new[1]} x {new[0]}, more than {MAX_PIXELS}")
    if isinstance(image, np.ndarray) and image.shape[2] not in (1, 3):  # Pillow would take a fourth for alpha
        planes = [resize_to_cover(image[..., c:c + 1], size, resample) for c in range(image.shape[2])]
        return np.stack(planes, axis=2)                                 # (H', W', C)
    image = to_pillow(image) if isinstance(image, np.ndarray) else image
    return image.resize(new[::-1], resample)


def flip(pixels, rng):
    """An array (H, W, C), mirrored left to right half of the time."""
    if rng.uniform() >= 0.5:
        return pixels
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)              # (1, C, H, W): fast to flip
    return x.flip(-1)[0].permute(1, 2, 0).numpy()


class WrongChannels(ValueError):
    """An image whose channels are not those that the model takes, and cannot become them."""


def to_mode(image, in_chans):
    """The image, of 8 bits per value, with in_chans channels by fixed rules; undecoded where it has them.

    Palettes and CMYK become colour; alpha is dropped, not blended; grey is repeated; of an animation the
    first frame counts; EXIF orientation is ignored, as it is by torchvision, with which MAE reads, but Pillow
    turns a TIFF by it. Raises WrongChannels where no rule leads to so many channels.
    """
    if isinstance(image, np.ndarray):
        H, W, C = image.shape
        if C == in_chans:
            return image
        if C not in (1, 3) or in_chans not in MODES:
            way = (f"--in-chans {C} is for a model of such" if H != in_chans else
                   "it seems to be (C, H, W): numpy.moveaxis(array, 0, -1) turns it")
            raise WrongChannels(f"an array ({H}, {W}, {C}) has {C} channels: expected {in_chans}, which the "
                                f"model takes; {way}")
        image = to_pillow(image)
    if in_chans not in MODES:
        raise WrongChannels(f"an image of mode {image.mode}: expected a .npy array (H, W, {in_chans}), since "
                            f"the model takes {in_chans} channels (--in-chans)")
    if image.mode in ("LA", "La", "PA", "RGBa"):                        # Pillow needs RGBA in between
        image = image.convert("RGBA")
    return image if image.mode == MODES[in_chans] else image.convert(MODES[in_chans])
