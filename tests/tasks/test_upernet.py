"""The segmenter: published sizes and schedule, every layer against its definition written out in NumPy.

The definitions are mmsegmentation's (UPerHead, FCNHead, Feature2Pyramid) by formula, in float64: convolutions
as sums over kernel offsets, pooling and bilinear resizing as loops. None of them calls a layer of PyTorch.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sources import FILES
from test_shape_comments import false_comments
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mff_min.errors import UserError
from mff_min.optim import clip_grad_norm, param_groups, set_lr
from mff_min.vit import MODELS, VisionTransformer
from mff_run.sharded import shard, whole
from mff_run.world import World
from mff_tasks.attention import add_relative_positions
from mff_tasks.upernet import (
    FCNHead,
    Neck,
    Segmenter,
    UPerHead,
    drop_channels,
    poly_lr,
    resize,
    segmentation_loss,
    segmenter_flops,
    taps_of,
)
from mff_weights.pretrained import Fusion, build_fusion, build_like, load_for_tuning, read_pretrained

EXACT = dict(rtol=1e-10, atol=1e-10)                                    # of float64, after a few sums


# ---------------------------------------------------------------- definitions, in NumPy

def convolve(x, layer):
    """A convolution of stride 1 with zeros around the image, as a sum over the kernel's offsets."""
    weight = layer.weight.detach().numpy()
    k, (rows, columns) = weight.shape[-1], x.shape[-2:]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = sum(np.einsum("oc,bcyx->boyx", weight[:, :, i, j], padded[:, :, i:i + rows, j:j + columns])
              for i in range(k) for j in range(k))
    return out if layer.bias is None else out + layer.bias.detach().numpy()[None, :, None, None]


def upsample_by_convolution(x, layer):
    """A transposed convolution whose 2 x 2 kernel is as large as its stride: each pixel becomes four."""
    out = np.einsum("bcyx,coij->boyixj", x, layer.weight.detach().numpy())
    b, o, y, i, x, j = out.shape
    return out.reshape(b, o, y * i, x * j) + layer.bias.detach().numpy()[None, :, None, None]


def batch_norm(x, layer):
    """BatchNorm by the statistics of this batch, or in eval mode by the stored ones."""
    mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    if not layer.training:
        mean, var = layer.running_mean.numpy(), layer.running_var.numpy()
    scale = layer.weight.detach().numpy() / np.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + layer.bias.detach().numpy()[:, None, None]


