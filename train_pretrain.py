"""Pre-train a ViT by predicting masked pixels: MAE, PixMIM, MFF_MAE and MFF_PixMIM (MFF: arXiv 2308.00261, table 1).

    torchrun train_pretrain.py --model vit_b                            MFF_MAE on the embedded images
    torchrun --nproc-per-node=8 train_pretrain.py --model vit_b --data IMAGENET --batch-size 256 --workers 12

The methods are combinations of independent flags:

    MFF_MAE                    (the defaults)
    MFF_PixMIM                 --low-pass-radius 40 --crop simple
    MAE                        --out-indices last
    PixMIM                     --out-indices last --low-pass-radius 40 --crop simple
    MFF as mmpretrain has it   --crop simple
    MFF, shallow detached      --detach-shallow

Published after 800 epochs of ImageNet with vit_b, linear probe / fine-tuning: MAE 65.1 / 83.3, PixMIM 67.5 / 83.5,
MFF_MAE 67.0 / 83.6. The batch of 4096 comes from any number of processes by accumulation. Sections of this file: config,
data, model, optimizer, loop, evaluation.
"""

import contextlib
import itertools
import math
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

import kernels
from mff_min.augment import CROPS, MODES, center
from mff_min.config import UserError, numbers, opt, parse, side_or_sides
from mff_min.data import Stream, Views, make_loader, open_data
from mff_min.mim import MaskedAutoencoder, random_masking, spread_indices
from mff_min.optim import cosine_lr, param_groups, set_lr
from mff_min.picture import grey_out, grid, to_uint8
from mff_min.runtime import (BadSamples, Fault, Log, Progress, Stopped, autocast, catch_signals, duration, find_checkpoint,
                             load_state, open_folder, pick_dtype, read_checkpoint, run, save_checkpoint, start_world,
                             write_atomically)
