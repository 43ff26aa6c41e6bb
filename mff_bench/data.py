"""Pipelines from files to crops, images a second of one core: ours beside torchvision's and timm's.

The files are drawn here: JPEGs of 500 x 375 pixels with enough detail to be about as large as ImageNet's.
Peers hand over normalised floats and we bytes, which are normalised on the device: that is part of the
comparison, since each is what its loader gives to training.
"""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from mff_bench.measure import Budget, NotRun, Record, in_rounds, need, show_group, stopwatch, timed_row
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.data import DeviceViews, Stream, Views, collate, make_loader
from mff_min.randaugment import rand_augment
from mff_min.runtime import pick_ops, start_world
from mff_min.sources import ImageFolder, open_data

ROOT = Path(__file__).resolve().parent.parent
SIZE = (224, 224)


def draw_jpegs(folder, count, size=(500, 375)):
    """Write count JPEGs of (width, height) into folder/train/drawn: noise of four scales, always the same."""
    (folder / "train" / "drawn").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        generator, pixels = np.random.RandomState(i), np.zeros((size[1], size[0], 3))
        for cell, strength in ((125, 80), (32, 40), (8, 30), (2, 26)):
            coarse = generator.randint(0, 256, (size[1] // cell + 1, size[0] // cell + 1, 3)).astype(np.uint8)
            smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            pixels += (np.asarray(smooth) / 255 - 0.5) * strength * 2
        image = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        image.save(folder / "train" / "drawn" / f"{i:05d}.jpg", quality=88)


# ---- pipelines: of a folder, a function that makes a batch of training's views of `count` images

def torchvision_views(folder):
    """facebookresearch/mae's pre-training input."""
    need("torchvision")
    dataset = torchvision_folder(folder, SIZE)
    return lambda count: default_collate([dataset[i % len(dataset)] for i in range(count)])


def torchvision_folder(folder, size):
    """A torchvision ImageFolder with MAE's transforms."""
    from torchvision import datasets
    from torchvision import transforms as T
    steps = [T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
             T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return datasets.ImageFolder(str(folder / "train"), T.Compose(steps))


def our_views(folder, crop, source=None, augment=None):
    """Our input with one of our crops, of files or of another source."""
    return batches_of(Views(source or ImageFolder(folder, "train"), crop, SIZE, 3, 196, 0, augment))


def batches_of(views):
    """Batches of our views, made as a loader's worker makes them."""
    n = len(views.source)
    return lambda count: collate(views.__getitems__([divmod(i, n) for i in range(count)]))


def packed_source(folder, *flags):
    """The images of a folder, as pack.py packs them with these flags."""
    if not (ROOT / "pack.py").exists():
        raise NotRun("there is no pack.py yet")
    packed = folder / "_".join(["packed", *flags])
    if not packed.exists():
        command = [sys.executable, "pack.py", str(folder / "train"), str(packed), *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return open_data(str(packed), "train", "", print)


def packed_small(folder):
    """packed_source of what PixMIM's crop begins with."""
    return packed_source(folder, "--short-side", "224", "--resample", "bilinear")


def timm_views(folder):
    """timm's input of fine-tuning, with RandAugment and no erasing."""
    need("timm")
    from timm.data import create_transform
    transform = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.0,
                                 interpolation="bicubic", color_jitter=None)
    source = ImageFolder(folder, "train")

    def view(i):
        image = source.open(i % len(source)).convert("RGB")
        while True:
            try:
                return transform(image)
            except ValueError:                                          # posterize to 0 bits: Pillow refuses
                pass
    return lambda count: default_collate([view(i) for i in range(count)])


def crop_on_device(folder, device, batch=64):
    """Random crops of a batch that is on the device already, 256 pixels wide, and their normalisation."""
    if device.type != "cuda":
        raise NotRun("crops on the device need a GPU")
    ops = pick_ops("auto", device)
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    images = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8, device=device)
    boxes = torch.tensor([[16, 24, 180, 200]], device=device).repeat(batch, 1)
    flip = torch.arange(batch, device=device) % 2 == 0

    def crop(count):
        for _ in range(0, count, batch):
            ops.prepare(ops.resized_crop(images, boxes, SIZE, flip), mean, std)
    return crop


PIPELINES = {                                                           # the first of each is the baseline
    "pre-training": {
        "torchvision": lambda folder, device: torchvision_views(folder),
        "mff_min, JPEG, random_resized": lambda folder, device: our_views(folder, "random_resized"),
        "mff_min, JPEG, simple": lambda folder, device: our_views(folder, "simple"),
        "mff_min, packed, random_resized":
            lambda folder, device: our_views(folder, "random_resized", packed_source(folder)),
        "mff_min, packed, simple": lambda folder, device: our_views(folder, "simple", packed_small(folder)),
        "mff_min, packed, simple, mirrored on the device": lambda folder, device: batches_of(
            DeviceViews(packed_small(folder), "simple", SIZE, 3, 196, 0)),
        "mff_min, crop on the device": crop_on_device},
    "fine-tuning, RandAugment": {
        "timm": lambda folder, device: timm_views(folder),
        "mff_min, JPEG": lambda folder, device: our_views(
            folder, "inception", augment=functools.partial(rand_augment, magnitude=9.0))},
}


def bench_pipelines(name, folder, options, budget, world):
    """The group of one stage's input: each pipeline's images a second on one thread."""
    count, samples, problems = options.images, {}, {}
    for who, build in PIPELINES[name].items():
        try:
            batch = build(folder, world.device)
            samples[who] = stopwatch(lambda batch=batch: batch(count), world.device)
        except NotRun as problem:
            problems[who] = str(problem)
    text = f"{name}: {len(samples)} pipelines"
    seconds, left_out = in_rounds(samples, options.rounds, budget, world, text)
    baseline, rows = next(iter(PIPELINES[name])), []
    for who in PIPELINES[name]:
        found = (timed_row(seconds[who], count, seconds.get(baseline)) if who in seconds else
                 {"not_run": problems.get(who) or left_out[who]})
        rows.append({"name": who, **found})
    return {"name": f"input of {name}, one core", "baseline": baseline, "images": count,
            "rounds": max(map(len, seconds.values()), default=0), "rows": rows}


def bench_data(args):
    """Every pipeline, into data_<device>.json."""
    with start_world(args.device) as world, tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        folder, budget = Path(folder), Budget(60 * args.minutes)
        draw_jpegs(folder, args.images)
        mean_bytes = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / args.images
        record = Record("data", args.output_dir, world, rounds=args.rounds, minutes=args.minutes,
                        files={"count": args.images, "size": [500, 375], "mean_bytes": mean_bytes})
        for i, name in enumerate(PIPELINES):
            group = bench_pipelines(name, folder, args, budget.share(len(PIPELINES) - i), world)
            record.add(group)
            world.say("\n".join(show_group(group)))
        world.say(f"\nwrote {record.path}")


# ---- loaders: of a folder, batches of (normalised images, noise) on the device, without end

def our_batches(folder, case, batch, workers, device, source=None):
    """Batches as train_pretrain.py gets them."""
    source, ops = source or ImageFolder(folder, "train"), pick_ops("auto", device)
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    views = Views(source, "random_resized", (case.img_size, case.img_size), 3, case.num_patches, 0)
    stream = Stream(len(source), batch, batch, 0, 0, 10 ** 9)
    for found in make_loader(views, stream, workers, device.type == "cuda"):
        images = ops.prepare(found["image"].to(device, non_blocking=True), mean, std)
        yield images, found["noise"].to(device, non_blocking=True)


def torchvision_batches(folder, case, batch, workers, device):
    """Batches as facebookresearch/mae gets them."""
    need("torchvision")
    dataset = torchvision_folder(folder, case.img_size)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10 ** 9)
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=sampler, num_workers=workers, drop_last=True,
                                         pin_memory=device.type == "cuda")
    for images, _ in loader:
        yield images.to(device, non_blocking=True), torch.rand(batch, case.num_patches, device=device)


LOADERS = {
    "mff_min, JPEG": our_batches,
    "mff_min, packed": lambda folder, *more: our_batches(folder, *more, source=packed_source(folder)),
    "torchvision": torchvision_batches,
}
