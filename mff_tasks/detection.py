"""Detection measured and drawn: COCO's average precision of boxes and masks, its format of results, pictures.

The measures are those of pycocotools: the detections of a class and image are matched to its objects greedily
by falling score, at ten IoU thresholds. An ignored object, which is a crowd or outside of a range of areas,
makes neither a hit nor a miss.

Shapes: B images, C H W, h w of the part that an image fills, R detections of an image, N objects, D
detections of one class, G classes, A ranges of areas, T thresholds.
"""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mff_data.sources import spread
from mff_data.views import make_loader
from mff_min.errors import Fault
from mff_min.probe import check_measured
from mff_min.stream import each_once
from mff_run.files import write_atomically
from mff_run.world import autocast
from mff_tasks.ade20k import IGNORED
from mff_tasks.box_views import WholeBoxes
from mff_tasks.masks import MOST, chunks, counts_of, decode, encode, encode_all, paste, rasterise
from mff_tasks.segmentation import as_rgb, blended, class_colours, overlay_size, tile_size, with_legend

KINDS = ("box", "mask")
THRESHOLDS = np.linspace(0.5, 0.95, 10)                                 # (T,) of the IoU
RECALLS = np.linspace(0, 1, 101)                                        # where precision is read
AREAS = {"": (0, 1e10), "s": (0, 32 ** 2), "m": (32 ** 2, 96 ** 2), "l": (96 ** 2, 1e10)}     # A, in pixels
DETECTIONS = (1, 10, 100)                                               # of a class and image, at most
MISS, HIT, NEITHER = range(3)


@dataclass(frozen=True)
class Found:
    """The detections of an image. Boxes are (x, y, width, height) in its pixels, masks RLEs of its size."""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))           # (R,)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))                     # (R,) float64
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))                 # (R, 4) float64
    masks: list = field(default_factory=list)


@dataclass(frozen=True)
class Truth:
    """The objects of an image, as Found; area is the annotation's, of the mask."""
    labels: np.ndarray                                                  # (N,) int64
    boxes: np.ndarray                                                   # (N, 4) float64
    masks: list
    crowd: np.ndarray                                                   # (N,) bool
    area: np.ndarray                                                    # (N,) float64


def truth_of(objects):
    """The Truth of an image's coco.Objects."""
    masks = [segment if isinstance(segment, dict) else encode(rasterise(segment, *objects.size))
             for segment in objects.segments]
    return Truth(objects.labels, objects.bbox, masks, objects.crowd, objects.area)


# ---------------------------------------------------------------- overlaps


def box_ious(found, truth, crowd):
    """IoU of boxes (D, 4) with boxes (N, 4) -> (D, N); of a crowd, the share of the detection in it."""
    low, high = np.maximum(found[:, None, :2], truth[:, :2]), found[:, None, :2] + found[:, None, 2:]
    sides = np.minimum(high, truth[:, :2] + truth[:, 2:]) - low         # (D, N, 2)
    both = np.where((sides > 0).all(axis=2), sides[..., 0] * sides[..., 1], 0)
    return share(both, found[:, 2] * found[:, 3], truth[:, 2] * truth[:, 3], crowd)