def conv_module(x, layers):
    """mmcv's ConvModule: convolution, norm, ReLU."""
    assert layers.conv.bias is None
    return np.maximum(batch_norm(convolve(x, layers.conv), layers.bn), 0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def adaptive_pool(x, side):
    """Means over side x side bins, from floor(i n / side) to ceil((i + 1) n / side)."""
    rows, columns = x.shape[-2:]
    out = np.empty((*x.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            top, bottom = i * rows // side, -(-(i + 1) * rows // side)
            left, right = j * columns // side, -(-(j + 1) * columns // side)
            out[:, :, i, j] = x[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return out


def bilinear(x, size):
    """Bilinear resizing whose pixels are areas (corners not aligned), a row and a column at a time."""
    for axis, new in zip((2, 3), size, strict=True):
        old = x.shape[axis]
        lines = []
        for i in range(new):
            place = max((i + 0.5) * old / new - 0.5, 0.0)
            low = min(int(place), old - 1)
            high, share = min(low + 1, old - 1), place - low
            lines.append((1 - share) * x.take(low, axis) + share * x.take(high, axis))
        x = np.stack(lines, axis)
    return x


def max_pool(x):
    b, c, rows, columns = x.shape
    x = x[:, :, :rows // 2 * 2, :columns // 2 * 2]
    return x.reshape(b, c, rows // 2, 2, columns // 2, 2).max(axis=(3, 5))


def neck_by_formula(neck, maps):
    first, norm, _, second = neck.upsample_4x
    fine = upsample_by_convolution(gelu(batch_norm(upsample_by_convolution(maps[0], first), norm)), second)
    return [fine, upsample_by_convolution(maps[1], neck.upsample_2x), maps[2], max_pool(maps[3])]


def upernet_by_formula(head, levels):
    *fine, last = levels
    pooled = [bilinear(conv_module(adaptive_pool(last, side), module[1]), last.shape[-2:])
              for side, module in zip((1, 2, 3, 6), head.psp_modules, strict=True)]
    laterals = [conv_module(level, conv) for level, conv in zip(fine, head.lateral_convs, strict=True)]
    laterals.append(conv_module(np.concatenate([last, *pooled], axis=1), head.bottleneck))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], laterals[i - 1].shape[-2:])
    out = [conv_module(x, conv) for x, conv in zip(laterals[:3], head.fpn_convs, strict=True)] + laterals[3:]
    out = np.concatenate([bilinear(x, out[0].shape[-2:]) for x in out], axis=1)
    return convolve(conv_module(out, head.fpn_bottleneck), head.conv_seg)


def fcn_by_formula(head, x):
    return convolve(conv_module(x, head.convs[0]), head.conv_seg)


def loss_by_formula(logits, labels):
    """Cross-entropy of every labelled pixel, summed by a loop and divided by the number of all pixels."""
    logits, total = bilinear(logits, labels.shape[1:]), 0.0
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] != 255:
            scores = logits[b, :, y, x]
            total += math.log(np.exp(scores).sum()) - scores[labels[b, y, x]]
    return total / labels.size


# ---------------------------------------------------------------- models

def build(img_size=(16, 24), patch_size=4, dim=8, depth=4, heads=2, classes=5, width=6, relative=True,
          fused=None, **options):
    """A small Segmenter."""
    encoder = VisionTransformer(img_size, patch_size, dim, depth, heads, **options)
    if relative:
        add_relative_positions(encoder)
    return Segmenter(encoder, classes, width, fused and Fusion(fused, dim).requires_grad_(True))


def shaken(model):
    """The model in float64, with random values in place of zeros, ones and running statistics."""
    for name, value in [*model.double().named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.5 if "var" in name else -0.5, 1.0)
    return model


def random_maps(*sizes, dim=4):
    return [torch.randn(3, dim, *size, dtype=torch.float64) for size in sizes]


def numpy(tensors):
    return [x.detach().numpy() for x in tensors]


def assert_same(found, want):
    torch.testing.assert_close(found.detach(), torch.tensor(want), **EXACT)


# ---------------------------------------------------------------- the published model

@pytest.fixture(scope="module")
def published():
    """ViT-B at 512 pixels with 150 classes, without memory."""
    with torch.device("meta"):
        encoder = VisionTransformer(512, **MODELS["vit_b"], drop_path=0.1)
        add_relative_positions(encoder)
        return Segmenter(encoder, 150)


def millions(*modules):
    return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.2f}"


def test_the_published_model_has_163_9_million_parameters(published):
    neck, head, aux = published.neck, published.decode_head, published.auxiliary_head
    assert millions(published) == "163.86" and millions(neck, head, aux) == "76.85"
    assert [millions(part) for part in (neck, head.bottleneck, head.fpn_bottleneck, head.fpn_convs)] == [
        "7.08", "26.54", "21.24", "15.93"]
    tables = [p for name, p in published.named_parameters() if "relative_position" in name]
    assert [tuple(p.shape) for p in tables] == [(63 * 63 + 3, 12)] * 12
    assert [tuple(layers.conv.weight.shape) for layers in (head.bottleneck, head.fpn_bottleneck)] == [
        (768, 3840, 3, 3), (768, 3072, 3, 3)]
    assert head.conv_seg.weight.shape == (150, 768, 1, 1)
    assert aux.conv_seg.weight.shape == (150, 256, 1, 1)
    assert published.num_noise == 24 + 768 + 256


def test_the_published_model_has_its_shapes(published):
    with torch.device("meta"):
        images = torch.empty(2, 3, 512, 512)
        maps = published.encode(images)
        levels = published.neck(maps)
        logits, aux = published(images, torch.empty(2, published.num_noise))
    assert [tuple(x.shape) for x in maps] == [(2, 768, 32, 32)] * 4
    assert [x.shape[1:] for x in levels] == [(768, side, side) for side in (128, 64, 32, 16)]
    assert logits.shape == (2, 150, 128, 128) and aux.shape == (2, 150, 32, 32)


@pytest.mark.parametrize("depth, taps", [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (32, (9, 15, 20, 31)),
                                         (4, (0, 1, 2, 3)), (5, (0, 1, 2, 4)), (6, (1, 2, 3, 5))])
def test_taps_are_the_published_parts_of_the_depth(depth, taps):
    assert taps_of(depth) == taps


def test_what_cannot_be_segmented_is_refused():
    with pytest.raises(ValueError, match="3 blocks has no four levels: expected 4 blocks or more"):
        build(depth=3)
    with pytest.raises(ValueError, match="1x6 patches cannot be halved: expected 2 or more"):
        build(img_size=(4, 24))


# ---------------------------------------------------------------- each module against its definition

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (2, 2)])
def test_the_neck_is_its_definition(size, training):
    neck = shaken(Neck(4)).train(training)
    maps = random_maps(*[size] * 4)
    for found, want in zip(neck(maps), neck_by_formula(neck, numpy(maps)), strict=True):
        assert_same(found, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(20, 12), (10, 6), (5, 3), (2, 1)],
                                   [(56, 56), (28, 28), (14, 14), (7, 7)]])
