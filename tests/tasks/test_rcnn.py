"""Mask R-CNN: published sizes and schedule, layers and losses against their definitions by loops in NumPy.

The definitions are detectron2's ViTDet by formula, in float64; torchvision's modules are a second witness
where it is installed.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sources import FILES
from test_shape_comments import false_comments
from test_upernet import convolve, gelu, max_pool, numpy, upsample_by_convolution
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mff_min.errors import Fault, UserError
from mff_min.optim import clip_grad_norm, param_groups, set_lr
from mff_min.vit import MODELS, VisionTransformer
from mff_run.sharded import shard, whole
from mff_run.world import World
from mff_tasks import rcnn
from mff_tasks.attention import WindowAttention, add_windows
from mff_tasks.boxes import decode, iou
from mff_tasks.rcnn import (
    MaskRCNN,
    RPNHead,
    SimpleFeaturePyramid,
    box_head,
    box_losses,
    detector_flops,
    mask_head,
    mask_loss,
    rpn_losses,
    step_lr,
)
from mff_weights.pretrained import Fusion, build_fusion, build_like, load_for_tuning, read_pretrained

EXACT = dict(rtol=1e-10, atol=1e-10)                                    # of float64, after a few sums
LOSSES = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]


# ---------------------------------------------------------------- models and objects

def build(img_size=(32, 48), patch_size=4, dim=8, depth=4, heads=2, classes=3, width=4, window=3, fused=None,
          proposals=50, regions=16, **options):
    """A small MaskRCNN, of blocks with windows of which the second is global."""
    encoder = VisionTransformer(img_size, patch_size, dim, depth, heads, **options)
    if window:
        add_windows(encoder, window, global_blocks=[1])
    return MaskRCNN(encoder, classes, width, fused and Fusion(fused, dim).requires_grad_(True),
                    proposals=proposals, regions=regions)


def shaken(module):
    """The module in float64, with random values in place of zeros and ones."""
    for value in module.double().parameters():
        torch.nn.init.uniform_(value, -0.5, 1.0)
    return module


def objects(count, img_size=(32, 48), classes=3, seed=0):
    """A target of random rectangles."""
    draws, (H, W) = np.random.default_rng(seed), img_size
    top, left = draws.uniform(0, H / 2, count), draws.uniform(0, W / 2, count)
    right, bottom = left + draws.uniform(4, W / 2, count), top + draws.uniform(4, H / 2, count)
    boxes = np.stack([left, top, right, bottom], axis=1)
    y, x = np.mgrid[:H, :W]
    masks = [(x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3]) for box in boxes]
    return dict(boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
                labels=torch.tensor(draws.integers(classes, size=count)),
                masks=torch.tensor(np.array(masks, dtype=bool).reshape(-1, H, W)))


def batch(model, counts=(2, 0, 3), seed=0):
    """(images, targets, noise) for a model."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), model.encoder.in_chans, *model.img_size, generator=g)
    targets = [objects(n, model.img_size, model.num_classes, seed + i) for i, n in enumerate(counts)]
    return images, targets, torch.rand(len(counts), model.num_noise, generator=g)


def trained(model, steps, lr=1e-3, **options):
    """The model after a few steps on one batch, which it is returned with."""
    images, targets, noise = batch(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        sum(model(images, targets, noise).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, images, targets, noise


# ---------------------------------------------------------------- definitions, in NumPy

def channel_norm(x, layer):
    """LayerNorm over axis 1."""
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    weight, bias = numpy([layer.weight, layer.bias])
    return x * weight[:, None, None] + bias[:, None, None]


def conv_norm(x, layer):
    assert layer.bias is None
    return channel_norm(convolve(x, layer), layer.norm)


def relu(x):
    return np.maximum(x, 0)


def pyramid_by_formula(pyramid, x):
    first, norm, _, second = pyramid.simfp_2[:4]
    levels = [
        upsample_by_convolution(gelu(channel_norm(upsample_by_convolution(x, first), norm)), second),
        upsample_by_convolution(x, pyramid.simfp_3[0]), x, max_pool(x)]
    layers = pyramid.simfp_2, pyramid.simfp_3, pyramid.simfp_4, pyramid.simfp_5
    levels = [conv_norm(conv_norm(x, part[-2]), part[-1]) for x, part in zip(levels, layers, strict=True)]
    return [*levels, levels[-1][:, :, ::2, ::2]]


def rpn_by_formula(head, levels):
    """Logits and deltas of all anchors: level, row, column, ratio."""
    logits, deltas = [], []
    for x in levels:
        x = relu(convolve(relu(convolve(x, head.conv.conv0)), head.conv.conv1))
        B, _, rows, columns = x.shape
        logits.append(convolve(x, head.objectness_logits).transpose(0, 2, 3, 1).reshape(B, -1))
        out = convolve(x, head.anchor_deltas).reshape(B, 3, 4, rows, columns)
        deltas.append(out.transpose(0, 3, 4, 1, 2).reshape(B, -1, 4))
    return np.concatenate(logits, axis=1), np.concatenate(deltas, axis=1)


def linear(x, layer):
    return x @ numpy([layer.weight])[0].T + numpy([layer.bias])[0]


def heads_by_formula(box, mask, x, larger):
    for layer in (box.conv1, box.conv2, box.conv3, box.conv4):
        x = relu(conv_norm(x, layer))
    for layer in (mask.mask_fcn1, mask.mask_fcn2, mask.mask_fcn3, mask.mask_fcn4):
        larger = relu(conv_norm(larger, layer))
    larger = convolve(relu(upsample_by_convolution(larger, mask.deconv)), mask.predictor)
    return relu(linear(x.reshape(len(x), -1), box.fc1)), larger


def assert_same(found, want):
    torch.testing.assert_close(found.detach(), torch.tensor(want), **EXACT)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (2, 2)])
