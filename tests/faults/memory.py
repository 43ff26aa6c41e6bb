"""Promise 12: the memory of a loader does not grow, in the trainer and in its workers."""

import os
from pathlib import Path

import numpy as np
from faults.suite import Fault, Guard, Tally
from PIL import Image

from mff_data import views
from mff_data.sources import ImageFolder
from mff_data.views import Views, make_loader
from mff_min.stream import Stream

BATCH, SIDE, NOISE, WARM_UP = 2, 32, 1024, 200


def folder_of_images(root):
    """Two classes of 16 images, and one file among them that cannot be read."""
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(16):
            pixels = np.random.default_rng(i).integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{('jpg', 'png')[k]}")
    (root / "a" / "torn.jpg").write_bytes(b"torn")
    return root


def private_memory(process):
    """Bytes that a process has in memory and shares with no other: what it had at its fork does not count."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def loader_memory(folder, quick):
    """What 2,000 batches leave behind is less than the smaller tensor, image or noise, of each of them."""
    root, tally, grown = folder_of_images(folder / "data"), Tally(), {}
    count = 500 if quick else 2_000
    for workers in (0, 2):
        views = Views(ImageFolder(root, "train"), "random_resized", (SIDE, SIDE), 3, NOISE, 0)
        stream = Stream(len(views.source), BATCH, BATCH, 0, 0, count)
        batches, before = iter(make_loader(views, stream, workers, False)), {}
        for i, batch in enumerate(batches):
            least = min(batch[name].nbytes for name in ("image", "noise"))
            if i + 1 in (WARM_UP, count - 10):                          # while the workers are alive
                children = [worker.pid for worker in getattr(batches, "_workers", [])]
                now = {process: private_memory(process) for process in (os.getpid(), *children)}
                before = before or now
        for process, bytes_now in now.items():
            growth, bound = bytes_now - before[process], least * (count - 10 - WARM_UP)
            who = f"{'trainer' if process == os.getpid() else 'worker'}, {workers} workers"
            grown[who] = max(growth, grown.get(who, growth))
            tally.note("" if growth < bound else f"{who}: {growth} bytes more; to keep the smaller tensor of "
                                                 f"each batch is {bound}")
    return tally.outcome(batches=count, most_grown_bytes=grown)


FAULTS = [Fault("2,000 batches of a loader", 12, loader_memory)]


# ---------------------------------------------------------------- the guards


def keep_what_was_shown():
    """A cache that nobody empties, as sources have that keep what they decoded."""
    kept, view = [], views.Views.view

    def keeping(self, *loaded):
        kept.append(view(self, *loaded))
        return kept[-1] | {"image": kept[-1]["image"].clone()}
    views.Views.view = keeping


GUARDS = [Guard("nothing-kept-of-a-batch", "2,000 batches of a loader", keep_what_was_shown)]
