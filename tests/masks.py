"""Images that are their masks' colours, in memory and as a tree of files, for the tests of segmentation."""

import numpy as np
from PIL import Image

from mff_tasks.ade20k import open_masks

COLOURS = np.random.default_rng(5).integers(30, 226, (256, 3)).astype(np.uint8)    # of a label


def blocks(height, width, labels, seed=0, side=16):
    """A mask of blocks of these labels."""
    draws = np.random.default_rng(seed).choice(labels, (-(-height // side), -(-width // side)))
    return np.kron(draws, np.ones((side, side), int))[:height, :width].astype(np.uint8)


def write_tree(root, count=4, labels=(0, 1, 2, 3, 255), splits=("training", "validation"), below=""):
    """Images that are their masks' colours, 40 to 90 pixels wide, as a tree of masks:DIR."""
    for split in splits:
        for i in range(count):
            mask = blocks(48 + i % 7, 90 - i % 11, labels, seed=i)
            for kind, pixels, ending in (("images", COLOURS[mask], "jpg"), ("annotations", mask, "png")):
                path = root / kind / split / below / f"{i:03}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                options = dict(quality=95, subsampling=0) if ending == "jpg" else {}
                Image.fromarray(pixels).save(path, **options)
    return root


def open_tree(root, split="train", say=lambda text: None, kind="masks", **options):
    return open_masks(f"{kind}:{root}", split, "nowhere", say, **options)


class Painted:
    """A source in memory whose images are the colours of its masks."""

    short_side, notes, is_split = 0, (), True

    def __init__(self, masks, classes=4):
        self.masks, self.classes = masks, [str(i) for i in range(classes)]

    def __len__(self):
        return len(self.masks)

    def open(self, i):
        return COLOURS[self.masks[i]]

    def open_mask(self, i):
        return self.masks[i]

    def name(self, i):
        return f"painted {i}"
