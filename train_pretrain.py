"""Pre-train a ViT by predicting what is masked: MAE, PixMIM, EVA, MILAN, each with MFF (arXiv 2308.00261).

    python train_pretrain.py --model vit_test                           a small MFF_MAE on the embedded images
    torchrun --nproc-per-node=8 train_pretrain.py --model vit_b --data IMAGENET --batch-size 512 --workers 12

The methods are combinations of independent flags:

    MFF_MAE                     (the defaults)
    MFF_PixMIM                  --low-pass-radius 40 --crop simple
    MAE                         --out-indices last
    PixMIM                      --out-indices last --low-pass-radius 40 --crop simple
    MFF as mmpretrain has it    --crop simple
    MFF, shallow detached       --detach-shallow
    MFF_EVA                     --target clip --teacher FILE --epochs 400
    MFF_MILAN                   the same and --masking importance --decoder prompting
    EVA, MILAN                  the same and --out-indices last

Published for vit_b after 800 epochs of ImageNet, linear probe / fine-tuning: MAE 65.1 / 83.3, PixMIM 67.5 /
83.5, MFF_MAE 67.0 / 83.6. Any number of processes makes up the batch of 4096 by accumulation.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from mff_data.decode import DataFlags, reading_of
from mff_data.sources import describe_files, fingerprint, open_data
from mff_data.views import Views, advice_if_late, collate, make_loader
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.config import (check_batches, check_channels, check_ranges, knob, numbers, opt, parse,
                            side_or_sides)
from mff_min.errors import UserError
from mff_min.kernels import ops as kernels
from mff_min.mim import parse_out_indices, random_masking
from mff_min.optim import clip_grad_norm, cosine_lr, make_schedule, param_groups, set_lr
from mff_min.stream import Stream
from mff_min.targets import PixelTarget, low_pass_radius_at
from mff_min.vit import MODELS, VisionTransformer
from mff_run import process, small
from mff_run.files import write_atomically, write_tensors
from mff_run.picture import reconstruction_sheet
from mff_run.run import Run, RunFlags
from mff_run.sharded import check_sharding, shard, whole
from mff_run.world import autocast, pick_dtype
from mff_tasks.features import (DECODERS, CosineTarget, FeatureFlags, feature_sheet, flops_with_teacher,
                                open_teacher)
from mff_weights.pretrained import initialise

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config(DataFlags, FeatureFlags, RunFlags):
    # these change the result; so do the flags of DataFlags and FeatureFlags
    model: str = opt("vit_b", "size of the encoder", choices=list(MODELS))
    data: str = opt("shapes", "shapes or shapes:COUNT (embedded), cifar10:DIR, cifar100:DIR, list:DIR, "
                              "cars:DIR, or a folder or pack of images, with or without train/ and classes")
    img_size: tuple[int, int] = opt((224, 224), "crop in pixels: SIDE or HEIGHTxWIDTH", type=side_or_sides)
    patch_size: int | None = opt(None, "side of a patch in pixels; not given: the model's own", above=0)
    in_chans: int = opt(3, "channels of an image; but for 1, 3 and 4, of .npy arrays (H, W, C)",
                        above=0)
    mean: tuple[float, ...] = opt(IMAGENET_MEAN, "mean of each channel, in [0, 1]", type=numbers)
    std: tuple[float, ...] = opt(IMAGENET_STD, "standard deviation of each channel", type=numbers)
    crop: str = opt("random_resized", "random_resized (MAE), simple (PixMIM), or center",
                    choices=["random_resized", "simple", "center"])
    mask_ratio: float = opt(0.75, "share of the patches that is masked")
    out_indices: str = opt("spread", "fused blocks: spread (0,2,4,6,8,11 of twelve), last (MAE), all, a list")
    detach_shallow: bool = opt(False, "no gradient to shallow blocks through the fusion (MFF, A.8)")
    norm_pix_loss: bool = opt(True, "normalise each target patch by its own mean and variance")
    low_pass_radius: float = opt(0.0, "frequency bins kept of the target, at 224 pixels (PixMIM: 40); 0: all",
                                 least=0)
    decoder_embed_dim: int = opt(512, "width of the decoder", above=0)
    decoder_depth: int = opt(8, "blocks of the decoder", above=0, most=1000)
    decoder_num_heads: int = opt(16, "attention heads of the decoder", above=0)
    epochs: float | None = opt(None, "epochs of the schedule; not given: 800, or what --steps makes", above=0)
    steps: int | None = opt(None, "end after this many; without --epochs the schedule does too", above=0)
    global_batch: int = opt(4096, "images of a step, over all processes and micro-batches", above=0)
    blr: float = opt(1.5e-4, "base learning rate; lr = blr * global_batch / 256", above=0)
    lr: float | None = opt(None, "learning rate, instead of blr", above=0)
    min_lr: float = opt(0.0, "learning rate at the end", least=0)
    warmup_epochs: float | None = opt(None, "of linear warm-up; not given: min(40, epochs / 5)", least=0)
    weight_decay: float = opt(0.05, "AdamW's weight decay", least=0)
    clip_grad: float = opt(0.0, "largest norm of the gradient; 0 does not clip, as published", least=0)
    seed: int = opt(0, "of the weights, the order, the crops and the masks", least=0)
    init_from: str = opt("", "weights to start from, of any family that tools.convert reads; not the state")
    key: str | None = opt(None, "of a file with several encoders: which, for example teacher")
    adapt: bool = opt(False, "make the projection of --init-from fit another --in-chans or --patch-size, as "
                             "timm does: channels are summed up or repeated, patches resampled")
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these do not change the result; nor do the flags of RunFlags
    output_dir: str = knob("runs/pretrain", "the run's folder")
    batch_size: int = knob(64, "images of one micro-batch in one process", above=0)
    compile: bool = knob(False, "torch.compile the model, or with --fsdp each block")
    fsdp: bool = knob(False, "parameters and optimizer state spread over the processes (fully_shard)")
    grad_checkpointing: bool = knob(False, "recompute activations to save memory, for vit_l and vit_h")
    picture_every: int = knob(0, "steps between pictures; 0: ten over the run", least=0)
    picture_images: int = knob(8, "images in a picture", above=0)
    small_settings = property(lambda cfg: small.of_model(cfg.model))    # what --small gives


def check(cfg, world):
    """Raise UserError for values that cannot be meant, before anything is done."""
    check_ranges(cfg)
    check_channels(cfg.in_chans, cfg.mean, cfg.std)
    check_batches(cfg.global_batch, cfg.batch_size, world.size)
    check_sharding(cfg.fsdp, world.size)


# ---------------------------------------------------------------- model


def build_model(cfg, device, teacher=None):
    """The encoder with its decoder, on the device. Raises UserError when the flags do not go together."""
    size = dict(MODELS[cfg.model])
    if cfg.patch_size:
        size["patch_size"] = cfg.patch_size
    try:
        out_indices = parse_out_indices(cfg.out_indices, size["depth"])
        encoder = VisionTransformer(cfg.img_size, in_chans=cfg.in_chans,
                                    grad_checkpointing=cfg.grad_checkpointing, **size)
        ops = kernels.load(cfg.ops, device)
        if cfg.target == "pixels":
            radius = low_pass_radius_at(cfg.low_pass_radius, cfg.img_size)
            target = PixelTarget(encoder.patch_size, cfg.in_chans, cfg.norm_pix_loss, cfg.mean, cfg.std,
                                 radius, ops)
        else:
            target = CosineTarget(teacher.dim)
        return DECODERS[cfg.decoder](encoder, out_indices, target, cfg.mask_ratio, cfg.detach_shallow,
                                     cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
                                     ops=ops).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------- the run


def main(cfg):
    """Pre-train as cfg says; returns the final metrics: step, loss, and on rank 0 what evaluate returns."""
    with Run(cfg) as run:
        check(cfg, run.world)
        return pretrain(cfg, run)


def pretrain(cfg, run):
    began, say, device = time.monotonic(), run.say, run.device
    dtype = pick_dtype(cfg.dtype, device)
    teacher, cfg = open_teacher(cfg, run.world, dtype)                  # None but for features
    torch.manual_seed(cfg.seed)                                         # for weights: the loop draws nothing
    model = build_model(cfg, device, teacher)
    run.resume(cfg)

    # ------------------------------------------------------------ data
    reading, first = reading_of(cfg), run.world.local_main_first
    train_set = first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say, reading))
    val_set = first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say, reading))
    describe_files(say, train_set, val_set, output=cfg.output_dir)
    run.check_data(fingerprint(train_set))
    schedule = make_schedule(len(train_set), cfg.global_batch, cfg.batch_size * run.world.size, cfg.epochs,
                             cfg.steps, cfg.warmup_epochs, cfg.blr, cfg.lr, published=(800, 40))
    views = Views(train_set, cfg.crop, cfg.img_size, cfg.in_chans, model.encoder.num_patches, cfg.seed)
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, run.start, schedule.stop,
                    run.world.rank, run.world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)

    def to_device(batch):
        """What the model takes: normalised images, the noise that masks them, and their pixels in uint8.

        A teacher's features take the place of the pixels, and its importance changes the noise.
        """
        pixels = batch["image"].to(device, non_blocking=True)
        noise = batch["noise"].to(device, non_blocking=True)
        images = model.ops.prepare(pixels, mean, std)
        return teacher.guide(images, noise, pixels) if teacher else (images, noise, pixels)

    # ------------------------------------------------------------ optimizer
    if cfg.init_from and not run.state:
        initialise(model, cfg, say)
    run.restore_model(model)
    if cfg.fsdp:                                                        # takes the parameters' place
        trained = shard(model, run.world, schedule.accumulation > 1, cfg.compile)
    else:
        options = dict(gradient_as_bucket_view=True, broadcast_buffers=False)   # the target's never change
        trained = DistributedDataParallel(model, **options) if run.world.size > 1 else model
        if cfg.compile:
            trained = torch.compile(trained, dynamic=False)
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.restore_optimizer(optimizer, scaler)
    run.open(len(train_set))
    flops = flops_with_teacher(model, teacher)
    run.begin(schedule, stream, train_set, model, optimizer, scaler, flops=flops, dtype=dtype,
              advice=advice_if_late(train_set, cfg.workers))

    def draw(step):
        """Write a picture of what the model predicts for a few held-out images: pixels or features."""
        if not isinstance(model.target, PixelTarget | CosineTarget):
            return
        with run.paused():
            drawn = whole(model, lambda: build_model(cfg, device, teacher), run.world)
            if run.world.is_main:
                with contextlib.suppress(process.Interrupted), run.signals.interrupting():  # a disk may hang
                    draw_reconstructions(cfg, drawn, teacher, val_set, to_device, run.folder, step)
            run.world.barrier()                                            # a picture may outlast --timeout

    # ------------------------------------------------------------ loop
    announce(cfg, schedule, model, flops, run.start, say)
    if run.start == 0:
        draw(0)
    picture_every = cfg.picture_every or math.ceil(schedule.stop / 10)
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda", cfg.timeout))
    for step in run.steps():
        lr = cosine_lr(schedule.epoch(step), schedule.lr, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for batch in run.micro_batches(batches):
            with run.accumulate(trained):                               # ranks add up gradients once per step
                with autocast(device, dtype):
                    micro_loss = trained(*to_device(batch)) / schedule.accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model, cfg.clip_grad)
        run.guard(loss, lr, grad_norm)                                  # NaN, Inf: no step changes a weight
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

        run.end_step(loss, lr, grad_norm, fusion_weights=model.fusion_weights)
        if run.is_due(picture_every):
            draw(step + 1)

    # ------------------------------------------------------------ evaluation
    metrics = dict(step=schedule.stop, loss=run.loss, seconds=time.monotonic() - began)
    final = whole(model, lambda: build_model(cfg, device, teacher), run.world)
    if run.world.is_main:
        weights = {name: value.cpu() for name, value in final.encoder.state_dict().items()}
        write_tensors(run.folder / "encoder.pt", {"model": weights, "config": asdict(cfg)})
        most = min(512, schedule.stop * cfg.global_batch)               # a short run is judged in short time
        metrics |= evaluate(cfg, final, val_set, to_device, dtype, most)
        kind = "held-out" if val_set.is_split else "training"
        means = metrics.get("val_loss_of_means")
        than = f", where predicting the mean of each masked patch gives {means:.4f}" if means else ""
        run.finish(metrics, f"loss {metrics['val_loss']:.4f} on {metrics['val_images']} {kind} images{than}\n"
                            f"  {run.folder}/{cfg.picture + '.png':20} what the model predicts\n"
                            f"  {run.folder}/encoder.pt           the encoder, with timm's parameter names\n"
                            f"  {run.folder}/log.jsonl            loss, learning rate and fusion weights")
    return metrics


def announce(cfg, schedule, model, flops, start, say):
    """Say what is about to run."""
    count = sum(p.numel() for p in model.parameters())
    say(f"{cfg.model}: {count / 1e6:.1f} M parameters with the decoder; fused blocks: "
        f"{','.join(map(str, model.out_indices))}; {flops / 1e9:.3g} GFLOP an image; "
        f"{schedule.num_samples} images of {cfg.data}\n"
        f"{schedule.plan(start)}")


# ---------------------------------------------------------------- evaluation and pictures


def spaced(count, source):
    """count indices, or all where there are fewer, spread over the source, whose classes are in order."""
    count = min(count, len(source))
    return [i * len(source) // count for i in range(count)]


def held_out(cfg, source, indices, num_patches):
    """A batch of fixed views: the centre crop of these images, under masks that depend on the index alone."""
    views = Views(source, "center", cfg.img_size, cfg.in_chans, num_patches, cfg.seed)
    return collate([views[0, i] for i in indices])


@torch.no_grad()
def evaluate(cfg, model, source, to_device, dtype, most):
    """The loss on `most` images at most, each counted once; of pixels also that of predicting means."""
    chosen, totals, replaced = spaced(most, source), torch.zeros(2, dtype=torch.float64), 0
    of_pixels = isinstance(model.target, PixelTarget)
    for first in range(0, len(chosen), cfg.batch_size):
        indices = chosen[first:first + cfg.batch_size]
        batch = held_out(cfg, source, indices, model.encoder.num_patches)
        images, noise, pixels = to_device(batch)
        with autocast(images.device, dtype):
            loss = model(images, noise, pixels)
        ids = random_masking(noise, model.num_visible)[0][:, model.num_visible:]
        of_means = model.target.loss_of_means(ids, images).item() if of_pixels else 0.0
        totals += torch.tensor([loss.item(), of_means]) * len(indices)
        replaced += len(batch["bad"])
    val_loss, of_means = (totals / len(chosen)).tolist()
    found = dict(val_loss=val_loss, val_images=len(chosen), val_replaced=replaced)
    return found | ({"val_loss_of_means": of_means} if of_pixels else {})


@torch.no_grad()
def draw_reconstructions(cfg, model, teacher, source, to_device, folder, step):
    """Write reconstruction.png or features.png, and a copy of it that keeps the step in its name."""
    indices = spaced(cfg.picture_images, source)
    images, noise, tokens = to_device(held_out(cfg, source, indices, model.encoder.num_patches))
    pred, ids, mask = model.predict(images, noise)
    mean, std = (torch.tensor(values, device=images.device) for values in (cfg.mean, cfg.std))
    target, title = model.target, f"{cfg.model} at step {step}"
    if cfg.target == "pixels":
        sheet = reconstruction_sheet(images, target.filter(images), pred, ids, mask, target.patch_size,
                                     cfg.norm_pix_loss, mean, std, title)
    else:
        importance = teacher(images)[1] if cfg.masking == "importance" else None
        sheet = feature_sheet(images, tokens, importance, pred, ids, mask, mean, std,
                              model.encoder.patch_size, title)
    for name in (f"{cfg.picture}-{step:06d}.png", f"{cfg.picture}.png"):
        write_atomically(folder / name, lambda file: sheet.save(file, format="PNG"))


if __name__ == "__main__":
    process.run(main, parse(Config))
