"""Segmentation measured and drawn: predictions by sliding windows, IoU of each class, pictures with a legend.

Shapes: B windows of h w, C H W, G classes, n images.
"""

import colorsys
import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from mff_data.sources import spread
from mff_data.views import make_loader
from mff_min.errors import Fault
from mff_min.probe import check_measured
from mff_min.stream import each_once
from mff_run.picture import GAP, INK, PAPER
from mff_run.world import autocast
from mff_tasks.ade20k import IGNORED
from mff_tasks.mask_views import WholeMasks
from mff_tasks.upernet import resize

# ---------------------------------------------------------------- predictions


def windows_over(length, side, stride):
    """Where the windows of one side begin: every stride pixels, and the last one ends with the image."""
    return [min(start, max(length - side, 0)) for start in range(0, max(length - side, 0) + stride, stride)]


def slide(logits_of, image, window, stride, batch_size=1):
    """Logits (1, G, H, W) of an image (1, C, H, W): those of its windows, averaged where they overlap.

    logits_of(windows (B, C, h, w)) is (B, G, ...) of any resolution, which is brought to the window's. A
    smaller image is padded to the window with 0, which is the mean colour, below and to the right.
    """
    (h, w), (H, W) = window, image.shape[-2:]
    image = F.pad(image, (0, max(w - W, 0), 0, max(h - H, 0)))
    places = [(top, left) for top in windows_over(H, h, stride[0]) for left in windows_over(W, w, stride[1])]
    total = count = 0
    for first in range(0, len(places), batch_size):
        chosen = places[first:first + batch_size]
        cuts = torch.cat([image[:, :, top:top + h, left:left + w] for top, left in chosen])     # (B, C, h, w)
        logits = resize(logits_of(cuts).float(), window)               # (B, G, h, w)
        if first == 0:
            total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])             # (1, G, H, W)
            count = logits.new_zeros(image.shape[-2:])                  # (H, W)
        for one, (top, left) in zip(logits, chosen, strict=True):
            total[0, :, top:top + h, left:left + w] += one
            count[top:top + h, left:left + w] += 1
    return (total / count)[:, :, :H, :W]