def test_the_head_is_mmsegmentations(sizes, training):
    head = shaken(UPerHead(4, 5, 3)).train(training)
    levels = random_maps(*sizes)
    assert_same(head(levels), upernet_by_formula(head, numpy(levels)))


@pytest.mark.parametrize("training", [True, False])
def test_the_auxiliary_head_is_mmsegmentations(training):
    head = shaken(FCNHead(4, 5, 3)).train(training)
    x, = random_maps((4, 6))
    assert_same(head(x), fcn_by_formula(head, x.numpy()))


@pytest.mark.parametrize("fused", [None, (0, 2, 3)])
def test_the_model_is_its_blocks_neck_and_heads(fused):
    """Taps come before any norm, without the class token; MFF's feature comes after the final one."""
    model = shaken(build(fused=fused))
    encoder, images = model.encoder, torch.randn(2, 3, 16, 24, dtype=torch.float64)
    x, outputs = encoder.embed(images), []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x)
    if fused:
        weights = model.fusion.proj_weights.flatten().softmax(dim=0)
        levels = [layer(outputs[i]) for layer, i in zip(model.fusion.proj_layers, fused, strict=False)]
        outputs[3] = encoder.norm(sum(w * y for w, y in zip(weights, [*levels, outputs[3]], strict=True)))
    maps = [y[:, 1:].reshape(2, 4, 6, 8).permute(0, 3, 1, 2) for y in outputs]
    levels = neck_by_formula(model.neck, numpy(maps))
    logits, aux = model(images)
    assert_same(logits, upernet_by_formula(model.decode_head, levels))
    assert_same(aux, fcn_by_formula(model.auxiliary_head, levels[2]))


def test_resizing_is_bilinear_with_corners_not_aligned():
    x, = random_maps((3, 5))
    for size in ((3, 5), (6, 10), (7, 4), (1, 1)):
        assert_same(resize(x, size), bilinear(x.numpy(), size))


# ---------------------------------------------------------------- noise

def test_a_channel_is_dropped_where_its_number_is_below_a_tenth():
    x = torch.ones(2, 3, 2, 2)
    noise = torch.tensor([[0.0, 0.0999, 0.1], [0.5, 0.0, 0.999]])
    kept = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    torch.testing.assert_close(drop_channels(x, noise), (kept / 0.9)[:, :, None, None].expand_as(x))
    assert drop_channels(x, None) is x


