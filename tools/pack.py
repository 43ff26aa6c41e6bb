"""Pack a folder of images into one memory-mapped file per split, so that no image is decoded again and again.

    python -m tools.pack IMAGENET PACK                              the shorter side at 256 pixels
    python -m tools.pack IMAGENET PACK --short-side 224 --resample bilinear   what --crop simple shows at 224
    python -m tools.pack IMAGENET PACK --verify                     read a pack again: every checksum

Then --data PACK is read as IMAGENET was: the same images in the same order, with the same labels and names.
It may be stopped at any time: the same line goes on, to the same bytes. Given once more, it says whether the
folder has changed since. docs/data.md, "Packing", says what is stored.
"""

import contextlib
import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from mff_data.decode import DECODE_ERRORS, DataFlags, reading_of, reason_of
from mff_data.packed import (
    Journal,
    Packed,
    check_own,
    check_same,
    encode,
    files_of,
    journal_of,
    open_packed,
    plan_of,
)
from mff_data.sources import ImageFiles, describe_files, open_data
from mff_data.views import begin_worker, check_fit, end_workers_at_exit
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import Fault, UserError, amount, printable
from mff_run.files import check_lock, lock
from mff_run.jsonfile import misfit, read_lines
from mff_run.process import Interrupted, StopSignals, leave, run
from mff_run.progress import Progress
from mff_run.world import World

MOST_LINE = 2 ** 28                                                     # of a journal: it names every image
BLOCK = 256                                                             # images that are flushed together
HERE = World(0, 1, 0, torch.device("cpu"))                              # progress lines ask who prints them
KEPT = "what is packed is kept, and the same line goes on from there"


@dataclass(frozen=True)
class Config(DataFlags):
    # these change the result
    source: str = opt(REQUIRED, "images: a folder as --data of the stages takes it, list:DIR or cars:DIR")
    output: str = opt(REQUIRED, "the folder for train.pack and val.pack")
    short_side: int = opt(256, "pixels of the shorter side; 0: keep every image as it is", least=0)
    resample: str = opt("bicubic", "how Pillow resizes", choices=["bicubic", "bilinear"])
    in_chans: int = opt(3, "channels that are stored; but for 1, 3 and 4, of .npy arrays (H, W, C)", above=0)

    # these change only how it is reached
    workers: int = knob(0, "processes that decode and resize", least=0, most=1024)
    max_bad: float = knob(0.01, "share of the images that may be unreadable in a finished pack", least=0)
    verify: bool = knob(False, "read a finished pack and check every record; write nothing")


class Records(Dataset):
    """(record, height, width, reason) of a folder's images; of one that cannot be read the reason alone."""

    def __init__(self, source, settings):
        self.source, self.settings = source, settings

    def __getitem__(self, i):
        name = self.source.name(i)
        try:
            return *encode(self.source, i, self.settings), ""
        except DECODE_ERRORS as error:
            broken_link = os.path.islink(name) and not os.path.exists(name)
            if isinstance(error, OSError) and error.errno and not broken_link:
                # The system's error, not the image's: a disk that went away must not end as a pack of holes.
                raise Fault(f"{printable(name)}: {error.strerror}; {KEPT}") from None
            return b"", 0, 0, reason_of(error, name)


def main(cfg):
    """Pack both splits, or verify them; returns the paths of their files."""
    check_ranges(cfg)
    if cfg.verify:
        return verify(cfg.output, reading_of(cfg).max_pixels)
    try:
        return pack(cfg)
    except OSError as error:
        what = f"{printable(str(error.filename or cfg.output))}: {error.strerror or error}"
        raise Fault(f"{what}; {KEPT}") from None
    except KeyboardInterrupt as error:
        leave("stopped: interrupted; the same line goes on from there", 128 + (error.args or (2,))[0])


def pack(cfg):
    output = Path(cfg.output)
    settings = dict(short_side=cfg.short_side, resample=cfg.resample, in_chans=cfg.in_chans, white=cfg.white,
                    max_pixels=cfg.max_pixels)
    if cfg.source.partition(":")[0] in ("shapes", "cifar10", "cifar100"):
        raise UserError(f"{cfg.source} is no folder of images and needs no pack: expected a folder, list:DIR "
                        f"or cars:DIR")
    splits = ("val", "train")                                           # train.pack is written last
    sources = {split: open_data(cfg.source, split, "", say, reading_of(cfg)) for split in splits}
    if not isinstance(sources["train"], ImageFiles):
        raise UserError(f"{cfg.source} is a pack already: expected the images that it was made of")
    if not sources["val"].is_split:
        del sources["val"]
        if (output / "val.pack").exists():
            raise UserError(f"{output} has a val.pack, and {cfg.source} has no val/ any more: expected "
                            f"another folder to write to")
    describe_files(say, sources["train"], *sources.values())
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = lock(output, say)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    with held:
        return pack_splits(cfg, settings, sources, output, dataclasses.replace(HERE, held=[held]))


