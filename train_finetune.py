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
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mff_min.augment import draw_mix, erase, mix_arguments, mix_images, soft_targets
from mff_min.config import check_batches, check_ranges, knob, numbers, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_data.views import Views, advice_if_late, make_loader
from mff_min.stream import Stream, each_once
from mff_run.finite import FiniteSteps
from mff_run.flops import classifier_flops, peak_img_per_s
from mff_min.optim import cosine_lr, load_optimizer, make_schedule, param_groups, set_lr
from mff_weights.pretrained import build_like, load_for_tuning, read_pretrained, settings_of
from mff_min.probe import accuracy, count_all, shown
from mff_min.augment import fill_color, rand_augment
from mff_min.rng import MIX, Rng
from mff_run.progress import Meter
from mff_run.log import BadSamples, Log
from mff_run.process import StopSignals, Stopped, run
from mff_run.resume import check_same_data, load_state, open_folder, resumed_state, save_run, warn_of_space
from mff_run.world import autocast, describe_environment, pick_dtype, pick_ops, start_world
from mff_run.files import write_json, write_tensors
from mff_run.sharded import exchange
from mff_data.sources import check_classes, check_labels, fingerprint, open_data, subset

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    # these change the result
    checkpoint: str = opt("", "what to start from: a run folder, or a file of any family of tools.convert")
    random_init: bool = opt(False, "start from random weights of the checkpoint's sizes: the baseline")
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), cifar10:DIR, cifar100:DIR, cars:DIR, or a "
                              "folder or pack of images: train/<class>/*, val/<class>/*")
    subset: str = opt("", "a file that names the training images to use, one a line (low-shot)")
    img_size: tuple[int, int] | None = opt(None, "crop, SIDE or HEIGHTxWIDTH; not given: the checkpoint's",
                                           type=side_or_sides)
    mean: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)
    std: tuple[float, ...] | None = opt(None, "of each channel; not given: the checkpoint's", type=numbers)
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

    # these change only how it is reached
    output_dir: str = knob("runs/finetune", "the run's folder")
    resume: str = knob("", "auto: go on where output_dir stopped, if it did; or a checkpoint file")
    allow_change: str = knob("", "comma-separated settings that may differ from the resumed run's")
    workers: int = knob(0, "loader processes for each training process", least=0)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before the run stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    deterministic: bool = knob(False, "the same bits in every run on a GPU too, for some speed")
    compile: bool = knob(False, "torch.compile the model")
    grad_checkpointing: bool = knob(False, "recompute activations to save memory, for vit_l and vit_h")
    timeout: float = knob(600.0, "seconds that a step waits for another rank or a loader process", above=0)
    log_every: int = knob(20, "steps between lines of the log", above=0)
    save_every: int = knob(500, "steps between checkpoints", above=0)
    eval_every: float = knob(10.0, "epochs between evaluations; there is always one at the end", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    if not cfg.checkpoint:
        raise UserError("--checkpoint is not given: expected a run folder, an encoder.pt or a state dict")
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
    with start_world(cfg.device, cfg.deterministic, cfg.timeout) as world, StopSignals() as signals:
        check(cfg, world.size)
        return finetune(cfg, world, signals)


def finetune(cfg, world, signals):
    say, device, dtype = world.say, world.device, pick_dtype(cfg.dtype, world.device)
    pretrained = read_pretrained(cfg.checkpoint)
    cfg = replace(cfg, **settings_of(pretrained, cfg.img_size, cfg.mean, cfg.std))
    state = resumed_state(cfg, world)
    start = state["step"] if state else 0

    # ------------------------------------------------------------ data
    train_set = world.local_main_first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say))
    val_set = world.local_main_first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say))
    check_labels(cfg.data, train_set, val_set)
    classes = train_set.classes
    if state:
        check_classes(classes, state["classes"], want=f"the run in {cfg.output_dir}")
    if cfg.subset:
        train_set = subset(train_set, cfg.subset)
    seen = fingerprint(train_set)
    check_same_data(cfg, state, seen)
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size, cfg.epochs,
                             cfg.steps, cfg.warmup_epochs, cfg.blr, cfg.lr, published=(100, 5))
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, start, schedule.stop,
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
        load_for_tuning(model, pretrained)
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
    if state:
        load_state(model, state["model"], f"the checkpoint in {cfg.output_dir}")
        load_optimizer(optimizer, state["optimizer"])
        if state["scaler"]:                                             # empty unless it was float16
            scaler.load_state_dict(state["scaler"])
        if average and "average" in state:
            average.load_state_dict(state["average"])
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    if cfg.compile:
        trained = torch.compile(trained, dynamic=False)
    folder = open_folder(cfg, world, state)
    warn_of_space(folder, world, model, copies=4 if cfg.ema else 3)     # its weights, their average, moments
    log = Log(folder, world, start)
    bad_samples = BadSamples(folder, world, len(train_set) + len(val_set), cfg.max_bad)
    resume_hint = ("--resume auto goes on from the last checkpoint; --allow-change clip_grad,lr,dtype with "
                   "--clip-grad, a lower --lr or --dtype float32 may help")
    finite = FiniteSteps(optimizer, world, folder, stream, train_set, resume_hint, scaler.is_enabled(),
                         state and state.get("skips"))

    def save(step, loss):
        """Write last.pt: all that the run needs to go on from this step."""
        finite.check()
        more = {"average": average.state_dict()} if average else {}
        save_run(folder, world, model, step, resume_hint, loss=loss, config=asdict(cfg), data=seen,
                 classes=classes, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 skips=finite.skips, **more)

    def evaluate():
        """Accuracy on all validation images, and of the averaged weights as ema_acc1 and so on."""
        found = accuracy(*count_on(val_set, "evaluation", model, cfg, world, ops, dtype, bad_samples))
        if average:
            counts = count_on(val_set, "evaluation", average.module, cfg, world, ops, dtype, bad_samples)
            found |= {f"ema_{name}": value for name, value in accuracy(*counts).items()}
        return found

    def note_accuracy(done):
        """Log the accuracy after this many steps."""
        with meter.paused():
            metrics = evaluate()
        log.write(step=done, epoch=schedule.epoch(done), **metrics)
        meter.say(f"epoch {schedule.epoch(done):.1f}: {shown(metrics)}")

    # ------------------------------------------------------------ loop
    say(f"{pretrained.config['model']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters "
        f"from {'random weights' if cfg.random_init else pretrained.path}; {len(train_set)} images of "
        f"{cfg.data}, {len(classes)} classes\n{schedule.plan(start)}")
    loss_value, state = state["loss"] if state else math.nan, None      # frees gigabytes
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda", cfg.timeout))
    flops = classifier_flops(model, model.head, False)
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
            place = world.rank * schedule.accumulation + micro          # the same on any number of ranks
            mix = draw_mix(Rng(cfg.seed, MIX, step, place), *cfg.img_size, cfg.mixup, cfg.cutmix)
            labels = batch["label"].to(device, non_blocking=True)
            targets = soft_targets(labels, len(classes), cfg.smoothing, mix.lam)
            more = micro + 1 < schedule.accumulation
            with exchange(trained, more):
                with autocast(device, dtype):
                    logits = trained(*to_device(batch, mix))
                micro_loss = F.cross_entropy(logits.float(), targets) / schedule.accumulation
                scaler.scale(micro_loss).backward()                     # ranks add up gradients once a step
            loss += micro_loss.detach()

            stop_signal = world.highest(signals.number)
            if stop_signal and more:                                    # a step may take minutes: dropped
                save(step, loss_value)
                raise Stopped(stop_signal, step, schedule.stop, folder)

        done = step + 1
        ends, logs = done == schedule.stop, done % cfg.log_every == 0 or done == 1
        passed = schedule.passes(done, cfg.eval_every)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        if cfg.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip_grad, grad_norm)
        finite.step(done, lr, loss, grad_norm)                          # the optimizer's, where all is finite
        scaler.update()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)

        saves = done % cfg.save_every == 0 or ends or passed or stop_signal
        if logs or saves:
            finite.check()                                              # waits for the GPU: not every step
            loss_value = world.mean([loss.item()])[0]
            bad_samples.report(meter.say)
        if logs:
            log.write(step=done, epoch=schedule.epoch(done), loss=loss_value, lr=lr,
                      grad_norm=grad_norm.item(), **finite.counted(), **meter.read(done, loss_value, lr))
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
    if world.is_main:
        export(folder / "classifier.pt", model, cfg, classes)
        if average:
            export(folder / "classifier_ema.pt", average.module, cfg, classes)
        about = dict(config=asdict(cfg), environment=describe_environment(world))
        write_json(folder / "metrics.json", metrics | about)
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
    return world.total(counts)


if __name__ == "__main__":
    run(main, parse(Config))
