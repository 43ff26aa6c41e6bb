"""UPerNet on a plain ViT (arXiv 1807.10221), as MAE and MFF transfer to ADE20K (arXiv 2308.00261, A.4).

What is unusual about this one:
- a plain ViT has one resolution: transposed convolutions and pooling make the four levels that UPerNet wants;
- the shallow blocks' outputs are taken before any norm, which is not the final norm that they never saw;
- no layer draws random numbers: drop path and the heads' dropout are functions of the caller's noise.

The layers' names are mmsegmentation's (neck, decode_head, auxiliary_head). Deviations: docs/parity.md.

Shapes: B images, C H W, P patch side, L patches, T = 1 + L tokens (class token first), D width of the encoder
and of the neck, E width of a head, G classes, M fused levels, r rows and c columns of patches.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.kernels.ops import TORCH
from mff_min.mim import fuse
from mff_run.flops import block_flops

DROPOUT = 0.1                                                           # of channels before each classifier
BINS = 1, 2, 3, 6                                                       # of pyramid pooling, per side


def taps_of(depth):
    """The four blocks whose outputs UPerNet gets: 3, 5, 7, 11 of twelve, and the same parts of other depths.

    Raises ValueError for fewer than four blocks.
    """
    if depth < 4:
        raise ValueError(f"an encoder of {depth} blocks has no four levels: expected 4 blocks or more")
    return tuple(max(depth * part // 12, least) - 1 for least, part in enumerate((4, 6, 8, 12), start=1))


def conv_bn_relu(in_chans, out_chans, kernel_size):
    """Convolution without bias, BatchNorm and ReLU, with mmsegmentation's names and initialisation."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers = nn.Sequential()
    layers.add_module("conv", conv)
    layers.add_module("bn", nn.BatchNorm2d(out_chans))
    layers.add_module("activate", nn.ReLU(inplace=True))
    return layers


def classifier(in_chans, num_classes):
    """A 1x1 convolution whose logits begin near zero."""
    conv = nn.Conv2d(in_chans, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resize(x, size):
    """Bilinear, corners not aligned: (B, E, rows, columns) -> (B, E, *size)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def drop_channels(x, noise):
    """Dropout2d by uniform noise (B, E): a channel of x (B, E, rows, columns) is zero where it is below 0.1.

    The others are scaled, so that the expectation stays. noise None: nothing is dropped.
    """
    if noise is None:
        return x
    return x * ((noise >= DROPOUT) / (1 - DROPOUT))[:, :, None, None].to(x.dtype)


class Neck(nn.Module):
    """Four levels, at strides P / 4, P / 2, P and 2 P, from four maps at stride P; all are D wide."""

    def __init__(self, dim):
        super().__init__()
        self.upsample_4x = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.BatchNorm2d(dim),
                                         nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, stride=2))
        self.upsample_2x = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.downsample_2x = nn.MaxPool2d(2)

    def forward(self, maps):
        """Levels (B, D, 4 r, 4 c) ... (B, D, r // 2, c // 2) of four maps (B, D, r, c), shallowest first."""
        return [self.upsample_4x(maps[0]), self.upsample_2x(maps[1]), maps[2], self.downsample_2x(maps[3])]


class UPerHead(nn.Module):
    """UPerNet's head: pyramid pooling of the coarsest level, a feature pyramid over all, and a classifier."""

    def __init__(self, dim, width, num_classes):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_bn_relu(dim, width, 1)) for side in BINS)
        self.bottleneck = conv_bn_relu(dim + len(BINS) * width, width, 3)
        self.lateral_convs = nn.ModuleList(conv_bn_relu(dim, width, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv_bn_relu(width, width, 3) for _ in range(3))
        self.fpn_bottleneck = conv_bn_relu(4 * width, width, 3)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, levels, noise=None):
        """Logits (B, G, 4 r, 4 c) from the Neck's levels; noise (B, E) drops channels of the last map."""
        # pool the coarsest level at four scales, beside itself
        *levels, last = levels
        pooled = [resize(pool(last), last.shape[-2:]) for pool in self.psp_modules]
        last = self.bottleneck(torch.cat([last, *pooled], dim=1))       # (B, E, r // 2, c // 2)

        # add coarse levels to finer ones, top down
        maps = [conv(level) for conv, level in zip(self.lateral_convs, levels, strict=True)] + [last]
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[-2:])
        maps[:3] = [conv(x) for conv, x in zip(self.fpn_convs, maps[:3], strict=True)]

        # join all levels at the finest resolution, and classify
        x = torch.cat([resize(x, maps[0].shape[-2:]) for x in maps], dim=1)     # (B, 4 * E, 4 * r, 4 * c)
        return self.conv_seg(drop_channels(self.fpn_bottleneck(x), noise))


class FCNHead(nn.Module):
    """One convolution and a classifier: the auxiliary head."""

    def __init__(self, dim, width, num_classes):
        super().__init__()
        self.convs = nn.Sequential(conv_bn_relu(dim, width, 3))
        self.conv_seg = classifier(width, num_classes)

    def forward(self, x, noise=None):
        """Logits (B, G, r, c) from a map (B, D, r, c); noise (B, E) drops channels."""
        return self.conv_seg(drop_channels(self.convs(x), noise))


