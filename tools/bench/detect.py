"""A training step of Mask R-CNN on a plain ViT: ours beside torchvision's, and what boxes cost in ours.

Both have the same encoder and pyramid, which are one object, the same widths, weights, numbers of anchors,
proposals and regions, and the same images and objects. A step is the forward pass to the five losses and the
backward pass to every parameter; the optimizer is left out. torchvision's heads have an output for the
background in each layer of boxes and masks, ours have not; its losses are those of its own definitions.

Then NMS and RoIAlign alone, with what a step of ours gave them: their share of its time. And the bytes of
every part of a step at ViTDet's size, by count (results/boxes_bytes.json): they decide whether the two need
a kernel.

Shapes: B images, C H W, R regions, D width of the levels, N objects.
"""

import functools
import math
import os
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mff_min.errors import UserError
from mff_min.vit import MODELS, VisionTransformer
from mff_run.files import write_json
from mff_run.world import DTYPES, autocast, start_world
from mff_tasks import boxes, rcnn
from mff_tasks.attention import add_windows
from mff_tasks.boxes import iou, match, nms, roi_align
from mff_tasks.rcnn import PROPOSALS, REGIONS, MaskRCNN
from tools.bench.measure import (
    FAILURES,
    Budget,
    NotRun,
    Record,
    in_rounds,
    need,
    reason_of,
    show_group,
    stopwatch,
    timed_row,
)
from tools.bench.ops import ByteCount
from tools.bench.step import slow_dtypes

#           model, pixels per side, window, width, classes, images, proposals, regions
SIZES = {"tiny": ("vit_test", 16, 2, 8, 3, 2, 50, 16),                  # for the tests
         "vit_test": ("vit_test", 64, 8, 32, 8, 8, 200, 64),            # --small, of the embedded scenes
         "vit_t": ("vit_t", 256, 14, 64, 80, 2, PROPOSALS, REGIONS),
         "vit_b_256": ("vit_b", 256, 14, 256, 80, 1, PROPOSALS, REGIONS),
         "vit_b": ("vit_b", 1024, 14, 256, 80, 2, PROPOSALS, REGIONS)}  # ViTDet's
OURS, PEER = "mff_min", "torchvision"
OBJECTS = 7                                                             # per image, as many as COCO has


def build(name, device="cpu"):
    """Our detector of one of the sizes."""
    model, side, window, width, num_classes, _, proposals, regions = SIZES[name]
    torch.manual_seed(0)
    encoder = VisionTransformer((side, side), **MODELS[model])
    add_windows(encoder, window)
    return MaskRCNN(encoder, num_classes, width, proposals=proposals, regions=regions).to(device)


class Levels(nn.Module):
    """Our encoder and pyramid as a backbone of torchvision's."""

    def __init__(self, ours, width):
        super().__init__()
        self.encoder, self.backbone, self.out_channels = ours.encoder, ours.backbone, width
        self.encode = ours.encode

    def forward(self, images):
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), self.encode(images), strict=True))


def peer_of(ours, width, num_classes):
    """torchvision's MaskRCNN on our encoder and pyramid, with our weights in its heads."""
    need("torchvision")
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.models.detection import MaskRCNN as Peer
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import LevelMapper

    def pool(size):
        """Its pooling, told the strides, which it would guess from the first image."""
        layer = MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2)
        layer.scales = [1 / stride for stride in ours.strides[:4]]
        first = round(math.log2(ours.strides[0]))
        side = rcnn.CANONICAL * int(ours.strides[2])
        layer.map_levels = LevelMapper(first, first + 3, canonical_scale=side, canonical_level=first + 2)
        return layer

    def norm(chans):
        return LayerNorm2d(chans, eps=1e-6)
    sizes = tuple((int(rcnn.ANCHOR_STRIDES * stride),) for stride in ours.strides)
    peer = Peer(
        Levels(ours, width), min_size=ours.img_size[0], max_size=ours.img_size[1],
        image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisible=1, _skip_resize=True,
        rpn_anchor_generator=AnchorGenerator(sizes, (rcnn.RATIOS,) * len(sizes)),
        rpn_head=RPNHead(width, len(rcnn.RATIOS), conv_depth=2),
        rpn_pre_nms_top_n_train=rcnn.BEFORE_NMS * ours.proposals, rpn_post_nms_top_n_train=ours.proposals,
        rpn_nms_thresh=rcnn.RPN_NMS, rpn_batch_size_per_image=rcnn.RPN_SAMPLES,
        box_batch_size_per_image=ours.regions, box_roi_pool=pool(rcnn.BOX_SIDE),
        box_head=FastRCNNConvFCHead((width, rcnn.BOX_SIDE, rcnn.BOX_SIDE), [width] * 4, [4 * width], norm),
        box_predictor=FastRCNNPredictor(4 * width, num_classes + 1), mask_roi_pool=pool(rcnn.MASK_SIDE),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1))
    copy_heads(peer, ours)
    return peer.to(ours.anchors.device)


