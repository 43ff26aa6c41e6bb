"""Where in an encoder the information is: a linear probe of every block, frozen, for every label.

    python -m tools.probe_layers --checkpoint runs/pretrain --layers 0,5,11 --pool avg
    python -m tools.analyze runs/layers                                 draws what it found

The probe is logistic regression on unmasked features of the evaluation crop: of every block, before the final
norm, and "fused", which MFF's decoder would receive. The baselines are the same layers with random weights,
and pixels. Rows are dicts with label, kind ("trained", "random", "pixels" or "chance"), layer and accuracy;
metrics.json holds them, and for each label the margin of the best layer over the baselines.

Shapes: B images, n images of a split, D width.
"""

import math
import time
from dataclasses import dataclass

import torch

from mff_data.decode import reading_of
from mff_data.sources import describe_files, match_labels, open_data
from mff_data.views import Views, make_loader
from mff_min.config import check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_min.mim import fuse
from mff_min.probe import accuracy, collect_features, count_hits, logistic_scores, pixel_features, pool_tokens
from mff_min.rng import ORDER, permutation
from mff_run.log import BadSamples
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.resume import open_measuring_folder, record
from mff_run.world import autocast, pick_dtype, pick_ops, start_world
from mff_weights.pretrained import (
    CheckpointFlags,
    build_encoder,
    build_fusion,
    build_untrained,
    open_pretrained,
)


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    data: str = opt("shapes", "images with classes, as --data of the stages")
    layers: str = opt("all", "blocks: all, or a list such as 0,5,11")
    images: int = opt(10_000, "of each split, at most, chosen at random", above=1)
    pool: str = opt("token", "the class token, or avg, the mean of the patch tokens",
                    choices=["token", "avg"])
    seed: int = opt(0, "of the choice of images and of the random weights", least=0)
    dtype: str = opt("auto", "of the encoder; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    batch_size: int = knob(512, "images that are computed together", above=0)
    output_dir: str = knob("runs/layers", "the folder for metrics.json")
    workers: int = knob(0, "loader processes", least=0, most=1024)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before it stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    timeout: float = knob(600.0, "seconds that it waits for a loader process", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


def parse_layers(text, depth):
    """The blocks that --layers names, ascending. Raises UserError."""
    if text == "all":
        return list(range(depth))
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 9 and int(part) < depth for part in parts):
        raise UserError(f"--layers {text}: expected all, or numbers of blocks from 0 to {depth - 1}")
    return sorted({int(part) for part in parts})


def features_of_layers(encoder, fusion, layers, images, pool, ops):
    """{"block 0": features (B, D), ...} of unmasked images, and "fused", what MFF's decoder would receive."""
    levels = encoder.forward_blocks(encoder.embed(images), range(len(encoder.blocks)))
    found = {f"block {i}": pool_tokens(levels[i], pool).float() for i in layers}
    if fusion:
        fused = fuse([levels[i] for i in fusion.out_indices], fusion.proj_layers, fusion.proj_weights,
                     encoder.norm, ops)
        found["fused"] = pool_tokens(fused, pool).float()
    return found


def margin(rows, label):
    """How far the best trained layer is ahead of both baselines' best, in points and in standard errors."""
    best = {kind: max((row for row in rows if row["label"] == label and row["kind"] == kind),
                      key=lambda row: row["acc1"]) for kind in ("trained", "random", "pixels")}
    found = dict(layer=best["trained"]["layer"], acc1=best["trained"]["acc1"])
    for kind in ("random", "pixels"):
        points = best["trained"]["acc1"] - best[kind]["acc1"]
        # Where both are all right or all wrong there is no error: at least one image's worth is taken.
        error = max(math.hypot(best["trained"]["acc1_error"], best[kind]["acc1_error"]),
                    100 / best["trained"]["val_images"])
        found[kind] = dict(layer=best[kind]["layer"], points=points, standard_errors=points / error)
    return found


def margin_line(label, found):
    """A margin as a line of text; "errors" are standard errors of the difference."""
    names = {"random": f"{found['random']['layer']} with random weights", "pixels": "pixels"}
    return f"{label}: {found['layer']} has {found['acc1']:.1f} %, " + ", ".join(
        f"{found[kind]['points']:+.1f} points ({found[kind]['standard_errors']:+.1f} errors) over {name}"
        for kind, name in names.items())


def table_of_layers(rows):
    """Top-1 accuracy in percent as text: a line a layer, and for each label trained and random weights.

    What was not measured is left blank.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["kind"], row["layer"]): f"{row['acc1']:.1f} +- {row['acc1_error']:.1f}"
             for row in rows}
    lines = [" " * 10 + "".join(f"{label + ', trained':>20}{'random weights':>20}" for label in labels)]
    for layer in dict.fromkeys(row["layer"] for row in rows if row["kind"] == "trained"):
        lines.append(f"{layer:10}" + "".join(f"{cells.get((label, kind, layer), ''):>20}"
                                             for label in labels for kind in ("trained", "random")))
    for kind in ("pixels", "chance"):
        lines.append(f"{kind:10}" + "".join(f"{cells.get((label, kind, kind), ''):>20}{'':20}"
                                            for label in labels))
    return "\n".join(line.rstrip() for line in lines)


def main(cfg, baselines=True):
    """Probe as cfg says; returns {"rows": [...], ...}, without baselines only of the trained encoder."""
    check_ranges(cfg)
    with start_world(cfg.device, timeout=cfg.timeout) as world:
        if world.size > 1:
            raise UserError("tools.probe_layers runs in one process: expected no --nproc-per-node")
        return probe_layers(cfg, world, baselines)


def probe_layers(cfg, world, baselines):
    device, dtype, ops = world.device, pick_dtype(cfg.dtype, world.device), pick_ops(cfg.ops, world.device)
    pretrained, cfg = open_pretrained(cfg, world.say)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)
    encoder = build_encoder(pretrained, cfg.img_size, world.say).to(device)
    layers = parse_layers(cfg.layers, len(encoder.blocks))
    fusion = build_fusion(pretrained, encoder)
    encoders = {"trained": (encoder, fusion)}
    if baselines:
        encoders["random"] = build_untrained(encoder, fusion, cfg.seed)
    sources = [open_data(cfg.data, split, cfg.cache_dir, world.say, reading_of(cfg))
               for split in ("train", "val")]
    describe_files(world.say, *sources, output=cfg.output_dir)
    sources = match_labels(cfg.data, *sources, world.say)
    folder = open_measuring_folder(cfg, world)
    bad_samples = BadSamples(folder, world, sum(map(len, sources)), cfg.max_bad)

    def measure(batch):
        """{(kind, layer): features (B, D)} of a batch."""
        images = ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)
        found = {("pixels", "pixels"): pixel_features(images)} if baselines else {}
        with autocast(device, dtype):
            for kind, (encoder, fusion) in encoders.items():
                for layer, x in features_of_layers(encoder, fusion, layers, images, cfg.pool, ops).items():
                    found[kind, layer] = x
        return found

    subsets = []
    for source, text in zip(sources, ("train", "val"), strict=True):
        # Chosen at random, because class folders come one after the other.
        chosen = permutation(len(source), cfg.seed, ORDER, 0)[:cfg.images]
        keys = [(0, int(i)) for i in chosen]
        batches = [keys[first:first + cfg.batch_size] for first in range(0, len(keys), cfg.batch_size)]
        views = Views(source, "evaluation", cfg.img_size, encoder.in_chans, 0, cfg.seed)
        loader = make_loader(views, batches, cfg.workers, device.type == "cuda", cfg.timeout)
        progress = Progress(len(keys), 0, world, text=f"features of {text}")
        features, classes = collect_features(measure, loader, bad_samples, progress)
        bad_samples.report(world.say)
        kept = classes >= (0 if text == "train" else -1)                # an unreadable one is a wrong answer
        labels = {name: torch.as_tensor(values[chosen]).long().where(classes >= 0, -1)[kept]
                  for name, values in source.labels.items()}
        subsets.append(({key: x[kept].to(device) for key, x in features.items()}, labels))
    (train, train_labels), (val, val_labels) = subsets
    train_images, val_images = (len(next(iter(features.values()))) for features in (train, val))

    rows, started = [], time.monotonic()
    for name, labels in train_labels.items():
        num_classes = int(labels.max()) + 1
        for kind, layer in train:
            scores = logistic_scores(train[kind, layer], labels.to(device), num_classes, val[kind, layer])
            counts = count_hits(scores, val_labels[name].to(device))
            rows.append(dict(label=name, kind=kind, layer=layer, **accuracy(*counts)))
        rows.append(dict(label=name, kind="chance", layer="chance", acc1=100 / num_classes, acc1_error=0.0))
    world.say(f"{len(rows)} logistic regressions in {time.monotonic() - started:.0f} s on {val_images} "
              f"validation images\n{table_of_layers(rows)}")
    margins = {name: margin(rows, name) for name in train_labels if baselines}
    for name, found in margins.items():
        world.say(margin_line(name, found))
    metrics = dict(pool=cfg.pool, train_images=train_images, rows=rows, margins=margins)
    record(folder, cfg, world, metrics)
    if baselines:
        world.say(f"python -m tools.analyze {cfg.output_dir} --figures layers draws it")
    return metrics


if __name__ == "__main__":
    run(main, parse(Config))
