"""`shapes`, the embedded data set: images drawn by formula, so that every stage runs with nothing downloaded.

Each image has two labels. The shape (ten classes) is high level: place, size, rotation and colours are
random, so that no single pixel tells it. The texture (eight classes) is low level: the spatial frequency of
the background's grating, whose direction and phase are random. The mask and the box of the shape serve
segmentation and detection. Sample i of a split depends on split and i alone, not on the count or the chunk.

Shapes: n images, S image side in pixels.
"""

import os
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mff_min.rng import SHAPE, hash_keys, numbers, permutation

VERSION = 1                                                             # of the cache: see load_shapes
SPLITS = {"train": 0, "val": 1}                                         # in every key: splits share no sample
CHUNK = 64                                                              # images drawn at a time

# Wavelengths in pixels where S = 64, in equal steps of log. A sample strays by at most a third of a step, so
# neighbouring bins do not touch. The shortest is 2.3 pixels where S = 32, just above the two of Nyquist.
STEP = (32 / 5) ** (1 / 7)
WAVELENGTHS = 5 * STEP ** np.arange(8)
TEXTURES = tuple(f"{wavelength:.1f} px" for wavelength in WAVELENGTHS)


# --- the shapes: distance to the edge, negative inside; each fits the circle of radius 1 ---

def fold(x, y, n):
    """Each point brought by turning and mirroring into the half sector of angles 0 ... pi / n: (u, v)."""
    sector, angle = 2 * np.pi / n, np.arctan2(y, x)
    radius, angle = np.hypot(x, y), np.abs(angle - sector * np.rint(angle / sector))
    return radius * np.cos(angle), radius * np.sin(angle)


def polygon(x, y, n, inner):
    """Distance to the polygon whose 2 n corners lie at radius 1 and `inner` in turn."""
    u, v = fold(x, y, n)
    run, rise = 1 - inner * np.cos(np.pi / n), inner * np.sin(np.pi / n)
    return ((u - 1) * rise + v * run) / np.hypot(run, rise)


