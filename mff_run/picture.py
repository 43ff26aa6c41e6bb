"""Pictures of a run, drawn with Pillow alone.

Shapes: B images, C H W, L patches, K masked patches, N = P * P * C.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mff_min.kernels.reference import patchify, unpatchify
from mff_min.targets import reconstruction

INK, PAPER = (40, 40, 40), (255, 255, 255)
GAP, TOP = 6, 46                                                        # between tiles, and above them: texts


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
    """What was there, what the model saw, what it predicts and both together, one row an image, by Pillow.

    images and targets (B, C, H, W) are normalised; where they differ (PixMIM) the target has a column of its
    own. pred (B, K, N) and ids (B, K) are the masked patches, mask is (B, L) with 1 removed.
    """
    pasted = reconstruction(pred.float(), targets, ids, patch_size, norm_pix)           # (B, C, H, W)
    columns = {"image": images, "target": targets, "masked": grey_out(images, mask, patch_size),
               "prediction": grey_out(pasted, 1 - mask, patch_size), "pasted": pasted}
    if targets is images:
        del columns["target"]
    tiles = {caption: to_uint8(pictures, mean, std) for caption, pictures in columns.items()}
    return grid(tiles, title, scale_of(min(images.shape[-2:])))


def scale_of(side):
    """By how much images of this side are drawn larger: small ones are."""
    return max(1, round(128 / side))


def grid(columns, title, scale=1):
    """A picture of {caption: (B, H, W, 3) uint8}, one labelled column per entry, one row per image."""
    B, H, W, _ = next(iter(columns.values())).shape
    H, W = H * scale, W * scale
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (GAP + (W + GAP) * len(columns), TOP + (H + GAP) * B), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 5), title, INK, font=font)
    for j, (caption, images) in enumerate(columns.items()):
        left = GAP + j * (W + GAP)
        draw.text((left, 26), caption, INK, font=font)
        for i in range(B):
            tile = Image.fromarray(np.ascontiguousarray(images[i])).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, TOP + i * (H + GAP)))
    return sheet
