"""What is done to pixels: RandAugment on one image, erasing and mixing on a batch, and the targets of a mix.

In fine-tuning the order is crop (mff_data/crops.py), rand_augment, normalise, erase, mix. What is random is
drawn on the CPU, all but the noise that an erased box is filled with. Where nothing is erased, ops.prepare
normalises and mixes at once.

RandAugment (arXiv 1909.13719) is timm's "rand-m9-mstd0.5-inc1", with which MAE fine-tunes: two of fifteen
operations in a row, each skipped half of the time. An operation is a function of (image, level, fill). level
is a magnitude of 0 to 10 divided by 10, and a larger one changes more; an operation that knows two
directions, which is every one but those of TONES, gets a level of random sign. fill is the colour of what a
move leaves uncovered: a tuple, with a number for each channel.

Shapes: B images, C H W, G classes.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

from mff_min.kernels.reference import mix_share
from mff_min.rng import normal_noise

BICUBIC = Image.Resampling.BICUBIC
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of pixels in [0, 1]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}                                   # in_chans to Pillow's mode


def erasing_box(height, width, rng, probability, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3), tries=10):
    """(top, left, height, width) of the box to erase, with this probability (arXiv 1708.04896), else all 0.

    Its share of the image is uniform in area, the logarithm of height / width uniform in aspect. Where none
    of the tries fits, nothing is erased.
    """
    if rng.uniform() > probability:
        return 0, 0, 0, 0
    for _ in range(tries):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if h < height and w < width:
            return rng.integer(0, height - h + 1), rng.integer(0, width - w + 1), h, w
    return 0, 0, 0, 0


def erase(images, boxes, keys):
    """The images, with N(0, 1) noise for each value inside a box: (B, C, H, W), normalised, changed in place.

    boxes (B, 4): top, left, height, width, of erasing_box; keys (B,): int64_key of each sample, of which its
    noise is a function. Both are on the CPU: an image whose box is empty costs nothing, and nothing waits for
    the device.
    """
    assert boxes.device.type == keys.device.type == "cpu"
    chosen = boxes[:, 2:].prod(dim=1).nonzero().flatten()               # (erased,)
    if not len(chosen):
        return images
    corner, size = boxes[chosen].split(2, dim=1)                        # (erased, 2), (erased, 2)
    moved = chosen, keys[chosen], torch.cat([corner, corner + size], dim=1)
    index, keys, box = (x.to(images.device, non_blocking=True) for x in moved)
    before = images[index]                                              # (erased, C, H, W)
    noise = normal_noise(keys, before.shape[1:]).to(images.dtype)       # (erased, C, H, W)
    outside = mix_share(before, None, box) == 1                         # (erased, 1, H, W)
    images[index] = torch.where(outside, before, noise)
    return images


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself in reverse order, of which each image keeps the share lam.

    Inside box (top, left, bottom, right, half open) pixels are the other image's; without a box all pixels
    are blended.
    """
    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


def draw_mix(rng, height, width, mixup=0.8, cutmix=1.0, switch_prob=0.5):
    """The Mix of one batch of images of this size: mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    mixup and cutmix are the alpha of lam's distribution Beta(alpha, alpha); 0 turns one off, and of two that
    are on it is CutMix with probability switch_prob. CutMix's lam is that of the box as cut to the image.
    Raises ValueError for a negative alpha.
    """
    if mixup < 0 or cutmix < 0:
        raise ValueError(f"mixup {mixup} and cutmix {cutmix}: expected 0 or more")
    use_box = rng.uniform() < switch_prob if mixup and cutmix else bool(cutmix)
    alpha = cutmix if use_box else mixup
    lam = rng.beta(alpha, alpha) if alpha else 1.0
    if not use_box:
        return Mix(lam)
    h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = rng.integer(0, height), rng.integer(0, width)                # the middle, anywhere
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def mix_arguments(mix, batch_size, device):
    """What ops.prepare is told for this Mix: partner, and lam or box; nothing where nothing is mixed."""
    if mix.lam == 1:
        return {}
    partner = torch.arange(batch_size - 1, -1, -1, device=device)       # (B,)
    if mix.box is None:
        return dict(partner=partner, lam=torch.full((batch_size,), mix.lam, device=device))
    box = torch.tensor(mix.box).to(device, non_blocking=True).expand(batch_size, 4)     # (B, 4)
    return dict(partner=partner, box=box)


def mix_images(images, mix):
    """What ops.prepare makes of images that it mixes, of images (B, C, H, W) that are normalised already."""
    arguments = mix_arguments(mix, len(images), images.device)
    if not arguments:
        return images
    keep = mix_share(images, arguments.get("lam"), arguments.get("box")).to(images.dtype)
    return keep * images + (1 - keep) * images[arguments["partner"]]


