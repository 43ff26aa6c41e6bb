"""RandAugment (arXiv 1909.13719) as MAE fine-tunes with it: timm's "rand-m9-mstd0.5-inc1".

Two of fifteen operations in a row, each skipped half of the time. An operation is a function of (image,
level, fill). level is a magnitude of 0 to 10 divided by 10, and a larger one changes more; an operation that
knows two directions, which is every one but those of TONES, gets a level of random sign. fill is the colour
of what a move leaves uncovered: a tuple, with a number for each channel.
"""

from PIL import Image, ImageEnhance, ImageOps

from mff_min.augment import BICUBIC, IMAGENET_MEAN


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
