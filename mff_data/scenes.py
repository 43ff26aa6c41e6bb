"""Embedded scenes for segmentation and detection: one to four shapes of shapes.py in an image, none touching.

A shape's hue strays from its class's by up to three quarters of the step between classes, and the background
is nearly grey. So colour helps to tell a class, as in photographs, and the outline decides. A network learns
this in minutes; on the images of shapes.py, where no colour tells a class, it takes far longer. Sample i of
a split depends on split and i alone.

Shapes: n images, S image side in pixels, m corners of a polygon.
"""

import numpy as np

from mff_data.shapes import DISTANCE, SHAPES, SPLITS, grating, load_cached
from mff_min.rng import SCENE, hash_keys, numbers

VERSION = 1                                                             # of the cache: see load_scenes
MOST = 4                                                                # shapes in an image
TRIES = 16                                                              # places that are drawn for them
RADIUS = 0.11, 0.2                                                      # smallest and largest, in image sides


# --- outlines, for polygons: closed, of radius 1 as the distances in shapes.py ---

def arc(centre, radius, start, end, m=24):
    """m points of a circle, from one angle to another in degrees: (m, 2)."""
    angle = np.radians(np.linspace(start, end, m))
    return np.asarray(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def corners(n, inner):
    """2 n corners at radius 1 and `inner` in turn: (2 n, 2)."""
    angle = np.pi / n * np.arange(2 * n)
    return np.where(np.arange(2 * n) % 2, inner, 1)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def rotated(points, degrees):
    """Points (m, 2) turned about the origin."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]])


def heart():
    side = 0.525 * 2 ** 0.5                                             # from the centre to a corner
    right = arc((side / 2, side / 2), 0.525, -45, 135)
    return np.concatenate([[[0, -side]], right, right[-2::-1] * [-1, 1]]) - [0, 0.08]


def flower():
    """Six petals, each from where it leaves the disc in the middle, and the disc between them."""
    x = (0.55 ** 2 + 0.7 ** 2 - 0.3 ** 2) / 1.4                         # where the circles of both meet
    y = (0.55 ** 2 - x ** 2) ** 0.5
    on_petal, on_disc = np.degrees(np.arctan2([y, y], [x - 0.7, x]))
    petal = np.concatenate([arc((0.7, 0), 0.3, -on_petal, on_petal, 12),
                            arc((0, 0), 0.55, on_disc, 60 - on_disc, 4)[1:-1]])
    return np.concatenate([rotated(petal, 60 * i) for i in range(6)])


def crescent():
    x = (1 + 0.5 ** 2 - 0.8 ** 2) / (2 * 0.5)                           # where the circles of both edges meet
    y = (1 - x ** 2) ** 0.5
    outside, inside = np.degrees(np.arctan2([y, y], [x, x - 0.5]))
    return np.concatenate([arc((0, 0), 1, outside, 360 - outside),
                           arc((0.5, 0), 0.8, 360 - inside, inside)[1:-1]])


OUTLINES = {
    "circle": arc((0, 0), 1, 0, 360, 49)[:-1],
    "ring": np.concatenate([arc((0, 0), 1, 0, 360, 49), arc((0, 0), 0.52, 360, 0, 49)]),    # joined by a cut
    "crescent": crescent(),
    "triangle": corners(3, 0.5)[::2],
    "square": corners(4, 0.5 ** 0.5)[::2],
    "star": corners(5, 0.42),
    "cross": np.concatenate([rotated(np.array([[0.95, -0.3], [0.95, 0.3], [0.3, 0.3]]), 90 * i)
                             for i in range(4)]),
    "heart": heart(),
    "arrow": np.array([[-0.96, -0.22], [0, -0.22], [0, -0.64 / 0.77], [1, 0], [0, 0.64 / 0.77], [0, 0.22],
                       [-0.96, 0.22]]),
    "flower": flower(),
}


def polygon_of(one):
    """The corners (m, 2), x and y in pixels, of one of a scene's objects: (class, x, y, radius, turn)."""
    label, x, y, radius, turn = map(float, one)
    return [x, y] + radius * rotated(OUTLINES[SHAPES[int(label)]], np.degrees(turn))


# --- the picture ---

def places(count, radius, x, y):
    """Which of TRIES circles in a unit square are taken, in turn, up to count, that none touches: (n, TRIES).

    count (n,); radius, x, y (n, TRIES).
    """
    taken = np.zeros(radius.shape, bool)
    for i in range(TRIES):
        apart = np.hypot(x - x[:, i:i + 1], y - y[:, i:i + 1]) > radius + radius[:, i:i + 1] + 0.02
        taken[:, i] = (apart | ~taken).all(1) & (taken.sum(1) < count)
    return taken


def render_scenes(split, indices, size=64):
    """A dict of the samples `indices` of a split: images (n, S, S, 3) uint8, labels (n, S, S) uint8 and
    objects (n, 4, 5) float32. A label is 0 on the background, k + 1 on SHAPES[k]; an object is (k, or -1 of
    none, x and y of its centre and radius in pixels, turn in radians)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if size < 32:
        raise ValueError(f"size {size} is less than 32, which the finest texture needs")
    indices = [int(i) for i in indices]
    n = len(indices)
    u = numbers(hash_keys(SCENE, SPLITS[split], indices), 10 + 13 * TRIES)     # (n, 10 + 13 * TRIES)
    own = u[:, 10:].reshape(n, TRIES, 13)                               # numbers of each place

    # The background: a grating with little colour, dark or light.
    dark, back, hue, wavelength, count = u[:, :5].T
    dark = dark < 0.5
    back = np.where(dark, 0.25, 0.65) + 0.12 * back
    images = grating(u[:, 5:10], back, hue, (6 + 20 * wavelength) / 64, size, vivid=0.2)    # (n, S, S, 3)

    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * own[..., 0]          # (n, TRIES), in image sides
    room = 1 - 2 * (radius + 0.01)                                      # keeps the whole circle in the image
    x, y = 0.5 + room * (own[..., 1] - 0.5), 0.5 + room * (own[..., 2] - 0.5)
    taken = places(1 + (MOST * count).astype(int), radius, x, y)
    label = (len(SHAPES) * own[..., 3]).astype(int)                     # (n, TRIES)
    turn = 2 * np.pi * own[..., 4]
    hue = (label + 1.5 * (own[..., 5] - 0.5)) / len(SHAPES)
    front = np.where(dark[:, None], 0.5, 0.3) + 0.2 * own[..., 6]       # lighter than a dark background

    labels = np.zeros((n, size, size), np.uint8)
    objects = np.full((n, MOST, 5), -1, np.float32)
    grid = (np.arange(size) + 0.5) / size
    for i in range(TRIES):
        rows = np.flatnonzero(taken[:, i])
        rank = taken[rows, :i].sum(1)                                   # how many objects came before
        r = radius[rows, i, None, None]
        right = (grid - x[rows, i, None])[:, None, :] / r               # (rows, 1, S)
        down = (grid - y[rows, i, None])[:, :, None] / r                # (rows, S, 1)
        cos, sin = np.cos(turn[rows, i, None, None]), np.sin(turn[rows, i, None, None])
        right, down = cos * right + sin * down, cos * down - sin * right        # (rows, S, S)
        distance = np.empty_like(right)
        for k in np.unique(label[rows, i]):
            same = label[rows, i] == k
            distance[same] = DISTANCE[SHAPES[k]](right[same], down[same])
        distance *= r * size                                            # in pixels
        texture = grating(own[rows, i, 7:12], front[rows, i], hue[rows, i], (5 + 27 * own[rows, i, 12]) / 64,
                          size, spread=0.25)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]                # share of each pixel that is shape
        images[rows] += cover * (texture - images[rows])
        labels[rows] = np.where(distance < 0, label[rows, i, None, None] + 1, labels[rows])
        objects[rows, rank] = np.stack([label[rows, i], size * x[rows, i], size * y[rows, i],
                                        size * radius[rows, i], turn[rows, i]], 1)
    return {"images": np.rint(255 * images).astype(np.uint8), "labels": labels, "objects": objects}


def load_scenes(cache_dir, split, count, size=64, progress=print):
    """Samples 0 ... count - 1 of a split as `render_scenes` returns them, memory-mapped; see load_cached."""
    return load_cached(cache_dir, f"scenes-v{VERSION}", render_scenes, split, count, size, progress)
