"""Measure a frozen encoder by a linear probe (MFF, arXiv 2308.00261, table 2, which follows MAE, A.1).

    torchrun train_probe.py --checkpoint runs/pretrain                  on the embedded images
    torchrun --nproc-per-node=8 train_probe.py --checkpoint runs/mff --data IMAGENET --workers 12

What is measured, and how, follows from one flag:

    the paper's protocol        (the defaults: 90 epochs of LARS, batch 16384, a new crop in every epoch)
    its approximation, quickly  --cache 4 --cache-lrs 0.05,0.1,0.2
    nearest neighbours          --knn 20
    every block, both labels    --layers all

Published for vit_b after 800 epochs of ImageNet: MAE 65.1, PixMIM 67.5, MFF_MAE 67.0. The probe normalises
each micro-batch of --batch-size images by its own statistics, on each rank alone, as published: so the result
depends on --batch-size, and from rank 0's running statistics comes the evaluation's normalisation.

Shapes: B images of a micro-batch, n images of a split, D width.
"""

import math
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mff_min.augment import MODES
from mff_min.config import (
    check_batches, check_channels, check_ranges, knob, numbers, opt, parse, side_or_sides)
from mff_min.errors import UserError
from mff_data.views import Views, advice_if_late, make_loader
from mff_min.stream import Stream, each_once
from mff_min.probe import check_measured
from mff_run.finite import FiniteSteps
from mff_run.flops import classifier_flops, peak_img_per_s
from tools.layers import features_of_layers, margin, margin_line, parse_layers, table_of_layers
from mff_min.optim import LARS, cosine_lr, load_optimizer, make_schedule, param_groups, set_lr
from mff_weights.pretrained import build_encoder, build_fusion, build_untrained, read_pretrained, settings_of
from mff_min.probe import (LinearProbe, accuracy, count_all, count_hits, knn_scores, logistic_scores,
                           pixel_features, pool_tokens, shown)
