"""Fine-tune a pre-trained encoder end to end (MFF, arXiv 2308.00261, table 3, which follows MAE, A.1).

    torchrun train_finetune.py --checkpoint runs/pretrain               on the embedded images
    torchrun --nproc-per-node=8 train_finetune.py --checkpoint runs/mff --data IMAGENET --batch-size 128 \\
        --workers 12

The defaults are the recipe of the paper's appendix. The same script does what follows from it:

    transfer (table 5)          --data cifar100:DIR, cars:DIR; recipes/ has the published settings
    low-shot                    --subset 1percent.txt

Accuracy and robustness of a finished classifier: python -m tools.evaluate.

Published for vit_b after 800 epochs of ImageNet: MAE 83.3, PixMIM 83.5, MFF_MAE 83.6. Mixup mixes the images
of one micro-batch, as published, so the result depends on --batch-size, but not on the number of processes.

Shapes: B images of a micro-batch.
"""

import functools
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mff_data.decode import reading_of
from mff_data.sources import describe_files, fingerprint, match_labels, open_data, relabel, subset
from mff_data.views import Views, advice_if_late, make_loader
from mff_min.augment import (MODES, draw_mix, erase, fill_color, mix_arguments, mix_images, rand_augment,
                             soft_targets)
from mff_min.config import check_batches, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_min.optim import clip_grad_norm, cosine_lr, make_schedule, param_groups, set_lr
from mff_min.probe import accuracy, count_all, shown
from mff_min.rng import MIX, Rng
from mff_min.stream import Stream, each_once
from mff_run import process, small
from mff_run.files import write_tensors
from mff_run.flops import classifier_flops
from mff_run.run import Run, RunFlags
from mff_run.world import autocast, pick_dtype, pick_ops
from mff_weights.pretrained import CheckpointFlags, build_like, load_for_tuning, open_pretrained

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config(CheckpointFlags, RunFlags):
    # these change the result
    random_init: bool = opt(False, "start from random weights of the checkpoint's sizes: the baseline")
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), cifar10:DIR, cifar100:DIR, list:DIR, "
                              "cars:DIR, or a folder or pack of images: train/<class>/*, val/<class>/*")
    subset: str = opt("", "a file that names the training images to use, one per line (low-shot)")
    global_pool: str = opt("avg", "avg: mean of the patch tokens, fc_norm; token: class token, final norm",
                           choices=["avg", "token"])
    epochs: float | None = opt(None, "epochs of the schedule; not given: 100, or what --steps makes", above=0)
    steps: int | None = opt(None, "end after this many; without --epochs the schedule does too", above=0)
    batch_size: int = opt(128, "images of one micro-batch in one process, mixed with one another", above=0)
    global_batch: int = opt(1024, "images of a step, over all processes and micro-batches", above=0)
    blr: float = opt(1e-3, "base learning rate; lr = blr * global_batch / 256", above=0)
    lr: float | None = opt(None, "learning rate, instead of blr", above=0)
    min_lr: float = opt(1e-6, "learning rate at the end", least=0)
    warmup_epochs: float | None = opt(None, "of linear warm-up; not given: min(5, epochs / 5)", least=0)
    layer_decay: float = opt(0.75, "factor of the learning rate from one block to the one below", above=0)
    weight_decay: float = opt(0.05, "AdamW's weight decay", least=0)
    clip_grad: float = opt(0.0, "largest norm of the gradient; 0 does not clip, as published", least=0)
    drop_path: float = opt(0.1, "probability that the last block drops a branch; block 0 drops none", least=0)
    crop: str = opt("inception", "inception (parts from 8 %), random_resized (from 20 %), simple, or center",
                    choices=["inception", "random_resized", "simple", "center"])
    rand_augment: float = opt(9.0, "RandAugment's magnitude, 0 to 10; 0: no RandAugment", least=0)
    repeats: int = opt(1, "views of an image in a batch; an epoch shows as many fewer images", above=0)
    reprob: float = opt(0.0, "probability that a box is erased (random erasing)", least=0)
    mixup: float = opt(0.8, "alpha of mixup; 0: none", least=0)
    cutmix: float = opt(1.0, "alpha of cutmix; 0: none", least=0)
    smoothing: float = opt(0.1, "label smoothing", least=0)
    ema: float = opt(0.0, "decay of an average of the weights, evaluated beside them; 0: none", least=0)
    seed: int = opt(0, "of the head's weights, the order, the views, mixing and drop path", least=0)
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these do not change the result; nor do the flags of RunFlags
    output_dir: str = knob("runs/finetune", "the run's folder")
    grad_checkpointing: bool = knob(False, "recompute activations to save memory, for vit_l and vit_h")
    eval_every: float = knob(10.0, "epochs between evaluations; there is always one at the end", above=0)
    small_settings = small.FINETUNE                                     # what --small gives


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    for name, most in (("drop_path", 0.99), ("smoothing", 0.99), ("reprob", 1.0), ("ema", 0.999999),
                       ("rand_augment", 10.0)):
        if getattr(cfg, name) > most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name):g}: expected {most:g} or less")
    check_batches(cfg.global_batch, cfg.batch_size, world_size)
    if cfg.batch_size % 2 and (cfg.mixup or cfg.cutmix):
        raise UserError(f"--batch-size {cfg.batch_size} is odd: mixup and cutmix mix pairs of a micro-batch, "
                        f"expected an even number, or --mixup 0 --cutmix 0")