def test_the_pyramid_and_the_rpn_are_their_definitions(size):
    pyramid, head = shaken(SimpleFeaturePyramid(8, 6)), shaken(RPNHead(6))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    levels, want = pyramid(x), pyramid_by_formula(pyramid, x.numpy())
    rows, columns = size
    half = rows // 2, columns // 2
    assert [tuple(level.shape[2:]) for level in levels] == [
        (4 * rows, 4 * columns), (2 * rows, 2 * columns), size, half, tuple(math.ceil(n / 2) for n in half)]
    for found, expected in zip(levels, want, strict=True):
        assert_same(found, expected)
    logits, deltas = rpn_by_formula(head, want)
    for found, expected in zip(head(levels), (logits, deltas), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-5, atol=1e-5)


def test_both_heads_are_their_definitions():
    box, mask = shaken(box_head(4)), shaken(mask_head(4, 3))
    x, larger = (torch.randn(2, 4, side, side, dtype=torch.float64) for side in (7, 14))
    want, maps = heads_by_formula(box, mask, x.numpy(), larger.numpy())
    assert want.shape == (2, 16) and maps.shape == (2, 3, 28, 28)
    assert_same(box(x), want)
    assert_same(mask(larger), maps)


def test_the_heads_are_torchvisions():
    """With the same weights in the same order."""
    pytest.importorskip("torchvision")
    from torchvision.models.detection import faster_rcnn, mask_rcnn, rpn
    theirs = [rpn.RPNHead(4, 3, conv_depth=2),
              faster_rcnn.FastRCNNConvFCHead((4, 7, 7), [4] * 4, [16], rcnn.ChannelNorm),
              torch.nn.Sequential(mask_rcnn.MaskRCNNHeads(4, [4] * 4, 1, rcnn.ChannelNorm),
                                  mask_rcnn.MaskRCNNPredictor(4, 4, 3))]
    ours = RPNHead(4), box_head(4), mask_head(4, 3)
    inputs = ([torch.randn(2, 4, 5, 6), torch.randn(2, 4, 3, 2)], torch.randn(2, 4, 7, 7),
              torch.randn(2, 4, 14, 14))
    for one, other, x in zip(ours, theirs, inputs, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.nn.init.uniform_(p, -0.5, 1.0)
            q.data.copy_(p.data)
        found, want = one(x), other(x)
        if isinstance(want, tuple):                         # of the RPN: a list of maps each
            logits, deltas = ([maps.movedim(1, -1).reshape(2, -1, size) for maps in part]
                              for part, size in zip(want, (1, 4), strict=True))
            torch.testing.assert_close(found[1], torch.cat(deltas, dim=1), rtol=1e-5, atol=1e-5)
            found, want = found[0], torch.cat(logits, dim=1)[..., 0]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the published model

@pytest.fixture(scope="module")
def published():
    """ViT-B at 1024 pixels with the 80 classes of COCO, without memory."""
    with torch.device("meta"):
        encoder = VisionTransformer(1024, **MODELS["vit_b"], drop_path=0.1)
        add_windows(encoder, 14)
        return MaskRCNN(encoder, 80)


def weights(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_published_model_has_113_9_million_parameters(published):
    """By formula. torchvision's route has 4,357 more, for a class 0, and 768 fewer, of a class token."""
    D, E, G = 768, 256, 80
    tables = 2 * 64 * (8 * (2 * 14 - 1) + 4 * (2 * 64 - 1))
    encoder = 12 * (12 * D * D + 13 * D) + 768 * D + D + (1 + 64 * 64) * D + tables
    conv = 9 * E * E + 2 * E                                # with its norm
    up = 4 * D * D // 2 + D // 2
    pyramid = 2 * up + D + 4 * D // 2 * D // 4 + D // 4 + 4 * conv
    pyramid += sum(chans * E + 2 * E for chans in (192, 384, 768, 768))
    rpn = 2 * (9 * E * E + E) + 3 * E + 3 + 12 * E + 12
    box = 4 * conv + 49 * E * 4 * E + 4 * E
    predictor = 4 * E * (G + 1) + G + 1 + 4 * E * 4 * G + 4 * G
    mask = 4 * conv + 4 * E * E + E + G * E + G
    assert [weights(part) for part in (published.encoder, published.backbone, published.rpn_head,
                                       published.box_head, published.box_predictor, published.mask_head)] == [
        encoder, pyramid, rpn, box, predictor, mask]
    assert weights(published) == encoder + pyramid + rpn + box + predictor + mask == 113_894_581 - 4357 + 768
    assert f"{(encoder + pyramid - D) / 1e6:.2f}" == "94.44"
    assert f"{(weights(published) - (64 * 64 - 14 * 14) * D) / 1e6:.1f}" == "110.9"     # as in detectron2


def test_the_published_model_has_its_shapes(published):
    with torch.device("meta"):
        levels = published.encode(torch.empty(2, 3, 1024, 1024), torch.empty(2, 12, 2))
        logits, deltas = published.rpn_head(levels)
    assert [tuple(x.shape) for x in levels] == [(2, 256, side, side) for side in (256, 128, 64, 32, 16)]
    assert published.strides == (4, 8, 16, 32, 64)
    assert logits.shape == (2, 261_888) and deltas.shape == (2, 261_888, 4)
    assert published.num_noise == 24 + 261_888 + 2000
    windows = [block.attn.window for block in published.encoder.blocks]
    assert [i for i, window in enumerate(windows) if window == (64, 64)] == [2, 5, 8, 11]
    assert windows.count((14, 14)) == 8


def test_layers_have_detectron2s_names(published):
    names = set(dict(published.named_parameters()))
    for name in [
            "backbone.simfp_2.0.weight", "backbone.simfp_2.1.weight", "backbone.simfp_2.3.bias",
            "backbone.simfp_2.4.norm.weight", "backbone.simfp_3.2.weight", "backbone.simfp_4.0.weight",
            "backbone.simfp_5.2.norm.bias", "rpn_head.conv.conv1.weight", "rpn_head.objectness_logits.bias",
            "rpn_head.anchor_deltas.weight", "box_head.conv4.norm.weight", "box_head.fc1.weight",
            "box_predictor.cls_score.weight", "box_predictor.bbox_pred.bias", "mask_head.mask_fcn1.weight",
            "mask_head.deconv.weight", "mask_head.predictor.bias", "encoder.blocks.0.attn.rel_pos_h",
            "encoder.blocks.11.attn.rel_pos_w"]:
        assert name in names, name
    assert not [name for name in names if "cls_token" in name or name.startswith("encoder.norm")]


def test_settings_are_the_published_ones():
    """detectron2's mask_rcnn_vitdet."""
    assert rcnn.RPN_IOU == (0.3, 0.7) and (rcnn.RPN_SAMPLES, rcnn.RPN_POSITIVE) == (256, 0.5)
    assert (rcnn.BEFORE_NMS, rcnn.PROPOSALS, rcnn.RPN_NMS) == (2, 1000, 0.7)
    assert (rcnn.ROI_IOU, rcnn.REGIONS, rcnn.ROI_POSITIVE) == (0.5, 512, 0.25)
    assert (rcnn.BOX_SIDE, rcnn.MASK_SIDE, rcnn.BOX_WEIGHTS) == (7, 14, (10, 10, 5, 5))
    assert (rcnn.SCORE, rcnn.NMS, rcnn.DETECTIONS) == (0.05, 0.5, 100)


def test_anchors_are_8_strides_large_and_of_three_ratios():
    model = build()                                         # strides 1, 2, 4, 8, 16
    begin = 0
    for stride, (rows, columns) in zip((1, 2, 4, 8, 16), model.grids, strict=True):
        part = model.anchors[begin:begin + 3 * rows * columns].view(rows, columns, 3, 4)
        begin += 3 * rows * columns
        sides = part[..., 2:] - part[..., :2]
        torch.testing.assert_close(sides.prod(-1), torch.full_like(sides[..., 0], (8.0 * stride) ** 2))
        ratios = torch.tensor([0.5, 1, 2]).expand(rows, columns, 3)
        torch.testing.assert_close(sides[..., 1] / sides[..., 0], ratios)
        centre = (part[-1, -1, 0, :2] + part[-1, -1, 0, 2:]) / 2
        assert centre.tolist() == [stride * (columns - 1), stride * (rows - 1)]
    assert begin == len(model.anchors)


def test_the_encoder_sees_patches_with_their_positions_and_no_class_token():
    encoder = VisionTransformer((32, 48), 4, 8, 4, 2)
    torch.nn.init.normal_(encoder.pos_embed)
    images = torch.randn(2, 3, 32, 48)
    tokens = encoder.embed(images)[:, 1:]
    add_windows(encoder, 3)
    model = MaskRCNN(encoder, 3, 4)
    x = encoder.forward_blocks(tokens, [3])[0].transpose(1, 2).reshape(2, 8, 8, 12)
    for found, want in zip(model.encode(images), model.backbone(x), strict=True):
        torch.testing.assert_close(found, want)


def test_what_cannot_be_detected_is_refused():
    with pytest.raises(ValueError, match="1x6 patches cannot be halved: expected 2 or more"):
        build(img_size=(4, 24))


def test_initial_weights_are_detectron2s():
    model = build(dim=16, width=64, classes=80, img_size=(8, 8))
    for layer, std in [(model.rpn_head.conv.conv0, 0.01), (model.rpn_head.objectness_logits, 0.01),
                       (model.box_predictor["cls_score"], 0.01), (model.box_predictor["bbox_pred"], 0.001),
                       (model.mask_head.predictor, 0.001), (model.box_head.conv2, math.sqrt(2 / 576)),
                       (model.mask_head.mask_fcn4, math.sqrt(2 / 576)),
                       (model.box_head.fc1, math.sqrt(1 / 3136))]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert (model.box_head.fc1.weight.abs() <= math.sqrt(3 / 3136)).all()          # uniform


# ---------------------------------------------------------------- losses, by loops

def pair_iou(a, b):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def deltas_of(box, reference, weights=(1, 1, 1, 1)):
    """The four numbers that make reference to box."""
    w, h, u, v = box[2] - box[0], box[3] - box[1], reference[2] - reference[0], reference[3] - reference[1]
    return np.array(weights) * [
        (box[0] + w / 2 - reference[0] - u / 2) / u, (box[1] + h / 2 - reference[1] - v / 2) / v,
        math.log(w / u), math.log(h / v)]


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def rpn_loss_by_loop(logits, deltas, anchors, targets, noise, samples=256):
    """detectron2's: 256 anchors of an image, half of them positive at most; divided by 256 per image."""
    cls = loc = 0.0
    for b, target in enumerate(targets):
        boxes = target["boxes"].double().tolist()
        table = np.array([[pair_iou(box, anchor) for anchor in anchors] for box in boxes])
        table = table.reshape(-1, len(anchors))
        positive, negative = [], []
        for a in range(len(anchors)):
            best = table[:, a].max() if boxes else 0
            forced = any(table[n, a] == table[n].max() for n in range(len(boxes)))
            if best >= 0.7 or forced:
                positive.append(a)
            elif best < 0.3:
                negative.append(a)
        positive = sorted(positive, key=lambda a: noise[b, a])[:samples // 2]
        negative = sorted(negative, key=lambda a: noise[b, a])[:samples - len(positive)]
        for a in positive:
            cls += softplus(-logits[b, a])
            loc += np.abs(deltas[b, a] - deltas_of(boxes[table[:, a].argmax()], anchors[a])).sum()
        cls += sum(softplus(logits[b, a]) for a in negative)
    return cls / (samples * len(targets)), loc / (samples * len(targets))


@pytest.mark.parametrize("counts, samples", [((2, 0, 3), 256), ((4, 3), 40), ((0,), 256)])
def test_rpn_losses_are_the_loop(counts, samples, monkeypatch):
    """Also where an image has fewer anchors than 256, and where positive ones are more than a half."""
    monkeypatch.setattr(rcnn, "RPN_SAMPLES", samples)
    targets = [objects(n, seed=i) for i, n in enumerate(counts)]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(150, 2, generator=generator, dtype=torch.float64) * 30
    anchors = torch.cat([corners, corners + 3 + 20 * torch.rand(150, 2, generator=generator)], dim=1)
    for target in targets:                                  # some that overlap
        n = len(target["boxes"])
        anchors[:20 * n] = target["boxes"].repeat(20, 1) + 2 * torch.rand(20 * n, 4, generator=generator) - 1
    logits, deltas = torch.randn(len(counts), 150).double(), torch.randn(len(counts), 150, 4).double()
    noise = torch.rand(len(counts), 150)
    targets = [target | dict(boxes=target["boxes"].double()) for target in targets]
    found = rpn_losses(logits, deltas, anchors, targets, noise)
    want = rpn_loss_by_loop(logits.numpy(), deltas.numpy(), anchors.tolist(), targets, noise.numpy(), samples)
    assert [x.item() for x in found] == pytest.approx(want, rel=1e-9)
    assert (found[1] > 0) == any(counts)


def test_box_losses_are_the_loop():
    """Background has no deltas, but counts in the divisor."""
    R, G = 9, 4
    scores, deltas = torch.randn(R, G + 1).double(), torch.randn(R, G, 4).double()
    labels = torch.tensor([2, 0, 4, 3, 4, 4, 1, 4, 4])
    regions, boxes = (objects(count, seed=seed)["boxes"].double() for count, seed in ((R, 1), (4, 2)))
    cls = reg = 0.0
    truth = iter(boxes.tolist())
    for r in range(R):
        row = scores[r].numpy()
        cls += math.log(np.exp(row).sum()) - row[labels[r]]
        if labels[r] < G:
            want = deltas_of(next(truth), regions[r].tolist(), (10, 10, 5, 5))
            reg += np.abs(deltas[r, labels[r]].numpy() - want).sum()
    found = box_losses(scores, deltas, labels, regions, boxes)
    assert [x.item() for x in found] == pytest.approx([cls / R, reg / R], rel=1e-9)


def test_the_mask_loss_is_that_of_the_true_class():
    logits, truth = torch.randn(3, 4, 5, 5).double(), torch.rand(3, 5, 5).gt(0.5).double()
    labels = torch.tensor([3, 0, 3])
    total = sum(softplus(-x if y else x) for r in range(3) for x, y in zip(
        logits[r, labels[r]].flatten().tolist(), truth[r].flatten().tolist(), strict=True))
    assert mask_loss(logits, labels, truth).item() == pytest.approx(total / 75, rel=1e-9)


def test_losses_of_nothing_are_zero_and_have_gradients():
    logits, labels = torch.zeros(0, 4, 28, 28, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert mask_loss(logits, labels, torch.zeros(0, 28, 28)).item() == 0
    scores, deltas = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 4, 4, requires_grad=True)
    losses = box_losses(scores, deltas, labels, torch.zeros(0, 4), torch.zeros(0, 4))
    assert [x.item() for x in losses] == [0, 0] and all(x.requires_grad for x in losses)


# ---------------------------------------------------------------- proposals and regions

def greedy(boxes, scores, threshold, group):
    """NMS box by box: indices by falling score."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(group[i] != group[j] or pair_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def random_outputs(model, B=2):
    """Logits and deltas (in parts of an anchor) of all anchors."""
    A = len(model.anchors)
    return torch.randn(B, A), 0.3 * torch.randn(B, A, 4)


def test_proposals_are_the_best_of_each_level_without_doubles():
    model = build()
    logits, deltas = random_outputs(model)
    sizes = torch.tensor([[32, 48], [20, 30]])
    found = model.propose(logits, deltas, sizes, most=30)
    boxes = decode(deltas, model.anchors)
    for b, (H, W) in enumerate(sizes.tolist()):
        cut, begin, chosen, group = boxes[b].clamp(min=0).double(), 0, [], []
        cut = cut.minimum(torch.tensor([W, H, W, H])).numpy()
        for level, count in enumerate(model.num_anchors):
            best = sorted(range(begin, begin + count), key=lambda a: -logits[b, a])[:30]
            best = [a for a in best if cut[a, 2] > cut[a, 0] and cut[a, 3] > cut[a, 1]]
            chosen, group, begin = chosen + best, group + [level] * len(best), begin + count
        kept = greedy(cut[chosen], logits[b, chosen].tolist(), 0.7, group)[:50]
        torch.testing.assert_close(found[b], torch.tensor(cut[chosen][kept]).float(), rtol=1e-6, atol=1e-5)
    assert len(found[0]) == 50                              # as many as the model proposes


def test_proposals_are_torchvisions():
    pytest.importorskip("torchvision")
    from torchvision.models.detection.rpn import RegionProposalNetwork
    model = build(proposals=40)
    logits, deltas = random_outputs(model)
    most, kept = (dict(training=n, testing=n) for n in (30, 40))
    parts = torch.nn.Identity(), torch.nn.Identity()
    network = RegionProposalNetwork(*parts, 0.7, 0.3, 256, 0.5, most, kept, 0.7)
    sizes = [(32, 48), (20, 30)]
    want, _ = network.filter_proposals(decode(deltas, model.anchors), logits, sizes, model.num_anchors)
    for found, expected in zip(model.propose(logits, deltas, torch.tensor(sizes), 30), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_numbers_that_are_not_finite_are_no_proposals():
    model = build()
    logits, deltas = random_outputs(model)
    logits[0, ::2], deltas[1] = math.nan, math.nan
    first, second = model.propose(logits, deltas, torch.tensor([[32, 48]] * 2), 2000)
    assert len(first) == 50 and first.isfinite().all() and len(second) == 0
    logits, deltas = random_outputs(model)
    logits[0, 5], logits[1, 5] = math.inf, -1e30
    deltas[1], logits[1, 6:], logits[1, :5] = deltas[0], logits[0, 6:], logits[0, :5]
    first, second = model.propose(logits, deltas, torch.tensor([[32, 48]] * 2), 2000)
    assert torch.equal(first, second)


def test_regions_are_objects_and_background_by_their_overlap():
    model = build(regions=16)
    targets = [objects(3), objects(0), objects(1, seed=5)]
    proposals = [objects(n, seed=seed)["boxes"] for n, seed in ((60, 7), (30, 8), (0, 9))]
    proposals[0][:10] = targets[0]["boxes"][0] + 0.5 * torch.rand(10, 4)    # nearly an object
    noise = torch.rand(3, 100)
    first, second, third = model.choose_regions(proposals, targets, noise)
    assert [len(part["labels"]) for part in (first, second, third)] == [16, 16, 1]
    overlaps = iou(targets[0]["boxes"], first["regions"])
    n = len(first["index"])
    assert n == 4 and (overlaps.amax(0)[:n] >= 0.5).all() and (overlaps.amax(0)[n:] < 0.5).all()
    assert torch.equal(first["index"], overlaps[:, :n].argmax(0))
    assert torch.equal(first["labels"][:n], targets[0]["labels"][first["index"]])
    assert (first["labels"][n:] == 3).all() and (second["labels"] == 3).all() and len(second["index"]) == 0
    assert torch.equal(third["regions"], targets[2]["boxes"])   # the true box is a region itself
    boxes = torch.cat([targets[0]["boxes"], proposals[0]])      # the smallest noise is chosen
    candidates = (iou(targets[0]["boxes"], boxes).amax(0) >= 0.5).nonzero()[:, 0]
    chosen = candidates[noise[0, candidates].argsort()[:4]]
    assert torch.equal(first["regions"][:n], boxes[chosen])


def test_more_objects_than_noise_are_cut_off():
    model = build(proposals=5)
    chosen, = model.choose_regions([objects(5)["boxes"]], [objects(30, seed=1)], torch.rand(1, 10))
    assert 0 < len(chosen["labels"]) <= 10


def test_boxes_are_read_from_the_level_of_their_size():
    """A box of 14 patches from the encoder's stride, of half that from the next finer one."""
    model = build(img_size=(64, 96))                        # strides 1, 2, 4, 8
    levels = []
    for i, (stride, (rows, columns)) in enumerate(zip(model.strides, model.grids, strict=True)):
        x = (torch.arange(columns) + 0.5).expand(rows, -1) * stride     # in pixels
        levels.append(torch.stack([torch.full((rows, columns), float(i)), x])[None].expand(2, -1, -1, -1))
    levels[0] = levels[0] * torch.tensor([1.0, -1.0])[:, None, None, None]      # another one of each image
    boxes = [torch.tensor([[20.0, 4, 76, 60], [20, 10, 48, 38]]), torch.tensor([[30.0, 10, 44, 24]])]
    pooled = model.pool(levels, boxes, 7)
    assert pooled.shape == (3, 2, 7, 7)
    torch.testing.assert_close(pooled[:2, 0].mean(dim=(1, 2)), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(pooled[:, 1].mean(dim=(1, 2)), torch.tensor([48.0, 34.0, -37.0]))


# ---------------------------------------------------------------- detection

def detections_by_loop(model, scores, deltas, proposals, size):
    """detectron2's fast_rcnn_inference for one image: (box, score, class), best first."""
    found = []
    probability, (H, W) = scores.double().softmax(dim=1), size
    boxes = decode(deltas, proposals[:, None], (10, 10, 5, 5)).double()
    for r in range(len(proposals)):
        for k in range(model.num_classes):
            x0, y0, x1, y1 = boxes[r, k].tolist()
            box = min(max(x0, 0), W), min(max(y0, 0), H), min(max(x1, 0), W), min(max(y1, 0), H)
            if probability[r, k] > 0.05 and box[2] > box[0] and box[3] > box[1]:
                found.append((box, probability[r, k].item(), k))
    kept = greedy([box for box, *_ in found], [score for _, score, _ in found], 0.5, [k for *_, k in found])
    return [found[i] for i in kept][:100]


def outputs_of(model, images, sizes):
    """(levels, proposals, scores, deltas) of detect."""
    levels = model.encode(images)
    proposals = model.propose(*model.rpn_head(levels), torch.tensor(sizes), model.proposals)
    return levels, proposals, *model.classify(levels, proposals)


def test_detections_are_the_loop():
    model, images, *_ = trained(build(), 3)
    sizes = [(32, 48), (32, 20), (17, 48)]
    model.box_predictor["cls_score"].weight.data *= 30      # several classes above 0.05
    levels, proposals, scores, deltas = outputs_of(model, images, sizes)
    counts = [len(part) for part in proposals]
    found = model.detect(images, sizes)
    for b, (scored, moved) in enumerate(zip(scores.split(counts), deltas.split(counts), strict=True)):
        want = detections_by_loop(model, scored, moved, proposals[b], sizes[b])
        assert len(want) and len(found[b]["labels"]) == len(want)
        assert found[b]["labels"].tolist() == [k for *_, k in want]
        torch.testing.assert_close(found[b]["scores"], torch.tensor([score for _, score, _ in want]))
        boxes = torch.tensor([box for box, *_ in want])
        torch.testing.assert_close(found[b]["boxes"], boxes, rtol=1e-5, atol=1e-5)
        boxes = [found[i]["boxes"] if i == b else torch.zeros(0, 4) for i in range(3)]
        maps = model.mask_head(model.pool(levels, boxes, 14))
        for r, k in enumerate(found[b]["labels"]):
            torch.testing.assert_close(found[b]["masks"][r], maps[r, k].sigmoid(), rtol=1e-4, atol=1e-5)
        assert found[b]["masks"].shape[1:] == (28, 28)


def test_detections_are_torchvisions():
    pytest.importorskip("torchvision")
    from torchvision.models.detection.roi_heads import RoIHeads
    model, images, *_ = trained(build(), 3)
    model.box_predictor["cls_score"].weight.data *= 30
    sizes = [(32, 48), (32, 20), (17, 48)]
    _, proposals, scores, deltas = outputs_of(model, images, sizes)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100)
    theirs = torch.cat([torch.zeros(len(deltas), 1, 4), deltas], dim=1).flatten(1)      # 0 is background
    want = heads.postprocess_detections(scores.roll(1, dims=1), theirs, proposals, sizes)
    for found, boxes, probability, labels in zip(model.detect(images, sizes), *want, strict=True):
        large = (found["boxes"][:, 2:] - found["boxes"][:, :2]).amin(dim=1) >= 0.01     # they drop others
        assert len(labels) and torch.equal(found["labels"][large], labels - 1)
        torch.testing.assert_close(found["boxes"][large], boxes, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["scores"][large], probability, rtol=1e-6, atol=0)


def same(found, want, **tolerance):
    for key in want:
        torch.testing.assert_close(found[key], want[key], **tolerance)


def test_what_else_is_in_the_batch_changes_no_detection():
    """An image alone, or beside others of other sizes; nothing is found outside the part that it fills."""
    model, images, *_ = trained(build(), 3)
    model.box_predictor["cls_score"].weight.data *= 30
    sizes = [(32, 48), (32, 20), (17, 48)]
    for b, (H, W) in enumerate(sizes):
        images[b, :, H:], images[b, :, :, W:] = 0, 0        # padding: the mean colour
    together = model.detect(images, sizes)
    for b, (H, W) in enumerate(sizes):
        alone, = model.detect(images[b:b + 1], sizes[b:b + 1])
        assert len(alone["labels"]) > 3
        same(alone, together[b], rtol=1e-4, atol=1e-4)
        x0, y0, x1, y1 = alone["boxes"].unbind(1)
        assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= W and y1.max() <= H
        assert (x1 > x0).all() and (y1 > y0).all()


def test_nothing_found_is_a_result():
    model = build()
    model.box_predictor["cls_score"].bias.data[-1] = 50.0   # all is background
    images, *_ = batch(model)
    for found in model.detect(images, torch.tensor([[32, 48]] * 3)):
        assert {name: tuple(x.shape) for name, x in found.items()} == dict(
            boxes=(0, 4), scores=(0,), labels=(0,), masks=(0, 28, 28))


@pytest.mark.parametrize("layer, what", [
    ("rpn_head.anchor_deltas", "scores of anchors"), ("rpn_head.objectness_logits", "scores of anchors"),
    ("box_predictor.cls_score", "scores of regions"), ("box_predictor.bbox_pred", "scores of regions"),
    ("mask_head.predictor", "masks")])
def test_numbers_that_are_not_finite_are_a_fault_and_no_empty_answer(layer, what):
    """NaN is not above a threshold: a model that has diverged would find nothing."""
    model, images, *_ = trained(build(), 3)
    model.box_predictor["cls_score"].weight.data *= 30
    assert len(model.detect(images[:1], [(32, 48)])[0]["labels"])
    model.get_submodule(layer).bias.data[:] = math.nan
    with pytest.raises(Fault, match=f"{what} of [123] in 3 images are not finite"):
        model.detect(images, [(32, 48)] * 3)


# ---------------------------------------------------------------- training

def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("options", [
    {}, dict(window=None), dict(fused=(0, 1, 3)), dict(img_size=(20, 12), depth=5), dict(drop_path=0.2),
    dict(patch_size=2, img_size=(12, 20), in_chans=1, window=4), dict(global_pool="avg", num_classes=9),
    dict(grad_checkpointing=True), dict(classes=1), dict(patch_size=14, img_size=(42, 28))])
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0)])
def test_every_parameter_gets_a_gradient(options, counts):
    """Also where no image has an object: DDP waits for each of them."""
    model = build(width=8, **options)
    images, targets, noise = batch(model, counts)
    noise[:, :2 * len(model.encoder.blocks)].clamp_(min=0.25)               # no branch is dropped
    losses = model(images, targets, noise)
    assert list(losses) == LOSSES and all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if any(counts):
        # A ReLU may shut off one of a few channels for all pixels, but no whole parameter.
        assert [name for name, p in model.named_parameters() if not p.grad.any()] == []
    else:
        assert [losses[name].item() for name in ("loss_rpn_loc", "loss_box_reg", "loss_mask")] == [0, 0, 0]
        assert losses["loss_rpn_cls"] > 0 and losses["loss_cls"] > 0


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_the_encoder(name):
    model = build(width=8)
    model(*batch(model))[name].backward()
    assert [p for p in model.encoder.blocks[0].parameters() if not p.grad.any()] == []