def cross(x, y):
    """Distance to two bars at right angles."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)


def heart(x, y):
    """Distance to a square that stands on its corner, with a disc on each of the two upper sides."""
    x, y, half = np.abs(x), y + 0.08, 0.525
    middle = half / 2 ** 0.5                                            # of the upper side, in x and in y
    return np.minimum((x + np.abs(y)) / 2 ** 0.5, np.hypot(x - middle, y - middle)) - half


def arrow(x, y):
    """Distance to a shaft and a triangular head."""
    y = np.abs(y)
    shaft, head = np.maximum(np.abs(x + 0.4) - 0.56, y - 0.22), np.maximum(-x, 0.64 * (x - 1) + 0.77 * y)
    return np.minimum(shaft, head)


def flower(x, y):
    """Distance to six round petals about a disc."""
    u, v = fold(x, y, 6)
    return np.minimum(np.hypot(u - 0.7, v) - 0.3, np.hypot(x, y) - 0.55)


DISTANCE = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) - 0.24,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y)),
    "triangle": lambda x, y: polygon(x, y, 3, 0.5),
    "square": lambda x, y: polygon(x, y, 4, 0.5 ** 0.5),
    "star": lambda x, y: polygon(x, y, 5, 0.42),
    "cross": cross,
    "heart": heart,
    "arrow": arrow,
    "flower": flower,
}
SHAPES = tuple(DISTANCE)


# --- the picture ---

def colour(luma, chroma, hue):
    """RGB in 0 ... 1 that has this luma (Rec. 601) unless clipped; hue in turns: (n,) each -> (n, 3)."""
    rgb = np.cos(2 * np.pi * (hue[:, None] - np.arange(3) / 3))         # (n, 3)
    grey = rgb @ [[0.299], [0.587], [0.114]]                            # (n, 1)
    return np.clip(luma[:, None] + chroma[:, None] * (rgb - grey), 0, 1)


def grating(u, luma, hue, wavelength, size, vivid=1.0, spread=1.0):
    """A sine wave between two related colours: (n, S, S, 3). u (n, 5) is noise, wavelength in image sides.

    vivid multiplies the chroma, spread the difference of the two hues.
    """
    angle, phase, depth, chroma, shift = u.T                            # (n,)
    depth, chroma, shift = 0.05 + 0.05 * depth, vivid * (0.12 + 0.14 * chroma), 0.16 * spread * (shift - 0.5)
    low, high = colour(luma - depth, chroma, hue - shift), colour(luma + depth, chroma, hue + shift)
    middle, swing = np.float32((low + high) / 2), np.float32((high - low) / 2)

    waves = (np.arange(size) + 0.5) / size / wavelength[:, None]        # (n, S)
    across = waves * np.cos(2 * np.pi * angle)[:, None]
    down = waves * np.sin(2 * np.pi * angle)[:, None] + phase[:, None]
    turns = np.float32(across[:, None, :] + down[:, :, None])           # (n, S, S)
    return middle[:, None, None] + swing[:, None, None] * np.sin(2 * np.pi * turns)[..., None]


def render(split, indices, size=64):
    """A dict of the samples `indices` of a split: images (n, S, S, 3) uint8, shape and texture (n,) int64,
    mask (n, S, S) bool, True on the shape, box (n, 4) int64, its (x0, y0, x1, y1) in pixels, half-open."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if size < 32:
        raise ValueError(f"size {size} is less than 32, which the finest texture needs")

    # Indices 0 ... 79, 80 ... 159 and so on hold every pair of labels once, in random order.
    indices, key, pairs = [int(i) for i in indices], (SHAPE, SPLITS[split]), len(SHAPES) * len(TEXTURES)
    pair = np.array([permutation(pairs, *key, 0, i // pairs)[i % pairs] for i in indices], np.int64)
    shape, texture = pair % len(SHAPES), pair // len(SHAPES)            # (n,)
    u = numbers(hash_keys(*key, 1, indices), 21)                        # (n, 21)
    scale, place_x, place_y, turn, coin, dark, light, hue, apart, stray, fine = u[:, :11].T

    # A coin says which of shape and background is dark, and their hues differ: a person sees the shape, yet
    # no pixel is brighter on average in one class, so that a linear probe of raw pixels stays near chance.
    dark, light = 0.22 + 0.16 * dark, 0.66 + 0.16 * light
    back, front = np.where(coin < 0.5, (dark, light), (light, dark))
    wavelength = WAVELENGTHS[texture] / 64 * STEP ** ((2 * stray - 1) / 3)
    background = grating(u[:, 11:16], back, hue, wavelength, size)      # (n, S, S, 3)
    wavelength = (5 + 27 * fine) / 64                                   # of the shape's own texture: no label
    foreground = grating(u[:, 16:21], front, hue + 0.25 + 0.5 * apart, wavelength, size)

    radius = 0.18 + 0.12 * scale                                        # in image sides
    room = 1 - 2 * (radius + 0.02)                                      # keeps the whole circle in the image
    centre = 0.5 + room * (np.stack([place_x, place_y]) - 0.5)          # (2, n)
    grid = (np.arange(size) + 0.5) / size - centre[..., None]           # (2, n, S)
    x, y = np.float32(grid / radius[:, None])                           # (n, S)
    cos, sin = np.float32([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)])[..., None, None]
    x, y = x[:, None, :], y[:, :, None]                                 # (n, 1, S), (n, S, 1)
    x, y = cos * x + sin * y, cos * y - sin * x                         # (n, S, S)

    distance = np.empty_like(x)                                         # (n, S, S), in pixels after the loop
    for label in np.unique(shape):
        rows = np.flatnonzero(shape == label)
        distance[rows] = DISTANCE[SHAPES[label]](x[rows], y[rows])
    distance *= np.float32(radius * size)[:, None, None]
    cover = np.clip(0.5 - distance, 0, 1)[..., None]                    # share of each pixel that is shape
    images = 255 * (background + cover * (foreground - background))     # (n, S, S, 3)

    mask = distance < 0
    columns, rows = mask.any(1), mask.any(2)                            # (n, S)
    start = np.stack([columns.argmax(1), rows.argmax(1)], 1)            # (n, 2)
    end = size - np.stack([columns[:, ::-1].argmax(1), rows[:, ::-1].argmax(1)], 1)
    return {"images": np.rint(images).astype(np.uint8), "shape": shape, "texture": texture, "mask": mask,
            "box": np.concatenate([start, end], 1)}


# --- the cache ---

def load_shapes(cache_dir, split, count, size=64, progress=print):
    """Samples 0 ... count - 1 of a split as `render` returns them, memory-mapped; see load_cached."""
    return load_cached(cache_dir, f"shapes-v{VERSION}", render, split, count, size, progress)


def load_cached(cache_dir, name, draw, split, count, size, progress):
    """Samples 0 ... count - 1 of a split as draw(split, indices, size) returns them, mapped from files.

    The first call writes the files, below cache_dir. The name, which holds a version, changes with each
    change of draw, so that none is out of date.
    """
    empty = draw(split, [], size)                                       # names and types; refuses bad input
    if count < 1:
        raise ValueError(f"count {count} is not positive")
    folder = Path(cache_dir) / f"{name}-{size}px" / f"{split}-{count}"
    if not folder.is_dir():
        write_shapes(folder, empty, draw, split, count, size, progress)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in empty}


def write_shapes(folder, empty, draw, split, count, size, progress):
    """None. The folder gets its name in one step, when all files are on the disk: if it exists it is whole.

    Of two processes that race, the loser discards its own files, which hold the same. One that is killed
    leaves a hidden folder, which nothing reads, and which the next one here removes.
    """
    what = folder.parent.name.partition("-")[0]                         # shapes or scenes
    ours = f".{folder.name}-{socket.gethostname()}-"                    # and the number of the process
    unfinished = folder.with_name(f"{ours}{os.getpid()}")
    for path in folder.parent.glob(f"{ours}*"):
        if path == unfinished or not os.path.exists(f"/proc/{path.name.removeprefix(ours)}"):
            shutil.rmtree(path, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(unfinished / f"{name}.npy", "wb")) for name in empty}
            for name, array in empty.items():
                header = np.lib.format.header_data_from_array_1_0(array)
                header["shape"] = (count, *array.shape[1:])
                np.lib.format.write_array_header_1_0(files[name], header)

            start, shown = time.monotonic(), -np.inf
            for first in range(0, count, CHUNK):
                done = min(first + CHUNK, count)
                for name, array in draw(split, range(first, done), size).items():
                    files[name].write(array.tobytes())                  # if mapped, a full disk would kill
                now = time.monotonic()
                if now - shown > 2 or done == count:
                    rate, shown = done / (now - start), now
                    left = (count - done) / rate
                    progress(f"{what} {split}: {done} / {count} images, {rate:.0f} img/s, {left:.0f} s left")
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():                                         # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