class Segmenter(nn.Module):
    """A VisionTransformer with UPerNet: per-pixel logits of num_classes classes, and those of a second head.

    width is that of the head; the auxiliary head's is a third of it. The encoder's final norm and head are
    left out, as nothing uses them. With fusion (mff_weights.pretrained.Fusion), MFF's fused and normalised
    feature takes the place of the last block's output, and the final norm stays. Raises ValueError for an
    encoder with fewer than four blocks or a grid that cannot be halved.
    """

    def __init__(self, encoder, num_classes, width=768, fusion=None, ops=TORCH):
        super().__init__()
        D, aux_width = encoder.embed_dim, max(width // 3, 1)
        if min(encoder.grid) < 2:
            raise ValueError(f"an image of {encoder.grid[0]}x{encoder.grid[1]} patches cannot be halved: "
                             f"expected 2 or more each way; a larger --img-size gives them")
        self.taps = taps_of(len(encoder.blocks))
        self.noise_parts = 2 * len(encoder.blocks), width, aux_width
        self.encoder, self.fusion, self.ops = encoder, fusion, ops
        for name in ("norm", "fc_norm", "head"):
            if hasattr(encoder, name) and not (name == "norm" and fusion):
                setattr(encoder, name, nn.Identity())                   # DDP wants every parameter to be used
        self.neck = Neck(D)
        self.decode_head = UPerHead(D, width, num_classes)
        self.auxiliary_head = FCNHead(D, aux_width, num_classes)

    @property
    def num_noise(self):
        """How many uniform numbers a training step takes for an image."""
        return sum(self.noise_parts)

    def encode(self, images, branches=None):
        """Four maps of (B, D, r, c), the shallowest first: images (B, C, H, W), branches (B, depth, 2)."""
        levels = self.fusion.out_indices if self.fusion else ()
        wanted = sorted({*self.taps, *levels})
        outputs = self.encoder.forward_blocks(self.encoder.embed(images), wanted, branches)
        outputs = dict(zip(wanted, outputs, strict=True))               # of (B, T, D)
        tokens = [outputs[tap] for tap in self.taps]
        if self.fusion:
            tokens[-1] = fuse([outputs[i] for i in levels], self.fusion.proj_layers, self.fusion.proj_weights,
                              self.encoder.norm, self.ops)
        return [x[:, 1:].transpose(1, 2).unflatten(2, self.encoder.grid) for x in tokens]

    def forward(self, images, noise=None):
        """Logits (B, G, 4 H / P, 4 W / P) and (B, G, H / P, W / P): images (B, C, H, W) normalised.

        noise (B, num_noise), uniform in [0, 1), is for drop path and dropout; None: nothing is dropped.
        """
        branches = channels = aux_channels = None
        if noise is not None:
            branches, channels, aux_channels = noise.split(self.noise_parts, dim=1)
            branches = branches.unflatten(1, (-1, 2))                   # (B, depth, 2)
        levels = self.neck(self.encode(images, branches))
        return self.decode_head(levels, channels), self.auxiliary_head(levels[2], aux_channels)


def segmentation_loss(logits, aux, labels, aux_weight=0.4):
    """Cross-entropy of both heads' logits, resized to labels (B, H, W), in which 255 is ignored: a scalar.

    It is averaged over all pixels, ignored ones included, as in mmsegmentation: an image that is mostly
    unlabelled weighs less. PyTorch's own mean would divide by the labelled pixels.
    """
    labels = labels.long()

    def cross_entropy(logits):
        logits = resize(logits.float(), labels.shape[-2:])              # (B, G, H, W)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()
    return cross_entropy(logits) + aux_weight * cross_entropy(aux)


def poly_lr(step, lr, steps, warmup_steps):
    """The learning rate at a step: linear from lr to 0, and in the warm-up a growing part of that (BEiT's).

    The warm-up begins at a millionth. mmsegmentation 1.x, whose decay begins after the warm-up, is up to 1 %
    above it.
    """
    lr *= 1 - step / steps
    if step < warmup_steps:
        lr *= 1 - (1 - step / warmup_steps) * (1 - 1e-6)
    return lr


def segmenter_flops(model):
    """FLOPs of a forward and backward pass of a Segmenter, for one image: see mff_run/flops.py.

    A convolution with n weights that makes p pixels multiplies n p times; a transposed one whose kernel is as
    large as its stride, n times per pixel that it reads.
    """
    encoder, neck, head, aux = model.encoder, model.neck, model.decode_head, model.auxiliary_head
    rows, columns = encoder.grid
    L, D = encoder.num_patches, encoder.embed_dim
    pixels = 16 * L, 4 * L, L, (rows // 2) * (columns // 2)             # of the four levels
    convs = [(neck.upsample_4x[0], L), (neck.upsample_4x[3], 4 * L), (neck.upsample_2x, L),
             *((pool[1].conv, side * side) for pool, side in zip(head.psp_modules, BINS, strict=True)),
             (head.bottleneck.conv, pixels[3]), (head.fpn_bottleneck.conv, 16 * L), (head.conv_seg, 16 * L),
             *((conv.conv, count) for layers in (head.lateral_convs, head.fpn_convs)
               for conv, count in zip(layers, pixels[:3], strict=True)),
             (aux.convs[0].conv, L), (aux.conv_seg, L)]
    products = sum(2 * conv.weight.numel() * count for conv, count in convs)
    products += sum(block_flops(block, L + 1, L + 1) for block in encoder.blocks)
    if model.fusion:
        products += 2 * len(model.fusion.proj_layers) * (L + 1) * D * D
    embed = 2 * L * encoder.patch_embed.proj.weight.numel()             # images get no gradient
    return 3 * (products + embed) - embed