from mff_min.targets import low_pass_radius_at, low_pass_target, patch_mean_loss, reconstruction
from mff_min.vit import MODELS, VisionTransformer

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    # what changes the result
    model: str = opt("vit_b", "size of the encoder", choices=list(MODELS))
    data: str = opt("shapes", "embedded images: shapes or shapes:COUNT; cifar10:DIR, cifar100:DIR, or a folder of images")
    img_size: tuple[int, int] = opt((224, 224), "side of the crop in pixels, or HEIGHTxWIDTH", type=side_or_sides)
    patch_size: int | None = opt(None, "side of a patch in pixels; not given: the model's (16; vit_h 14; vit_test 8)")
    in_chans: int = opt(3, "channels of an image", choices=list(MODES))
    mean: tuple[float, ...] = opt((0.485, 0.456, 0.406), "mean of each channel, in [0, 1]", type=numbers)
    std: tuple[float, ...] = opt((0.229, 0.224, 0.225), "standard deviation of each channel", type=numbers)
    crop: str = opt("random_resized", "random_resized as in MAE, simple as in PixMIM, center for no randomness",
                    choices=list(CROPS))
    mask_ratio: float = opt(0.75, "share of the patches that is masked")
    out_indices: str = opt("spread", "blocks that are fused: spread (0,2,4,6,8,11 of twelve), last (plain MAE), all, or a list")
    detach_shallow: bool = opt(False, "no gradient to shallow blocks through the fusion (MFF, A.8)")
    norm_pix_loss: bool = opt(True, "normalise each target patch by its own mean and variance")
    low_pass_radius: float = opt(0.0, "keep this many frequency bins of the target (PixMIM: 40); 0 predicts the image itself")
    low_pass_scaled: bool = opt(True, "low_pass_radius is meant at 224 pixels and scales with the image side")
    decoder_embed_dim: int = opt(512, "width of the decoder")
    decoder_depth: int = opt(8, "blocks of the decoder")
    decoder_num_heads: int = opt(16, "attention heads of the decoder")
    epochs: float | None = opt(None, "epochs of the schedule; not given: 800, or as many as --steps makes")
    steps: int | None = opt(None, "end after this many steps; without --epochs the schedule ends there too")
    global_batch: int = opt(4096, "images of a step, over all processes and accumulated micro-batches")
    blr: float = opt(1.5e-4, "base learning rate; lr = blr * global_batch / 256")
    lr: float | None = opt(None, "learning rate, instead of blr")
    min_lr: float = opt(0.0, "learning rate at the end")
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up; not given: 40, at most a fifth of the run")
    weight_decay: float = opt(0.05, "AdamW's weight decay")
    clip_grad: float = opt(0.0, "largest norm of the gradient; 0 does not clip, as published")
    seed: int = opt(0, "of the weights, the order, the crops and the masks")
    init_from: str = opt("", "start from these weights: a checkpoint of this stage, or an encoder with timm's names")
    dtype: str = opt("auto", "matrix products in this type; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # what does not
    output_dir: str = opt("runs/pretrain", "the run's folder")
    resume: str = opt("", "auto: go on where output_dir stopped, if it did; or a checkpoint file")
    batch_size: int = opt(64, "images of one micro-batch in one process")
    workers: int = opt(0, "loader processes for each training process")
    max_bad: float = opt(0.01, "share of the images that may be unreadable before the run stops")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    ops: str = opt("auto", "implementation of the kernels", choices=["auto", "torch"])
    compile: bool = opt(False, "torch.compile the model")
    grad_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, for vit_l and vit_h")
    log_every: int = opt(20, "steps between lines of the log")
    save_every: int = opt(500, "steps between checkpoints")
    picture_every: int = opt(0, "steps between pictures; 0: ten over the run")
    picture_images: int = opt(8, "images in a picture")
    cache_dir: str = opt("runs/cache", "where the embedded images are kept")


@dataclass(frozen=True)
class Schedule:
    """What follows from the flags, the number of images and the number of processes."""
    num_samples: int
    accumulation: int
    stop: int                                                           # the step at which the run ends
    epochs: float                                                       # where the learning rate reaches min_lr
    warmup_epochs: float
    lr: float
    global_batch: int

    def epoch(self, step):
        return step * self.global_batch / self.num_samples


def check(cfg, world_size):
    """Raise UserError for values that cannot be meant."""
    for name in ("batch_size", "global_batch", "log_every", "save_every", "decoder_embed_dim", "decoder_depth",
                 "decoder_num_heads", "steps", "epochs", "patch_size"):
        value = getattr(cfg, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    for name in ("low_pass_radius", "clip_grad", "workers", "picture_every", "picture_images", "weight_decay", "min_lr"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected 0 or more")
    for name in ("mean", "std"):
        if len(getattr(cfg, name)) != cfg.in_chans:
            raise UserError(f"--{name} has {len(getattr(cfg, name))} numbers: expected one for each of --in-chans {cfg.in_chans}")
    if min(cfg.std) <= 0:
        raise UserError(f"--std {min(cfg.std)}: expected more than 0")
    together = cfg.batch_size * world_size
    if cfg.global_batch % together:
        nearest = max(round(cfg.global_batch / together), 1) * together
        raise UserError(f"--global-batch {cfg.global_batch} is not a multiple of --batch-size {cfg.batch_size} times "
                        f"{world_size} processes; the nearest that is: {nearest}")


def make_schedule(cfg, num_samples, world_size):
    """The Schedule. Raises UserError when the warm-up is longer than the run."""
    epochs = cfg.epochs
    if epochs is None:
        epochs = cfg.steps * cfg.global_batch / num_samples if cfg.steps else 800
    stop = math.ceil(epochs * num_samples / cfg.global_batch)
    warmup_epochs = min(40, epochs / 5) if cfg.warmup_epochs is None else cfg.warmup_epochs
    if not 0 <= warmup_epochs < epochs:
        raise UserError(f"--warmup-epochs {warmup_epochs:g}: expected at least 0 and less than the {epochs:g} epochs of the run")
    lr = cfg.blr * cfg.global_batch / 256 if cfg.lr is None else cfg.lr
    accumulation = cfg.global_batch // (cfg.batch_size * world_size)
    return Schedule(num_samples, accumulation, min(stop, cfg.steps or stop), epochs, warmup_epochs, lr,
                    cfg.global_batch)


# ---------------------------------------------------------------- model


def build_model(cfg):
    """The encoder with its decoder, on the CPU. Raises UserError when the flags do not go together."""
    size = dict(MODELS[cfg.model])
    if cfg.patch_size:
        size["patch_size"] = cfg.patch_size
    named = {"spread": spread_indices(size["depth"]), "last": (size["depth"] - 1,), "all": tuple(range(size["depth"]))}
    try:
        out_indices = named.get(cfg.out_indices) or tuple(int(part) for part in cfg.out_indices.split(","))
    except ValueError:
        raise UserError(f"--out-indices {cfg.out_indices}: expected spread, last, all, or a list such as 0,4,11") from None
    try:
        encoder = VisionTransformer(cfg.img_size, in_chans=cfg.in_chans, grad_checkpointing=cfg.grad_checkpointing, **size)
        return MaskedAutoencoder(encoder, out_indices, cfg.mask_ratio, cfg.norm_pix_loss, cfg.detach_shallow,
                                 cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads, kernels.load(cfg.ops))
    except ValueError as error:
        raise UserError(str(error)) from None


def init_from(model, path, say):
    """Load weights into the model: a whole one of this stage, or an encoder alone."""
    state = read_checkpoint(path)
    state = state.get("model", state)
    if any(name.startswith("encoder.") for name in state):
        load_state(model, state, f"--init-from {path}")
    else:
        load_state(model.encoder, state, f"--init-from {path}")
        say(f"--init-from {path} holds an encoder alone: the decoder starts from random weights")


# ---------------------------------------------------------------- the run


def main(cfg):
    """Pre-train as cfg says and return the final metrics: step, loss, and val_loss beside the loss of predicting means."""
    with start_world(cfg.device) as world, catch_signals() as signals:
        check(cfg, world.size)
        return pretrain(cfg, world, signals)


def pretrain(cfg, world, signals):
    device, dtype = world.device, pick_dtype(cfg.dtype, world.device)
    torch.manual_seed(cfg.seed)                                         # for the initial weights; the loop draws nothing
    model = build_model(cfg).to(device)
    ops = model.ops

    def say(text):
        if world.is_main:
            print(text, flush=True)

    state = find_checkpoint(cfg.output_dir, cfg.resume, say)
    start = state["step"] if state else 0
    if len(set(world.gather(start))) > 1:
        raise UserError(f"the processes would resume from different steps: --output-dir {cfg.output_dir} must be one folder, "
                        f"seen by all hosts")

    # ------------------------------------------------------------ data
    train_set = world.local_main_first(lambda: open_data(cfg.data, "train", cfg.cache_dir, say))
    val_set = world.local_main_first(lambda: open_data(cfg.data, "val", cfg.cache_dir, say))
    schedule = make_schedule(cfg, len(train_set), world.size)
    if len(train_set) < cfg.global_batch:
        say(f"warning: {len(train_set)} images are fewer than the global batch of {cfg.global_batch}: "
            f"a step sees some of them more than once, each time with another crop and mask")
    views = Views(train_set, CROPS[cfg.crop], cfg.img_size, cfg.in_chans, model.encoder.num_patches, cfg.seed)
    stream = Stream(len(train_set), cfg.global_batch, cfg.batch_size, cfg.seed, start, schedule.stop, world.rank, world.size)
    mean, std = torch.tensor(cfg.mean, device=device), torch.tensor(cfg.std, device=device)
    radius = low_pass_radius_at(cfg.low_pass_radius, cfg.img_size) if cfg.low_pass_scaled else cfg.low_pass_radius

    def to_device(batch):
        """Images, what to predict of them, and the noise that masks them, on the device."""
        images = ops.prepare(batch["image"].to(device, non_blocking=True), mean, std)
        targets = low_pass_target(images, mean, std, radius, ops) if radius else images
        return images, targets, batch["noise"].to(device, non_blocking=True)

    # ------------------------------------------------------------ optimizer
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=schedule.lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if cfg.init_from and not state:
        init_from(model, cfg.init_from, say)
    if state:
        load_state(model, state["model"], f"the checkpoint in {cfg.output_dir}")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    trained = model                                                     # the same parameters, wrapped
    if world.size > 1:
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if cfg.compile:
        trained = torch.compile(trained)

    folder = open_folder(cfg, world)
    log, bad_samples = Log(folder, world, start), BadSamples(folder, world, len(train_set), cfg.max_bad)
    progress = Progress(schedule.stop * cfg.global_batch, start * cfg.global_batch, world)
    picture = Picture(cfg, val_set, model, to_device, folder) if world.is_main else None
    picture_every = cfg.picture_every or math.ceil(schedule.stop / 10)
    announce(cfg, schedule, model, train_set, start, say)

    def save(step):
        """Write last.pt, which holds all that the run needs to go on from this step."""
        if world.is_main:
            save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                     "scaler": scaler.state_dict(), "step": step, "loss": loss_value,
                                     "config": asdict(cfg)})

    # ------------------------------------------------------------ loop
    batches = iter(make_loader(views, stream, cfg.workers, device.type == "cuda"))
    loss_value = state["loss"] if state else math.nan
    waited, logged_at, logged_step = 0.0, time.monotonic(), start
    if picture and start == 0:
        picture.draw(0)
    for step in range(start, schedule.stop):
        lr = cosine_lr(schedule.epoch(step), schedule.lr, cfg.min_lr, schedule.warmup_epochs, schedule.epochs)
        set_lr(optimizer, lr)

        loss = torch.zeros((), device=device)
        for micro in range(schedule.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            began = time.monotonic()
            waited += began - asked
            bad_samples.add(batch["bad"])
            images, targets, noise = to_device(batch)
            more = micro + 1 < schedule.accumulation                    # gradients travel between ranks once a step
            with trained.no_sync() if more and world.size > 1 else contextlib.nullcontext():
                with autocast(device, dtype):
                    micro_loss = trained(images, noise, targets) / schedule.accumulation
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            progress.tick(step * cfg.global_batch + (micro + 1) * cfg.batch_size * world.size)
            if (step - start) * schedule.accumulation + micro == 1:     # the second: the first one warms up
                estimate(cfg, schedule, start, time.monotonic() - asked, device, progress.say)

        done = step + 1
        logs, ends = done % cfg.log_every == 0 or done == 1, done == schedule.stop
        if cfg.clip_grad or logs:
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if cfg.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip_grad, grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        signal_number = world.highest(signals[0] if signals else 0)
        saves = done % cfg.save_every == 0 or ends or signal_number
        if logs or saves:
            loss_value = world.mean([loss.item()])[0]                   # waits for the GPU: not every step
            if not math.isfinite(loss_value):
                raise Fault(f"loss is {loss_value} at step {done}; go on from the last checkpoint with --resume auto and a "
                            f"lower --lr, or --clip-grad, or --dtype float32")
            bad_samples.report()
        if logs:
            now = time.monotonic()
            img_per_s = (done - logged_step) * cfg.global_batch / (now - logged_at)
            wait = waited / (now - logged_at)
            log.write(step=done, epoch=schedule.epoch(done), loss=loss_value, lr=lr, grad_norm=grad_norm.item(),
                      img_per_s=img_per_s, data_wait=wait, fusion_weights=model.fusion_weights().tolist())
            progress.show(done * cfg.global_batch, f"step {done}/{schedule.stop}  epoch {schedule.epoch(done):.1f}  loss "
                          f"{loss_value:.4f}  lr {lr:.1e}  {img_per_s:.0f} img/s  waiting for data {100 * wait:.0f} %")
            waited, logged_at, logged_step = 0.0, now, done
        if picture and (done % picture_every == 0 or ends):
            picture.draw(done)
        if saves:
            save(done)
        if signal_number and not ends:
            raise Stopped(signal_number, f"signal {signal_number}; step {done} of {schedule.stop} is saved in {folder}, "
                                         f"--resume auto goes on from there")

    # ------------------------------------------------------------ evaluation
    metrics = dict(step=schedule.stop, loss=loss_value)
    if world.is_main:
        metrics |= evaluate(cfg, model, val_set, to_device, dtype)
        if start < schedule.stop:
            log.write(**metrics)
        export = {"model": model.encoder.state_dict(), "config": asdict(cfg)}
        write_atomically(folder / "encoder.pt", lambda file: torch.save(export, file))
        kind = "held-out" if val_set.is_split else "training"
        progress.say(f"done: loss on {metrics['val_images']} {kind} images {metrics['val_loss']:.4f}; predicting each "
                     f"masked patch by its mean would give {metrics['val_loss_of_means']:.4f}\n"
                     f"  {folder}/reconstruction.png   what the model sees behind the mask\n"
                     f"  {folder}/encoder.pt           the encoder, with timm's parameter names\n"
                     f"  {folder}/log.jsonl            loss, learning rate and fusion weights over the run")
    return metrics


def announce(cfg, schedule, model, train_set, start, say):
    """Say what is about to run."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    levels = ",".join(map(str, model.out_indices))
    say(f"{cfg.model}: {trainable / 1e6:.1f} M parameters, blocks {levels} fused; {len(train_set)} images from {cfg.data}; steps "
        f"{start} to {schedule.stop} of {cfg.global_batch} images, {schedule.epoch(schedule.stop):.1f} epochs; lr "
        f"{schedule.lr:.2e}, {schedule.warmup_epochs:g} epochs of warm-up; {schedule.accumulation} micro-batches a step")


def estimate(cfg, schedule, start, seconds, device, say):
    """Say how long the run will take, given the seconds of one micro-batch."""
    total = seconds * schedule.accumulation * (schedule.stop - start)
    say(f"a micro-batch takes {seconds:.2f} s, so the run takes about {duration(total)}")
    if device.type == "cpu" and total > 86_400:
        say("that is over a day on this CPU: `make demo` trains a small model on small images in minutes, "
            "and --steps ends this one early")


# ---------------------------------------------------------------- evaluation and pictures


def held_out(cfg, source, indices, num_patches):
    """Fixed views of fixed images: the centre crop, and a mask that depends on the index alone."""
    views = Views(source, center, cfg.img_size, cfg.in_chans, num_patches, cfg.seed)
    items = [views[0, i] for i in indices]
    return dict(image=torch.stack([item["image"] for item in items]), noise=torch.stack([item["noise"] for item in items]))


@torch.no_grad()
def evaluate(cfg, model, source, to_device, dtype, most=512):
    """The loss on at most 512 images of the source, each counted once, and the loss of predicting every patch by its mean."""
    count = min(len(source), most)
    totals = torch.zeros(2)
    for first in range(0, count, cfg.batch_size):
        indices = range(first, min(first + cfg.batch_size, count))
        images, targets, noise = to_device(held_out(cfg, source, indices, model.encoder.num_patches))
        with autocast(images.device, dtype):
            loss = model(images, noise, targets)
        ids = random_masking(noise, model.num_visible)[0][:, model.num_visible:]        # (B, K)
        means = patch_mean_loss(targets, ids, model.encoder.patch_size, cfg.norm_pix_loss, model.ops)
        totals += torch.tensor([loss.item(), means.item()]) * len(indices)
    val_loss, of_means = (totals / count).tolist()
    return dict(val_loss=val_loss, val_loss_of_means=of_means, val_images=count)


class Picture:
    """Draws the same few held-out images whenever asked: what was there, what the model saw, what it predicts."""

    def __init__(self, cfg, source, model, to_device, folder):
        self.cfg, self.model, self.folder = cfg, model, folder
        indices = range(min(cfg.picture_images, len(source)))
        self.images, self.targets, self.noise = to_device(held_out(cfg, source, indices, model.encoder.num_patches))

    @torch.no_grad()
    def draw(self, step):
        """Write reconstruction.png and a copy of it with the step in its name."""
        cfg, model, P = self.cfg, self.model, self.model.encoder.patch_size
        pred, ids, mask = model.predict(self.images, self.noise)
        pasted = reconstruction(pred.float(), self.targets, ids, P, cfg.norm_pix_loss)
        columns = {"image": self.images, "masked": grey_out(self.images, mask, P),
                   "prediction": grey_out(pasted, 1 - mask, P), "pasted": pasted}
        if cfg.low_pass_radius:
            columns = {"image": columns.pop("image"), "target": self.targets} | columns
        mean, std = (torch.tensor(values, device=pred.device) for values in (cfg.mean, cfg.std))
        tiles = {caption: to_uint8(images, mean, std) for caption, images in columns.items()}
        sheet = grid(tiles, f"step {step}", scale=max(1, round(128 / min(cfg.img_size))))
        for name in (f"reconstruction-{step:06d}.png", "reconstruction.png"):
            write_atomically(self.folder / name, lambda file: sheet.save(file, format="PNG"))


if __name__ == "__main__":
    run(main, parse(Config))