def soft_targets(labels, num_classes, smoothing, lam):
    """The distributions that a mixed batch is to predict: labels (B,) -> (B, G) fp32, each of sum 1.

    Smoothing (arXiv 1512.00567) gives each of the G classes smoothing / G and the labelled one the rest.
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)     # (B, G)
    targets.scatter_(1, labels[:, None], 1 - smoothing + off)
    return lam * targets + (1 - lam) * targets.flip(0)


def fill_color(mean):
    """The colour of a normalised 0 in 8 bits: a tuple with a number for each channel's mean in [0, 1]."""
    return tuple(min(255, round(255 * value)) for value in mean)


FILL = fill_color(IMAGENET_MEAN)


def rand_augment(image, rng, magnitude=9, magnitude_std=0.5, num_ops=2, probability=0.5, fill=FILL):
    """The image, L, RGB or RGBA, after num_ops random operations, each applied with this probability.

    An operation's magnitude is normal with this mean and deviation, clipped to 0 ... 10. Raises ValueError
    where fill, which is fill_color(mean), has not as many numbers as the image has channels.
    """
    if len(fill) != len(image.getbands()):
        raise ValueError(f"fill {fill} has {len(fill)} values: expected one for each channel of {image.mode}")
    names = list(OPERATIONS)
    for name in [names[rng.integer(0, len(names))] for _ in range(num_ops)]:
        if rng.uniform() <= probability:
            image = apply(name, image, draw_level(name, rng, magnitude, magnitude_std), fill)
    return image


def draw_level(name, rng, magnitude, magnitude_std):
    """How strong an operation is: in [0, 1] for one of TONES, else in [-1, 1]."""
    level = max(0.0, min(magnitude + magnitude_std * rng.normal(), 10.0)) / 10
    return -level if name not in TONES and rng.uniform() > 0.5 else level


def apply(name, image, level, fill):
    """The image after one operation. An alpha channel moves with the colours, and is otherwise kept."""
    operation = OPERATIONS[name]
    if image.mode != "RGBA":
        return operation(image, level, fill)
    alpha = image.getchannel("A")                                       # apart: Pillow would blend with it
    image = operation(image.convert("RGB"), level, fill[:3])
    image.putalpha(operation(alpha, level, fill[3:]) if name in MOVES else alpha)
    return image


def posterize(image, bits):
    """The image with the upper `bits` of each value's eight; 0 bits, which Pillow refuses, make it black."""
    return image.point(lambda value: value & (256 - (1 << (8 - bits))))


def solarize_add(image, amount):
    """The image with the darker half of its values raised by amount."""
    return image.point(lambda value: min(255, value + amount) if value < 128 else value)


def enhance(kind, image, level):
    """The image blended with a plainer one, or taken away from it where level > 0; 0 changes nothing."""
    return kind(image).enhance(1 + 0.9 * level)


def warp(image, matrix, fill):
    """Each pixel (x, y) of the result is the image's at (a x + b y + c, d x + e y + f), bicubic."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=fill)


TONES = {                                                               # a new value for each value
    "AutoContrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, fill: ImageOps.equalize(image),
    "Invert": lambda image, level, fill: ImageOps.invert(image),
    "Posterize": lambda image, level, fill: posterize(image, 4 - int(4 * level)),
    "Solarize": lambda image, level, fill: ImageOps.solarize(image, 256 - int(256 * level)),
    "SolarizeAdd": lambda image, level, fill: solarize_add(image, int(110 * level)),
}
BLENDS = {                                                              # with a plainer image
    "Color": lambda image, level, fill: enhance(ImageEnhance.Color, image, level),
    "Contrast": lambda image, level, fill: enhance(ImageEnhance.Contrast, image, level),
    "Brightness": lambda image, level, fill: enhance(ImageEnhance.Brightness, image, level),
    "Sharpness": lambda image, level, fill: enhance(ImageEnhance.Sharpness, image, level),
}
MOVES = {                                                               # the only ones that need fill
    "Rotate": lambda image, level, fill: image.rotate(30 * level, BICUBIC, fillcolor=fill),
    "ShearX": lambda image, level, fill: warp(image, (1, 0.3 * level, 0, 0, 1, 0), fill),
    "ShearY": lambda image, level, fill: warp(image, (1, 0, 0, 0.3 * level, 1, 0), fill),
    "TranslateX": lambda image, level, fill: warp(image, (1, 0, 0.45 * level * image.width, 0, 1, 0), fill),
    "TranslateY": lambda image, level, fill: warp(image, (1, 0, 0, 0, 1, 0.45 * level * image.height), fill),
}
OPERATIONS = TONES | BLENDS | MOVES
