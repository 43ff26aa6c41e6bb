"""Fine-tune a pre-trained encoder for detection and instance segmentation (MFF, arXiv 2308.00261, A.3).

    python train_detect.py --checkpoint runs/demo --small               on the embedded scenes
    torchrun --nproc-per-node=8 train_detect.py --checkpoint runs/mff --data coco:DIR --workers 4

The defaults are Mask R-CNN on a plain ViT by ViTDet's published recipe (arXiv 2203.16527) for the paper's 25
epochs: attention in windows but for four blocks, a pyramid from the last map alone, large-scale jitter to
1,024 pixels, and batches of 64 by accumulation. ViTDet's own schedules are --schedule 50 and 100. Own images:
a folder of COCO's layout.

No published AP is reproduced: docs/detect.md says what was checked. A finished run: tools.evaluate measures
it, tools.detect applies it to images.

Shapes: B images of a micro-batch, C H W, N objects of an image, G classes.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn.parallel import DistributedDataParallel

from mff_data.decode import reading_of
from mff_data.sources import describe_files, fingerprint
from mff_data.views import advice_if_late, make_loader
from mff_min.config import check_batches, check_ranges, knob, numbers, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_min.optim import clip_grad_norm, make_schedule, param_groups, set_lr
from mff_min.stream import Stream
from mff_run import process, small
from mff_run.files import write_atomically, write_tensors
from mff_run.run import Run, RunFlags
from mff_run.sharded import check_sharding, shard, whole
from mff_run.world import autocast, pick_dtype, pick_ops
from mff_tasks.attention import add_windows
from mff_tasks.box_views import BoxViews, targets
from mff_tasks.coco import match_classes, open_boxes
from mff_tasks.detection import evaluate, picture, shown
from mff_tasks.rcnn import MaskRCNN, detector_flops, step_lr
from mff_weights.pretrained import (CheckpointFlags, build_fusion, build_like, load_for_tuning,
                                    open_pretrained)

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config(CheckpointFlags, RunFlags):
    # these change the result; so do the flags of CheckpointFlags
    random_init: bool = opt(False, "start from random weights of the checkpoint's sizes: the baseline")
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), or coco:DIR with "
                              "annotations/instances_{train,val}2017.json and {train,val}2017/*")
    num_classes: int | None = opt(None, "how many classes --data must have; not given: any number", above=0)
    img_size: tuple[int, int] | None = opt(None, "of the model's images, SIDE or HEIGHTxWIDTH; not given: "
                                                 "1024, of shapes 64", type=side_or_sides)
    scale: tuple[float, ...] = opt((0.1, 2.0), "smallest and largest size of a training image, MIN,MAX: 1 "
                                               "just fits --img-size", type=numbers)
    window: int = opt(14, "side of an attention window, in patches", above=0)
    width: int = opt(256, "channels of pyramid and heads", above=0)
    proposals: int = opt(1000, "boxes of an image that the first stage proposes", above=0)
    regions: int = opt(512, "boxes of an image that the second stage learns from, in a step", above=0)
    fused: bool = opt(False, "the pyramid is made of MFF's fused feature, not of the last block's output")
    schedule: float = opt(25.0, "epochs; the rate falls to a tenth at 8/9 and 26/27 of them", above=0)
    steps: int | None = opt(None, "steps of the schedule, in place of --schedule", above=0)
    batch_size: int = opt(1, "images of one micro-batch in one process", above=0)
    global_batch: int = opt(64, "images of a step, over all processes and micro-batches", above=0)
    lr: float = opt(1e-4, "learning rate", above=0)
    warmup_steps: int | None = opt(None, "of linear warm-up; not given: min(250, steps / 20)", least=0)
    layer_decay: float = opt(0.7, "factor of the learning rate from one block to the one below", above=0)
    weight_decay: float = opt(0.1, "AdamW's weight decay", least=0)
    clip_grad: float = opt(0.0, "largest norm of the gradient; 0 does not clip, as published", least=0)
    drop_path: float = opt(0.1, "probability that the last block drops a branch; block 0 drops none", least=0)
    seed: int = opt(0, "of the heads' weights, the order, the crops, samples of boxes and drop path", least=0)
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these do not change the result; nor do the flags of RunFlags
    output_dir: str = knob("runs/detect", "the run's folder")
    fsdp: bool = knob(False, "parameters and optimizer state spread over the processes (fully_shard)")
    grad_checkpointing: bool = knob(False, "recompute activations to save memory, for vit_l and vit_h")
    eval_every: int = knob(5_000, "steps between evaluations; there is always one at the end", above=0)
    picture_every: int = knob(0, "steps between pictures; 0: ten over the run", least=0)
    picture_images: int = knob(4, "images in a picture", above=0)
    small_settings = small.DETECT                                       # what --small gives


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    if cfg.drop_path > 0.99:
        raise UserError(f"--drop-path {cfg.drop_path:g}: expected 0.99 or less")
    if len(cfg.scale) != 2 or not 0 < cfg.scale[0] <= cfg.scale[1] <= 10:
        raise UserError(f"--scale {','.join(f'{x:g}' for x in cfg.scale)}: expected MIN,MAX with 0 < MIN <= "
                        f"MAX <= 10, such as 0.1,2")
    check_batches(cfg.global_batch, cfg.batch_size, world_size)
    check_sharding(cfg.fsdp, world_size)


# ---------------------------------------------------------------- model


def build_model(cfg, pretrained, num_classes, ops, say):
    """Mask R-CNN on the checkpoint's encoder; say(text) is told what was loaded. Raises UserError."""
    encoder = build_like(pretrained, cfg.img_size, drop_path=cfg.drop_path,
                         grad_checkpointing=cfg.grad_checkpointing)
    fusion = cfg.fused and build_fusion(pretrained, encoder)
    if cfg.fused and not fusion:
        raise UserError(f"--fused: checkpoint {pretrained.path} holds no fusion; expected one that was "
                        f"pre-trained with more than one of --out-indices")
    if not cfg.random_init:
        load_for_tuning(encoder, pretrained, say)
    add_windows(encoder, cfg.window)
    try:
        return MaskRCNN(encoder, num_classes, cfg.width, fusion and fusion.requires_grad_(), ops,
                        cfg.proposals, cfg.regions)
    except ValueError as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------- the run