def test_the_losses_begin_where_they_must():
    """Anchors at even odds, all classes alike, masks at even odds."""
    model = build(width=16, classes=7)
    losses = numbers(model(*batch(model)))
    assert losses["loss_cls"] == pytest.approx(math.log(8), rel=0.15)
    assert losses["loss_mask"] == pytest.approx(math.log(2), rel=0.02)
    assert losses["loss_rpn_cls"] == pytest.approx(math.log(2), rel=0.02)


def test_the_losses_are_of_parts_that_are_tested():
    """forward is put together as its parts say."""
    model = build(drop_path=0.4)
    images, targets, noise = batch(model)
    losses = model(images, targets, noise)
    branches, anchor_noise, region_noise = noise.split(model.noise_parts, dim=1)
    levels = model.encode(images, branches.view(3, 4, 2))
    logits, deltas = model.rpn_head(levels)
    proposals = model.propose(logits, deltas, torch.tensor([[32, 48]] * 3), 2 * model.proposals)
    chosen = model.choose_regions(proposals, targets, region_noise)
    scores, moved = model.classify(levels, [part["regions"] for part in chosen])
    boxes = torch.cat([target["boxes"][part["index"]] for target, part in zip(targets, chosen, strict=True)])
    labels = torch.cat([part["labels"] for part in chosen])
    want = [*rpn_losses(logits, deltas, model.anchors, targets, anchor_noise),
            *box_losses(scores, moved, labels, torch.cat([part["regions"] for part in chosen]), boxes)]
    for name, loss in zip(LOSSES, want, strict=False):
        torch.testing.assert_close(losses[name], loss)
    total, count = 0.0, 0
    for b, (target, part) in enumerate(zip(targets, chosen, strict=True)):
        for r, n in enumerate(part["index"].tolist()):
            box = part["regions"][r]
            boxes = [box[None] if i == b else torch.zeros(0, 4) for i in range(3)]
            maps = model.mask_head(model.pool(levels, boxes, 14))[:, target["labels"][n]]
            truth = rcnn.masks.targets(target["masks"], box[None], torch.tensor([n]), 28)
            total += F.binary_cross_entropy_with_logits(maps, truth).item()
            count += 1
    assert count and losses["loss_mask"].item() == pytest.approx(total / count, rel=1e-4)


