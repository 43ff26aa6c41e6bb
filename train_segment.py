"""Fine-tune a pre-trained encoder for semantic segmentation with UPerNet (MFF, arXiv 2308.00261, A.4).

    python train_segment.py --checkpoint runs/demo --small              on the embedded images and their masks
    torchrun --nproc-per-node=8 train_segment.py --checkpoint runs/mff --data ade20k:DIR --workers 4

The defaults are the recipe that the paper follows, MAE's (arXiv 2111.06377, A.4) with BEiT's decoder: 160,000
steps of 16 crops of 512 pixels, relative position biases that begin at zero, and evaluation by windows. The
paper's "16k iterations" cannot reach its numbers (docs/segment.md). Own images with index masks: --data
masks:DIR.

Published mIoU of vit_b on ADE20K: MFF_MAE 47.9, detached 48.0. A finished run: tools.evaluate measures it,
tools.segment applies it to images.

Shapes: B images of a micro-batch, C H W, G classes.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mff_data.decode import reading_of
from mff_data.sources import describe_files, fingerprint
from mff_data.views import advice_if_late, make_loader
from mff_min.config import check_batches, check_ranges, knob, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_min.optim import clip_grad_norm, make_schedule, param_groups, set_lr
from mff_min.stream import Stream
from mff_run import process, small
from mff_run.files import write_atomically, write_tensors
from mff_run.run import Run, RunFlags
from mff_run.sharded import check_sharding, shard, whole
from mff_run.world import autocast, pick_dtype, pick_ops
from mff_tasks.ade20k import open_masks
from mff_tasks.attention import add_relative_positions
from mff_tasks.mask_views import MaskViews
from mff_tasks.segmentation import evaluate, picture, shown
from mff_tasks.upernet import Segmenter, poly_lr, segmentation_loss, segmenter_flops
from mff_weights.pretrained import (CheckpointFlags, build_fusion, build_like, load_for_tuning,
                                    open_pretrained)

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config(CheckpointFlags, RunFlags):
    # these change the result; so do the flags of CheckpointFlags
    random_init: bool = opt(False, "start from random weights of the checkpoint's sizes: the baseline")
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), ade20k:DIR, or masks:DIR with "
                              "{images,annotations}/{training,validation}/*")
    num_classes: int | None = opt(None, "of masks:DIR; not given: by --names, or the largest label", above=0)
    names: str = opt("", "a file with the names of the classes of masks:DIR, one per line")
    reduce_zero_label: bool = opt(False, "in masks:DIR 0 is no class but unlabelled, as it is in ADE20K")
    img_size: tuple[int, int] | None = opt(None, "crop, SIDE or HEIGHTxWIDTH; not given: 512, of shapes 64",
                                           type=side_or_sides)
    width: int = opt(768, "channels of UPerNet", above=0)
    rel_pos: bool = opt(True, "learned relative position biases in the encoder's attention, zero at first")
    fused: bool = opt(False, "the last level is MFF's fused feature, not the last block's output")
    aux_weight: float = opt(0.4, "weight of the auxiliary head's loss", least=0)
    steps: int = opt(160_000, "steps of the schedule", above=0)
    batch_size: int = opt(2, "crops of one micro-batch in one process, which BatchNorm sees", above=0)
    global_batch: int = opt(16, "crops of a step, over all processes and micro-batches", above=0)
    lr: float = opt(1e-4, "learning rate", above=0)
    warmup_steps: int | None = opt(None, "of linear warm-up; not given: min(1500, steps / 20)", least=0)
    layer_decay: float = opt(0.65, "factor of the learning rate from one block to the one below", above=0)
    weight_decay: float = opt(0.05, "AdamW's weight decay", least=0)
    clip_grad: float = opt(0.0, "largest norm of the gradient; 0 does not clip, as published", least=0)
    drop_path: float = opt(0.1, "probability that the last block drops a branch; block 0 drops none", least=0)
    seed: int = opt(0, "of the heads' weights, the order, the crops and drop path", least=0)
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these do not change the result; nor do the flags of RunFlags
    output_dir: str = knob("runs/segment", "the run's folder")
    fsdp: bool = knob(False, "parameters and optimizer state spread over the processes (fully_shard)")
    grad_checkpointing: bool = knob(False, "recompute activations to save memory, for vit_l and vit_h")
    eval_every: int = knob(16_000, "steps between evaluations; there is always one at the end", above=0)
    picture_every: int = knob(0, "steps between pictures; 0: ten over the run", least=0)
    picture_images: int = knob(4, "images in a picture", above=0)
    small_settings = small.SEGMENT                                      # what --small gives


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    if cfg.drop_path > 0.99:
        raise UserError(f"--drop-path {cfg.drop_path:g}: expected 0.99 or less")
    if (cfg.warmup_steps or 0) >= cfg.steps:
        raise UserError(f"--warmup-steps {cfg.warmup_steps}: expected fewer than --steps {cfg.steps}")
    if cfg.batch_size == 1 and (world_size == 1 or cfg.device == "cpu"):
        raise UserError("--batch-size 1: BatchNorm needs two crops or more of a process, or several GPUs")
    check_batches(cfg.global_batch, cfg.batch_size, world_size)
    check_sharding(cfg.fsdp, world_size)


# ---------------------------------------------------------------- model


def build_model(cfg, pretrained, num_classes, ops, say):
    """UPerNet on the checkpoint's encoder; say(text) is told what was loaded. Raises UserError."""
    encoder = build_like(pretrained, cfg.img_size, drop_path=cfg.drop_path,
                         grad_checkpointing=cfg.grad_checkpointing)
    fusion = cfg.fused and build_fusion(pretrained, encoder)
    if cfg.fused and not fusion:
        raise UserError(f"--fused: checkpoint {pretrained.path} holds no fusion; expected one that was "
                        f"pre-trained with more than one of --out-indices")
    if not cfg.random_init:
        load_for_tuning(encoder, pretrained, say)
    if cfg.rel_pos:
        add_relative_positions(encoder)
    try:
        return Segmenter(encoder, num_classes, cfg.width, fusion and fusion.requires_grad_(), ops)
    except ValueError as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------- the run