# ---------------------------------------------------------------- the run


def main(cfg):
    """Fine-tune as cfg says; returns the metrics, acc1 and acc5 among them."""
    with Run(cfg) as run:
        check(cfg, run.world.size)
        return finetune(cfg, run)


def finetune(cfg, run):
    say, world, device, dtype = run.say, run.world, run.device, pick_dtype(cfg.dtype, run.device)
    pretrained, cfg = open_pretrained(cfg, say)
    if cfg.rand_augment and cfg.in_chans not in MODES:
        raise UserError(f"--rand-augment {cfg.rand_augment:g} changes the colours of 1, 3 or 4 channels, and "
                        f"the model has {cfg.in_chans}: expected --rand-augment 0")
    run.resume(cfg)

    # ------------------------------------------------------------ data
    reading, first = reading_of(cfg), world.local_main_first
    train_set = first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say, reading))
    val_set = first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say, reading))
    describe_files(say, train_set, val_set, output=cfg.output_dir)
    if run.state and "classes" in run.state:
        train_set = relabel(train_set, run.state["classes"], say, "train", f"the run in {cfg.output_dir}")
    train_set, val_set = match_labels(cfg.data, train_set, val_set, say)
    classes = train_set.classes
    if cfg.subset:
        train_set = subset(train_set, cfg.subset)
    run.check_data(fingerprint(train_set))
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size, cfg.epochs,
                             cfg.steps, cfg.warmup_epochs, cfg.blr, cfg.lr, published=(100, 5))
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, run.start, schedule.stop,
                    world.rank, world.size, cfg.repeats)
    augment = None
    if cfg.rand_augment:
        augment = functools.partial(rand_augment, magnitude=cfg.rand_augment, fill=fill_color(cfg.mean))
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)

    # ------------------------------------------------------------ model
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    model = build_like(pretrained, cfg.img_size, num_classes=len(classes), global_pool=cfg.global_pool,
                       drop_path=cfg.drop_path, grad_checkpointing=cfg.grad_checkpointing)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)            # MAE's: starts from equal logits
    if not cfg.random_init:
        load_for_tuning(model, pretrained, say)
    model.to(device)
    depth = len(model.blocks)
    ops = pick_ops(cfg.ops, device)
    views = Views(train_set, cfg.crop, cfg.img_size, model.in_chans, 2 * depth, cfg.seed, augment, cfg.reprob)

    def to_device(batch, mix):
        """Erased and mixed images (B, C, H, W), and the noise for drop path (B, depth, 2)."""
        pixels = batch["image"].to(device, non_blocking=True)
        noise = batch["noise"].to(device, non_blocking=True).unflatten(1, (depth, 2))   # (B, depth, 2)
        if not cfg.reprob:
            return ops.prepare(pixels, mean, std, **mix_arguments(mix, len(pixels), device)), noise
        images = erase(ops.prepare(pixels, mean, std), batch["erase"], batch["erase_key"])
        return mix_images(images, mix), noise

    # ------------------------------------------------------------ optimizer
    groups = param_groups(model, cfg.weight_decay, cfg.layer_decay, depth, ("pos_embed", "cls_token"))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
    run.restore_model(model)
    run.restore_optimizer(optimizer, scaler)
    kept = {"classes": lambda: classes}
    if average:
        kept["average"] = average.state_dict
        run.restore_model(average, "average")
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    if cfg.compile:
        trained = torch.compile(trained, dynamic=False)
    run.open(len(train_set) + len(val_set))
    run.begin(schedule, stream, train_set, model, optimizer, scaler, dtype=dtype,
              flops=classifier_flops(model, model.head, False), advice=advice_if_late(train_set, cfg.workers),
              copies=4 if cfg.ema else 3, **kept)

    def evaluate():
        """Accuracy on all validation images, and of the averaged weights as ema_acc1 and so on."""
        found = accuracy(*count_on(val_set, "evaluation", model, cfg, world, ops, dtype, run.bad_samples))
        if average:
            counts = count_on(val_set, "evaluation", average.module, cfg, world, ops, dtype, run.bad_samples)
            found |= {f"ema_{name}": value for name, value in accuracy(*counts).items()}
        return found

    # ------------------------------------------------------------ loop
    say(f"{pretrained.config['model']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters "
        f"from {'random weights' if cfg.random_init else pretrained.path}; {len(train_set)} images of "
        f"{cfg.data}, {len(classes)} classes\n{schedule.plan(run.start)}")
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda", cfg.timeout))
    if run.evaluation_missed(schedule.evaluation_due(run.start, cfg.eval_every)):
        run.note_accuracy(run.start, evaluate)
    for step in run.steps():
        lr = cosine_lr(schedule.epoch(step), schedule.lr, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for micro, batch in enumerate(run.micro_batches(batches)):
            place = world.rank * schedule.accumulation + micro          # the same on any number of ranks
            mix = draw_mix(Rng(cfg.seed, MIX, step, place), *cfg.img_size, cfg.mixup, cfg.cutmix)
            labels = batch["label"].to(device, non_blocking=True)
            targets = soft_targets(labels, len(classes), cfg.smoothing, mix.lam)
            with run.accumulate(trained):                               # ranks add up gradients once per step
                with autocast(device, dtype):
                    logits = trained(*to_device(batch, mix))
                micro_loss = F.cross_entropy(logits.float(), targets) / schedule.accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model, cfg.clip_grad)
        run.guard(loss, lr, grad_norm)                                  # NaN, Inf: no step changes a weight
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)

        evaluates = schedule.evaluation_due(step + 1, cfg.eval_every)
        run.end_step(loss, lr, grad_norm, save=evaluates)
        if evaluates and step + 1 < schedule.stop:
            run.note_accuracy(step + 1, evaluate)

    # ------------------------------------------------------------ evaluation
    metrics = dict(step=schedule.stop, loss=run.loss, **evaluate())
    if world.is_main:
        export(run.folder / "classifier.pt", model, cfg, classes)
        if average:
            export(run.folder / "classifier_ema.pt", average.module, cfg, classes)
    run.finish(metrics, shown(metrics))
    return metrics


def export(path, model, cfg, classes):
    """Write a classifier alone, with timm's names, and what it takes to build it again."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    content = {"model": weights, "config": asdict(cfg), "classes": classes}
    write_tensors(path, content)


# ---------------------------------------------------------------- measuring


def count_on(source, crop, model, cfg, world, ops, dtype, bad_samples, columns=slice(None)):
    """[images, top-1 hits, top-5 hits] on a source: each counts on one rank, an unreadable one is wrong.

    columns are the logits that the source's labels count.
    """
    device = world.device
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)

    def score(batch):
        images = ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)
        with autocast(device, dtype):
            return model(images)[:, columns].float()

    views = Views(source, crop, cfg.img_size, model.in_chans, 0, seed=0)      # it draws only replacements
    keys = each_once(len(source), cfg.batch_size, world)
    batches = make_loader(views, keys, cfg.workers, device.type == "cuda", cfg.timeout)
    counts = count_all(score, batches, bad_samples)
    bad_samples.report(world.say)
    return world.sum(counts)


if __name__ == "__main__":
    process.run(main, parse(Config))
