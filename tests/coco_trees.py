"""Small COCO trees of painted polygons, for the tests of detection."""

import json

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = {1: "disc", 3: "box", 4: "triangle", 90: "nowhere"}       # with gaps, as COCO has them
COLOURS = {1: (220, 40, 40), 3: (40, 200, 60), 4: (50, 70, 230)}


def polygon(kind, x, y, radius):
    """The corners of an object, x0, y0, x1, y1, ... with two digits, as COCO has them."""
    count, turn = {1: (24, 0), 3: (4, np.pi / 4), 4: (3, -np.pi / 2)}[kind]
    angle = turn + 2 * np.pi * np.arange(count) / count
    points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)      # (count, 2)
    return [float(value) for value in np.round(points, 2).ravel()]


def annotation(number, image, kind, corners, **options):
    """One of an annotation file's, of a polygon; its area is that of its box."""
    x, y = corners[::2], corners[1::2]
    w, h = max(x) - min(x), max(y) - min(y)
    return dict(id=number, image_id=image, category_id=kind, iscrowd=0, bbox=[min(x), min(y), w, h],
                area=round(w * h, 2), segmentation=[corners]) | options


def content(count=6, seed=0, height=72, width=96):
    """(what an annotation file holds, its images): one to three objects in a row, in the last image none.

    The last image but one has a crowd too, a strip of 4 columns. Ids of images have gaps.
    """
    draws, images, annotations, drawn = np.random.default_rng([seed, 77]), [], [], []
    for i in range(count):
        image = 10 * i + 7
        h, w = height + i % 3, width - i % 5
        images.append(dict(id=image, file_name=f"{image:06}.png", height=h, width=w, license=1))
        sheet = Image.fromarray(draws.integers(90, 130, (h, w, 3)).astype(np.uint8))
        for place in range(draws.integers(1, 4) if i < count - 1 else 0):
            kind, radius = int(draws.choice(list(COLOURS))), draws.uniform(8, 14)
            corners = polygon(kind, 16 + 30 * place, draws.uniform(20, h - 20), radius)
            ImageDraw.Draw(sheet).polygon(corners, fill=COLOURS[kind])
            annotations.append(annotation(len(annotations) + 1, image, kind, corners))
        if i == count - 2:
            crowd = dict(size=[h, w], counts=[h * (w - 4), 4 * h])
            annotations.append(dict(id=len(annotations) + 1, image_id=image, category_id=1, iscrowd=1,
                                    bbox=[w - 4, 0, 4, h], area=4 * h, segmentation=crowd))
        drawn.append(sheet)
    categories = [dict(id=number, name=name, supercategory="thing") for number, name in CATEGORIES.items()]
    order = draws.permutation(len(annotations))                         # a file's are in no order
    return dict(images=images, annotations=[annotations[i] for i in order], categories=categories), drawn


def write_tree(root, count=6, splits=("train2017", "val2017"), images="", change=None, **options):
    """A tree of coco:DIR with so many images in each split; change(found) may alter what the files hold."""
    for seed, split in enumerate(splits):
        found, drawn = content(count, seed, **options)
        folder = root / images / split
        folder.mkdir(parents=True, exist_ok=True)
        for entry, sheet in zip(found["images"], drawn, strict=True):
            sheet.save(folder / entry["file_name"])
        if change:
            change(found)
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return root
