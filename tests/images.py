"""Images for the tests of crops and sources, and how far two of them are apart."""

import numpy as np
from PIL import Image


def noise_image(height, width, seed=0):
    """An image of random values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def furthest(a, b):
    """The largest difference between the values of two images."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max()
