"""Views of a source's images, and the loader that makes batches of them.

How a sample is cropped and which of its patches are masked are pure functions of (seed, epoch, index), so
nothing depends on the number of workers or ranks. Which sample is seen when: mff_min/stream.py.

Shapes: B images, C H W, L patches.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from functools import cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mff_data import crops
from mff_data.decode import DECODE_ERRORS, reason_of
from mff_data.outages import Patience
from mff_data.sources import ImageFiles, spread
from mff_min import augment, rng
from mff_min.errors import STOP_SIGNALS, Fault, UserError, amount, printable, shared_memory


class Views(Dataset):
    """Random views of a source. An item is asked for by (epoch, index), and is a function of it and the seed.

    It holds image (C, H, W) uint8, its label, noise (num_noise,), which random_masking or drop path takes,
    and bad, the (name, reason) of every file that could not be read; such a file is replaced by another one
    chosen by (seed, epoch, index). augment(image, rng) changes the crop, a Pillow image. With reprob > 0 it
    also holds what augment.erase takes: erase, a box that is empty but with that probability, and erase_key.
    Raises UserError for a pack whose images are smaller than the crop, and for images of other channels.
    """

    def __init__(self, source, crop, size, in_chans, num_noise, seed, augment=None, reprob=0.0):
        needed = min(crops.cut_from(size) if crop == "evaluation" else size)
        if 0 < source.short_side < needed:
            raise UserError(f"the pack has images of short side {source.short_side}, and the crop {crop} of "
                            f"{size[0]}x{size[1]} needs {needed}: expected a smaller --img-size, or a pack "
                            f"made with a larger --short-side")
        check_fit(source, in_chans)
        self.source, self.crop, self.size, self.seed = source, crop, size, seed
        self.in_chans, self.num_noise, self.augment, self.reprob = in_chans, num_noise, augment, reprob
        self.patience = Patience(source, self.load)

    @property
    def item_bytes(self):
        """Bytes of an item in a batch: its pixels and its noise."""
        return self.in_chans * math.prod(self.size) + 4 * self.num_noise

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a micro-batch, which is what a loader asks for: their noise is drawn together."""
        streams = rng.hash_keys(self.seed, rng.MASK, *np.array(keys).T)
        noise = rng.numbers(streams, self.num_noise).astype(np.float32)     # (keys, num_noise)
        return [self.item(*key, row) for key, row in zip(keys, torch.from_numpy(noise), strict=True)]

    def item(self, epoch, index, noise):
        """What is asked for by (epoch, index), with its noise (num_noise,)."""
        item = self.read(epoch, index) | dict(noise=noise)
        if self.reprob:
            box = augment.erasing_box(*self.size, rng.Rng(self.seed, rng.ERASE, epoch, index), self.reprob)
            key = rng.int64_key(self.seed, rng.NOISE, epoch, index)
            item |= dict(erase=box, erase_key=key)
        return item

    def read(self, epoch, index):
        """What view gives of the image at index, or of another one, and what was bad before it.

        A disk that does not answer is waited for: outages.py.
        """
        bad, shown = [], index

        def show():
            return self.view(*self.load(shown), epoch, index) | dict(bad=bad)
        for attempt in range(20):
            try:
                return self.patience.read(shown, show)
            except DECODE_ERRORS as error:
                name = getattr(error, "file", None) or self.source.name(shown)
                bad.append((name, reason_of(error, name)))
                draws = rng.Rng(self.seed, rng.REPLACE, epoch, index)
                shown = [draws.integer(0, len(self.source)) for _ in range(attempt + 1)][-1]
        name, reason = bad[-1]
        raise Fault(f"20 images in a row cannot be read; the last is {printable(name)} ({reason})")

    def load(self, shown):
        """(image, label) at an index of the source: Pillow's, which may not be decoded yet, or an array.

        An error that is about another file than the image has its name as `file`.
        """
        return crops.to_mode(self.source.open(shown), self.in_chans), self.source.label(shown)

    def view(self, image, label, epoch, index):
        """What an item holds of a loaded image: image, the crop of it, and label."""
        draws = rng.Rng(self.seed, rng.CROP, epoch, index)
        crop = crops.CROPS[self.crop](image, self.size, draws)          # (H, W, C)
        if self.augment:
            crop = self.augment(crops.to_pillow(crop), rng.Rng(self.seed, rng.AUGMENT, epoch, index))
            crop = np.array(crops.to_array(crop))                       # (H, W, C)
        return dict(image=torch.from_numpy(crop).permute(2, 0, 1), label=label)


def check_fit(source, in_chans):
    """Raise UserError where none of some images has channels that can become in_chans."""
    wrong = ""
    for i in spread(len(source)):
        try:
            crops.to_mode(source.open(i), in_chans)
            return
        except crops.WrongChannels as error:
            wrong = wrong or f"{printable(source.name(i))}: {error}"
        except DECODE_ERRORS:                                           # the run counts and names it
            pass
    if wrong:
        raise UserError(wrong)