def test_noise_is_for_drop_path_and_for_both_heads():
    """Each part of the noise changes what it should, of its own image alone."""
    model = build(drop_path=0.5).eval()
    assert model.num_noise == 2 * 4 + 6 + 2
    images, kept = torch.randn(2, 3, 16, 24), torch.full((2, model.num_noise), 0.999)
    kept[:, :8] = 0.9999

    def change(column):
        noise = kept.clone()
        noise[0, column] = 0.0
        pairs = zip(model(images, noise), before, strict=True)
        return [(new - old).abs().amax(dim=(1, 2, 3)) for new, old in pairs]
    before = model(images, kept)
    for column, (main, aux) in [(6, (True, False)), (8, (True, False)), (15, (False, True))]:
        for found, expected in zip(change(column), (main, aux), strict=True):
            assert bool(found[0] > 0) == expected and found[1] == 0
    logits, aux = change(5)                                 # the MLP of block 2, from which both heads get
    assert logits[0] > 0 and aux[0] > 0 and logits[1] == aux[1] == 0


def test_the_same_noise_gives_the_same_bits_and_none_drops_nothing():
    model = build(drop_path=0.5)
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, model.num_noise)
    state = torch.get_rng_state()
    first, second = model(images, noise), model(images, noise)
    assert all(map(torch.equal, first, second)) and torch.equal(torch.get_rng_state(), state)
    without, small = model(images), build(drop_path=0.0)
    small.load_state_dict(model.state_dict())
    kept = small(images, torch.full((2, model.num_noise), 0.5))
    assert not torch.equal(first[0], without[0])
    bias = small.decode_head.conv_seg.bias[:, None, None]   # all channels kept: features are 1 / 0.9 as large
    torch.testing.assert_close((kept[0] - bias) * 0.9, without[0] - bias, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_the_loss_is_the_mean_over_all_pixels_ignored_ones_included(dtype):
    logits, aux = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 3, 2, 3).double()
    labels = torch.randint(3, (2, 8, 11)).to(dtype)
    labels[:, :3] = 255
    want = loss_by_formula(logits.numpy(), labels.numpy())
    other = loss_by_formula(aux.numpy(), labels.numpy())
    found = segmentation_loss(logits, aux, labels)
    assert found.item() == pytest.approx(want + 0.4 * other, rel=1e-5)      # it is computed in float32
    assert segmentation_loss(logits, aux, labels, 0.0).item() == pytest.approx(want, rel=1e-5)


def test_an_image_without_labels_costs_nothing():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    loss = segmentation_loss(logits, logits, labels)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---------------------------------------------------------------- the recipe

# (iteration from 1, learning rate of the lowest layer) in the log of implus/mae_segmentation, of 48.15 mIoU.
LOGGED = [(50, "1.207e-08"), (20_100, "3.233e-07"), (40_150, "2.769e-07"), (140_450, "4.518e-08")]


@pytest.mark.parametrize("iteration, lr", LOGGED)
def test_learning_rates_are_the_logged_ones(published, iteration, lr):
    optimizer = torch.optim.AdamW(param_groups(published, 0.05, 0.65, 12))
    set_lr(optimizer, poly_lr(iteration - 1, 1e-4, 160_000, 1500))
    lowest = min(group["lr"] for group in optimizer.param_groups)
    assert f"{lowest:.3e}" == lr


def test_the_schedule_ends_at_zero_and_may_have_no_warm_up():
    assert poly_lr(0, 1.0, 10, 0) == 1 and poly_lr(5, 1.0, 10, 0) == 0.5 and poly_lr(10, 1.0, 10, 0) == 0
    assert poly_lr(0, 1.0, 10, 2) == pytest.approx(1e-6)
    assert poly_lr(1, 1.0, 10, 2) == pytest.approx(0.9 * (1 - 0.5 * (1 - 1e-6)))


def test_layer_decay_has_the_published_14_groups(published):
    groups = param_groups(published, 0.05, 0.65, 12)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert sorted(set(scales.values())) == pytest.approx([0.65 ** n for n in range(13, -1, -1)], rel=1e-12)
    assert scales.keys() == {name for name, _ in published.named_parameters()}
    table = "encoder.blocks.11.attn.relative_position_bias_table"
    for name, layers, decays in [                           # positions and class token decay, as published
            ("encoder.pos_embed", 13, True), ("encoder.cls_token", 13, True),
            ("encoder.patch_embed.proj.weight", 13, True), ("encoder.blocks.0.attn.qkv.weight", 12, True),
            ("encoder.blocks.0.norm1.weight", 12, False), ("encoder.blocks.3.mlp.fc1.bias", 9, False),
            (table, 1, True), ("neck.upsample_2x.weight", 0, True),
            ("decode_head.bottleneck.bn.weight", 0, False), ("decode_head.conv_seg.weight", 0, True),
            ("auxiliary_head.conv_seg.bias", 0, False)]:
        assert scales[name] == pytest.approx(0.65 ** layers, rel=1e-12), name
        assert decay[name] == (0.05 if decays else 0), name


