"""Measure a frozen encoder by a linear probe (MFF, arXiv 2308.00261, table 2, which follows MAE, A.1).

    torchrun train_probe.py --checkpoint runs/pretrain                  on the embedded images
    torchrun --nproc-per-node=8 train_probe.py --checkpoint runs/mff --data IMAGENET --workers 12

What is measured, and how, follows from one flag:

    the paper's protocol        (the defaults: 90 epochs of LARS, batch 16384, a new crop in every epoch)
    its approximation, quickly  --cache 4 --cache-lrs 0.05,0.1,0.2
    nearest neighbours          --knn 20

Every block, and both labels of the embedded images: python -m tools.probe_layers.

Published for vit_b after 800 epochs of ImageNet: MAE 65.1, PixMIM 67.5, MFF_MAE 67.0. The probe normalises
each micro-batch of --batch-size images by its own statistics, on each rank alone, as published: so the result
depends on --batch-size, and evaluation normalises by rank 0's running statistics.

Shapes: B images of a micro-batch, n images of a split, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mff_data.decode import reading_of
from mff_data.sources import describe_files, fingerprint, match_labels, open_data, relabel
from mff_data.views import Views, advice_if_late, make_loader
from mff_min.config import check_batches, check_ranges, knob, numbers, opt, parse
from mff_min.errors import Fault, UserError
from mff_min.optim import LARS, clip_grad_norm, cosine_lr, make_schedule, param_groups, set_lr
from mff_min.probe import (LinearProbe, accuracy, collect_features, count_all, count_hits, knn_scores,
                           pool_tokens, shown)
from mff_min.stream import Stream, each_once
from mff_run import process, small
from mff_run.flops import classifier_flops
from mff_run.progress import Progress
from mff_run.run import Run, RunFlags
from mff_run.world import autocast, pick_dtype, pick_ops
from mff_weights.pretrained import CheckpointFlags, build_encoder, open_pretrained

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config(CheckpointFlags, RunFlags):
    # these change the result
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), cifar10:DIR, cifar100:DIR, list:DIR, "
                              "cars:DIR, or a folder or pack of images: train/<class>/*, val/<class>/*")
    pool: str = opt("token", "after the final norm: the class token, or avg, the mean of the patch tokens",
                    choices=["token", "avg"])
    epochs: float | None = opt(None, "epochs of the schedule; not given: 90, or what --steps makes", above=0)
    steps: int | None = opt(None, "end after this many; without --epochs the schedule does too", above=0)
    batch_size: int = opt(512, "images of one micro-batch in one process, normalised together", least=2)
    global_batch: int = opt(16384, "images of a step, over all processes and micro-batches", above=0)
    blr: float = opt(0.1, "base learning rate; lr = blr * global_batch / 256", above=0)
    lr: float | None = opt(None, "learning rate, instead of blr", above=0)
    min_lr: float = opt(0.0, "learning rate at the end", least=0)
    warmup_epochs: float | None = opt(None, "of linear warm-up; not given: min(10, epochs / 5)", least=0)
    weight_decay: float = opt(0.0, "LARS's weight decay", least=0)
    cache: int = opt(0, "probe the features of this many views of each image, computed once", least=0)
    cache_lrs: tuple[float, ...] | None = opt(None, "base learning rates that --cache tries together",
                                              type=numbers)
    knn: int = opt(0, "classify by this many nearest neighbours instead; 0: do not", least=0)
    seed: int = opt(0, "of the head's weights, the order and the crops", least=0)
    dtype: str = opt("auto", "of the encoder; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these do not change the result; nor do the flags of RunFlags
    output_dir: str = knob("runs/probe", "the run's folder")
    eval_every: float = knob(10.0, "epochs between evaluations; there is always one at the end", above=0)
    small_settings = small.PROBE                                        # what --small gives


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    check_batches(cfg.global_batch, cfg.batch_size, world_size)
    asked = [flag for flag in ("cache", "knn") if getattr(cfg, flag)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two ways to probe: expected one of them")
    if asked and world_size > 1:
        raise UserError(f"--{asked[0]} runs in one process: expected no --nproc-per-node")
    if cfg.cache_lrs and not (cfg.cache and min(cfg.cache_lrs) > 0):
        raise UserError("--cache-lrs: expected numbers above 0, and --cache with them")


# ---------------------------------------------------------------- the run


def main(cfg):
    """Probe as cfg says; returns the metrics, acc1 and acc5 among them."""
    with Run(cfg) as run:
        check(cfg, run.world.size)
        return probe(cfg, run)


def probe(cfg, run):
    say, world, device, dtype = run.say, run.world, run.device, pick_dtype(cfg.dtype, run.device)
    pretrained, cfg = open_pretrained(cfg, say)
    encoder = build_encoder(pretrained, cfg.img_size, say).to(device)
    ops = pick_ops(cfg.ops, device)
    run.resume(cfg)

    # ------------------------------------------------------------ data
    reading, first = reading_of(cfg), world.local_main_first
    train_set = first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say, reading))
    val_set = first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say, reading))
    describe_files(say, train_set, val_set, output=cfg.output_dir)
    if run.state and "classes" in run.state:                            # once a checkpoint had none
        train_set = relabel(train_set, run.state["classes"], say, "train", f"the run in {cfg.output_dir}")
    train_set, val_set = match_labels(cfg.data, train_set, val_set, say)
    run.check_data(fingerprint(train_set))
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size, cfg.epochs,
                             cfg.steps, cfg.warmup_epochs, cfg.blr, cfg.lr, published=(90, 10))
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, run.start, schedule.stop,
                    world.rank, world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)
    forward = encoder.forward_features
    if cfg.compile:
        forward = torch.compile(forward, dynamic=False)
    run.open(len(train_set) + len(val_set))

    def load(source, crop, batches):
        """A loader of views of a source, in batches of (epoch, index)."""
        views = Views(source, crop, cfg.img_size, encoder.in_chans, 0, cfg.seed)
        return make_loader(views, batches, cfg.workers, device.type == "cuda", cfg.timeout)

    def prepare(batch):
        """Normalised images on the device."""
        return ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)

    @torch.no_grad()
    def extract(images):
        """The encoder's features of unmasked images, (B, D)."""
        with autocast(device, dtype):
            return pool_tokens(forward(images), cfg.pool).float()

    def collect(source, crop, keys, text):
        """(features (n, D) as the probe gets them, labels (n,), -1 if unreadable), on the CPU."""
        batches = [keys[first:first + cfg.batch_size] for first in range(0, len(keys), cfg.batch_size)]
        progress = Progress(len(keys), 0, world, text=f"features of {text}")
        found, labels = collect_features(lambda batch: {"pooled": extract(prepare(batch))},
                                         load(source, crop, batches), run.bad_samples, progress)
        run.bad_samples.report(say)
        return found["pooled"], labels

    say(f"{pretrained.path}: {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters, frozen; "
        f"feature: {'class token' if cfg.pool == 'token' else 'mean of the patch tokens'}; {len(train_set)} "
        f"images of {cfg.data}, {len(train_set.classes)} classes")
    if cfg.knn or cfg.cache:
        if cfg.knn:
            metrics = classify_by_neighbours(cfg, train_set, val_set, collect, device, say)
        else:
            metrics = probe_cached(cfg, schedule, stream, train_set, val_set, collect, device, say)
        run.record(metrics)
        return metrics

    # ------------------------------------------------------------ optimizer
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    head = LinearProbe(encoder.embed_dim, len(train_set.classes)).to(device)
    optimizer = LARS(param_groups(head, cfg.weight_decay))
    run.restore_model(head)
    run.restore_optimizer(optimizer)
    # Ranks keep their own running statistics, and evaluation uses those of rank 0.
    trained = DistributedDataParallel(head, broadcast_buffers=False) if world.size > 1 else head
    run.begin(schedule, stream, train_set, head, optimizer, dtype=dtype, copies=2,
              flops=classifier_flops(encoder, head.head, True), advice=advice_if_late(train_set, cfg.workers),
              hint="a lower --blr may help", classes=lambda: train_set.classes)

    def evaluate():
        """Accuracy on all validation images, each counted by one rank; an unreadable one counts as wrong."""
        world.broadcast(head.buffers())
        head.eval()
        batches = load(val_set, "evaluation", each_once(len(val_set), cfg.batch_size, world))
        counts = count_all(lambda batch: head(extract(prepare(batch))), batches, run.bad_samples)
        head.train()
        run.bad_samples.report(say)
        return accuracy(*world.sum(counts))

    # ------------------------------------------------------------ loop
    say(schedule.plan(run.start))
    batches = iter(load(train_set, "single_draw", stream))
    if run.evaluation_missed(schedule.evaluation_due(run.start, cfg.eval_every)):
        run.note_accuracy(run.start, evaluate)
    for step in run.steps():
        lr = cosine_lr(schedule.epoch(step), schedule.lr, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for batch in run.micro_batches(batches):
            features, labels = extract(prepare(batch)), batch["label"].to(device, non_blocking=True)
            with run.accumulate(trained):                               # ranks add up gradients once per step
                micro_loss = F.cross_entropy(trained(features), labels) / schedule.accumulation
                micro_loss.backward()
            loss += micro_loss.detach()

        grad_norm = clip_grad_norm(head, 0.0)                           # 0 does not clip: the norm is logged
        run.guard(loss, lr, grad_norm)                                  # NaN, Inf: no step changes a weight
        optimizer.step()
        optimizer.zero_grad()

        evaluates = schedule.evaluation_due(step + 1, cfg.eval_every)
        run.end_step(loss, lr, grad_norm, save=evaluates)
        if evaluates and step + 1 < schedule.stop:
            run.note_accuracy(step + 1, evaluate)

    # ------------------------------------------------------------ evaluation
    metrics = dict(step=schedule.stop, loss=run.loss, **evaluate())
    run.finish(metrics, shown(metrics))
    return metrics


# ---------------------------------------------------------------- other ways to probe


def probe_cached(cfg, schedule, stream, train_set, val_set, collect, device, say):
    """Metrics of the best of several learning rates, trained together on the features of a few fixed views.

    Epoch e sees view e mod VIEWS of every image, in the protocol's order. With as many views as epochs this
    is the protocol itself; with fewer it is an approximation, since crops come again. An image that cannot be
    read is left out.
    """
    views = [collect(train_set, "single_draw", [(view, i) for i in range(len(train_set))],
                     f"view {view + 1} of {cfg.cache}") for view in range(cfg.cache)]
    features = torch.stack([features for features, _ in views])         # (VIEWS, n, D)
    labels = torch.stack([labels for _, labels in views])               # (VIEWS, n)
    val, val_labels = collect(val_set, "evaluation", [(0, i) for i in range(len(val_set))], "val")
    if cfg.cache < schedule.epochs:
        say(f"{cfg.cache} views for {schedule.epochs:.3g} epochs: an approximation of the protocol, which "
            f"draws a new view in every epoch")

    lrs = [blr * cfg.global_batch / 256 for blr in cfg.cache_lrs] if cfg.cache_lrs else [schedule.lr]
    heads = []
    for _ in lrs:
        torch.manual_seed(cfg.seed)                                     # the same weights to start from
        heads.append(LinearProbe(features.shape[-1], len(train_set.classes)).to(device))
    optimizers = [LARS(param_groups(head, cfg.weight_decay)) for head in heads]
    micro_batches = iter(stream)
    for step in range(schedule.stop):
        for _ in range(schedule.accumulation):
            epochs, images = torch.tensor(next(micro_batches)).T
            chosen = epochs % cfg.cache, images
            x, y = features[chosen].to(device), labels[chosen].to(device)
            for head in heads:
                (F.cross_entropy(head(x), y, ignore_index=-1) / schedule.accumulation).backward()
        for optimizer, peak in zip(optimizers, lrs, strict=True):
            lr = cosine_lr(schedule.epoch(step), peak, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
            set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()

    tried = []
    for head, lr in zip(heads, lrs, strict=True):
        blr = lr * 256 / cfg.global_batch
        if not all(p.isfinite().all() for p in head.parameters()):
            say(f"blr {blr:g}: it has diverged, and is left out")
            continue
        with torch.no_grad():
            counts = count_hits(head.eval()(val.to(device)), val_labels.to(device))
        tried.append(dict(lr=lr, blr=blr, **accuracy(*counts)))
        say(f"blr {blr:g}: {shown(tried[-1])}")
    if not tried:
        raise Fault("every head has diverged: expected a lower --blr or --cache-lrs")
    best = max(tried, key=lambda metrics: metrics["acc1"])
    say(f"best of {len(tried)}, chosen on these very images: blr {best['blr']:g}")
    return dict(step=schedule.stop, views=cfg.cache, tried=tried, **best)


def classify_by_neighbours(cfg, train_set, val_set, collect, device, say):
    """Metrics of a weighted nearest-neighbour classifier on features of the evaluation crop."""
    (train, labels), (val, val_labels) = (
        collect(source, "evaluation", [(0, i) for i in range(len(source))], text)
        for source, text in ((train_set, "train"), (val_set, "val")))
    train, labels = train[labels >= 0].to(device), labels[labels >= 0].to(device)
    votes = knn_scores(train, labels, len(train_set.classes), val.to(device), cfg.knn)
    metrics = accuracy(*count_hits(votes, val_labels.to(device)))
    say(f"{cfg.knn} neighbours of {len(train)}: {shown(metrics)}")
    return dict(k=cfg.knn, **metrics)


if __name__ == "__main__":
    process.run(main, parse(Config))