def test_noise_alone_decides_and_each_image_has_its_own(monkeypatch):
    monkeypatch.setattr(rcnn, "RPN_SAMPLES", 4)             # two positive anchors of an image, of more
    model = build(drop_path=0.5, regions=4)                 # one object and three other regions of an image
    images, targets, noise = batch(model)
    state = torch.get_rng_state()
    first, again = numbers(model(images, targets, noise)), numbers(model(images, targets, noise))
    assert first == again and torch.equal(torch.get_rng_state(), state)
    begin = 0
    for part, changed in zip(model.noise_parts, (LOSSES, LOSSES[:2], LOSSES[2:]), strict=True):
        other = noise.clone()
        other[:, begin:begin + part] = 1 - other[:, begin:begin + part]     # the opposite order
        found = numbers(model(images, targets, other))
        begin += part
        assert [name for name in LOSSES if found[name] != first[name]] == changed
    assert begin == model.num_noise
    order = torch.tensor([2, 0, 1])                         # samples belong to images, not to places
    moved = model(images[order], [targets[i] for i in order], noise[order])
    assert numbers(moved) == pytest.approx(first, rel=1e-5)


def test_the_order_of_objects_changes_nothing():
    model = build(regions=200, proposals=100)               # all regions are chosen
    images, targets, noise = batch(model, (3,))
    want = numbers(model(images, targets, noise))
    turned = [{name: value.flip(0) for name, value in targets[0].items()}]
    found = numbers(model(images, turned, noise))
    assert found["loss_rpn_cls"] == pytest.approx(want["loss_rpn_cls"], rel=1e-5)
    assert found["loss_rpn_loc"] == pytest.approx(want["loss_rpn_loc"], rel=1e-5)


