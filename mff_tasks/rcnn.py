"""Mask R-CNN (arXiv 1703.06870) on a plain ViT, as ViTDet has it (arXiv 2203.16527): boxes and their masks.

What is unusual about this one:
- a plain ViT has one resolution: all levels of the pyramid are made of its last map, without a top-down path;
- the encoder runs without its class token, and detection has no use for its final norm;
- nothing draws random numbers: drop path, and which anchors and regions the losses are taken of, are
  functions of the caller's noise.

Layers and losses have detectron2's names. Deviations: docs/parity.md.

Shapes: B images, C H W, P patch side, L patches, D width of the encoder, E width of the heads, G classes
(class G is background), A anchors of an image, R regions, N objects, r rows and c columns of patches.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.kernels.ops import TORCH
from mff_min.kernels.reference import patchify
from mff_min.mim import fuse
from mff_min.probe import check_measured
from mff_run.flops import block_flops
from mff_tasks import masks
from mff_tasks.attention import WindowAttention
from mff_tasks.boxes import anchors, areas, clip, decode, encode, iou, match, nms, roi_align, sample

RATIOS = 0.5, 1.0, 2.0                                                  # height / width of the anchors
ANCHOR_STRIDES = 8                                                      # their side: 32 ... 512 for P = 16
RPN_IOU = 0.3, 0.7                                                      # background below, object from there
RPN_SAMPLES, RPN_POSITIVE = 256, 0.5                                    # anchors of an image's loss
RPN_NMS = 0.7
PROPOSALS = 1000                                                        # of an image
BEFORE_NMS = 2                                                          # in training, twice these of a level
ROI_IOU = 0.5                                                           # from here on a region is an object
REGIONS, ROI_POSITIVE = 512, 0.25                                       # of an image's loss
BOX_WEIGHTS = 10.0, 10.0, 5.0, 5.0                                      # of a region's four deltas
BOX_SIDE, MASK_SIDE = 7, 14                                             # of pooled features
CANONICAL = 14                                                          # patches per side: a box of level P
SCORE, NMS, DETECTIONS = 0.05, 0.5, 100                                 # of what detect returns

# ---------------------------------------------------------------- layers


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, (B, E, r, c) -> same, which is channels last in memory."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNorm(nn.Conv2d):
    """Convolution without bias and ChannelNorm."""

    def __init__(self, in_chans, out_chans, kernel_size):
        super().__init__(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_chans)

    def forward(self, x):
        return self.norm(super().forward(x))


def named(**layers):
    """A Sequential of these layers with their names."""
    return nn.Sequential(OrderedDict(layers))


def initialised(layer, init, **options):
    """The layer with weights by init and zero biases."""
    init(layer.weight, **options)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def msra(layer):
    """The layer with He's weights (arXiv 1502.01852), for a ReLU behind it."""
    return initialised(layer, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")


def normal(layer, std):
    return initialised(layer, nn.init.normal_, std=std)


class SimpleFeaturePyramid(nn.Module):
    """Five levels of width E, at strides P / 4 ... 4 P, of the encoder's last map at stride P."""

    def __init__(self, dim, width):
        super().__init__()
        finest = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), ChannelNorm(dim // 2), nn.GELU(),
                  nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)]
        finer = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        for level, (layers, chans) in enumerate([(finest, dim // 4), (finer, dim // 2), ([], dim),
                                                 ([nn.MaxPool2d(2)], dim)], start=2):
            layers = [*layers, ConvNorm(chans, width, 1), ConvNorm(width, width, 3)]
            self.add_module(f"simfp_{level}", nn.Sequential(*layers))

    def forward(self, x):
        """Levels (B, E, 4 r, 4 c), ... of a map (B, D, r, c); the last is a part of the fourth's pixels."""
        levels = [layers(x) for layers in self.children()]
        return [*levels, levels[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    """A region proposal network's head (arXiv 1506.01497): which anchors are objects, and their boxes."""

    def __init__(self, width):
        super().__init__()
        self.conv = named(**{name: layer for i in range(2) for name, layer in (
            (f"conv{i}", normal(nn.Conv2d(width, width, 3, padding=1), 0.01)), (f"relu{i}", nn.ReLU()))})
        self.objectness_logits = normal(nn.Conv2d(width, len(RATIOS), 1), 0.01)
        self.anchor_deltas = normal(nn.Conv2d(width, 4 * len(RATIOS), 1), 0.01)

    def forward(self, levels):
        """Logits (B, A) and deltas (B, A, 4) of all anchors, in float32, from the pyramid's levels."""
        logits, deltas = [], []
        for x in levels:
            x = self.conv(x)
            logits.append(self.objectness_logits(x).movedim(1, -1).flatten(1))
            deltas.append(self.anchor_deltas(x).movedim(1, -1).flatten(1).unflatten(1, (-1, 4)))
        return torch.cat(logits, dim=1).float(), torch.cat(deltas, dim=1).float()


def box_head(width):
    """Four convolutions and a layer of 4 E: (R, E, 7, 7) -> (R, 4 * E)."""
    fc = nn.Linear(width * BOX_SIDE ** 2, 4 * width)
    layers = conv_layers("conv", width) | dict(
        flatten=nn.Flatten(), fc1=initialised(fc, nn.init.kaiming_uniform_, a=1), fc_relu1=nn.ReLU())
    return named(**layers)


def mask_head(width, num_classes):
    """Four convolutions and a transposed one: a mask for each class, (R, E, 14, 14) -> (R, G, 28, 28)."""
    layers = conv_layers("mask_fcn", width) | dict(
        deconv=msra(nn.ConvTranspose2d(width, width, 2, stride=2)), deconv_relu=nn.ReLU(),
        predictor=normal(nn.Conv2d(width, num_classes, 1), 0.001))
    return named(**layers)


def conv_layers(name, width):
    """Four 3x3 convolutions with ChannelNorm and ReLU, by name."""
    return {key: layer for i in (1, 2, 3, 4) for key, layer in (
        (f"{name}{i}", msra(ConvNorm(width, width, 3))), (f"{name}{i}_relu", nn.ReLU()))}


def of_class(x, labels):
    """What x (R, G, ...) holds of each region's own class, labels (R,): (R, ...)."""
    return x[torch.arange(len(x), device=x.device), labels]


def owners(parts):
    """The image of each row of a list of tensors, one for each image: (R,) int64."""
    return torch.cat([torch.full((len(part),), i, device=part.device) for i, part in enumerate(parts)])


def sums(x, parts):
    """The sums over each image's rows of x (R, ...), of which parts are as long: (B, 1)."""
    return torch.stack([rows.sum() for rows in x.split(list(map(len, parts)))])[:, None]

# ---------------------------------------------------------------- losses


def rpn_losses(logits, deltas, anchors, targets, noise):
    """loss_rpn_cls and loss_rpn_loc: logits (B, A), deltas (B, A, 4), anchors (A, 4), uniform noise (B, A).

    256 anchors of each image are chosen. Both sums, of cross-entropies and of absolute errors of the positive
    anchors' deltas, are divided by 256 B, also where an image has fewer.
    """
    objectness, localisation = logits.new_zeros(2).unbind()
    for i, target in enumerate(targets):
        index = match(iou(target["boxes"], anchors), *RPN_IOU, allow_low_quality=True)      # (A,)
        positive, negative = sample(index, RPN_SAMPLES, RPN_POSITIVE, noise[i])
        chosen = torch.cat([positive, negative])
        truth = (index[chosen] >= 0).to(logits)
        error = F.binary_cross_entropy_with_logits(logits[i, chosen], truth, reduction="sum")
        wanted = encode(target["boxes"][index[positive]], anchors[positive])
        objectness = objectness + error
        localisation = localisation + (deltas[i, positive] - wanted).abs().sum()
    count = RPN_SAMPLES * len(targets)
    return objectness / count, localisation / count


def box_losses(scores, deltas, labels, regions, boxes):
    """loss_cls and loss_box_reg of regions (R, 4): scores (R, G + 1), deltas (R, G, 4), labels (R,).

    labels are G for background; boxes are the true ones of all other regions. Both sums, of cross-entropies
    and of absolute errors of the true class's deltas, are divided by R, background included.
    """
    count = max(len(labels), 1)
    objects = (labels < deltas.shape[1]).nonzero()[:, 0]
    wanted = encode(boxes, regions[objects], BOX_WEIGHTS)
    error = (of_class(deltas[objects], labels[objects]) - wanted).abs()
    return F.cross_entropy(scores, labels, reduction="sum") / count, error.sum() / count


def mask_loss(logits, labels, truth):
    """loss_mask: the mean cross-entropy of the true class's map, logits (R, G, 28, 28), truth (R, 28, 28)."""
    chosen = of_class(logits, labels)
    return F.binary_cross_entropy_with_logits(chosen, truth, reduction="sum") / max(truth.numel(), 1)

# ---------------------------------------------------------------- the model


class MaskRCNN(nn.Module):
    """A VisionTransformer with Mask R-CNN: boxes, classes 0 ... G - 1, scores and masks of objects.

    width E is that of the pyramid and of all heads. The encoder's class token, final norm and head are left
    out, as nothing uses them; its blocks may have windows (mff_tasks.attention.add_windows). With fusion
    (mff_weights.pretrained.Fusion), MFF's fused and normalised feature takes the place of the last block's
    output, and the final norm stays. proposals is how many the box head gets of an image, regions how many of
    them a training step takes. Raises ValueError for a grid that cannot be halved.
    """

    def __init__(self, encoder, num_classes, width=256, fusion=None, ops=TORCH, proposals=PROPOSALS,
                 regions=REGIONS):
        super().__init__()
        (rows, columns), P = encoder.grid, encoder.patch_size
        if min(encoder.grid) < 2:
            raise ValueError(f"an image of {rows}x{columns} patches cannot be halved: "
                             f"expected 2 or more each way; a larger --img-size gives them")
        self.encoder, self.fusion, self.ops = encoder, fusion, ops
        self.num_classes, self.proposals, self.regions = num_classes, proposals, regions
        del encoder.cls_token                                           # DDP wants every parameter to be used
        for name in ("norm", "fc_norm", "head"):
            if hasattr(encoder, name) and not (name == "norm" and fusion):
                setattr(encoder, name, nn.Identity())
        self.backbone = SimpleFeaturePyramid(encoder.embed_dim, width)
        self.rpn_head = RPNHead(width)
        self.box_head = box_head(width)
        self.box_predictor = nn.ModuleDict(dict(
            cls_score=normal(nn.Linear(4 * width, num_classes + 1), 0.01),
            bbox_pred=normal(nn.Linear(4 * width, 4 * num_classes), 0.001)))
        self.mask_head = mask_head(width, num_classes)

        self.img_size = rows * P, columns * P
        self.strides = P / 4, P / 2, P, 2 * P, 4 * P
        half = rows // 2, columns // 2
        self.grids = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), encoder.grid, half,
                      tuple(-(-side // 2) for side in half)]
        found = [anchors((ANCHOR_STRIDES * stride,), RATIOS, stride, grid)
                 for stride, grid in zip(self.strides, self.grids, strict=True)]
        self.num_anchors = [len(level) for level in found]              # of each level
        found = torch.cat(found)                                        # (A, 4)
        self.register_buffer("anchors", found, persistent=False)
        self.noise_parts = 2 * len(encoder.blocks), sum(self.num_anchors), 2 * proposals

    @property
    def num_noise(self):
        """How many uniform numbers a training step takes for an image."""
        return sum(self.noise_parts)

    def encode(self, images, branches=None):
        """The pyramid's five levels, (B, E, 4 r, 4 c) first: images (B, C, H, W), branches (B, depth, 2).

        All shapes in here are fixed, so that this method alone can be compiled.
        """
        encoder = self.encoder
        patches = patchify(images, encoder.patch_size)
        x = encoder.patch_embed(patches) + encoder.pos_embed[:, 1:]     # (B, L, D)
        if self.fusion:
            outputs = encoder.forward_blocks(x, self.fusion.out_indices, branches)
            x = fuse(outputs, self.fusion.proj_layers, self.fusion.proj_weights, encoder.norm, self.ops)
        else:
            x, = encoder.forward_blocks(x, [len(encoder.blocks) - 1], branches)
        return self.backbone(x.transpose(1, 2).unflatten(2, encoder.grid))

    @torch.no_grad()
    def propose(self, logits, deltas, sizes, most):
        """The RPN's boxes of each image, best first: a list of (R, 4), R up to self.proposals.

        logits (B, A), deltas (B, A, 4); sizes (B, 2): the (height, width) that boxes are cut to. The `most`
        best of each level are taken; boxes suppress those of their own level.
        """
        best, level, begin = [], [], 0
        for i, count in enumerate(self.num_anchors):
            kept = min(most, count)
            best.append(begin + logits[:, begin:begin + count].topk(kept, dim=1).indices)
            level.append(torch.full((kept,), i, device=logits.device))
            begin += count
        best, level = torch.cat(best, dim=1), torch.cat(level)          # of all levels
        logits = logits.gather(1, best)
        boxes = decode(deltas.gather(1, best[..., None].expand(-1, -1, 4)), self.anchors[best])
        boxes = clip(boxes, sizes[:, None])

        # NaN, of weights that diverged, is no box: the loss says so
        image, place = ((areas(boxes) > 0) & logits.isfinite()).nonzero(as_tuple=True)
        boxes, logits = boxes[image, place], logits[image, place]
        kept = nms(boxes, logits, RPN_NMS, image * len(self.num_anchors) + level[place])
        boxes, image = boxes[kept], image[kept]
        return [boxes[image == i][:self.proposals] for i in range(len(sizes))]

    def choose_regions(self, proposals, targets, noise):
        """A step's regions of each image, objects first: dicts of regions (R, 4), labels (R,) and index (N,).

        index tells which true object each of these N objects is. True boxes are proposals too. noise is
        (B, 2 * proposals); of more boxes the last are left out.
        """
        chosen = []
        for found, target, numbers in zip(proposals, targets, noise, strict=True):
            boxes = torch.cat([target["boxes"], found])[:len(numbers)]
            index = match(iou(target["boxes"], boxes), ROI_IOU, ROI_IOU)
            positive, negative = sample(index, self.regions, ROI_POSITIVE, numbers)
            labels = torch.cat([target["labels"][index[positive]],
                                torch.full_like(negative, self.num_classes)])
            chosen.append(dict(regions=boxes[torch.cat([positive, negative])], labels=labels,
                               index=index[positive]))
        return chosen

    def pool(self, levels, boxes, side):
        """(R, E, side, side) of boxes, a list of (R, 4) for each image, from the first four levels."""
        return roi_align(levels[:4], torch.cat(boxes), owners(boxes), self.strides[:4], side,
                         canonical_size=CANONICAL * self.encoder.patch_size)

    def classify(self, levels, boxes):
        """Scores (R, G + 1) before the softmax, and deltas (R, G, 4), of all images' boxes, in float32."""
        x = self.box_head(self.pool(levels, boxes, BOX_SIDE))           # (R, 4 * E)
        deltas = self.box_predictor["bbox_pred"](x).unflatten(1, (-1, 4))
        return self.box_predictor["cls_score"](x).float(), deltas.float()

    def forward(self, images, targets, noise):
        """The five losses of a batch, by name: images (B, C, H, W) normalised.

        targets are dicts, one for each image, of boxes (N, 4) float32, labels (N,) int64 and masks (N, H, W)
        bool; N may be 0. noise (B, num_noise), uniform in [0, 1), is for drop path and for sampling.
        """
        branches, anchor_noise, region_noise = noise.split(self.noise_parts, dim=1)
        levels = self.encode(images, branches.unflatten(1, (-1, 2)))
        logits, deltas = self.rpn_head(levels)
        loss_rpn_cls, loss_rpn_loc = rpn_losses(logits, deltas, self.anchors, targets, anchor_noise)

        # choose regions of each image
        sizes = torch.tensor([self.img_size], device=images.device).expand(len(images), -1)     # (B, 2)
        proposals = self.propose(logits, deltas, sizes, BEFORE_NMS * self.proposals)
        chosen = self.choose_regions(proposals, targets, region_noise)
        objects = [part["regions"][:len(part["index"])] for part in chosen]
        regions = [part["regions"] for part in chosen]
        labels = torch.cat([part["labels"] for part in chosen])         # (R,)
        boxes = torch.cat([target["boxes"][part["index"]]
                           for target, part in zip(targets, chosen, strict=True)])      # (N, 4)

        # classify them all, and find the boxes of objects
        scores, deltas = self.classify(levels, regions)
        loss_cls, loss_box_reg = box_losses(scores, deltas, labels, torch.cat(regions), boxes)

        # find the masks of objects
        logits = self.mask_head(self.pool(levels, objects, MASK_SIDE)).float()
        truth = torch.cat([masks.targets(target["masks"], part, found["index"], 2 * MASK_SIDE)
                           for target, part, found in zip(targets, objects, chosen, strict=True)])
        loss_mask = mask_loss(logits, labels[labels < self.num_classes], truth)
        return dict(loss_rpn_cls=loss_rpn_cls, loss_rpn_loc=loss_rpn_loc, loss_cls=loss_cls,
                    loss_box_reg=loss_box_reg, loss_mask=loss_mask)

    @torch.no_grad()
    def detect(self, images, sizes):
        """What is found in each image (B, C, H, W), best first: dicts of boxes, scores, labels and masks.

        sizes (B, 2): the (height, width) of the part that the image fills, from its upper left corner. boxes
        (R, 4) are in pixels of that part, scores (R,) probabilities, labels (R,) int64, and masks (R, 28, 28)
        probabilities inside the boxes; R is 100 at most. Raises Fault where a number of the model is not
        finite: it would be an image without detections.
        """
        sizes = torch.as_tensor(sizes, device=images.device)
        levels = self.encode(images)
        logits, deltas = self.rpn_head(levels)
        check_measured(logits.sum(dim=1, keepdim=True) + deltas.sum(dim=1), "the scores of anchors")
        proposals = self.propose(logits, deltas, sizes, self.proposals)
        scores, deltas = self.classify(levels, proposals)
        check_measured(sums(scores, proposals) + sums(deltas, proposals), "the scores of regions")
        boxes = decode(deltas, torch.cat(proposals)[:, None], BOX_WEIGHTS)      # (R, G, 4)
        owner, scores = owners(proposals), scores.softmax(dim=1)[:, :-1]        # (R,), (R, G)
        boxes = clip(boxes, sizes[owner, None])

        # drop what is unlikely, and doubles of a class
        row, label = ((scores > SCORE) & (areas(boxes) > 0)).nonzero(as_tuple=True)
        boxes, scores, owner = boxes[row, label], scores[row, label], owner[row]
        kept = nms(boxes, scores, NMS, owner * self.num_classes + label)
        chosen = [kept[owner[kept] == i][:DETECTIONS] for i in range(len(images))]
        found = [dict(boxes=boxes[one], scores=scores[one], labels=label[one]) for one in chosen]

        # find the masks of the others
        maps = self.mask_head(self.pool(levels, [image["boxes"] for image in found], MASK_SIDE))
        maps = of_class(maps, label[torch.cat(chosen)]).float()
        check_measured(sums(maps, chosen), "the masks")
        for image, part in zip(found, maps.sigmoid().split(list(map(len, chosen))), strict=True):
            image["masks"] = part
        return found

# ---------------------------------------------------------------- the recipe


def step_lr(step, lr, steps, warmup_steps, milestones=(8 / 9, 26 / 27)):
    """The learning rate at a step: a tenth of it from each milestone on, a part of all steps (ViTDet).

    In the warm-up it grows linearly from a thousandth.
    """
    lr *= 0.1 ** sum(step >= round(part * steps) for part in milestones)
    if step < warmup_steps:
        lr *= 0.001 + (1 - 0.001) * step / warmup_steps
    return lr


def detector_flops(model):
    """FLOPs of a forward and backward pass of a MaskRCNN, for one image: see mff_run/flops.py.

    Assumed are all of an image's regions for the box head, and a quarter of them, the most that may be
    objects, for the mask head. RoIAlign and what sorts and compares boxes are no products. A convolution with
    n weights that makes p pixels multiplies n p times; a transposed one whose kernel is as large as its
    stride, n times per pixel that it reads.
    """
    encoder, objects = model.encoder, int(model.regions * ROI_POSITIVE)
    L, pixels = encoder.num_patches, [rows * columns for rows, columns in model.grids]
    products = sum(windowed_flops(block, L) for block in encoder.blocks)
    if model.fusion:
        products += 2 * len(model.fusion.proj_layers) * L * encoder.embed_dim ** 2
    starts = L, L, L, pixels[3]                                         # that each level begins with
    products += sum(map(products_of, model.backbone.children(), starts))
    products += products_of(model.rpn_head, sum(pixels))
    convs, layers = model.box_head[:8], model.box_head[8:]
    products += model.regions * (products_of(convs, BOX_SIDE ** 2) + products_of(layers, 1)
                                 + products_of(model.box_predictor, 1))
    products += objects * products_of(model.mask_head, MASK_SIDE ** 2)
    embed = 2 * L * encoder.patch_embed.proj.weight.numel()             # images get no gradient
    return 3 * (products + embed) - embed


def products_of(module, pixels):
    """FLOPs of a forward pass of its layers on so many pixels; a transposed convolution makes four of one."""
    products = 0
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            products += 2 * pixels * layer.weight.numel()
            pixels *= 4 if isinstance(layer, nn.ConvTranspose2d) else 1
    return products


def windowed_flops(block, L):
    """FLOPs of a forward pass of a Block of L patches; with windows, on the padding too."""
    attn, (hidden, D) = block.attn, block.mlp.fc1.weight.shape
    if not isinstance(attn, WindowAttention):
        return block_flops(block, L, L)
    padded = math.prod(side + -side % window for side, window in zip(attn.grid, attn.window, strict=True))
    scores = attn.num_heads * attn.query_width * math.prod(attn.window)
    return padded * (6 * D * D + 2 * D * sum(attn.window) + 4 * scores) + L * (2 * D * D + 4 * D * hidden)