@torch.no_grad()
def copy_heads(peer, ours):
    """Give torchvision's heads our weights. Its background is class 0, ours the last; what it adds is 0."""
    heads = peer.roi_heads
    for theirs, own in ((peer.rpn.head, ours.rpn_head), (heads.box_head, ours.box_head),
                        (heads.mask_head, ours.mask_head[:8]),
                        (heads.mask_predictor.conv5_mask, ours.mask_head.deconv)):
        for new, old in zip(theirs.parameters(), own.parameters(), strict=True):
            new.copy_(old)
    for key in ("weight", "bias"):
        scores = getattr(ours.box_predictor["cls_score"], key)
        getattr(heads.box_predictor.cls_score, key).copy_(scores.roll(1, dims=0))
        for layer, own in ((heads.box_predictor.bbox_pred, ours.box_predictor["bbox_pred"]),
                           (heads.mask_predictor.mask_fcn_logits, ours.mask_head.predictor)):
            new, old = getattr(layer, key), getattr(own, key)
            new.zero_()
            new[len(new) - len(old):] = old


def make_inputs(name, ours, device):
    """Images (B, C, H, W), objects of each (detectron2's dicts of our forward), and noise (B, num_noise)."""
    side, num_classes, batch = SIZES[name][1], SIZES[name][4], SIZES[name][5]
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(batch):
        corners = torch.rand(OBJECTS, 2, generator=generator) * side / 2
        sides = side / 8 + torch.rand(OBJECTS, 2, generator=generator) * side / 4
        edges = torch.cat([corners, corners + sides], dim=1).round()    # (N, 4)
        y, x = torch.arange(side)[:, None], torch.arange(side)
        x0, y0, x1, y1 = (edge[:, None, None] for edge in edges.unbind(dim=1))          # each (N, 1, 1)
        masks = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)             # (N, H, W)
        labels = torch.randint(num_classes, (OBJECTS,), generator=generator)
        target = dict(boxes=edges, labels=labels, masks=masks)
        targets.append({key: value.to(device) for key, value in target.items()})
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    return images, targets, torch.rand(batch, ours.num_noise, generator=generator).to(device)


class Step:
    """A step of a detector without its optimizer: the sum of its losses, backward to every parameter."""

    def __init__(self, module, arguments, device, dtype):
        self.module, self.arguments, self.device, self.dtype = module, arguments, device, DTYPES[dtype]

    def __call__(self):
        with autocast(self.device, self.dtype):
            losses = self.module(*self.arguments)
        loss = sum(losses.values())
        loss.backward()
        for parameter in self.module.parameters():                      # others need the memory
            parameter.grad = None
        return loss.detach()


def arguments_of(who, images, targets, noise):
    """What a contender's forward takes: torchvision's classes begin at 1, and it draws its own noise."""
    if who == OURS:
        return images, targets, noise
    return list(images), [one | dict(labels=one["labels"] + 1, masks=one["masks"].byte()) for one in targets]