from mff_min.rng import ORDER, permutation
from mff_run.progress import Meter, Progress
from mff_min.errors import Fault
from mff_run.log import BadSamples, Log
from mff_run.process import StopSignals, Stopped, run
from mff_run.resume import check_same_data, load_state, open_folder, resumed_state, save_run, warn_of_space
from mff_run.world import autocast, describe_environment, pick_dtype, pick_ops, start_world
from mff_run.files import write_json
from mff_run.sharded import exchange
from mff_data.sources import check_labels, fingerprint, open_data
from mff_min.vit import MODELS

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    # these change the result
    checkpoint: str = opt("", "the encoder: a run folder, or a file of any family that tools.convert reads")
    model: str | None = opt(None, "size of the encoder; not given: the checkpoint's", choices=list(MODELS))
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), cifar10:DIR, cifar100:DIR, cars:DIR, or a "
                              "folder or pack of images: train/<class>/*, val/<class>/*")
    img_size: tuple[int, int] | None = opt(None, "crop, SIDE or HEIGHTxWIDTH; not given: the checkpoint's",
                                           type=side_or_sides)
    patch_size: int | None = opt(None, "side of a patch in pixels; not given: the checkpoint's", above=0)
    in_chans: int | None = opt(None, "channels; not given: the checkpoint's", choices=list(MODES))
    mean: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)
    std: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)
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
    knn_temperature: float = opt(0.07, "their weight is exp(cosine similarity / temperature)", above=0)
    layers: str = opt("", "probe blocks instead: all, or a list such as 0,5,11")
    layer_images: int = opt(10_000, "images of each split for --layers, at most", above=1)
    layer_baselines: bool = opt(True, "with --layers: also random weights and pixels, and a picture")
    seed: int = opt(0, "of the head's weights, the order and the crops", least=0)
    dtype: str = opt("auto", "of the encoder; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    output_dir: str = knob("runs/probe", "the run's folder")
    resume: str = knob("", "auto: go on where output_dir stopped, if it did; or a checkpoint file")
    allow_change: str = knob("", "comma-separated settings that may differ from the resumed run's")
    workers: int = knob(0, "loader processes for each training process", least=0)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before the run stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    deterministic: bool = knob(False, "the same bits in every run on a GPU too, for some speed")
    compile: bool = knob(False, "torch.compile the encoder")
    timeout: float = knob(600.0, "seconds that a step waits for another rank or a loader process", above=0)
    log_every: int = knob(20, "steps between lines of the log", above=0)
    save_every: int = knob(500, "steps between checkpoints", above=0)
    eval_every: float = knob(10.0, "epochs between evaluations; there is always one at the end", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    check_batches(cfg.global_batch, cfg.batch_size, world_size)
    if not cfg.checkpoint:
        raise UserError("--checkpoint is not given: expected a run folder, an encoder.pt or a state dict")
    asked = [flag for flag in ("cache", "knn", "layers") if getattr(cfg, flag)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two ways to probe: expected one of them")
    if asked and world_size > 1:
        raise UserError(f"--{asked[0]} runs in one process: expected no --nproc-per-node")
    if cfg.cache_lrs and not (cfg.cache and min(cfg.cache_lrs) > 0):
        raise UserError("--cache-lrs: expected numbers above 0, and --cache with them")


# ---------------------------------------------------------------- the run


def main(cfg):
    """Probe as cfg says; returns the metrics, acc1 and acc5 among them, or those of every layer."""
    with start_world(cfg.device, cfg.deterministic, cfg.timeout) as world, StopSignals() as signals:
        check(cfg, world.size)
        return probe(cfg, world, signals)


def probe(cfg, world, signals):
    say, device, dtype = world.say, world.device, pick_dtype(cfg.dtype, world.device)
    pretrained = read_pretrained(cfg.checkpoint)
    cfg = replace(cfg, **settings_of(pretrained, cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans,
                                     cfg.mean, cfg.std))
    check_channels(cfg.in_chans, cfg.mean, cfg.std)
    encoder = build_encoder(pretrained, cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans).to(device)
    layers = parse_layers(cfg.layers, len(encoder.blocks))
    ops = pick_ops(cfg.ops, device)
    state = resumed_state(cfg, world)
    start = state["step"] if state else 0

    # ------------------------------------------------------------ data
    train_set = world.local_main_first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say))
    val_set = world.local_main_first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say))
    check_labels(cfg.data, train_set, val_set)
    seen = fingerprint(train_set)
    check_same_data(cfg, state, seen)
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size, cfg.epochs,
                             cfg.steps, cfg.warmup_epochs, cfg.blr, cfg.lr, published=(90, 10))
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, start, schedule.stop,
                    world.rank, world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)
    forward = encoder.forward_features
    if cfg.compile:
        forward = torch.compile(forward, dynamic=False)
    folder = open_folder(cfg, world, state)
    bad_samples = BadSamples(folder, world, len(train_set) + len(val_set), cfg.max_bad)

    def load(source, crop, batches):
        """A loader of views of a source, in batches of (epoch, index)."""
        views = Views(source, crop, cfg.img_size, cfg.in_chans, 0, cfg.seed)
        return make_loader(views, batches, cfg.workers, device.type == "cuda", cfg.timeout)

    def prepare(batch):
        """Normalised images on the device."""
        return ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)

    @torch.no_grad()
    def extract(images):
        """The encoder's features of unmasked images, (B, D)."""
        with autocast(device, dtype):
            return pool_tokens(forward(images), cfg.pool).float()

    def collect(source, crop, keys, measure, text):
        """({name: features (n, D)} by measure(images), labels (n,), -1 if unreadable), on the CPU."""
        found, labels, progress = [], [], Progress(len(keys), 0, world, text=f"features of {text}")
        batches = [keys[first:first + cfg.batch_size] for first in range(0, len(keys), cfg.batch_size)]
        for i, batch in enumerate(load(source, crop, batches)):
            bad_samples.add(batch["bad"])
            with torch.no_grad(), autocast(device, dtype):
                found.append({name: features.cpu() for name, features in measure(prepare(batch)).items()})
            for features in found[-1].values():
                check_measured(features, "the features")
            labels.append(batch["label"].masked_fill(batch["replaced"], -1))
            progress.tick(min((i + 1) * cfg.batch_size, len(keys)))
        bad_samples.report(say)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}, torch.cat(labels)

    def collect_pooled(source, crop, keys, text):
        """(features (n, D) as the probe gets them, labels (n,), -1 if unreadable), on the CPU."""
        found, labels = collect(source, crop, keys, lambda images: {"pooled": extract(images)}, text)
        return found["pooled"], labels

    def record(metrics):
        """Write metrics.json: what was measured, with the flags and on what machine."""
        if world.is_main:
            about = dict(config=asdict(cfg), environment=describe_environment(world))
            write_json(folder / "metrics.json", metrics | about)

    say(f"{pretrained.path}: {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters, frozen; "
        f"feature: {'class token' if cfg.pool == 'token' else 'mean of the patch tokens'}; {len(train_set)} "
        f"images of {cfg.data}, {len(train_set.classes)} classes")
    if cfg.layers or cfg.knn or cfg.cache:
        if cfg.layers:
            fusion = build_fusion(pretrained, encoder)
            encoders = {"trained": (encoder, fusion)}
            if cfg.layer_baselines:
                encoders["random"] = build_untrained(encoder, fusion, cfg.seed)
            metrics = probe_layers(cfg, encoders, layers, train_set, val_set, ops, collect, device, say)
        elif cfg.knn:
            metrics = classify_by_neighbours(cfg, train_set, val_set, collect_pooled, device, say)
        else:
            metrics = probe_cached(cfg, schedule, stream, train_set, val_set, collect_pooled, device, say)
        record(metrics)
        return metrics

    # ------------------------------------------------------------ optimizer
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    head = LinearProbe(encoder.embed_dim, len(train_set.classes)).to(device)
    optimizer = LARS(param_groups(head, cfg.weight_decay))
    if state:
        load_state(head, state["model"], f"the checkpoint in {cfg.output_dir}")
        load_optimizer(optimizer, state["optimizer"])
    # Ranks keep their own running statistics, and evaluation uses those of rank 0.
    trained = DistributedDataParallel(head, broadcast_buffers=False) if world.size > 1 else head
    warn_of_space(folder, world, head, copies=2)                        # its weights and LARS's momentum
    log = Log(folder, world, start)
    resume_hint = "a lower --blr may help"
    finite = FiniteSteps(optimizer, world, folder, stream, train_set, resume_hint)

    def save(step, loss):
        """Write last.pt: all that the run needs to go on from this step."""
        finite.check()
        save_run(folder, world, head, step, resume_hint, loss=loss, config=asdict(cfg), data=seen,
                 optimizer=optimizer.state_dict())

    def evaluate():
        """Accuracy on all validation images, each counted by one rank; an unreadable one counts as wrong."""
        world.share(head.buffers())
        head.eval()
        batches = load(val_set, "evaluation", each_once(len(val_set), cfg.batch_size, world))
        counts = count_all(lambda batch: head(extract(prepare(batch))), batches, bad_samples)
        head.train()
        bad_samples.report(say)
        return accuracy(*world.total(counts))

    def note_accuracy(done):
        """Log the accuracy after this many steps."""
        with meter.paused():
            metrics = evaluate()
        log.write(step=done, epoch=schedule.epoch(done), **metrics)
        meter.say(f"epoch {schedule.epoch(done):.1f}: {shown(metrics)}")

    # ------------------------------------------------------------ loop
    say(schedule.plan(start))
    batches = iter(load(train_set, "single_draw", stream))
    loss_value = state["loss"] if state else math.nan
    flops = classifier_flops(encoder, head.head, True)
    meter = Meter(schedule, start, world, peak_img_per_s(flops, dtype, world),
                  advice_if_late(train_set, cfg.workers))
    if 0 < start < schedule.stop and schedule.passes(start, cfg.eval_every) and not log.evaluated:
        note_accuracy(start)                                            # the run was stopped before it could
    signals.start()
    for step in range(start, schedule.stop):
        world.step = step + 1
        lr = cosine_lr(schedule.epoch(step), schedule.lr, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for micro in range(schedule.accumulation):
            batch = meter.next(batches)
            bad_samples.add(batch["bad"])
            features, labels = extract(prepare(batch)), batch["label"].to(device, non_blocking=True)
            more = micro + 1 < schedule.accumulation
            with exchange(trained, more):
                micro_loss = F.cross_entropy(trained(features), labels) / schedule.accumulation
                micro_loss.backward()                                   # ranks add up gradients once a step
            loss += micro_loss.detach()

        done = step + 1
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in head.parameters()])
        finite.step(done, lr, loss, grad_norm)                          # the optimizer's, where all is finite
        optimizer.zero_grad()

        ends, logs = done == schedule.stop, done % cfg.log_every == 0 or done == 1
        passed = schedule.passes(done, cfg.eval_every)
        stop_signal = world.highest(signals.number)
        saves = done % cfg.save_every == 0 or ends or passed or stop_signal
        if logs or saves:
            finite.check()                                              # waits for the GPU: not every step
            loss_value = world.mean([loss.item()])[0]
            bad_samples.report(meter.say)
        if logs:
            log.write(step=done, epoch=schedule.epoch(done), loss=loss_value, lr=lr,
                      **meter.read(done, loss_value, lr))
        if saves:
            save(done, loss_value)
        if stop_signal and not ends:
            raise Stopped(stop_signal, done, schedule.stop, folder)
        if passed and not ends:
            note_accuracy(done)
    signals.release()

    # ------------------------------------------------------------ evaluation
    metrics = dict(step=schedule.stop, loss=loss_value, **evaluate())
    log.write(done=True, **metrics)
    meter.say(f"done: {shown(metrics)}")
    record(metrics)
    return metrics