@pytest.mark.parametrize("options", [
    {}, dict(relative=False), dict(fused=(0, 1, 3)), dict(fused=(1, 3), depth=4, dim=12, heads=3),
    dict(img_size=(20, 12), depth=7), dict(patch_size=2, img_size=(6, 10), in_chans=1),
    dict(global_pool="avg", num_classes=9), dict(grad_checkpointing=True), dict(width=2, classes=2)])
def test_every_parameter_is_used(options):
    model = build(**options)
    H, W = options.get("img_size", (16, 24))
    images = torch.randn(2, options.get("in_chans", 3), H, W)
    logits, aux = model(images, torch.rand(2, model.num_noise).clamp(min=0.2))
    P, classes = options.get("patch_size", 4), options.get("classes", 5)
    assert logits.shape == (2, classes, 4 * H // P, 4 * W // P)
    assert aux.shape == (2, classes, H // P, W // P)
    segmentation_loss(logits, aux, torch.randint(classes, (2, H, W))).backward()
    # A ReLU may shut off one of a few channels for all pixels, but no whole parameter.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_recomputing_activations_changes_nothing():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(grad_checkpointing=recompute, drop_path=0.2)
        images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, model.num_noise)
        sum(x.square().sum() for x in model(images, noise)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_initial_weights_are_mmsegmentations():
    head, aux = UPerHead(64, 64, 150), FCNHead(64, 64, 150)
    for classifier in (head.conv_seg, aux.conv_seg):
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.05) and not classifier.bias.any()
    for layers, fan_out in [(head.fpn_bottleneck, 576), (aux.convs[0], 576), (head.lateral_convs[0], 64)]:
        assert layers.conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert layers.bn.weight.eq(1).all() and not layers.bn.bias.any()


def test_a_step_lowers_the_loss():
    model = build(classes=3)
    images, labels = torch.randn(4, 3, 16, 24), torch.arange(4).remainder(3).view(4, 1, 1).expand(4, 16, 24)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05, 0.65, len(model.encoder.blocks)))
    set_lr(optimizer, 1e-2)
    losses = []
    for _ in range(8):
        loss = segmentation_loss(*model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("fused", [False, True])
def test_weights_come_from_an_mff_checkpoint(pretrained, fused):
    """On another grid: positions are resampled, the fusion is taken where it is asked for."""
    found = read_pretrained(str(pretrained))
    encoder = build_like(found, (24, 16), drop_path=0.1)
    load_for_tuning(encoder, found, say=len)
    fusion = build_fusion(found, encoder).requires_grad_(True) if fused else None
    add_relative_positions(encoder)
    model = Segmenter(encoder, 4, 16, fusion)
    weights = model.state_dict()
    changed = {"pos_embed"} if fused else {"pos_embed", "norm.weight", "norm.bias"}
    for name in found.encoder.keys() - changed:
        assert torch.equal(weights[f"encoder.{name}"], found.encoder[name]), name
    assert ("encoder.norm.weight" in weights) == fused
    if fused:
        assert all(torch.equal(weights[f"fusion.{name}"], value) for name, value in found.fusion.items())
    logits, aux = model(torch.randn(2, 3, 24, 16), torch.rand(2, model.num_noise))
    assert logits.isfinite().all() and logits.shape == (2, 4, 24, 16) and aux.shape == (2, 4, 6, 4)


def test_a_segmenter_that_is_given_as_an_encoder_is_refused_by_its_name(tmp_path):
    encoder = VisionTransformer(16, **MODELS["vit_test"])
    add_relative_positions(encoder)
    torch.save({"model": Segmenter(encoder, 4, 16).state_dict()}, tmp_path / "segmenter.pt")
    found = read_pretrained(tmp_path / "segmenter.pt")
    with pytest.raises(UserError, match="; it is of a run of train_segment.py, which changes the encoder: "
                                        "expected the checkpoint that this run began with$"):
        load_for_tuning(build_like(found, (16, 16)), found, say=len)


def test_a_state_dict_makes_the_same_model_again():
    model = build(fused=(1, 3))
    model(torch.randn(2, 3, 16, 24))                        # changes the running statistics
    again = build(fused=(1, 3))
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 16, 24)
    assert all(map(torch.equal, model.eval()(images), again.eval()(images)))