def test_a_few_steps_lower_every_loss():
    model, *step = trained(build(dim=16, width=16), 12, lr=1e-2)
    first, last = numbers(build(dim=16, width=16)(*step)), numbers(model(*step))
    assert sum(last.values()) < 0.6 * sum(first.values())
    assert last["loss_mask"] < first["loss_mask"] and last["loss_cls"] < 0.6 * first["loss_cls"]


def test_recomputing_activations_changes_nothing():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(grad_checkpointing=recompute, drop_path=0.2)
        sum(model(*batch(model)).values()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_windows_as_large_as_the_image_are_global_attention():
    """Of the whole detector: the blocks with windows then do what the global ones do."""
    torch.manual_seed(0)
    models = [build(window=99), build(window=99)]
    models[1].load_state_dict(models[0].state_dict())
    for block in models[1].encoder.blocks:                  # all global, by the argument that means it
        new = WindowAttention(8, 2, models[1].encoder.grid, None)
        new.load_state_dict(block.attn.state_dict())
        block.attn = new
    assert numbers(models[0](*batch(models[0]))) == numbers(models[1](*batch(models[1])))


# ---------------------------------------------------------------- the recipe

@pytest.mark.parametrize("steps, milestones", [(184_375, (163_889, 177_546)), (46_094, (40_972, 44_387))])
def test_milestones_are_the_published_ones(steps, milestones):
    """100 epochs as in detectron2's ViTDet, and 25."""
    first, second = milestones
    assert step_lr(first - 1, 1e-4, steps, 250) == 1e-4
    assert step_lr(first, 1e-4, steps, 250) == step_lr(second - 1, 1e-4, steps, 250) == pytest.approx(1e-5)
    assert step_lr(second, 1e-4, steps, 250) == step_lr(steps, 1e-4, steps, 250) == pytest.approx(1e-6)


def test_the_warm_up_begins_at_a_thousandth():
    assert step_lr(0, 2.0, 1000, 250) == pytest.approx(0.002)
    assert step_lr(125, 2.0, 1000, 250) == pytest.approx(2 * 0.5005)
    assert step_lr(250, 2.0, 1000, 250) == 2.0 and step_lr(0, 2.0, 1000, 0) == 2.0


def test_layer_decay_has_the_published_14_groups(published):
    groups = param_groups(published, 0.1, 0.7, 12, undecayed=("encoder.pos_embed",))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert sorted(set(scales.values())) == pytest.approx([0.7 ** n for n in range(13, -1, -1)], rel=1e-12)
    assert scales.keys() == {name for name, _ in published.named_parameters()}
    for name, layers, decays in [
            ("encoder.pos_embed", 13, False), ("encoder.patch_embed.proj.weight", 13, True),
            ("encoder.blocks.0.attn.qkv.weight", 12, True), ("encoder.blocks.0.norm1.weight", 12, False),
            ("encoder.blocks.11.attn.rel_pos_h", 1, True), ("backbone.simfp_2.0.weight", 0, True),
            ("backbone.simfp_2.1.weight", 0, False), ("rpn_head.conv.conv0.weight", 0, True),
            ("box_head.conv1.norm.weight", 0, False), ("mask_head.predictor.weight", 0, True)]:
        assert scales[name] == pytest.approx(0.7 ** layers, rel=1e-12), name
        assert decay[name] == (0.1 if decays else 0), name


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("fused", [False, True])
def test_weights_come_from_an_mff_checkpoint(pretrained, fused):
    """On another grid: positions are resampled; the class token is left behind."""
    found = read_pretrained(str(pretrained))
    encoder = build_like(found, (24, 16), drop_path=0.1)
    load_for_tuning(encoder, found, say=len)
    fusion = build_fusion(found, encoder).requires_grad_(True) if fused else None
    add_windows(encoder, 3)
    model = MaskRCNN(encoder, 4, 8, fusion, proposals=20, regions=8)
    state = model.state_dict()
    changed = {"pos_embed", "cls_token"} if fused else {"pos_embed", "cls_token", "norm.weight", "norm.bias"}
    for name in found.encoder.keys() - changed:
        assert torch.equal(state[f"encoder.{name}"], found.encoder[name]), name
    assert ("encoder.norm.weight" in state) == fused and "encoder.cls_token" not in state
    if fused:
        assert all(torch.equal(state[f"fusion.{name}"], value) for name, value in found.fusion.items())
    losses = model(*batch(model))
    assert all(loss.isfinite() for loss in losses.values())


def test_a_detector_that_is_given_as_an_encoder_is_refused_by_its_name(tmp_path):
    encoder = VisionTransformer(16, **MODELS["vit_test"])
    add_windows(encoder, 3)
    torch.save({"model": MaskRCNN(encoder, 4, 8).state_dict()}, tmp_path / "detector.pt")
    with pytest.raises(UserError, match="it is of a run of train_detect.py"):
        found = read_pretrained(tmp_path / "detector.pt")
        load_for_tuning(build_like(found, (16, 16)), found, say=len)


def test_a_state_dict_makes_the_same_model_again():
    model, again = build(fused=(1, 3)), build(fused=(1, 3))
    assert not [name for name in model.state_dict() if "anchors" in name]
    again.load_state_dict(model.state_dict())
    assert numbers(model(*batch(model))) == numbers(again(*batch(again)))


# ---------------------------------------------------------------- types, graphs, cost

def test_bfloat16_gives_what_float32_gives_but_for_rounding():
    model = build(dim=16, width=16)
    step = batch(model)
    exact = numbers(model(*step))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*step)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert numbers(losses) == pytest.approx(exact, rel=0.1, abs=0.02)       # some samples are others
    for name in ("loss_rpn_cls", "loss_rpn_loc"):                           # but not the anchors
        assert losses[name].item() == pytest.approx(exact[name], rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = model.detect(step[0], [(32, 48)] * 3)
    assert all(x.dtype == torch.float32 for image in found for name, x in image.items() if name != "labels")


@pytest.mark.slow
def test_the_encoder_and_the_pyramid_are_one_graph_of_fixed_sizes(symbols):
    model = build(drop_path=0.1, fused=(1, 3))
    step, compiled = batch(model), copy.deepcopy(model)
    compiled.encode = torch.compile(compiled.encode, dynamic=False)
    want, found = model(*step), compiled(*step)
    for name in LOSSES:
        torch.testing.assert_close(found[name], want[name], rtol=1e-3, atol=1e-4)
    sum(found.values()).backward()
    assert symbols == []


@pytest.fixture
def world():
    """A process group of this process alone, in which nothing is exchanged."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [None, (1, 3)])
@pytest.mark.parametrize("way", ["ddp", "sharded", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ddp_and_sharding_change_nothing(world, symbols, way, fused):
    """Three steps, one of them without objects: DDP raises after a step in which a parameter was not used."""
    models = [build(drop_path=0.1, fused=fused) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wrapped = (DistributedDataParallel(models[1], broadcast_buffers=False) if way == "ddp" else
               shard(models[1], world, accumulates=False, compile=way == "compiled"))
    for counts in ((2, 1), (0, 0), (1, 3)):
        step = batch(models[0], counts)
        losses = [sum(model(*step).values()) for model in (models[0], wrapped)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(*(clip_grad_norm(model, 0.0) for model in models), rtol=1e-3, atol=0)
    again = whole(models[1], lambda: build(drop_path=0.1, fused=fused), world)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert symbols == []


def counted_flops(model):
    """What PyTorch counts in a step of one image with all regions, a quarter of them objects."""
    E = model.box_predictor["cls_score"].in_features // 4
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.empty(1, model.encoder.in_chans, *model.img_size)
        levels = model.encode(images, torch.empty(1, len(model.encoder.blocks), 2))
        outputs = list(model.rpn_head(levels))
        x = model.box_head(torch.empty(model.regions, E, 7, 7, requires_grad=True))
        outputs += [layer(x) for layer in model.box_predictor.values()]
        outputs.append(model.mask_head(torch.empty(model.regions // 4, E, 14, 14, requires_grad=True)))
        sum(x.sum() for x in outputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [
    {}, dict(window=None), dict(fused=(0, 2, 3)), dict(img_size=(20, 12), window=2), dict(window=5),
    dict(patch_size=2, img_size=(10, 14), in_chans=1)])
def test_the_formula_counts_every_product(options):
    with torch.device("meta"):
        model = build(**options)
    assert counted_flops(model) == detector_flops(model)


def test_the_published_model_costs_teraflops_per_image(published):
    assert counted_flops(published) == detector_flops(published)
    assert f"{detector_flops(published) / 1e12:.1f}" == "6.0"


# ---------------------------------------------------------------- shape comments

def test_shape_comments_are_true():
    path = "mff_tasks/rcnn.py"
    truth = dict(B=[3], D=[8], E=[4], G=[5], L=[96], A=[6138])

    def work():
        model = build(classes=5)
        step = batch(model)
        model(*step)
        model.detect(step[0], [(32, 48)] * 3)
    false, unseen, _ = false_comments({path: FILES[path]}, truth, work)
    assert false == unseen == []


def test_a_small_rate_for_the_encoder_alone_is_what_decay_gives():
    """The groups that a stage makes train: all rates are set and every group has parameters."""
    model = build()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.7, 4, undecayed=("encoder.pos_embed",)))
    set_lr(optimizer, 1.0)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.7 ** n for n in range(5, -1, -1)])
