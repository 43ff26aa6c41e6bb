"""The order in which a source's images are seen, their views, and the loader.

Which sample is seen when, how it is cropped and which of its patches are masked are pure functions of (seed,
epoch, index), so nothing depends on the number of workers or ranks, and a run resumes anywhere.

Shapes: B images, C H W, L patches.
"""

import signal
import struct
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from mff_min import rng
from mff_min.augment import CROPS, erasing_box, to_mode
from mff_min.runtime import Fault

# What Pillow raises on damaged files, seen by feeding it mutated ones: anything but OSError alone.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
                 OverflowError, ZeroDivisionError, RuntimeError, struct.error, Image.DecompressionBombError)


class Views(Dataset):
    """Random views of a source. An item is asked for by (epoch, index), and is a function of it and the seed.

    It holds image (C, H, W) uint8, its label, noise (num_noise,), which random_masking or drop path takes,
    and bad, the (name, reason) of every file that could not be read; such a file is replaced by another one
    chosen by (seed, epoch, index). augment(image, rng) changes the crop, a Pillow image. With reprob > 0 it
    also holds what augment.erase takes: erase, a box that is empty but with that probability, and erase_key.
    """

    def __init__(self, source, crop, size, in_chans, num_noise, seed, augment=None, reprob=0.0):
        self.source, self.crop, self.size, self.seed = source, crop, size, seed
        self.in_chans, self.num_noise, self.augment, self.reprob = in_chans, num_noise, augment, reprob

    def __getitem__(self, key):
        epoch, index = key
        image, label, bad = self.read(epoch, index)
        crop = CROPS[self.crop](image, self.size, rng.Rng(self.seed, rng.CROP, epoch, index))
        if self.augment:
            crop = self.augment(crop, rng.Rng(self.seed, rng.AUGMENT, epoch, index))
        noise = rng.Rng(self.seed, rng.MASK, epoch, index).random(self.num_noise)
        pixels = torch.tensor(np.asarray(crop)).reshape(*self.size, -1)     # (H, W, C)
        pixels = pixels.permute(2, 0, 1)                                # (C, H, W)
        item = dict(image=pixels, label=label, noise=torch.tensor(noise, dtype=torch.float32), bad=bad)
        if self.reprob:
            box = erasing_box(*self.size, rng.Rng(self.seed, rng.ERASE, epoch, index), self.reprob)
            key = rng.int64_key(self.seed, rng.NOISE, epoch, index)
            item |= dict(erase=torch.tensor(box), erase_key=torch.tensor(key))
        return item

    def read(self, epoch, index):
        """(Pillow image, label, bad): of the image at index, or of another one and what was bad before it."""
        bad, replacements = [], rng.Rng(self.seed, rng.REPLACE, epoch, index)
        for _ in range(20):
            try:
                return to_mode(self.source.open(index), self.in_chans), self.source.label(index), bad
            except DECODE_ERRORS as error:
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "not an image" if unknown else f"{type(error).__name__}: {error}"
                bad.append((self.source.name(index), reason))
                index = replacements.integer(0, len(self.source))
        raise Fault(f"20 images in a row cannot be read; the last is {bad[-1][0]} ({bad[-1][1]})")


class Stream:
    """The samples of this rank's micro-batches, from step `start` to step `stop`: lists of (epoch, index).

    The epochs' permutations stand one behind the other, and step s takes the global_batch samples from
    position s * global_batch on: every sample is seen once in every epoch, batches are always full, and no
    epoch has a tail. Ranks take equal runs of the global batch, and micro-batches equal runs of a rank's
    share.

    With repeats > 1 an epoch shows that many views of each image side by side, and as many fewer images
    (repeated augmentation, arXiv 1901.09335, with epochs as short as DeiT's): views of one image differ in
    their first number, epoch * repeats + view.
    """

    def __init__(self, num_samples, global_batch, batch_size, seed, start, stop, rank=0, world_size=1,
                 repeats=1):
        self.num_samples, self.global_batch, self.batch_size = num_samples, global_batch, batch_size
        self.repeats = repeats
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.order = lru_cache(maxsize=2)(lambda epoch: rng.permutation(num_samples, seed, rng.ORDER, epoch))

    def __len__(self):
        return (self.stop - self.start) * (self.global_batch // (self.batch_size * self.world_size))

    def __iter__(self):
        share = self.global_batch // self.world_size
        for step in range(self.start, self.stop):
            first = step * self.global_batch + self.rank * share
            for position in range(first, first + share, self.batch_size):
                yield [self.sample(p) for p in range(position, position + self.batch_size)]

    def sample(self, position):
        """(epoch, index) of one position of the endless stream."""
        epoch, offset = divmod(position, self.num_samples)
        place, view = divmod(offset, self.repeats)
        return epoch * self.repeats + view, int(self.order(epoch)[place])


def each_once(count, batch_size, world):
    """Batches of (epoch 0, index) for this rank: every index below count is in one batch of one rank."""
    share = [(0, i) for i in range(world.rank, count, world.size)]
    return [share[first:first + batch_size] for first in range(0, len(share), batch_size)]


def collate(items):
    """A batch of what Views gives: bad and replaced (B,), where bad names the image; the rest is stacked."""
    batch = dict(label=torch.tensor([item["label"] for item in items]),
                 replaced=torch.tensor([len(item["bad"]) > 0 for item in items]),
                 bad=[entry for item in items for entry in item["bad"]])
    stacked = [name for name in items[0] if name not in batch]
    return batch | {name: torch.stack([item[name] for item in items]) for name in stacked}


def leave_signals_to_the_trainer(worker):
    """What a new worker does first: a signal to the whole group must not end the last step's supply."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_loader(views, stream, workers, pin_memory):
    """A DataLoader over the stream, with one thread a worker."""
    return DataLoader(views, batch_sampler=stream, num_workers=workers, collate_fn=collate,
                      worker_init_fn=leave_signals_to_the_trainer,
                      pin_memory=pin_memory, persistent_workers=False, prefetch_factor=4 if workers else None,
                      generator=torch.Generator().manual_seed(0))       # else it draws from the global one
