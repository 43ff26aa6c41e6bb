"""Pipelines from files to batches, images per second of one core: ours beside torchvision's and timm's.

Each runs in a loader with one worker, as in training, and what counts is the CPU time of that worker for each
batch: reading the files, which the system has in memory, decoding, cropping, stacking, and writing the batch
to shared memory. Not counted are the disk and what the training process does with a batch: mapping it,
pinning it, and sending it to the device.

The files are drawn here: JPEGs of 500 x 375 pixels with enough detail to be about as large as ImageNet's.
Peers hand over normalised floats and we bytes, which are normalised on the device: that is part of the
comparison, since each is what its loader gives to training.
"""

import contextlib
import functools
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from mff_data.sources import ImageFolder, open_data
from mff_data.views import Views, collate, make_loader
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD, rand_augment
from mff_min.config import parse
from mff_min.stream import Stream
from mff_run.world import pick_ops, start_world
from tools import pack
from tools.bench.measure import (
    FAILURES,
    Budget,
    Record,
    in_rounds,
    need,
    reason_of,
    show_group,
    timed_row,
)

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


# ---- pipelines: of a folder of `count` images, a sample of in_rounds: seconds for a batch of them all

def worker_clock(dataset, collate, count):
    """A sample: CPU seconds of a loader's one worker for a batch of count images.

    Its own process says how much it has had when a batch is stacked, so that all that lies between two of
    them counts: reading, cropping, stacking, and writing the batch to shared memory. What the other side does
    with it does not. The first batch warms up: it tests a pack's checksums, which later ones need not.
    """
    def batch(epoch):
        return [(epoch, i) if isinstance(dataset, Views) else i for i in range(count)]

    def sample(repeats):
        loader = DataLoader(dataset, batch_sampler=[batch(epoch) for epoch in range(repeats + 1)],
                            num_workers=1, prefetch_factor=1, collate_fn=functools.partial(stamped, collate))
        stamps = [stamp for _, stamp in loader]
        return (stamps[-1] - stamps[0]) / repeats
    return sample


def stamped(collate, items):
    """A batch, and the CPU seconds that this process has had."""
    return collate(items), time.process_time()


def torchvision_folder(folder, size):
    """A torchvision ImageFolder with MAE's transforms: facebookresearch/mae's pre-training input."""
    need("torchvision")
    from torchvision import datasets
    from torchvision import transforms as T
    steps = [T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
             T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return datasets.ImageFolder(str(folder / "train"), T.Compose(steps))


def our_views(folder, crop, source=None, augment=None):
    """Our input with one of our crops, of files or of another source."""
    return Views(source or ImageFolder(folder, "train"), crop, SIZE, 3, 196, 0, augment)


def packed_source(folder, *flags):
    """The images of a folder, as tools.pack packs them with these flags."""
    packed = folder / "_".join(["packed", *flags])
    if not packed.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            pack.main(parse(pack.Config, [str(folder / "train"), str(packed), *flags]))
    return open_data(str(packed), "train", "", print)


def packed_small(folder):
    """packed_source of what PixMIM's crop begins with."""
    return packed_source(folder, "--short-side", "224", "--resample", "bilinear")


class TimmViews(Dataset):
    """timm's input of fine-tuning, with RandAugment and no erasing."""

    def __init__(self, folder):
        need("timm")
        from timm.data import create_transform
        self.source = ImageFolder(folder, "train")
        self.transform = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1",
                                          re_prob=0.0, interpolation="bicubic", color_jitter=None)

    def __getitem__(self, index):
        image = self.source.open(index).convert("RGB")
        while True:
            try:
                return self.transform(image)
            except ValueError:                                          # posterize to 0 bits: Pillow refuses
                pass


PIPELINES = {                                                           # the first of each is the baseline
    "pre-training": {
        "torchvision": lambda folder: (torchvision_folder(folder, SIZE), default_collate),
        "mff_min, JPEG, random_resized": lambda folder: (our_views(folder, "random_resized"), collate),
        "mff_min, JPEG, simple": lambda folder: (our_views(folder, "simple"), collate),
        "mff_min, packed, random_resized":
            lambda folder: (our_views(folder, "random_resized", packed_source(folder)), collate),
        "mff_min, packed, simple":
            lambda folder: (our_views(folder, "simple", packed_small(folder)), collate)},
    "fine-tuning, RandAugment": {
        "timm": lambda folder: (TimmViews(folder), default_collate),
        "mff_min, JPEG": lambda folder: (our_views(
            folder, "inception", augment=functools.partial(rand_augment, magnitude=9.0)), collate)},
}


def bench_pipelines(name, folder, options, budget, world):
    """The group of one stage's input: each pipeline's images per second."""
    count, samples, problems = options.images, {}, {}
    for who, build in PIPELINES[name].items():
        try:
            samples[who] = worker_clock(*build(folder), count)
        except FAILURES as problem:
            problems[who] = reason_of(problem)
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
    source, ops, size = source or ImageFolder(folder, "train"), pick_ops("auto", device), (case.img_size,) * 2
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    views = Views(source, "random_resized", size, 3, case.num_patches, 0)
    stream = Stream(len(source), batch, batch, 0, 0, 10 ** 9)
    for found in make_loader(views, stream, workers, device.type == "cuda"):
        pixels = found["image"].to(device, non_blocking=True)
        yield ops.prepare(pixels, mean, std), found["noise"].to(device, non_blocking=True)


def torchvision_batches(folder, case, batch, workers, device):
    """Batches as facebookresearch/mae gets them."""
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