def main(cfg):
    """Fine-tune as cfg says; returns the metrics, box_AP and mask_AP among them."""
    with Run(cfg) as run:
        check(cfg, run.world.size)
        return detect(cfg, run)


def detect(cfg, run):
    began, say, world = time.monotonic(), run.say, run.world
    device, dtype = run.device, pick_dtype(cfg.dtype, run.device)
    if not cfg.img_size:
        cfg = replace(cfg, img_size=(64, 64) if cfg.data.startswith("shapes") else (1024, 1024))
    pretrained, cfg = open_pretrained(cfg, say)
    run.resume(cfg)

    # ------------------------------------------------------------ data
    reading, first = reading_of(cfg), world.local_main_first
    train_set, val_set = (first(lambda split=split: open_boxes(cfg.data, split, cfg.cache_dir, say, reading,
                                                               cfg.max_bad, cfg.num_classes))
                          for split in ("train", "val"))
    classes = train_set.classes
    match_classes(train_set, val_set)
    describe_files(say, train_set, val_set, output=cfg.output_dir)
    run.check_data(fingerprint(train_set))
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * world.size,
                             None if cfg.steps else cfg.schedule, cfg.steps, 0, None, cfg.lr, published=None)
    warmup = min(250, schedule.stop // 20) if cfg.warmup_steps is None else cfg.warmup_steps
    if warmup >= schedule.stop:
        raise UserError(f"--warmup-steps {warmup}: expected fewer than the run's {schedule.stop} steps")
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, run.start, schedule.stop,
                    world.rank, world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)

    # ------------------------------------------------------------ model
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    ops = pick_ops(cfg.ops, device)
    model = build_model(cfg, pretrained, len(classes), ops, say).to(device)
    views = BoxViews(train_set, cfg.img_size, cfg.in_chans, model.num_noise, cfg.seed, cfg.mean,
                     cfg.scale)

    def to_device(batch):
        """Normalised images (B, C, H, W), the objects of each, and the noise for samples and drop path."""
        images, noise = (batch[name].to(device, non_blocking=True) for name in ("image", "noise"))
        return ops.prepare(images, mean, std), targets(batch, cfg.img_size[1], device), noise

    # ------------------------------------------------------------ optimizer
    run.restore_model(model)
    if cfg.fsdp:                                                        # takes the parameters' place
        trained = shard(model, world, schedule.accumulation > 1, cfg.compile)
    else:
        if cfg.compile:                                                 # later shapes depend on the boxes
            model.encode = torch.compile(model.encode, dynamic=False)
        options = dict(gradient_as_bucket_view=True, broadcast_buffers=False)
        trained = DistributedDataParallel(model, **options) if world.size > 1 else model
    groups = param_groups(model, cfg.weight_decay, cfg.layer_decay, len(model.encoder.blocks),
                          undecayed=("encoder.pos_embed",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.restore_optimizer(optimizer, scaler)
    run.open(len(train_set) + len(val_set))
    run.begin(schedule, stream, train_set, model, optimizer, scaler, dtype=dtype,
              flops=detector_flops(model), advice=advice_if_late(train_set, cfg.workers))

    def measured():
        """The model that evaluations use: this one, or where it is sharded a whole copy on every rank."""
        def build():
            return build_model(cfg, pretrained, len(classes), ops, lambda text: None).to(device)
        return whole(model, build, world, everywhere=True).eval()

    def measure():
        """AP and so on, on all validation images at their own sizes."""
        found = evaluate(measured(), val_set, cfg, world, ops, dtype, run.bad_samples)
        model.train()
        return found

    def draw(step):
        """Write a picture of what the model finds in a few held-out images."""
        with run.paused():
            drawn = measured()
            if world.is_main:
                with contextlib.suppress(process.Interrupted), run.signals.interrupting():  # a disk may hang
                    title = f"{pretrained.config['model']} with Mask R-CNN at step {step}"
                    sheet = picture(drawn, val_set, cfg.picture_images, cfg, device, ops, dtype, title)
                    for name in (f"detection-{step:06d}.png", "detection.png") if sheet else ():
                        write_atomically(run.folder / name, lambda file: sheet.save(file, "PNG"))
            model.train()
            world.barrier()                                             # a picture may outlast --timeout

    # ------------------------------------------------------------ loop
    say(f"{pretrained.config['model']} with Mask R-CNN: "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters from "
        f"{'random weights' if cfg.random_init else pretrained.path}; {len(train_set)} images of {cfg.data}, "
        f"{len(classes)} classes\n{schedule.plan(run.start)}")
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda", cfg.timeout))
    if run.start == 0:
        draw(0)
    picture_every = cfg.picture_every or math.ceil(schedule.stop / 10)
    if run.evaluation_missed(run.start % cfg.eval_every == 0):
        run.note_accuracy(run.start, measure, shown)
    for step in run.steps():
        lr = step_lr(step, schedule.lr, schedule.stop, warmup)
        set_lr(optimizer, lr)

        parts = {}                                                      # the losses of RPN and heads, by name
        for batch in run.micro_batches(batches):
            with run.accumulate(trained):                               # ranks add up gradients once per step
                with autocast(device, dtype):
                    losses = trained(*to_device(batch))
                micro_loss = sum(losses.values()) / schedule.accumulation
                scaler.scale(micro_loss).backward()
            for name, value in losses.items():
                parts[name] = parts.get(name, 0) + value.detach() / schedule.accumulation
        loss = sum(parts.values())

        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model, cfg.clip_grad)
        run.guard(loss, lr, grad_norm)                                  # NaN, Inf: no step changes a weight
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

        evaluates = run.is_due(cfg.eval_every)
        run.end_step(loss, lr, grad_norm, save=evaluates,
                     **{name: lambda value=value: value for name, value in parts.items()})
        if run.is_due(picture_every):
            draw(step + 1)
        if evaluates and step + 1 < schedule.stop:
            run.note_accuracy(step + 1, measure, shown)

    # ------------------------------------------------------------ evaluation
    final = measured()
    found = evaluate(final, val_set, cfg, world, ops, dtype, run.bad_samples, run.folder / "results.json")
    metrics = dict(step=schedule.stop, loss=run.loss, **found, seconds=time.monotonic() - began)
    if world.is_main:
        weights = {name: value.cpu() for name, value in final.state_dict().items()}
        config = asdict(cfg) | {name: pretrained.config[name] for name in ("model", "out_indices")
                                if name in pretrained.config}
        write_tensors(run.folder / "detector.pt", {"model": weights, "config": config, "classes": classes,
                                                   "category_ids": train_set.category_ids})
    run.finish(metrics, shown(metrics))
    return metrics


if __name__ == "__main__":
    process.run(main, parse(Config))
