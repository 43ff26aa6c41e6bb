"""UPerNet's neck and heads: ours beside mmsegmentation's list of layers, built from torch.nn.

Both have the same names, weights and work: a forward pass from the tokens of four blocks, and a backward pass
to every parameter and every token. Both train, so BatchNorm takes the batch's statistics and dropout drops.
As there, the layers' maps are contiguous (B, D, rows, columns); ours stay views of the tokens. The encoder,
the loss and the optimizer are left out.

Shapes: B images, T tokens, D width of the encoder.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.errors import UserError
from mff_min.vit import MODELS
from mff_run.world import DTYPES, autocast, start_world
from mff_tasks.upernet import FCNHead, Neck, UPerHead
from tools.bench.measure import (
    FAILURES,
    Budget,
    NotRun,
    Record,
    in_rounds,
    reason_of,
    show_group,
    stopwatch,
    timed_row,
)
from tools.bench.step import slow_dtypes

#           model, width of the head, patches per side, classes, images
SIZES = {"tiny": ("vit_test", 16, 4, 5, 2),                             # for the tests
         "vit_t": ("vit_t", 192, 8, 150, 8),                            # 128 pixels
         "vit_b_128": ("vit_b", 768, 8, 150, 2),
         "vit_b": ("vit_b", 768, 32, 150, 16)}                          # 512 pixels, as published
OURS, PEER = "mff_min", "mmsegmentation's layers"


class Ours(nn.Module):
    """What follows the encoder in a Segmenter."""

    def __init__(self, dim, width, num_classes):
        super().__init__()
        self.neck = Neck(dim)
        self.decode_head = UPerHead(dim, width, num_classes)
        self.auxiliary_head = FCNHead(dim, width // 3, num_classes)

    def forward(self, tokens, side, noise):
        maps = [x[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for x in tokens]
        levels = self.neck(maps)
        noise = noise or (None, None)
        return self.decode_head(levels, noise[0]), self.auxiliary_head(levels[2], noise[1])


class ConvModule(nn.Module):
    """mmcv's: convolution, norm, ReLU."""

    def __init__(self, in_chans, out_chans, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn, self.activate = nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class Head(nn.Module):
    """What both of its heads have: dropout of channels before a classifier."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.dropout, self.conv_seg = nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1)

    def classify(self, x):
        return self.conv_seg(self.dropout(x))


class PeerFCNHead(Head):
    def __init__(self, dim, width, num_classes):
        super().__init__(width, num_classes)
        self.convs = nn.Sequential(ConvModule(dim, width, 3))

    def forward(self, levels):
        return self.classify(self.convs(levels[2]))


class PeerUPerHead(Head):
    def __init__(self, dim, width, num_classes):
        super().__init__(width, num_classes)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(dim, width, 1)) for side in (1, 2, 3, 6))
        self.bottleneck = ConvModule(dim + 4 * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, width, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * width, width, 3)

    def forward(self, levels):
        def to_size_of(x, other):
            return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)
        last = levels[-1]
        pyramid = [last] + [to_size_of(module(last), last) for module in self.psp_modules]
        laterals = [self.lateral_convs[i](levels[i]) for i in range(3)]
        laterals.append(self.bottleneck(torch.cat(pyramid, dim=1)))
        for i in range(3, 0, -1):
            laterals[i - 1] = laterals[i - 1] + to_size_of(laterals[i], laterals[i - 1])
        outs = [self.fpn_convs[i](laterals[i]) for i in range(3)] + [laterals[-1]]
        outs = outs[:1] + [to_size_of(out, outs[0]) for out in outs[1:]]
        return self.classify(self.fpn_bottleneck(torch.cat(outs, dim=1)))


class Peer(nn.Module):
    """The neck and both heads as mmsegmentation lists them; it draws its own dropout."""

    def __init__(self, dim, width, num_classes):
        super().__init__()
        self.neck = nn.ModuleDict(dict(
            upsample_4x=nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
                                      nn.ConvTranspose2d(dim, dim, 2, 2)),
            upsample_2x=nn.ConvTranspose2d(dim, dim, 2, 2), same=nn.Identity(),
            downsample_2x=nn.MaxPool2d(2, 2)))
        self.decode_head = PeerUPerHead(dim, width, num_classes)
        self.auxiliary_head = PeerFCNHead(dim, width // 3, num_classes)

    def forward(self, tokens, side, noise):
        maps = [x[:, 1:].transpose(1, 2).unflatten(2, (side, side)).contiguous() for x in tokens]
        levels = [layer(x) for layer, x in zip(self.neck.values(), maps, strict=True)]
        return self.decode_head(levels), self.auxiliary_head(levels)


class Work:
    """A forward and backward pass of a module, in a type."""

    def __init__(self, module, compiled, inputs, device, dtype):
        self.forward = torch.compile(module, dynamic=False) if compiled else module
        self.inputs, self.device, self.dtype = inputs, device, DTYPES[dtype]
        self.wanted = [*module.parameters(), *inputs[0]]

    def __call__(self):
        with autocast(self.device, self.dtype):
            outputs = self.forward(*self.inputs)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        for x in self.wanted:                                           # others need the memory
            x.grad = None


def make_inputs(dim, width, side, batch, device):
    """Four of an encoder's outputs (B, T, D), which want gradients, the side of its grid, and noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(batch, 1 + side * side, dim, generator=generator) for _ in range(4)]
    noise = [torch.rand(batch, channels, generator=generator).to(device) for channels in (width, width // 3)]
    return [x.to(device).requires_grad_() for x in tokens], side, noise


def check_equal(peer, ours, tokens, side):
    """Raise NotRun unless both give the same logits, but for rounding, and train as many values."""
    trained = [sum(p.numel() for p in module.parameters()) for module in (peer, ours)]
    if trained[0] != trained[1]:
        raise NotRun(f"unequal work: it trains {trained[0]} values, ours {trained[1]}")
    with torch.no_grad():
        found, want = (module.eval()([x[:2] for x in tokens], side, None) for module in (peer, ours))
    for name, a, b in zip(("main", "auxiliary"), found, want, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= 1e-3:                                           # convolutions may run in TF32
            raise NotRun(f"unequal work: its {name} logits are {error:.1e} of theirs away from ours")
    for module in (peer, ours):
        module.train()


def bench_size(name, args, budget, world):
    """The group of one size: both contenders in each type, eager and, where it is asked for, compiled."""
    model, width, side, num_classes, batch = SIZES[name]
    dim, device = MODELS[model]["embed_dim"], world.device
    tokens, side, noise = make_inputs(dim, width, side, batch, device)
    torch.manual_seed(0)
    modules = {OURS: Ours(dim, width, num_classes).to(device), PEER: Peer(dim, width, num_classes).to(device)}
    modules[PEER].load_state_dict(modules[OURS].state_dict())
    keys = [(who, dtype, mode) for mode in ["eager"] + ["compiled"] * args.compile for dtype in args.dtypes
            for who in modules]
    slow = slow_dtypes(args.dtypes, device)
    reasons = {key: slow[key[1]] for key in keys if key[1] in slow}
    try:
        check_equal(modules[PEER], modules[OURS], tokens, side)
    except FAILURES as problem:
        reasons |= {key: reason_of(problem) for key in keys if key[0] == PEER}
    samples = {(who, dtype, mode): stopwatch(
        Work(modules[who], mode == "compiled", (tokens, side, noise), device, dtype), device)
        for who, dtype, mode in keys if (who, dtype, mode) not in reasons}
    title = f"neck and heads {name}, {side}x{side} patches, width {width}, batch {batch}"
    compiled = [key for key in samples if key[2] == "compiled"]
    seconds, left_out = in_rounds(samples, args.rounds, budget, world, title, compiled)
    baseline, rows = (PEER, args.dtypes[0], "eager"), []
    for key in keys:
        row = dict(zip(("name", "dtype", "mode"), key, strict=True))
        found = (timed_row(seconds[key], batch, seconds.get(baseline), seconds.get((OURS, *key[1:])))
                 if key in seconds else {"not_run": reasons.get(key) or left_out[key]})
        rows.append(row | found)
    return {"name": title, "case": name, "model": model, "width": width, "patches": [side, side],
            "classes": num_classes, "batch": batch, "baseline": " ".join(baseline),
            "rounds": max(map(len, seconds.values()), default=0), "rows": rows}


def bench_segment(args):
    """Every size that was asked for, into segment_<device>.json."""
    with start_world(args.device) as world:
        on_gpu = world.device.type == "cuda"
        args.dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32"])
        args.sizes = args.sizes or (["vit_b"] if on_gpu else ["vit_t", "vit_b_128"])
        for kind, names, known in (("--sizes", args.sizes, SIZES), ("--dtypes", args.dtypes, DTYPES)):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UserError(f"{kind} {unknown[0]}: expected some of {','.join(known)}")
        torch.set_num_threads(args.threads or os.cpu_count())
        record = Record("segment", args.output_dir, world, rounds=args.rounds, minutes=args.minutes)
        budget = Budget(60 * args.minutes)
        for i, name in enumerate(args.sizes):
            group = bench_size(name, args, budget.share(len(args.sizes) - i), world)
            record.add(group)
            world.say("\n".join(show_group(group)))
        world.say(f"\nwrote {record.path}")