# ---------------------------------------------------------------- other ways to probe


def probe_cached(cfg, schedule, stream, train_set, val_set, collect_pooled, device, say):
    """Metrics of the best of several learning rates, trained together on the features of a few fixed views.

    Epoch e sees view e mod VIEWS of every image, in the protocol's order. With as many views as epochs this
    is the protocol itself; with fewer it is an approximation, since crops come again. An image that cannot be
    read is left out.
    """
    keys = [[(view, i) for i in range(len(train_set))] for view in range(cfg.cache)]
    views = [collect_pooled(train_set, "single_draw", keys[view], f"view {view + 1} of {cfg.cache}")
             for view in range(cfg.cache)]
    features = torch.stack([features for features, _ in views])         # (VIEWS, n, D)
    labels = torch.stack([labels for _, labels in views])               # (VIEWS, n)
    val, val_labels = collect_pooled(val_set, "evaluation", [(0, i) for i in range(len(val_set))], "val")
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


def classify_by_neighbours(cfg, train_set, val_set, collect_pooled, device, say):
    """Metrics of a weighted nearest-neighbour classifier on features of the evaluation crop."""
    (train, labels), (val, val_labels) = (
        collect_pooled(source, "evaluation", [(0, i) for i in range(len(source))], text)
        for source, text in ((train_set, "train"), (val_set, "val")))
    train, labels = train[labels >= 0].to(device), labels[labels >= 0].to(device)
    votes = knn_scores(train, labels, len(train_set.classes), val.to(device), cfg.knn, cfg.knn_temperature)
    metrics = accuracy(*count_hits(votes, val_labels.to(device)))
    say(f"{cfg.knn} neighbours of {len(train)}, temperature {cfg.knn_temperature:g}: {shown(metrics)}")
    return dict(k=cfg.knn, temperature=cfg.knn_temperature, **metrics)