def main(cfg):
    """Fine-tune as cfg says; returns the metrics, mIoU among them."""
    with Run(cfg) as run:
        check(cfg, run.world.size)
        return segment(cfg, run)


def segment(cfg, run):
    began, say, world = time.monotonic(), run.say, run.world
    device, dtype = run.device, pick_dtype(cfg.dtype, run.device)
    if not cfg.img_size:
        cfg = replace(cfg, img_size=(64, 64) if cfg.data.startswith("shapes") else (512, 512))
    pretrained, cfg = open_pretrained(cfg, say)
    run.resume(cfg)

    # ------------------------------------------------------------ data
    reading, first = reading_of(cfg), world.local_main_first
    labels = cfg.names, cfg.reduce_zero_label, reading, cfg.max_bad
    train_set = first(lambda: open_masks(cfg.data, "train", cfg.cache_dir, say, cfg.num_classes, *labels))
    classes = train_set.classes                                         # may be counted from the labels
    val_set = first(lambda: open_masks(cfg.data, "val", cfg.cache_dir, say, len(classes), *labels))
    describe_files(say, train_set, val_set, output=cfg.output_dir)
    run.check_data(fingerprint(train_set))
    warmup = min(1500, cfg.steps // 20) if cfg.warmup_steps is None else cfg.warmup_steps
    epochs = cfg.global_batch / len(train_set)                          # of a step
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size, None,
                             cfg.steps, warmup * epochs, None, cfg.lr, published=None)
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, run.start, schedule.stop,
                    world.rank, world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)

    # ------------------------------------------------------------ model
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    ops = pick_ops(cfg.ops, device)
    model = build_model(cfg, pretrained, len(classes), ops, say).to(device)
    if world.size > 1 and device.type == "cuda":                        # of a few crops each
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    views = MaskViews(train_set, cfg.img_size, cfg.in_chans, model.num_noise, cfg.seed, cfg.mean)

    def to_device(batch):
        """Normalised crops (B, C, H, W), and the noise for drop path and dropout."""
        noise = batch["noise"].to(device, non_blocking=True)
        return ops.prepare(batch["image"].to(device, non_blocking=True), mean, std), noise

    # ------------------------------------------------------------ optimizer
    run.restore_model(model)
    depth = len(model.encoder.blocks)
    if cfg.fsdp:                                                        # takes the parameters' place
        trained = shard(model, world, schedule.accumulation > 1, cfg.compile)
    else:
        options = dict(gradient_as_bucket_view=True, broadcast_buffers=False)   # BatchNorm's are synchronised
        trained = DistributedDataParallel(model, **options) if world.size > 1 else model
        if cfg.compile:
            trained = torch.compile(trained, dynamic=False)
    groups = param_groups(model, cfg.weight_decay, cfg.layer_decay, depth)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.restore_optimizer(optimizer, scaler)
    run.open(len(train_set) + len(val_set))
    run.begin(schedule, stream, train_set, model, optimizer, scaler, dtype=dtype,
              flops=segmenter_flops(model), advice=advice_if_late(train_set, cfg.workers))

    def measured():
        """The model that evaluations use: this one, or where it is sharded a whole copy on every rank."""
        def build():
            return build_model(cfg, pretrained, len(classes), ops, lambda text: None).to(device)
        found = whole(model, build, world, everywhere=True)
        world.broadcast(found.buffers())                                # BatchNorm's: a CPU rank's own
        return found.eval()

    def measure():
        """mIoU and so on, on all validation images at their own sizes."""
        found = evaluate(measured(), val_set, cfg, world, ops, dtype, run.bad_samples)
        model.train()
        return found

    def draw(step):
        """Write a picture of what the model predicts for a few held-out images."""
        with run.paused():
            drawn = measured()
            if world.is_main:
                with contextlib.suppress(process.Interrupted), run.signals.interrupting():  # a disk may hang
                    title = f"{pretrained.config['model']} with UPerNet at step {step}"
                    sheet = picture(drawn, val_set, cfg.picture_images, cfg, device, ops, dtype, title)
                    for name in (f"segmentation-{step:06d}.png", "segmentation.png") if sheet else ():
                        write_atomically(run.folder / name, lambda file: sheet.save(file, "PNG"))
            model.train()
            world.barrier()                                             # a picture may outlast --timeout

    # ------------------------------------------------------------ loop
    say(f"{pretrained.config['model']} with UPerNet: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} "
        f"M parameters from {'random weights' if cfg.random_init else pretrained.path}; {len(train_set)} "
        f"images of {cfg.data}, {len(classes)} classes\n{schedule.plan(run.start)}")
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda", cfg.timeout))
    if run.start == 0:
        draw(0)
    picture_every = cfg.picture_every or math.ceil(schedule.stop / 10)
    if run.evaluation_missed(run.start % cfg.eval_every == 0):
        run.note_accuracy(run.start, measure, shown)
    for step in run.steps():
        lr = poly_lr(step, schedule.lr, schedule.stop, warmup)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for batch in run.micro_batches(batches):
            labels = batch["label"].to(device, non_blocking=True)       # (B, H, W), 255: none
            with run.accumulate(trained):                               # ranks add up gradients once per step
                with autocast(device, dtype):
                    logits, aux = trained(*to_device(batch))
                micro_loss = segmentation_loss(logits, aux, labels, cfg.aux_weight) / schedule.accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model, cfg.clip_grad)
        run.guard(loss, lr, grad_norm)                                  # NaN, Inf: no step changes a weight
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

        evaluates = run.is_due(cfg.eval_every)
        run.end_step(loss, lr, grad_norm, save=evaluates)
        if run.is_due(picture_every):
            draw(step + 1)
        if evaluates and step + 1 < schedule.stop:
            run.note_accuracy(step + 1, measure, shown)

    # ------------------------------------------------------------ evaluation
    final = measured()
    found = evaluate(final, val_set, cfg, world, ops, dtype, run.bad_samples)
    metrics = dict(step=schedule.stop, loss=run.loss, **found, seconds=time.monotonic() - began)
    if world.is_main:
        weights = {name: value.cpu() for name, value in final.state_dict().items()}
        config = asdict(cfg) | {name: pretrained.config[name] for name in ("model", "out_indices")
                                if name in pretrained.config}
        write_tensors(run.folder / "segmenter.pt",
                      {"model": weights, "config": config, "classes": classes})
    run.finish(metrics, shown(metrics))
    return metrics


if __name__ == "__main__":
    process.run(main, parse(Config))