def collate(items):
    """Stack the items.

    `bad` becomes one flat list; `replaced` (B,) marks items whose own file could not be read.
    image is (B, C, H, W) with a pixel's channels side by side, as they are in files: none is moved twice. A
    label may be a mask of uint8: all are of one size. boxes, labels and masks of objects stand one behind the
    other, and count (B,) is how many an item has.
    """
    columns = {name: [item[name] for item in items] for name in items[0]}
    bad, noise, images = columns.pop("bad"), torch.stack(columns.pop("noise")), columns.pop("image")
    masks = columns.pop("label") if isinstance(columns.get("label", [0])[0], torch.Tensor) else []
    objects = {name: columns.pop(name) for name in ("boxes", "labels", "masks") if name in columns}
    C, H, W = images[0].shape
    of_masks = sum(mask.nbytes for mask in [*masks, *objects.get("masks", ())])
    with room_for(len(images) * C * H * W + noise.nbytes + of_masks):
        pixels = blank(len(images), H, W, C)                            # (B, H, W, C)
        if masks:
            columns["label"] = torch.stack(masks, out=blank(len(masks), *masks[0].shape))
        if objects:
            columns["count"] = [len(labels) for labels in objects["labels"]]
            room = blank(sum(columns["count"]), *objects["masks"][0].shape[1:])
            columns["masks"] = torch.cat(objects["masks"], out=room)
            columns |= {name: torch.cat(objects[name]) for name in ("boxes", "labels")}
        if get_worker_info() and noise.nbytes:
            noise.share_memory_()       # else a thread of the worker does, and an error there loses the batch
    for row, image in zip(pixels, images, strict=True):
        row[:] = image.permute(1, 2, 0)
    batch = {name: torch.as_tensor(values) for name, values in columns.items()}
    return batch | dict(image=pixels.permute(0, 3, 1, 2), noise=noise,
                        replaced=torch.tensor([len(found) > 0 for found in bad]),
                        bad=[entry for found in bad for entry in found])


def blank(*shape):
    """Zeros of this shape, uint8: in a worker in memory that the trainer shares, which saves a copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))        # as default_collate has it; all zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


@contextlib.contextmanager
def room_for(needed):
    """A context in which a batch takes so many bytes of shared memory. Raises Fault where it has no room."""
    try:
        yield
    except RuntimeError as error:
        if "unable to allocate shared memory" not in str(error):
            raise
        text = shared_memory(f"a batch of {amount(needed)} has no room beside those that wait")
        raise Fault(text) from None


def begin_worker(worker):
    """What a new worker does first: a signal to the whole group must not end the last step's supply.

    A batch or an error that cannot be sent to the trainer ends the worker, since the trainer waits for it. So
    does the trainer's end: a worker that waits to send something to it would never notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                      # PR_SET_PDEATHSIG
    trainer, by_fork = multiprocessing.parent_process(), multiprocessing.get_start_method() == "fork"
    if os.getppid() != trainer.pid if by_fork else not trainer.is_alive():
        os._exit(1)                                                     # it ended before
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error, unsent):
    """What a worker's queue does where it cannot send (number, batch or error): say so and end the worker."""
    traceback.print_exception(error)
    sys.stderr.write(getattr(unsent[1], "exc_msg", ""))                 # an error's own traceback
    sys.stderr.flush()
    os._exit(1)


def kill_workers():
    """Kill the daemons of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                       # PyTorch's raises at a killed worker
    # The process ends: PyTorch must not wait for a lock that a killed worker held.
    torch.utils.data._utils.python_exit_status = True
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@cache
def end_workers_at_exit(process):
    """This process kills its workers at its end: Python waits for them, and they ignore its SIGTERM."""
    multiprocessing.util.Finalize(None, kill_workers, exitpriority=0)


def advice_if_late(source, workers):
    """What would help a run that waits for its data."""
    if not workers:
        return "--workers, as many as there are cores for this process, would help"
    in_packs = not (hasattr(source, "open_mask") or hasattr(source, "objects"))
    if isinstance(source, ImageFiles) and in_packs:
        return "data packed by tools.pack would help, or more --workers"
    return "more --workers would help"


def check_shared_memory(views, stream, workers):
    """Raise UserError where /dev/shm is too small for the batches of these workers; warn where it may be.

    Every worker makes one before the trainer has ended its first step, which is the slowest: without room for
    these no run can begin. Later each may have two that wait, and the trainer has one and takes another.
    """
    try:
        space = shutil.disk_usage("/dev/shm")
    except FileNotFoundError:                                           # another system: nothing is known
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                  # they share it
    batch, room = len(next(iter(stream), [])) * views.item_bytes, min(space.free, space.total // ranks)
    least, most = (min(count, len(stream)) * batch for count in (workers, 2 * workers + 2))
    if not space.total or most <= room:                                 # a total of 0 is one without a limit
        return
    within = multiprocessing.active_children()                          # an evaluation in the middle of a run
    needs = f"a batch takes {amount(batch)}, of which {workers} workers"
    needs += f" on each of {ranks} processes" * (ranks > 1)
    if least > room:
        raise (Fault if within else UserError)(shared_memory(f"{needs} hold {least // batch} or more"))
    if not within and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        warn_once(shared_memory(f"{needs} hold up to {most // batch}"))


@cache
def warn_once(text):
    """Print a warning, but not for every loader of a run."""
    print(f"warning: {text}", flush=True)


def make_loader(views, stream, workers, pin_memory, timeout=0.0):
    """A DataLoader over the stream, one thread per worker; timeout: seconds to wait for them, or 0.

    So a disk that does not answer is waited for less long, and named, before the trainer or another rank
    gives up. Raises UserError where shared memory is certain to be too small for the workers.
    """
    if timeout:
        views.patience.limit = 0.75 * timeout
    if workers:
        check_shared_memory(views, stream, workers)
        end_workers_at_exit(os.getpid())
    return DataLoader(views, batch_sampler=stream, num_workers=workers, collate_fn=collate,
                      worker_init_fn=begin_worker, timeout=timeout if workers else 0,
                      pin_memory=pin_memory, persistent_workers=False, prefetch_factor=2 if workers else None,
                      generator=torch.Generator().manual_seed(0))       # else it draws from the global one