def pack_splits(cfg, settings, sources, output, here):
    """Write the pack of each source, where it is not there; the folder is ours alone."""
    paths, journals = {split: output / f"{split}.pack" for split in sources}, {}     # train.pack is last
    for split, path in paths.items():
        plan = dict(settings=settings, files=files_of(sources[split]))
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to what is not there (is a disk not mounted?): expected a "
                            f"pack, or none: remove it to pack anew")
        if path.exists():
            check_same(path, plan_of(path), plan)
            journal_of(path).unlink(missing_ok=True)                    # killed when it was done
            say(f"{path} is there already")
        else:
            check_fit(sources[split], cfg.in_chans)
            journals[split] = Journal(path, plan, lines_of(journal_of(path)))
    announce(sources, journals, settings, output)

    for split, journal in journals.items():
        source = sources[split]
        write_records(source, journal, cfg.workers, settings, here)
        unread = sum(bool(reason) for *_, reason in journal.entries)
        if unread > cfg.max_bad * len(source):
            raise Fault(f"{unread} of {len(source)} images cannot be read, more than --max-bad {cfg.max_bad} "
                        f"allows; {journal.path} names the reason of each, and a larger --max-bad goes on")
        check_lock(output, here)
        journal.finish(source.labels["class"], source.classes, split if source.is_split else "")
        say(f"{paths[split]}: {len(source)} images of {len(source.classes)} classes, "
            f"{amount(paths[split].stat().st_size)}; {unread} cannot be read")
    return list(paths.values())


def lines_of(journal):
    """(bytes, value) of the whole lines of a pack's journal. UserError where Journal has not written them."""
    found = []
    if os.path.lexists(journal):
        check_own(journal)
    for number, text, value in read_lines(journal, MOST_LINE, 4 * MOST_LINE) if journal.exists() else ():
        torn = not text.endswith(b"\n") and (found or FIRST.startswith(text[:len(FIRST)]))
        problem = not torn and misfit(value, [is_entry] if found else PLAN)
        if problem:
            raise UserError(f"{journal} is damaged, or not what tools.pack writes: remove it and its "
                            f".partial to pack anew; line {number} holds {problem}")
        found += [(text, value)] * (not torn)                           # a crash tears the last line
    return found


def is_file(value):
    """[path, bytes]"""
    return isinstance(value, list) and list(map(type, value)) == [str, int]


def is_entry(value):
    """[bytes, height, width, CRC-32, reason]"""
    return (isinstance(value, list) and list(map(type, value)) == [int, int, int, int, str]
            and min(value[:4]) >= 0)


PLAN, FIRST = {"settings": dict, "files": [is_file]}, b'{"settings":'   # the first line of a journal


def say(text):
    """Print a line."""
    print(text, flush=True)


def announce(sources, journals, settings, output):
    """Say how large the packs will be. Raises UserError where the disk is too small for what is missing."""
    needed = 0
    for split, journal in journals.items():
        records, count = Records(sources[split], settings), len(sources[split])
        some = range(0, count, -(-count // 256))                        # spread over the classes
        total = sum(len(records[i][0]) for i in some) / len(some) * count
        done = len(journal.entries)
        say(f"{split}: {count} images, about {amount(total)}; {done} are packed already")
        needed += total * (count - done) / count
    free = shutil.disk_usage(output).free
    if needed > free:
        for journal in journals.values():
            journal.discard_empty()
        raise UserError(f"{output} needs about {amount(needed)} more, and {amount(free)} are free: expected "
                        f"a smaller --short-side, or another disk")


def write_records(source, journal, workers, settings, here):
    """Write the records that are missing, block by block, while the folder is still ours.

    A signal ends the process, once what came before it is written.
    """
    first, count = len(journal.entries), len(source)
    end_workers_at_exit(os.getpid())
    loader = DataLoader(Records(source, settings), batch_size=None, sampler=range(first, count),
                        num_workers=workers, collate_fn=unchanged, generator=torch.Generator(),
                        worker_init_fn=begin_worker, prefetch_factor=64 if workers else None)
    progress = Progress(count, first, here, every=5.0, text=journal.pack.name)
    block = []
    with StopSignals() as signals:
        signals.start()
        records = iter(loader)
        for i in range(first + 1, count + 1):
            with contextlib.suppress(Interrupted), signals.interrupting():      # the source may hang
                block.append(next(records))
            if block and (len(block) == BLOCK or i == count or signals.number):
                check_lock(journal.pack.parent, here)
                journal.add(block)
                block = []
                progress.tick(i)
            if i == count:
                del records                                             # ends its workers: nothing may cut in
            if signals.number:
                leave(f"stopped: signal {signals.number}; {KEPT}", 128 + signals.number)


def unchanged(record):
    """What a worker hands over, as it is: bytes stay bytes."""
    return record


def verify(spec, most):
    """Read every record of a folder's packs. UserError with how many are altered, and the first of them."""
    train = open_packed(spec, "train", most)
    if not train:
        raise UserError(f"{spec} holds no pack: expected a folder that tools.pack wrote")
    paths = sorted(train.path.parent.glob("*.pack"))
    for path in paths:
        source, altered = Packed(path, "", most), []
        progress = Progress(len(source), 0, HERE, every=5.0, text=path.name)
        for i in range(len(source)):
            try:
                source.record(i)
            except ValueError as error:
                if str(i) not in source.header["bad"]:
                    altered.append(f"{printable(source.name(i))}: {error}")
            progress.tick(i + 1)
        if altered:
            raise UserError(f"{len(altered)} of {len(source)} images are altered, first {altered[0]}")
        unread = len(source.header["bad"])
        say(f"{path}: {len(source)} images, every checksum is right; {unread} could not be read when packed")
    return paths


if __name__ == "__main__":
    run(main, parse(Config))