def classes_at(logits, size, most=2 ** 26):
    """The class of the largest logit at another size: (1, G, h, w) -> (H, W) int64.

    Logits at that size may be larger than the memory: they are made for so many rows at a time that they have
    at most `most` values.
    """
    (H, W), (G, h) = size, logits.shape[1:3]
    y = ((torch.arange(H, device=logits.device) + 0.5) * (h / H) - 0.5).clamp_min(0)    # (H,)
    above = y.long().clamp_max(h - 1)
    below, share = (above + 1).clamp_max(h - 1), y - above
    found = []
    for rows in torch.arange(H, device=logits.device).split(max(most // (G * W), 1)):
        part = share[rows][:, None]                                     # (rows, 1)
        mixed = logits[:, :, above[rows]] * (1 - part) + logits[:, :, below[rows]] * part   # (1, G, rows, w)
        found.append(resize(mixed, (len(rows), W))[0].argmax(dim=0))   # (rows, W)
    return torch.cat(found)


def predictor(model, num_classes, img_size, mean, std, batch_size, device, ops, dtype):
    """predict(image (1, C, h, w) uint8, size) -> (H, W) int64: the classes of the image's pixels at a size.

    img_size is the window, and batch_size the most windows that are computed at once. Windows overlap by a
    third. Raises Fault where logits are not finite.
    """
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    stride = tuple(max(side * 2 // 3, 1) for side in img_size)          # 341 of 512
    batch_size = min(batch_size, max(2 ** 27 // (num_classes * math.prod(img_size)), 1))    # logits of 0.5 GB

    def logits_of(images):
        with autocast(device, dtype):
            logits = model(images)[0].float()
        check_measured(logits, "the scores")
        return logits

    @torch.no_grad()
    def predict(image, size):
        images = ops.prepare(image.to(device, non_blocking=True), mean, std)
        return classes_at(slide(logits_of, images, img_size, stride, batch_size), size)
    return predict


# ---------------------------------------------------------------- measures


def pixel_counts(pred, label, num_classes):
    """Pixels of each class in both, in the truth and in the prediction: two masks (H, W) -> (3, G) int64.

    Only pixels whose label is a class count; a prediction that is none of the classes is a miss.
    """
    known = label != IGNORED
    pred, label = pred[known].long(), label[known].long()
    both = label[pred == label]
    return torch.stack([torch.bincount(x, minlength=num_classes)
                        for x in (both, label, pred[pred < num_classes])]).cpu()


def mean_iou(counts):
    """(mIoU, IoU (..., G)) of pixel_counts (..., 3, G), as fractions.

    The IoU of a class that is nowhere is NaN; it is left out of the mean, as in mmsegmentation.
    """
    both, truth, pred = counts.double().unbind(dim=-2)                  # each (..., G)
    per_class = both / (truth + pred - both)                            # 0 / 0 is NaN
    return per_class.nanmean(dim=-1), per_class


def iou(counts, classes):
    """Metrics in percent of the pixel_counts of n images (n, 3, G), summed over them.

    mIoU is the mean over the classes that occur in the truth or the prediction, mAcc over those in the truth;
    aAcc is the share of the labelled pixels. mIoU_error is mIoU's standard error over images by the jackknife
    (Efron & Stein, Ann. Statist. 1981). Raises Fault where no pixel is labelled.
    """
    counts = counts[counts[:, 1].sum(dim=1) > 0]                        # others change nothing
    if not len(counts):
        raise Fault("no pixel of the validation images has a class: their masks could not be read, or hold "
                    "255 alone: expected labels of classes in them")
    n, total = len(counts), counts.sum(dim=0)                           # (3, G)
    both, truth, _ = total.double()
    value, per_class = mean_iou(total)
    without, _ = mean_iou(total - counts)                               # (n,): all images but one
    error = math.sqrt((n - 1) / n * float((without - without.mean()).square().sum())) if n > 1 else 0.0
    named = zip(classes, per_class.tolist(), strict=True)
    return dict(val_images=n, mIoU=100 * float(value), mIoU_error=100 * error,
                mAcc=100 * float((both / truth).nanmean()), aAcc=100 * float(both.sum() / truth.sum()),
                iou={name: None if math.isnan(x) else 100 * x for name, x in named})


def shown(metrics):
    """The metrics of `iou` as a line of text, with one standard error."""
    return (f"mIoU {metrics['mIoU']:.2f} +- {metrics['mIoU_error']:.2f} %, mAcc {metrics['mAcc']:.2f} %, "
            f"aAcc {metrics['aAcc']:.2f} % of {metrics['val_images']} validation images")


def evaluate(model, source, cfg, world, ops, dtype, bad_samples):
    """The metrics of `iou` on a source with masks: every image once on one rank, at its own size.

    The labelled pixels of an unreadable image are misses; an image whose mask is unreadable is left out.
    """
    num_classes = len(source.classes)
    predict = predictor(model, num_classes, cfg.img_size, cfg.mean, cfg.std, cfg.batch_size, world.device,
                        ops, dtype)
    keys = each_once(len(source), 1, world)                             # images differ in size
    views = WholeMasks(source, cfg.img_size, cfg.in_chans)
    found = {}
    for [(_, index)], batch in zip(keys, make_loader(views, keys, cfg.workers, world.device.type == "cuda",
                                                     cfg.timeout), strict=True):
        bad_samples.add(batch["bad"])
        label = batch["label"][0].to(world.device, non_blocking=True)   # (H, W)
        if batch["replaced"][0] or bool((label == IGNORED).all()):
            pred = torch.full_like(label, IGNORED)
        else:
            pred = predict(batch["image"], label.shape)                 # (H, W)
        found[index] = pixel_counts(pred, label, num_classes)           # (3, G)
    bad_samples.report(world.say)
    found = {index: counts for part in world.all_gather(found) for index, counts in part.items()}
    return iou(torch.stack([found[index] for index in range(len(source))]), source.classes)


# ---------------------------------------------------------------- pictures

TILE = 192                                                              # height of an image in a picture
TEXT, BOX = 13, 12                                                      # sizes in the legend, in pixels


@cache
def class_colours():
    """The colour of every label (256, 3) uint8: a fixed function of it. Neighbours are far apart in hue.

    Nine labels on, saturation and value are the same, and the hue is a golden section on, which spreads it.
    Label 0, which is often the background, is dark grey.
    """
    def colour(label):
        if not label:
            return 0.22, 0.22, 0.24
        hue = label * (5 + (math.sqrt(5) - 1) / 2) / 9 % 1
        return colorsys.hsv_to_rgb(hue, (0.9, 0.45, 0.7)[label % 3], (1, 0.6, 0.8)[label // 3 % 3])
    return np.rint(255 * np.array([colour(label) for label in range(256)])).astype(np.uint8)


def painted(labels):
    """A mask (H, W) in its classes' colours, and hatched where there is none: (H, W, 3) uint8."""
    y, x = np.indices(labels.shape)
    hatch = np.where((x + y) // 3 % 3 == 0, 150, 30).astype(np.uint8)   # (H, W)
    return np.where((labels == IGNORED)[..., None], hatch[..., None], class_colours()[labels])


def blended(image, labels):
    """An image (H, W, 3) under the colours of a mask (H, W)."""
    colours = class_colours()[labels].astype(np.float32)
    return np.where((labels == IGNORED)[..., None], image, 0.5 * image + 0.5 * colours).astype(np.uint8)


def with_legend(tiles, labels, classes, title="", captions=()):
    """A picture of rows of tiles, each (H, W, 3), with a legend of the labels that it shows.

    captions are one for each column. Tiles of a column have one width.
    """
    font = ImageFont.load_default(TEXT)
    widths = [max(tile.shape[1] for tile in column) for column in zip(*tiles, strict=True)]
    heights = [max(tile.shape[0] for tile in row) for row in tiles]
    entries = [(label, classes[label] if label < len(classes) else "no class") for label in labels]
    widest = max((font.getlength(text) for _, text in entries), default=0)
    width = max(GAP + sum(widths) + GAP * len(widths), math.ceil(widest) + BOX + 4 * GAP,
                math.ceil(font.getlength(title)) + 2 * GAP)
    step = math.ceil(widest) + BOX + 3 * GAP                            # of a column of the legend
    columns = max((width - GAP) // step, 1)
    line, top = TEXT + 6, GAP + (TEXT + 6) * (bool(title) + bool(captions))
    legend = top + sum(heights) + GAP * len(heights)
    sheet = Image.new("RGB", (width, legend + line * math.ceil(len(entries) / columns) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, font=font)
    for row, height in zip(tiles, heights, strict=True):
        left = GAP
        for tile, one in zip(row, widths, strict=True):
            sheet.paste(Image.fromarray(np.ascontiguousarray(tile)), (left, top))
            left += one + GAP
        top += height + GAP
    left = GAP
    for caption, one in zip(captions, widths, strict=False):
        draw.text((left, GAP + line * bool(title)), caption, INK, font=font)
        left += one + GAP
    for i, (label, text) in enumerate(entries):
        x, y = GAP + i % columns * step, legend + i // columns * line
        patch = painted(np.full((BOX, BOX), label, np.uint8))
        sheet.paste(Image.fromarray(patch), (x, y + 2))
        draw.text((x + BOX + GAP, y), text, INK, font=font)
    return sheet


def segmentation_sheet(rows, classes, title):
    """A picture of rows (image (H, W, 3), truth (H, W), prediction (H, W)) of any sizes, with a legend."""
    labels = np.unique(np.concatenate([np.ravel(mask) for row in rows for mask in row[1:]]))
    tiles = [[scaled(image), *(scaled(painted(mask), is_mask=True) for mask in masks)]
             for image, *masks in rows]
    return with_legend(tiles, labels, classes, title, ("image", "truth", "prediction"))


def overlay(image, labels, classes):
    """An image (h, w, 3) under the colours of its labels (H, W), 256 to 1,024 pixels large, with a legend."""
    size = overlay_size(*labels.shape)
    kinds = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    image, mask = (np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, kind))
                   for pixels, kind in zip((image, labels), kinds, strict=True))
    return with_legend([[blended(image, mask)]], np.unique(mask), classes)


def overlay_size(H, W):
    """(width, height) of an image that is shown 256 to 1,024 pixels large."""
    factor = min(max(256 / max(H, W), 1), 1024 / max(H, W))
    return max(round(W * factor), 1), max(round(H * factor), 1)


def tile_size(H, W, tile=TILE):
    """(width, height) of an image at the height of a tile, or lower where it would be wider than two."""
    factor = min(tile / H, 2 * tile / W)
    return max(round(W * factor), 1), max(round(H * factor), 1)


def scaled(pixels, is_mask=False):
    """Pixels (H, W, 3) at the size of a tile."""
    size = tile_size(*pixels.shape[:2])
    larger = size[0] > pixels.shape[1]
    kind = Image.Resampling.NEAREST if is_mask or larger else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, kind))


def as_rgb(image):
    """(C, H, W) uint8 as RGB (H, W, 3): of other channels than three the first is shown grey."""
    pixels = image.permute(1, 2, 0).numpy()
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels[..., :1], 3, axis=2)


def picture(model, source, count, cfg, device, ops, dtype, title):
    """A sheet of count images, spread over a source: image, truth, prediction, and a legend.

    Unreadable ones are left out. None where there is no other.
    """
    predict = predictor(model, len(source.classes), cfg.img_size, cfg.mean, cfg.std, cfg.batch_size, device,
                        ops, dtype)
    views, rows = WholeMasks(source, cfg.img_size, cfg.in_chans), []
    for index in spread(len(source), count):
        item = views[0, index]
        if not item["bad"]:
            size = item["image"].shape[-2:]
            truth = Image.fromarray(item["label"].numpy()).resize(size[::-1], Image.Resampling.NEAREST)
            pred = predict(item["image"][None], size).to(torch.uint8).cpu().numpy()     # (H, W)
            rows.append((as_rgb(item["image"]), np.asarray(truth), pred))
    return segmentation_sheet(rows, source.classes, title) if rows else None
