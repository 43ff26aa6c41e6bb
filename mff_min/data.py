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
from mff_min.augment import CROPS, to_mode
from mff_min.runtime import Fault

# What Pillow raises on damaged files, seen by feeding it mutated ones: anything but OSError alone.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
                 OverflowError, ZeroDivisionError, RuntimeError, struct.error, Image.DecompressionBombError)


class Views(Dataset):
    """Random views of a source. An item is asked for by (epoch, index), and is a function of it and the seed.

    It holds image (C, H, W) uint8, its label, noise (L,) for random_masking, and bad, the (name, reason) of
    every file that could not be read; such a file is replaced by another one chosen by (seed, epoch, index).
    """

    def __init__(self, source, crop, size, in_chans, num_patches, seed):
        self.source, self.crop, self.size, self.seed = source, crop, size, seed
        self.in_chans, self.num_patches = in_chans, num_patches

    def __getitem__(self, key):
        epoch, index = key
        image, label, bad = self.read(epoch, index)
        crop = CROPS[self.crop](image, self.size, rng.Rng(self.seed, rng.CROP, epoch, index))
        noise = rng.Rng(self.seed, rng.MASK, epoch, index).random(self.num_patches)
        pixels = torch.tensor(np.asarray(crop)).reshape(*self.size, -1)     # (H, W, C)
        pixels = pixels.permute(2, 0, 1)                                # (C, H, W)
        return dict(image=pixels, label=label, noise=torch.tensor(noise, dtype=torch.float32), bad=bad)

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
    """

    def __init__(self, num_samples, global_batch, batch_size, seed, start, stop, rank=0, world_size=1):
        self.num_samples, self.global_batch, self.batch_size = num_samples, global_batch, batch_size
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
        return epoch, int(self.order(epoch)[offset])


def collate(items):
    """A batch: image (B, C, H, W) uint8, label (B,), replaced (B,) where bad names it, noise (B, L), bad."""
    return dict(image=torch.stack([item["image"] for item in items]),
                label=torch.tensor([item["label"] for item in items]),
                replaced=torch.tensor([len(item["bad"]) > 0 for item in items]),
                noise=torch.stack([item["noise"] for item in items]),
                bad=[entry for item in items for entry in item["bad"]])


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
