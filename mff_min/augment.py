"""From a Pillow image to the uint8 pixels that a model sees: crops, flips and channel conversion.

Every crop takes (image, size, rng), with size (height, width) and rng an Rng of the sample, and returns a
Pillow image of that size. Normalisation is not here: uint8 travels to the device and `ops.prepare` normalises
there.

Shapes: H W, C channels.
"""

import math

import numpy as np
from PIL import Image, ImageOps

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of pixels in [0, 1]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}                                   # in_chans to Pillow's mode


def random_resized(image, size, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of the image, resized, and flipped half of the time.

    MAE, A.1; the crop is Inception's (arXiv 1409.4842).
    """
    top, left, height, width = random_resized_box(image.height, image.width, rng, scale, ratio)
    image = image.crop((left, top, left + width, top + height)).resize(size[::-1], BICUBIC)
    return flip(image, rng)


def single_draw(image, size, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of the image, resized, and flipped half of the time: MAE's crop for linear probing.

    It draws one box and cuts it to what fits, as BYOL does (arXiv 2006.07733), where random_resized tries
    again.
    """
    area = image.height * image.width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))      # width / height
    width = min(max(round(math.sqrt(area * aspect)), 1), image.width)
    height = min(max(round(math.sqrt(area / aspect)), 1), image.height)
    top, left = rng.integer(0, image.height - height + 1), rng.integer(0, image.width - width + 1)
    image = image.crop((left, top, left + width, top + height)).resize(size[::-1], BICUBIC)
    return flip(image, rng)


def simple(image, size, rng, padding=4):
    """The shorter side resized to the crop, padded by reflection, cropped at random and flipped.

    PixMIM's crop (arXiv 2303.02416). Unlike random_resized it keeps most of the object in view, which under a
    75 % mask is little enough.
    """
    image = np.asarray(resize_to_cover(image, size, BILINEAR))          # (H, W, C), or (H, W) where grey
    image = np.pad(image, [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2), mode="reflect")
    height, width = size
    top = rng.integer(0, image.shape[0] - height + 1)
    left = rng.integer(0, image.shape[1] - width + 1)
    return flip(Image.fromarray(image[top:top + height, left:left + width]), rng)


def center(image, size, rng=None, margin=1.0):
    """The middle of the image at the scale at which `margin` times the crop just fits; nothing random."""
    height, width = size
    image = resize_to_cover(image, (round(height * margin), round(width * margin)), BICUBIC)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def evaluation(image, size, rng=None):
    """The crop that accuracies are measured on: shorter side to 256 for a crop of 224, then the middle."""
    return center(image, size, margin=256 / 224)


CROPS = {"random_resized": random_resized, "single_draw": single_draw, "simple": simple, "center": center,
         "evaluation": evaluation}


def random_resized_box(height, width, rng, scale, ratio):
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


def resize_to_cover(image, size, resample):
    """The image scaled, aspect kept, to the smallest size that covers (height, width)."""
    height, width = size
    factor = max(height / image.height, width / image.width)
    new_size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    return image.resize(new_size, resample)


def flip(image, rng):
    """The image, mirrored left to right half of the time."""
    return ImageOps.mirror(image) if rng.uniform() < 0.5 else image


def to_mode(image, in_chans):
    """The image with in_chans channels of 8 bits, by fixed rules.

    16-bit values are scaled to 8 bits, which Pillow's own convert would saturate; palettes and CMYK become
    colour; alpha is dropped, not blended; grey is repeated; of an animation the first frame counts; EXIF
    orientation is ignored, as it is by the published pipelines. Raises ValueError for 32-bit and float
    images, whose range is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)                    # (H, W)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range")
    if image.mode in ("LA", "La", "PA"):                                # Pillow needs RGBA in between
        image = image.convert("RGBA")
    return image.convert(MODES[in_chans])
