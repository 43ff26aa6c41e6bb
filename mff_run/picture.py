"""Pictures of a run, drawn with Pillow alone.

Shapes: B images, C H W, L patches, K masked patches, N = P * P * C, D width of features.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from mff_min.kernels.reference import patchify, unpatchify
from mff_min.targets import reconstruction

INK, PAPER = (40, 40, 40), (255, 255, 255)
GAP, TOP = 6, 46                                                        # between tiles, and above them: texts
LINE = 17                                                               # of a note below them

# What a picture owes to its target, by norm_pix.
OWED = {True: "Each predicted patch is shown with the mean and the contrast of the true patch, which "
              "the model does not predict (norm_pix). The last column shows the means alone.",
        False: "The prediction has its own colours. The last column shows the mean of each true patch alone."}


def to_uint8(images, mean, std):
    """Normalised images (B, C, H, W) as RGB pixels (B, H, W, 3) uint8.

    Of one or two channels the first is shown grey, of more than three the first three.
    """
    images = images.float() * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)            # (B, C, H, W)
    if images.shape[1] < 3:
        images = images[:, :1].expand(-1, 3, -1, -1)                    # (B, 3, H, W)
    pixels = (images[:, :3].clamp(0, 1) * 255).round().to(torch.uint8)  # (B, 3, H, W)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()                     # (B, H, W, 3)


def grey_out(images, mask, patch_size):
    """Images whose masked patches are 0, the mean colour of normalised images; mask (B, L), 1 removed."""
    H, W = images.shape[-2:]
    patches = patchify(images, patch_size) * (1 - mask[..., None])      # (B, L, N)
    return unpatchify(patches, patch_size, (H // patch_size, W // patch_size))


def reconstruction_sheet(images, targets, pred, ids, mask, patch_size, norm_pix, mean, std, title):
    """What was there, what the model saw, what it predicts, both together, and the masked patches' means.

    One row an image, by Pillow, with what the picture owes to the target in words below. images and targets
    (B, C, H, W) are normalised; where they differ (PixMIM) the target has a column of its own. pred (B, K, N)
    and ids (B, K) are the masked patches, mask is (B, L) with 1 removed.
    """
    pasted = reconstruction(pred.float(), targets, ids, patch_size, norm_pix)           # (B, C, H, W)
    means = reconstruction(torch.zeros_like(pred.float()), targets, ids, patch_size, norm_pix=True)
    columns = {"image": images, "target": targets, "masked": grey_out(images, mask, patch_size),
               "prediction": grey_out(pasted, 1 - mask, patch_size), "pasted": pasted, "patch means": means}
    if targets is images:
        del columns["target"]
    tiles = {caption: to_uint8(pictures, mean, std) for caption, pictures in columns.items()}
    return grid(tiles, title, scale=scale_of(min(images.shape[-2:])), note=OWED[norm_pix])


def scale_of(side):
    """By how much images of this side are drawn larger: small ones are."""
    return max(1, round(128 / side))


def principal_colours(x, *others):
    """Features as colours: their three principal components are red, green and blue, each from 0 to 1.

    x is (B, L, D), the others (B, ..., D) have the colours of x's components. Returns all in one list,
    (B, L, 3).
    """
    centre = x.mean(dim=(0, 1))                                         # (D,)
    axes = torch.linalg.svd((x - centre).flatten(0, 1), full_matrices=False).Vh[:3]
    axes = F.pad(axes, (0, 0, 0, 3 - len(axes)))                        # (3, D)
    found = [(each - centre) @ axes.mT for each in (x, *others)]        # each (B, L, 3)
    low, high = found[0].amin(dim=(0, 1)), found[0].amax(dim=(0, 1))    # each (3,)
    return [((each - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for each in found]


def painted(colours, patch_size, width):
    """Pixels (B, H, W, 3) uint8 of a colour for each patch, (B, L, 3) or of grey (B, L, 1); width is W."""
    maps = colours.expand(-1, -1, 3).mT.unflatten(-1, (-1, width // patch_size))
    maps = F.interpolate(maps, scale_factor=patch_size, mode="nearest") * 255           # (B, 3, H, W)
    return maps.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(columns, title, scale=1, note="", rows=()):
    """A picture of {caption: (B, H, W, 3) uint8}, one labelled column per entry, one row per image.

    rows are a caption for each row, which stand on its left; the note stands below.
    """
    B, H, W, _ = next(iter(columns.values())).shape
    H, W = H * scale, W * scale
    font = ImageFont.load_default(13)
    start = GAP + math.ceil(max((font.getlength(row) + GAP for row in rows), default=0))
    width = start + (W + GAP) * len(columns)
    lines = wrapped(note, width - 2 * GAP, font)
    sheet = Image.new("RGB", (width, TOP + (H + GAP) * B + LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 5), title, INK, font=font)
    for i, caption in enumerate(rows):
        draw.text((GAP, TOP + i * (H + GAP)), caption, INK, font=font)
    for j, (caption, images) in enumerate(columns.items()):
        left = start + j * (W + GAP)
        draw.text((left, 26), caption, INK, font=font)
        for i in range(B):
            tile = Image.fromarray(np.ascontiguousarray(images[i])).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, TOP + i * (H + GAP)))
    for i, line in enumerate(lines):
        draw.text((GAP, TOP + (H + GAP) * B + LINE * i), line, INK, font=font)
    return sheet


def wrapped(text, width, font):
    """The lines of a text whose words fit into so many pixels; a longer word has its own line."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