@torch.no_grad()
def check_equal(peer, ours, images):
    """Raise NotRun unless both heads give the same logits, but for rounding, of the same pooled features.

    torchvision's own pooling is half a pixel off (its RoIAlign is not the aligned one).
    """
    levels, heads = ours.encode(images[:1]), peer.roi_heads
    regions = [ours.anchors[::max(len(ours.anchors) // 20, 1)]]         # one of (R, 4)
    objectness = torch.cat([x.movedim(1, -1).flatten(1) for x in peer.rpn.head(levels)[0]], dim=1)
    x = heads.box_head(ours.pool(levels, regions, rcnn.BOX_SIDE))
    scores = heads.box_predictor(x)[0].roll(-1, dims=1)
    x = ours.pool(levels, regions, rcnn.MASK_SIDE)
    masks = heads.mask_predictor(heads.mask_head(x))[:, 1:]
    pairs = {"objectness": (objectness, ours.rpn_head(levels)[0]),
             "class": (scores, ours.classify(levels, regions)[0]), "mask": (masks, ours.mask_head(x))}
    for name, (a, b) in pairs.items():
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= 1e-3:                                           # convolutions may run in TF32
            raise NotRun(f"unequal work: its {name} logits are {error:.1e} of theirs away from ours")


def calls_of(step):
    """{"NMS", "RoIAlign"}: functions that do again what a step does of these, with its arguments.

    RoIAlign's is with its backward pass.
    """
    calls = {"NMS": [], "RoIAlign": []}

    def noting(name, function):
        def noted(*args, **options):
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            calls[name].append((args, options))
            return function(*args, **options)
        return noted
    with mock.patch.object(rcnn, "nms", noting("NMS", nms)), \
            mock.patch.object(rcnn, "roi_align", noting("RoIAlign", roi_align)), torch.no_grad():
        step.module(*step.arguments)

    def suppress():
        for args, options in calls["NMS"]:
            nms(*args, **options)

    def align():
        for (levels, *rest), options in calls["RoIAlign"]:
            levels = [level.requires_grad_() for level in levels]
            out = roi_align(levels, *rest, **options)
            torch.autograd.grad(out, levels, torch.ones_like(out))
    return {"NMS": suppress, "RoIAlign": align}


def bench_size(name, args, budget, world):
    """The groups of one size: a step of both contenders, and what boxes cost in ours."""
    width, num_classes, batch = SIZES[name][3:6]
    device = world.device
    ours = build(name, device)
    images, targets, noise = make_inputs(name, ours, device)
    keys, modules = [(who, dtype) for dtype in args.dtypes for who in (OURS, PEER)], {OURS: ours}
    slow = slow_dtypes(args.dtypes, device)
    reasons = {key: slow[key[1]] for key in keys if key[1] in slow}
    try:
        modules[PEER] = peer_of(ours, width, num_classes)
        check_equal(modules[PEER], ours, images)
    except FAILURES as problem:
        reasons |= {key: reason_of(problem) for key in keys if key[0] == PEER}
    steps = {(who, dtype): Step(modules[who], arguments_of(who, images, targets, noise), device, dtype)
             for who, dtype in keys if (who, dtype) not in reasons}
    samples = {key: stopwatch(step, device) for key, step in steps.items()}
    first = next((step for (who, _), step in steps.items() if who == OURS), None)
    if first:
        samples |= {name: stopwatch(work, device) for name, work in calls_of(first).items()}
    title = f"Mask R-CNN {name}, {ours.img_size[0]} px, width {width}, batch {batch}"
    seconds, left_out = in_rounds(samples, args.rounds, budget, world, title)
    baseline, rows = (PEER, args.dtypes[0]), []
    for key in keys:
        row = dict(zip(("name", "dtype"), key, strict=True))
        found = (timed_row(seconds[key], batch, seconds.get(baseline), seconds.get((OURS, key[1])))
                 if key in seconds else {"not_run": reasons.get(key) or left_out[key]})
        rows.append(row | found)
    whole, dtype = seconds.get((OURS, args.dtypes[0])), args.dtypes[0]
    for part in ("NMS", "RoIAlign"):
        row = {"name": f"{part} of ours", "dtype": dtype}
        if part in seconds and whole:
            row |= timed_row(seconds[part], 0)
            row["share"] = row["median"] / timed_row(whole, 0)["median"]
        else:
            row["not_run"] = left_out.get(part) or f"{OURS} was not run: nothing to compare with"
        rows.append(row)
    return {"name": title, "case": name, "model": SIZES[name][0], "width": width, "img_size": ours.img_size,
            "classes": num_classes, "batch": batch, "objects": OBJECTS, "proposals": ours.proposals,
            "regions": ours.regions, "baseline": " ".join(baseline),
            "rounds": max(map(len, seconds.values()), default=0), "rows": rows}


def bench_detect(args):
    """Every size that was asked for, into detect_<device>.json."""
    with start_world(args.device) as world:
        on_gpu = world.device.type == "cuda"
        args.dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32"])
        args.sizes = args.sizes or (["vit_b"] if on_gpu else ["vit_test", "vit_t", "vit_b_256"])
        for kind, names, known in (("--sizes", args.sizes, SIZES), ("--dtypes", args.dtypes, DTYPES)):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UserError(f"{kind} {unknown[0]}: expected some of {','.join(known)}")
        torch.set_num_threads(args.threads or os.cpu_count())
        record = Record("detect", args.output_dir, world, rounds=args.rounds, minutes=args.minutes)
        budget = Budget(60 * args.minutes)
        for i, name in enumerate(args.sizes):
            group = bench_size(name, args, budget.share(len(args.sizes) - i), world)
            record.add(group)
            world.say("\n".join(show_group(group)))
        world.say(f"\nwrote {record.path}")


# ---- bytes by count

def count(work, wanted, dtype):
    """[forward, backward] bytes of work(), to wanted tensors, with products in a type."""
    with autocast(torch.device("cpu"), dtype), ByteCount() as forward:
        outputs = [x for x in torch.utils._pytree.tree_leaves(work()) if x.requires_grad]
    with ByteCount() as backward:
        torch.autograd.grad(outputs, wanted, [torch.empty_like(x) for x in outputs], allow_unused=True)
    return [forward.total, backward.total]


def proposals_of(model):
    """(boxes (R, 4), scores, levels) that NMS gets of one image: at random, as many as a step takes."""
    generator, height = torch.Generator().manual_seed(0), model.img_size[0]
    found, level = [], []
    for i, (anchors, stride) in enumerate(zip(model.num_anchors, model.strides, strict=True)):
        R = min(anchors, rcnn.BEFORE_NMS * model.proposals)
        centres = height * torch.rand(R, 2, generator=generator)
        sides = rcnn.ANCHOR_STRIDES * stride * (0.3 * torch.randn(R, 2, generator=generator)).exp()
        found.append(torch.cat([centres - sides / 2, centres + sides / 2], dim=1))
        level.append(torch.full((R,), i))
    found = torch.cat(found).clamp(0, height)
    return found, torch.rand(len(found), generator=generator), torch.cat(level)


def step_bytes(name, dtype):
    """{part: [forward, backward]} bytes of a step of one image; the products' results are of a type.

    Only NMS computes, for its bytes depend on what it keeps; it takes the blocks that it takes on a GPU.
    """
    model, width = build(name), SIZES[name][3]
    candidates, scores, level = proposals_of(model)
    with mock.patch.object(boxes, "BLOCK", 2 * boxes.BLOCK), ByteCount() as counted:
        nms(candidates, scores, rcnn.RPN_NMS, level)
    found = {"NMS": [counted.total, 0]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = list(model.parameters())
        images = torch.empty(1, 3, *model.img_size)

        def trunk():
            levels = model.encode(images)
            return levels, model.rpn_head(levels)
        found["encoder, pyramid, RPN"] = count(trunk, trained, dtype)
        with ByteCount() as counted:
            match(iou(torch.empty(OBJECTS, 4), model.anchors), *rcnn.RPN_IOU, allow_low_quality=True)
        found["matching of anchors"] = [counted.total, 0]
        levels = [torch.empty(1, width, *grid, dtype=dtype).requires_grad_() for grid in model.grids]

        def box_head(x):
            x = model.box_head(x)
            return [layer(x) for layer in model.box_predictor.values()]
        objects = int(model.regions * rcnn.ROI_POSITIVE)
        for part, R, side, head in (("boxes", model.regions, rcnn.BOX_SIDE, box_head),
                                    ("masks", objects, rcnn.MASK_SIDE, model.mask_head)):
            pool = functools.partial(model.pool, levels, [torch.empty(R, 4)], side)
            found[f"RoIAlign of {part}"] = count(pool, levels[:4], dtype)
            x = torch.empty(R, side, side, width).requires_grad_()
            work = functools.partial(head, x.movedim(-1, 1))            # channels last
            found[f"head of {part}"] = count(work, [x, *trained], dtype)
    values = sum(parameter.numel() for parameter in trained)
    found["AdamW"] = [7 * 4 * values, 0]                                # four are read, three written
    return found


def bench_bytes(output_dir, name="vit_b"):
    """Write boxes_bytes.json: what each part of a step moves, by count; needs no GPU."""
    rows = []
    for words in ("bfloat16", "float32"):
        found = step_bytes(name, DTYPES[words])
        total = sum(map(sum, found.values()))
        for part, (forward, backward) in found.items():
            rows.append({"dtype": words, "part": part, "forward": forward, "backward": backward,
                         "share": (forward + backward) / total})
    for line in byte_table({"rows": rows}):
        print(line)
    path = Path(output_dir) / "boxes_bytes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"torch": torch.__version__, "case": name, "batch": 1, "objects": OBJECTS, "rows": rows})
    print(f"\nwrote {path}")


def byte_table(result):
    """Lines of a Markdown table: gigabytes of each part of a step, and their share of it."""
    yield "| part of a step | bf16 GB, forward + backward | share | fp32 GB, forward + backward | share |"
    yield "|---|---|---|---|---|"
    cells = {}
    for row in result["rows"]:
        cells.setdefault(row["part"], []).append(
            f"{row['forward'] / 1e9:.3f} + {row['backward'] / 1e9:.3f} | {100 * row['share']:.1f} %")
    for part, found in cells.items():
        yield f"| {part} | {' | '.join(found)} |"