# ---------------------------------------------------------------- types, graphs, cost

def test_bfloat16_gives_what_float32_gives_but_for_rounding():
    model = build(dim=16, width=16)
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, model.num_noise)
    labels = torch.randint(5, (2, 16, 24))
    exact = segmentation_loss(*model(images, noise), labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux = model(images, noise)
    assert logits.dtype == aux.dtype == torch.bfloat16
    loss = segmentation_loss(logits, aux, labels)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_the_model_is_one_graph_of_fixed_sizes(symbols):
    model = build(drop_path=0.1, fused=(1, 3))
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, model.num_noise)
    want = model(images, noise)
    compiled = torch.compile(model, dynamic=False)
    for found, expected in zip(compiled(images, noise), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sum(x.sum() for x in compiled(images, noise)).backward()
    assert symbols == []


def counted_flops(model, img_size):
    """What PyTorch counts in a step of two images."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs = model(torch.empty(2, 3, *img_size), torch.empty(2, model.num_noise))
        sum(x.sum() for x in outputs).backward()
    return counter.get_total_flops()


@pytest.fixture
def world():
    """A process group of this process alone, in which nothing is exchanged."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [None, (1, 3)])
@pytest.mark.parametrize("way", ["ddp", "sharded", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ddp_and_sharding_change_nothing(world, symbols, way, fused):
    """Two steps: DDP raises in the second where a parameter was not used in the first."""
    models = [build(drop_path=0.1, fused=fused) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wrapped = (DistributedDataParallel(models[1]) if way == "ddp" else
               shard(models[1], world, accumulates=False, compile=way == "compiled"))
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, models[0].num_noise)
    labels = torch.randint(5, (2, 16, 24))
    for _ in range(2):
        losses = [segmentation_loss(*model(images, noise), labels) for model in (models[0], wrapped)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(*(clip_grad_norm(model, 0.0) for model in models), rtol=1e-4, atol=0)
    again = whole(models[1], lambda: build(drop_path=0.1, fused=fused), world)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert symbols == []


@pytest.mark.parametrize("img_size, options", [((16, 24), {}), ((16, 24), dict(relative=False)),
                                               ((16, 24), dict(fused=(0, 2, 3))), ((20, 12), {})])
def test_the_formula_counts_every_product(img_size, options):
    with torch.device("meta"):
        model = build(img_size, **options)
    assert counted_flops(model, img_size) == 2 * segmenter_flops(model)


def test_the_published_model_costs_3_6_teraflops_per_image(published):
    assert f"{segmenter_flops(published) / 1e12:.1f}" == "3.6"
    assert counted_flops(published, (512, 512)) == 2 * segmenter_flops(published)


# ---------------------------------------------------------------- shape comments

def test_shape_comments_are_true():
    path = "mff_tasks/upernet.py"
    truth = dict(B=[3], T=[25], D=[8], E=[9, 3], G=[5], H=[16], W=[24], r=[4], c=[6])

    def work():
        model = build(width=9, classes=5, drop_path=0.1)
        outputs = model(torch.randn(3, 3, 16, 24), torch.rand(3, model.num_noise))
        segmentation_loss(*outputs, torch.zeros(3, 16, 24, dtype=torch.uint8))
    false, unseen, _ = false_comments({path: FILES[path]}, truth, work)
    assert false == unseen == []