def mask_ious(found, truth, crowd):
    """IoU of RLEs with RLEs -> (D, N), as box_ious. Counted on the runs: no mask is made."""
    both, counts = np.zeros((len(found), len(truth))), [counts_of(rle) for rle in found]
    ends = [np.cumsum(each) for each in counts]
    owner = np.repeat(np.arange(len(found)), [len(each) // 2 for each in counts])
    start, stop = (np.concatenate([end[i:len(end) // 2 * 2:2] for end in ends] or [[]]) for i in (0, 1))
    sizes = []
    for n, rle in enumerate(truth):
        runs = counts_of(rle)
        place, inside = np.cumsum(runs), np.cumsum(np.where(np.arange(len(runs)) % 2, runs, 0))
        sizes.append(inside[-1])
        kept = runs > 0                                                 # the places rise
        place, inside = np.append(0, place[kept]), np.append(0, inside[kept])
        pixels = np.interp(stop, place, inside) - np.interp(start, place, inside)       # of each run: exact
        both[:, n] = np.bincount(owner, pixels, len(found))
    return share(both, np.array([each[1::2].sum() for each in counts]), np.array(sizes), crowd)


def share(both, found, truth, crowd):
    """Intersections (D, N) over unions; a crowd's are over the detection alone."""
    union = np.where(crowd, found[:, None], found[:, None] + truth - both)
    return both / np.where(both > 0, union, 1)


# ---------------------------------------------------------------- matching


def outside(area):
    """Whether areas (n,) are outside of each range: (A, n) bool."""
    low, high = np.array(list(AREAS.values())).T[..., None]             # each (A, 1)
    return (area < low) | (area > high)


@dataclass(frozen=True)
class Matches:
    """What the detections of an image are, or of all; those of each class and image by falling score."""
    labels: np.ndarray                                                  # (R,)
    scores: np.ndarray                                                  # (R,)
    rank: np.ndarray                                                    # (R,) in its class and image
    outcome: np.ndarray                                                 # (R, A, T) uint8: MISS, HIT, NEITHER
    truth_labels: np.ndarray                                            # (N,)
    ignored: np.ndarray                                                 # (N, A) bool


def match(found, truth, kind):
    """The Matches of the detections of one image: of their boxes or masks."""
    if kind == "box":
        size = found.boxes[:, 2] * found.boxes[:, 3]                    # (R,)
    else:
        size = np.array([counts_of(rle)[1::2].sum() for rle in found.masks], np.float64)
    ignored, beyond = truth.crowd | outside(truth.area), outside(size)  # (A, N), (A, R)
    kept, rank = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    outcomes = [np.zeros((0, len(AREAS), len(THRESHOLDS)), np.uint8)]
    for label in np.unique(found.labels):
        own = np.flatnonzero(found.labels == label)
        own = own[np.argsort(-found.scores[own], kind="stable")][:DETECTIONS[-1]]       # (D,)
        among = np.flatnonzero(truth.labels == label)
        crowd = truth.crowd[among]
        if kind == "box":
            ious = box_ious(found.boxes[own], truth.boxes[among], crowd)                # (D, N)
        else:
            ious = mask_ious([found.masks[i] for i in own], [truth.masks[i] for i in among], crowd)
        kept.append(own)
        rank.append(np.arange(len(own)))
        outcomes.append(greedy(ious, crowd, ignored[:, among], beyond[:, own]))
    kept = np.concatenate(kept)
    return Matches(found.labels[kept], found.scores[kept], np.concatenate(rank), np.concatenate(outcomes),
                   truth.labels, ignored.T)


def greedy(ious, crowd, ignored, beyond):
    """The outcome (D, A, T) uint8 of detections by falling score, of IoU (D, N) with objects of their class.

    Each takes the free object that it overlaps most, the last one of equals, and one in ignored (A, N) only
    where there is no other. A crowd stays free. A detection that takes none is no miss where its own area is
    beyond the range, in beyond (A, D).
    """
    N, A, T = ious.shape[1], len(AREAS), len(THRESHOLDS)
    outcome = np.repeat(np.where(beyond.T, NEITHER, MISS).astype(np.uint8)[..., None], T, axis=2)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]                  # (T, 1)
    taken, ignored = np.zeros((A, T, N), bool), ignored[:, None]        # (A, 1, N)
    for d in np.flatnonzero(ious.max(axis=1, initial=0) >= least[0]):
        free = (ious[d] >= least) & ~(taken & ~crowd)                   # (A, T, N)
        counted = free & ~ignored
        free = np.where(counted.any(axis=2, keepdims=True), counted, free)
        takes = free.any(axis=2)                                        # (A, T)
        best = N - 1 - np.where(free, ious[d], -1)[..., ::-1].argmax(axis=2, keepdims=True)     # (A, T, 1)
        of_no_matter = np.take_along_axis(np.broadcast_to(ignored, free.shape), best, axis=2)[..., 0]
        outcome[d] = np.where(takes, np.where(of_no_matter, NEITHER, HIT), outcome[d])
        taken |= (np.arange(N) == best) & takes[..., None]
    return outcome


# ---------------------------------------------------------------- average precision


def joined(parts):
    """(the Matches of all images, by falling score; the image of each detection (R,); of each object (N,)).

    Equal scores keep the order of the images.
    """
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    image, truth_image = (np.repeat(np.arange(len(parts)), [len(getattr(part, name)) for part in parts])
                          for name in ("labels", "truth_labels"))
    order = np.argsort(-columns["scores"], kind="stable")
    for name in ("labels", "scores", "rank", "outcome"):
        columns[name] = columns[name][order]
    return Matches(**columns), image[order], truth_image


def curve(outcome, positives):
    """(precision (T, 101) at RECALLS, the highest recall (T,)) of outcomes (D, T) by falling score."""
    hits, misses = (np.cumsum(outcome == kind, axis=0).astype(np.float64) for kind in (HIT, MISS))  # (D, T)
    recall, precision = hits / positives, hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    found = np.zeros((len(THRESHOLDS), len(RECALLS)))
    for t, values in enumerate(found):
        place = np.searchsorted(recall[:, t], RECALLS, side="left")
        reached = place < len(recall)
        values[reached] = precision[place[reached], t]
    return found, recall[-1] if len(recall) else np.zeros(len(THRESHOLDS))


def curves(matches, num_classes, area=0, most=DETECTIONS[-1], kept=None):
    """(AP (G, T), recall (G, T)) of each class within a range of areas: NaN of a class without objects.

    kept says which detections (R,) and which objects (N,) there are; not given: all.
    """
    ap, recall = (np.full((num_classes, len(THRESHOLDS)), np.nan) for _ in range(2))
    counts, seen = ~matches.ignored[:, area], matches.rank < most
    if kept:
        seen, counts = seen & kept[0], counts & kept[1]
    positives = np.bincount(matches.truth_labels[counts], minlength=num_classes)
    for label in np.flatnonzero(positives):
        outcome = matches.outcome[seen & (matches.labels == label), area]               # (D, T)
        precision, recall[label] = curve(outcome, positives[label])
        ap[label] = precision.mean(axis=1)
    return ap, recall


GROUPS = 50                                                             # of images, for the jackknife


def average_precision(parts, classes):
    """COCO's measures in percent, of the Matches of each image in the order of image ids.

    AP is the mean over classes and IoU thresholds, AP50 and AP75 those at one threshold, APs, APm and APl of
    objects below 32 x 32 pixels, up to 96 x 96, and above; AR1, AR10 and AR100 are recalls with so many
    detections per class and image. A measure without objects is None. AP_error is the standard error of AP
    over images, by the jackknife that leaves out one group of images at a time: 50 groups, or one per image.
    """
    parts, num_classes = [*parts], len(classes)
    matches, *images = joined(parts)                                    # of detections, of objects

    def mean(values):
        return None if np.isnan(values).all() else 100 * float(np.nanmean(values))
    ap, _ = curves(matches, num_classes)                                # (G, T)
    found = dict(AP=mean(ap), AP_error=0.0, AP50=mean(ap[:, 0]), AP75=mean(ap[:, 5]))
    for area, name in enumerate(AREAS):
        if name:
            found[f"AP{name}"] = mean(curves(matches, num_classes, area)[0])
    found |= {f"AR{most}": mean(curves(matches, num_classes, 0, most)[1]) for most in DETECTIONS}
    groups = min(len(parts), GROUPS)
    without = [mean(curves(matches, num_classes, kept=[each % groups != group for each in images])[0])
               for group in range(groups)]
    without = np.array([value for value in without if value is not None])
    if len(without) > 1:
        n = len(without)
        found["AP_error"] = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return found | dict(classes={name: mean(row) for name, row in zip(classes, ap, strict=True)})


def measures(matches, classes):
    """The metrics of {kind: Matches} of each image, in the order of image ids: box_AP, mask_AP and so on.

    Raises Fault where no object counts.
    """
    found = dict(val_images=len(matches))
    for kind in KINDS:
        values = average_precision((each[kind] for each in matches), classes)
        found |= {f"{kind}_{name}": value for name, value in values.items()}
    if found["box_AP"] is None:
        raise Fault("the validation images have no object that counts: expected boxes of one class or more "
                    "that are no crowds")
    return found


def shown(metrics):
    """The metrics of `measures` as a line of text, with one standard error."""
    parts = [f"{kind} AP {metrics[f'{kind}_AP']:.2f} +- {metrics[f'{kind}_AP_error']:.2f} %, AP50 "
             f"{metrics[f'{kind}_AP50']:.2f} %, AP75 {metrics[f'{kind}_AP75']:.2f} %" for kind in KINDS]
    return f"{'; '.join(parts)} of {metrics['val_images']} validation images"


# ---------------------------------------------------------------- predictions


def detector(model, mean, std, device, ops, dtype):
    """detect(images (B, C, H, W) uint8, sizes, originals) -> the Found of each, in its original pixels.

    sizes are the (h, w) that an image fills, originals those that it had. Raises Fault where scores or boxes
    are not finite.
    """
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    @torch.no_grad()
    def detect(images, sizes, originals):
        images = ops.prepare(images.to(device, non_blocking=True), mean, std)
        sizes, originals = ([tuple(map(int, size)) for size in each] for each in (sizes, originals))
        with autocast(device, dtype):
            answers = model.detect(images, sizes)
        return [at_home(*each) for each in zip(answers, sizes, originals, strict=True)]
    return detect


def at_home(answer, size, original):
    """The Found, in an original image (H, W), of the model's answer for the same image of (h, w) pixels."""
    (h, w), (H, W), boxes = size, original, answer["boxes"].float()
    check_measured(torch.cat([boxes, answer["scores"][:, None].float()], dim=1)[None], "the detections")
    limits = boxes.new_tensor([W, H, W, H])
    boxes = (boxes * (limits / boxes.new_tensor([w, h, w, h]))).clamp_min(0).minimum(limits)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, probs = boxes[kept], answer["masks"][kept]
    parts = chunks(probs, boxes, most=MOST // (H * W))                  # masks of all may be too large
    rles = [rle for part in parts for rle in encode_all(paste(*part, original))]
    x0, y0, x1, y1 = boxes.double().cpu().numpy().T
    return Found(answer["labels"][kept].cpu().numpy(), answer["scores"][kept].double().cpu().numpy().round(6),
                 np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).round(3), rles)


def evaluate(model, source, cfg, world, ops, dtype, bad_samples, path=None):
    """The metrics of `measures` on a source with objects: every image once on one rank, at its own size.

    An unreadable image is one without detections. With a path, the detections are written there.
    """
    detect = detector(model, cfg.mean, cfg.std, world.device, ops, dtype)
    batch_size = min(cfg.batch_size, max(2 ** 24 // math.prod(cfg.img_size), 1))        # 16 of 1024 x 1024
    keys = each_once(len(source), batch_size, world)
    views = WholeBoxes(source, cfg.img_size, cfg.in_chans, cfg.mean)
    matches, results = {}, {}
    for chosen, batch in zip(keys, make_loader(views, keys, cfg.workers, world.device.type == "cuda",
                                               cfg.timeout), strict=True):
        bad_samples.add(batch["bad"])
        answers = detect(batch["image"], batch["size"], batch["original"])
        for (_, index), found, bad in zip(chosen, answers, batch["replaced"], strict=True):
            found = Found() if bad else found
            truth = truth_of(source.objects(index))
            matches[index] = {kind: match(found, truth, kind) for kind in KINDS}
            results[index] = found
    bad_samples.report(world.say)
    matches = {index: each for part in world.all_gather(matches) for index, each in part.items()}
    if path:
        results = {index: each for part in world.all_gather(results) for index, each in part.items()}
        if world.is_main:
            write_results(path, (entry for index in sorted(results) for entry in
                                 entries(results[index], source.image_ids[index], source.category_ids)))
    order = sorted(range(len(source)), key=lambda index: source.image_ids[index])       # as in pycocotools
    return measures([matches[index] for index in order], source.classes)


def entries(found, image_id, category_ids):
    """The entries of an image's detections in COCO's format of results, with the original ids."""
    for label, score, box, rle in zip(found.labels, found.scores, found.boxes, found.masks, strict=True):
        yield dict(image_id=int(image_id), category_id=int(category_ids[label]), bbox=box.tolist(),
                   score=float(score), segmentation=rle)


def write_results(path, results):
    """Write entries in COCO's format of results, one per line.

    For masks, pycocotools takes the areas of boxes where it is given both: delete each "bbox" before.
    """
    text = ",\n".join(map(json.dumps, results))
    write_atomically(path, lambda file: file.write(f"[{text}]\n".encode()))


# ---------------------------------------------------------------- pictures

TILE, TEXT = 320, 11                                                    # in pixels
SHOWN = 0.3                                                             # least score in a picture


def above(found, least=SHOWN):
    """The detections of a Found whose score is at least that."""
    kept = np.flatnonzero(found.scores >= least)
    return Found(found.labels[kept], found.scores[kept], found.boxes[kept], [found.masks[i] for i in kept])


def texts_of(objects, classes):
    """What a picture says of each detection, its name and score in percent, or of each object, its name."""
    names = [classes[label] for label in objects.labels]
    if isinstance(objects, Truth):
        return [name + " (crowd)" * bool(crowd) for name, crowd in zip(names, objects.crowd, strict=True)]
    return [f"{name} {100 * score:.0f}" for name, score in zip(names, objects.scores, strict=True)]


def with_instances(image, size, objects, classes):
    """An image (h, w, 3) at a size (width, height) with masks, boxes and names: (H, W, 3) uint8.

    objects is a Found or a Truth; a smaller one is above a larger one. Masks may have another size.
    """
    W, H = size
    kind = Image.Resampling.NEAREST if W > image.shape[1] else Image.Resampling.BILINEAR
    tile = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, kind))
    order = np.argsort(-objects.boxes[:, 2] * objects.boxes[:, 3], kind="stable")
    shades = [1 + int(label) % (IGNORED - 1) for label in objects.labels]       # 0 is the background's
    shade, edge = np.full((H, W), IGNORED, np.uint8), np.zeros((H, W), bool)
    for i in order:
        mask = np.asarray(Image.fromarray(decode(objects.masks[i])).resize(size, Image.Resampling.NEAREST))
        inner = np.pad(mask, 1, mode="edge")
        inner = inner[2:, 1:-1] & inner[:-2, 1:-1] & inner[1:-1, 2:] & inner[1:-1, :-2]
        shade[mask], edge[mask] = shades[i], ~inner[mask]
    tile = blended(tile, shade)
    tile[edge] = class_colours()[shade[edge]]
    picture, texts = Image.fromarray(tile), texts_of(objects, classes)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    for i in order:
        colour, (rows, columns) = tuple(class_colours()[shades[i]].tolist()), objects.masks[i]["size"]
        x, y, width, height = objects.boxes[i] * np.tile([W / columns, H / rows], 2)
        draw.rectangle((x, y, max(x + width - 1, x), max(y + height - 1, y)), outline=colour)
        x = max(min(x, W - font.getlength(texts[i]) - 2), 0)            # where it is in the picture
        y = min(max(y - TEXT - 4, 0), H - TEXT - 4)
        draw.rectangle((x, y, x + font.getlength(texts[i]) + 1, y + TEXT + 3), fill=colour)
        ink = (0, 0, 0) if sum(colour) > 380 else (255, 255, 255)
        draw.text((x + 1, y + 1), texts[i], ink, font=font)
    return np.asarray(picture)


def detection_sheet(rows, classes, title):
    """A picture of rows (image (h, w, 3), Truth, Found): the image, the objects and the detections."""
    tiles = []
    for image, *both in rows:
        size = tile_size(*image.shape[:2], TILE)
        tiles.append([with_instances(image, size, each, classes) for each in (Found(), *both)])
    return with_legend(tiles, (), classes, title, ("image", "truth", "detections"))


def overlay(image, original, found, classes):
    """A picture of an image (h, w, 3), originally (H, W), with its detections: 256 to 1,024 pixels large."""
    return Image.fromarray(with_instances(image, overlay_size(*original), found, classes))


def picture(model, source, count, cfg, device, ops, dtype, title):
    """A sheet of count images, spread over a source: the image, its objects and what the model finds.

    Unreadable ones are left out. None where there is no other.
    """
    detect = detector(model, cfg.mean, cfg.std, device, ops, dtype)
    views, rows = WholeBoxes(source, cfg.img_size, cfg.in_chans, cfg.mean), []
    for index in spread(len(source), count):
        item = views[0, index]
        if not item["bad"]:
            h, w = item["size"]
            [found] = detect(item["image"][None], [item["size"]], [item["original"]])
            rows.append((as_rgb(item["image"][:, :h, :w]), truth_of(source.objects(index)), above(found)))
    return detection_sheet(rows, source.classes, title) if rows else None