def probe_layers(cfg, encoders, layers, train_set, val_set, ops, collect, device, say):
    """How well each layer tells each label: {"rows": [...], ...}, and a table of it for the terminal.

    The features are unmasked, of the evaluation crop, pooled as --pool says, and the blocks' before the final
    norm; the probe is logistic regression. Its baselines, unless --no-layer-baselines: the same layers with
    random weights, and pixels.
    """
    def measure(images):
        found = {("pixels", "pixels"): pixel_features(images)} if cfg.layer_baselines else {}
        for kind, (encoder, fusion) in encoders.items():
            for layer, x in features_of_layers(encoder, fusion, layers, images, cfg.pool, ops).items():
                found[kind, layer] = x
        return found

    subsets = []
    for source, text in ((train_set, "train"), (val_set, "val")):
        # Chosen at random, because class folders come one after the other.
        chosen = permutation(len(source), cfg.seed, ORDER, 0)[:cfg.layer_images]
        features, main = collect(source, "evaluation", [(0, int(i)) for i in chosen], measure, text)
        kept = main >= 0 if source is train_set else main >= -1         # an unreadable one is a wrong answer
        labels = {name: torch.as_tensor(values[chosen]).long().where(main >= 0, -1)[kept]
                  for name, values in source.labels.items()}
        subsets.append(({key: x[kept].to(device) for key, x in features.items()}, labels))
    (train, train_labels), (val, val_labels) = subsets

    rows, started = [], time.monotonic()
    for name, labels in train_labels.items():
        num_classes = int(labels.max()) + 1
        for kind, layer in train:
            scores = logistic_scores(train[kind, layer], labels.to(device), num_classes, val[kind, layer])
            counts = count_hits(scores, val_labels[name].to(device))
            rows.append(dict(label=name, kind=kind, layer=layer, **accuracy(*counts)))
        rows.append(dict(label=name, kind="chance", layer="chance", acc1=100 / num_classes, acc1_error=0.0))
    say(f"{len(rows)} logistic regressions in {time.monotonic() - started:.0f} s on {len(main)} validation "
        f"images\n{table_of_layers(rows)}")
    margins = {name: margin(rows, name) for name in train_labels if cfg.layer_baselines}
    for name, found in margins.items():
        say(margin_line(name, found))
    return dict(pool=cfg.pool, train_images=len(labels), rows=rows, margins=margins)


if __name__ == "__main__":
    run(main, parse(Config))
