"""Sources, the stream of samples, crops, and what becomes of files that are damaged or unusual."""

import contextlib
import json
import math
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults.signals import gone
from faults.suite import Child
from images import furthest, noise_image
from PIL import Image
from torch.utils.data import _utils

from mff_data import views
from mff_data.crops import (
    center,
    cut_from,
    evaluation,
    random_resized,
    random_resized_box,
    resize_to_cover,
    simple,
    to_mode,
)
from mff_data.decode import Reading, eight_bits
from mff_data.sources import ImageFolder, open_data
from mff_data.views import Views, advice_if_late, make_loader
from mff_min.errors import Fault, UserError
from mff_min.rng import CROP, MASK, Rng, hash64, hash_int, hash_keys, numbers, permutation
from mff_min.stream import Stream
from mff_run.log import BadSamples
from mff_run.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images of different sizes in each of train and val."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                noise_image(40 + i, 50 - i, seed=i).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


# ---------------------------------------------------------------- random numbers


def test_splitmix64_is_the_published_generator():
    state = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)   # the first outputs from state 0
    want = ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    assert [hex(value) for value in hash64(state)] == want
    assert [hex(hash_int(int(value))) for value in state] == want
    most = [0, 1, 2 ** 32, 2 ** 63, 2 ** 64 - 1]
    assert [hash_int(value) for value in most] == hash64(np.array(most, np.uint64)).tolist()


def test_random_numbers_depend_on_the_key_alone():
    assert np.array_equal(Rng(1, 2, 3).random(5), Rng(1, 2, 3).random(5))
    one = Rng(1, 2, 3)
    assert np.array_equal(np.concatenate([one.random(2), one.random(3)]), Rng(1, 2, 3).random(5))
    singly = Rng(1, 2, 3)                                               # hashed as Python ints
    assert [singly.number() for _ in range(5)] == Rng(1, 2, 3).random(5).tolist()
    assert singly.random(3).tolist() == Rng(1, 2, 3).random(8)[5:].tolist()
    keys = (1, 2, 3), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, CROP), (0, MASK)
    draws = [Rng(*key).random(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_many_keys_at_once_have_the_numbers_of_each():
    epochs, indices = np.array([0, 1, 2 ** 40]), np.array([5, 0, 7])
    keys = hash_keys(2 ** 63 - 1, MASK, epochs, indices)
    alone = [Rng(2 ** 63 - 1, MASK, int(e), int(i)) for e, i in zip(epochs, indices, strict=True)]
    assert numbers(keys, 6).tolist() == [source.random(6).tolist() for source in alone]


def test_random_numbers_are_uniform():
    draws = np.stack([Rng(7, i).random(64) for i in range(2000)])       # (2000, 64)
    error = 1 / math.sqrt(12 * draws.size)
    assert abs(draws.mean() - 0.5) < 4 * error
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi2 = ((counts - draws.size / 20) ** 2 / (draws.size / 20)).sum()
    assert chi2 < 43.8                                                  # 99.9 % of 19 degrees of freedom
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 4 / math.sqrt(len(draws))
    assert {Rng(7, i).integer(3, 6) for i in range(100)} == {3, 4, 5}


# ---------------------------------------------------------------- the stream


def samples(stream):
    return [sample for batch in stream for sample in batch]


def test_every_sample_is_seen_once_an_epoch_and_batches_are_always_full():
    stream = Stream(num_samples=10, global_batch=4, batch_size=2, seed=0, start=0, stop=10)
    seen = samples(stream)
    assert [len(batch) for batch in stream] == [2] * 20 == [2] * len(stream)
    for epoch in range(4):
        assert sorted(index for e, index in seen if e == epoch) == list(range(10))
    orders = [tuple(index for e, index in seen if e == epoch) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert samples(Stream(10, 4, 2, seed=1, start=0, stop=10)) != seen


def test_a_later_start_continues_the_same_stream():
    whole = list(Stream(10, 4, 2, seed=5, start=0, stop=9))
    assert list(Stream(10, 4, 2, seed=5, start=3, stop=9)) == whole[6:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_and_micro_batches_share_out_the_same_global_batches(world_size, batch_size):
    def steps(batch_size, world_size):
        ranks = [samples(Stream(13, 8, batch_size, 3, 2, 7, rank, world_size)) for rank in range(world_size)]
        share = 8 // world_size
        return [sum((rank[i * share:(i + 1) * share] for rank in ranks), []) for i in range(5)]
    assert steps(batch_size, world_size) == steps(8, 1)


def test_fewer_samples_than_a_batch_are_seen_again_in_another_epoch():
    batch = next(iter(Stream(3, 8, 8, 0, 0, 1)))
    assert sorted(batch)[:3] == [(0, 0), (0, 1), (0, 2)] and len(set(batch)) == 8


def test_permutation_is_one_and_depends_on_its_key():
    order = permutation(1000, 1, 2)
    assert sorted(order) == list(range(1000)) and not np.array_equal(order, permutation(1000, 1, 3))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 4 / math.sqrt(1000)


def test_repeated_views_of_an_image_stand_side_by_side_and_each_has_its_own_key():
    batches = list(Stream(num_samples=9, global_batch=6, batch_size=6, seed=0, start=0, stop=3, repeats=3))
    keys = [key for batch in batches for key in batch]                  # 18 positions: two epochs of 9
    views = [keys[first:first + 3] for first in range(0, 18, 3)]
    for i, view in enumerate(views):
        epoch = i // 3
        assert len({index for _, index in view}) == 1
        assert [key for key, _ in view] == [3 * epoch, 3 * epoch + 1, 3 * epoch + 2]
    assert len(set(keys)) == 18 and len({view[0][1] for view in views[:3]}) == 3


@pytest.mark.parametrize("crop", ["random_resized", "simple"])
def test_workers_0_2_and_4_give_the_same_batches(folder, crop):
    views = Views(ImageFolder(folder, "train"), crop, (32, 24), 3, num_noise=12, seed=0)
    loaders = [make_loader(views, Stream(12, 6, 3, 0, 0, 4), workers, pin_memory=False)
               for workers in (0, 2, 4)]
    for alone, *helped in zip(*loaders, strict=True):
        assert all(torch.equal(alone[name], batch[name]) for batch in helped for name in ("image", "noise"))
        assert alone["image"].shape == (3, 3, 32, 24) and alone["image"].dtype == torch.uint8


MEMORY = "fewer --workers or a smaller --batch-size"


@pytest.fixture
def space(monkeypatch):
    """space(total, free): /dev/shm has so many bytes, as the loader sees it."""
    def set_space(total, free):
        monkeypatch.setattr(views.shutil, "disk_usage", lambda path: SimpleNamespace(total=total, free=free))
    views.warn_once.cache_clear()
    return set_space


def load(folder, workers, steps=4):
    """A loader of batches of 3 x (3 x 32 x 24 + 4 x 12) = 7,056 bytes; steps is how many there are."""
    views = Views(ImageFolder(folder, "train"), "random_resized", (32, 24), 3, num_noise=12, seed=0)
    return make_loader(views, Stream(12, 3, 3, 0, 0, steps), workers, pin_memory=False)


def test_a_shared_memory_that_holds_no_batch_for_each_worker_is_refused(folder, space, monkeypatch):
    for total, free in ((14_000, 14_000), (10 ** 9, 14_000)):
        space(total, free)
        with pytest.raises(UserError, match="0.0 MB free, and a batch takes 0.0 MB, of which 2 workers hold "
                                            "2 or more: .*--shm-size or --ipc=host.*" + MEMORY):
            load(folder, 2)
        load(folder, 0)
        load(folder, 2, steps=1)                                        # there is one batch in all
    space(20_000, 20_000)
    load(folder, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")                         # they share it
    with pytest.raises(UserError, match="of which 2 workers on each of 2 processes hold 2 or more"):
        load(folder, 2)
    monkeypatch.setattr(views.multiprocessing, "active_children", lambda: ["a trainer's worker"])
    with pytest.raises(Fault, match="hold 2 or more"):                  # in the middle of a run: no bad input
        load(folder, 2)


def test_a_shared_memory_that_may_be_too_small_is_a_warning_said_once(folder, space, capsys):
    space(6 * 7_056 - 1, 6 * 7_056 - 1)
    for _ in range(2):
        load(folder, 2, steps=9)
    said = capsys.readouterr().out
    assert said.startswith("warning: /dev/shm has 0.0 MB") and said.count("\n") == 1 and MEMORY in said
    assert "2 workers hold up to 6: " in said
    for total, free in ((6 * 7_056, 6 * 7_056), (0, 0)):                # 0 in all is one without a limit
        space(total, free)
        load(folder, 2, steps=9)
    assert not capsys.readouterr().out


def test_a_system_without_dev_shm_is_not_judged(folder, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)
    monkeypatch.setattr(views.shutil, "disk_usage", missing)
    load(folder, 2)


@pytest.mark.parametrize("reason", ["No space left on device (28)", "Success (0)"])         # the latter: 2.11
@pytest.mark.parametrize("owner, call", [(torch.UntypedStorage, "_new_shared"),
                                         (torch.Tensor, "share_memory_")])
def test_a_worker_without_shared_memory_says_what_a_batch_takes(folder, monkeypatch, owner, call, reason):
    def full(*arguments, **options):
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {reason}")
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(Fault, match="a batch of 0.0 MB has no room.*" + MEMORY):
        next(iter(load(folder, 1)))


@pytest.mark.parametrize("bad", ["error", "batch"])
def test_a_worker_that_cannot_send_something_ends_instead_of_losing_it(folder, monkeypatch, capfd, bad):
    class Nowhere(Exception):
        """A class that pickle finds in no module."""

    def read(views, epoch, index):
        if bad == "error":
            raise Nowhere("planted")
        return dict(image=torch.zeros(3, 32, 24, dtype=torch.uint8), label=0, bad=[("a", lambda: 0)])
    monkeypatch.setattr(Views, "read", read)
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        next(iter(load(folder, 1)))
    said = capfd.readouterr().err
    assert "t pickle" in said and ("Nowhere: planted" in said) == (bad == "error")


def test_a_process_ends_also_where_nobody_has_ended_its_workers(folder):
    def leave():
        batches = iter(load(folder, 2))
        batches.itself = batches                                        # no garbage before Python's exit
        next(batches)
        raise SystemExit(5)
    assert Child(leave).end(20).code == 5


def test_workers_that_begin_after_their_trainer_was_killed_end(folder, monkeypatch):
    set_up = _utils.signal_handling._set_worker_signal_handlers         # what a worker does first
    monkeypatch.setattr(_utils.signal_handling, "_set_worker_signal_handlers",
                        lambda: time.sleep(0.5) or set_up())

    def train():
        batches = iter(load(folder, 2))
        (folder / "workers.tmp").write_text(" ".join(str(worker.pid) for worker in batches._workers))
        (folder / "workers.tmp").rename(folder / "workers")
        os.kill(os.getpid(), signal.SIGKILL)
    assert Child(train).end(20).code == -signal.SIGKILL
    workers = [int(pid) for pid in (folder / "workers").read_text().split()]
    ended = gone(workers, 10)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)                                # else they would live for ever
    assert ended is not None


def test_workers_end_with_a_trainer_that_is_killed_also_when_they_wait_to_send_something(folder, monkeypatch):
    def read(views, epoch, index):
        image = torch.zeros(3, 32, 24, dtype=torch.uint8)
        return dict(image=image, label=0, bad=[("x" * 2 ** 20, "fills the pipe, which nobody reads")])
    monkeypatch.setattr(Views, "read", read)

    def train():
        batches = iter(load(folder, 2))
        (folder / "workers.tmp").write_text(" ".join(str(worker.pid) for worker in batches._workers))
        (folder / "workers.tmp").rename(folder / "workers")
        time.sleep(600)
    trainer = Child(train)
    while not (folder / "workers").exists():
        time.sleep(0.05)
    time.sleep(1)                                                       # a batch is made
    trainer.end(0.1)                                                    # kills it
    assert gone(map(int, (folder / "workers").read_text().split()), 20) is not None


def test_late_data_is_answered_with_the_flag_that_is_not_used_yet(folder):
    files, pack = ImageFolder(folder, "train"), SimpleNamespace(short_side=256)
    assert advice_if_late(files, 0).startswith("--workers, as many")
    assert advice_if_late(files, 2).startswith("data packed by tools.pack")
    assert advice_if_late(pack, 2) == "more --workers would help"


def test_a_view_is_a_function_of_seed_epoch_and_index(folder):
    source = ImageFolder(folder, "train")
    view = {key: Views(source, "random_resized", (24, 24), 3, 9, seed)[epoch, index]
            for key in [(0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2)] for seed, epoch, index in [key]}
    again = Views(source, "random_resized", (24, 24), 3, 9, 0)[0, 1]
    assert all(torch.equal(view[0, 0, 1][key], again[key]) for key in ("image", "noise"))
    for other in [(0, 1, 1), (1, 0, 1), (0, 0, 2)]:
        assert not torch.equal(view[other]["noise"], again["noise"])
        assert not torch.equal(view[other]["image"], again["image"])


def test_loading_draws_nothing_from_the_global_generator(folder):
    before = torch.get_rng_state()
    views = Views(ImageFolder(folder, "train"), "simple", (16, 16), 3, 4, 0)
    next(iter(make_loader(views, Stream(12, 4, 4, 0, 0, 1), 0, False)))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- crops


class Fixed(Rng):
    """Hands out the numbers it was given."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def number(self):
        return self.numbers.pop(0)


def test_random_resized_box_draws_area_and_log_aspect():
    box = random_resized_box(100, 200, Fixed(0.25, 0.5, 0.5, 0.999), (0.2, 1.0), (3 / 4, 4 / 3))
    assert box == (int(0.5 * 12), int(0.999 * 112), 89, 89)             # area 0.4, aspect 1: 89.4 pixels


def test_random_resized_box_falls_back_to_the_largest_centred_one():
    assert random_resized_box(10, 1000, Rng(0), (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 13)
    assert random_resized_box(1000, 10, Rng(0), (1.0, 1.0), (3 / 4, 4 / 3)) == (493, 0, 13, 10)


def test_random_resized_boxes_have_the_stated_distribution():
    limits = (0.2, 1.0), (3 / 4, 4 / 3)
    boxes = np.array([random_resized_box(400, 400, Rng(1, i), *limits) for i in range(3000)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 160_000, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.19 and area.max() <= 1 and 0.74 < aspect.min() and aspect.max() < 1.35
    assert abs(np.log(aspect).mean()) < 0.02                            # wide and tall alike
    assert (boxes[:, :2].min(0) >= 0).all() and ((boxes[:, 0] + boxes[:, 2]) <= 400).all()


def test_random_resized_crop_is_pillows_crop_and_bicubic_resize():
    image = noise_image(60, 80)
    got = random_resized(image, (32, 24), Fixed(0.25, 0.5, 0.5, 0.5, 0.9))
    top, left, h, w = random_resized_box(60, 80, Fixed(0.25, 0.5, 0.5, 0.5))
    want = image.crop((left, top, left + w, top + h)).resize((24, 32), Image.Resampling.BICUBIC)
    assert got.shape == (32, 24, 3) and furthest(got, want) <= 2        # rounded twice: see test_packed


def test_simple_crop_keeps_the_scale_and_pads_by_reflection():
    image = noise_image(40, 60)
    resized = np.asarray(resize_to_cover(image, (32, 32), Image.Resampling.BILINEAR))
    assert resized.shape == (32, 48, 3)
    got = np.asarray(simple(image, (32, 32), Fixed(0.0, 0.0, 0.9)))
    assert np.array_equal(got, np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect")[:32, :32])
    flipped = np.asarray(simple(image, (32, 32), Fixed(0.0, 0.0, 0.1)))
    assert np.array_equal(flipped, got[:, ::-1])


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
def test_center_crop_has_the_size_asked_for_and_nothing_random(size):
    image = noise_image(45, 70)
    assert center(image, size).shape == (*size, 3)
    assert center(image, size).tobytes() == center(image, size).tobytes()


# (width, height): even and odd, both ways round, a line nearly, and the sizes of crops and one pixel beside
SHAPES = [(500, 375), (333, 500), (499, 331), (640, 427), (97, 64), (64, 97), (400, 7), (31, 523), (1, 3),
          (96, 96), (109, 110), (225, 224), (256, 257), (384, 385), (255, 255), (513, 512)]


def grey_noise(width, height):
    return noise_image(height, width, seed=width + height).convert("L")


@pytest.mark.parametrize("size", [32, 48, 64, 96, 112, 128, 160, 192, 223, 224, 225, 256, 384, 448, 512])
def test_the_evaluation_and_center_crops_are_torchvisions_byte_for_byte(size):
    """MAE's evaluation: int(size / 0.875) up to 224 pixels, the size itself above, then CenterCrop."""
    transforms = pytest.importorskip("torchvision.transforms")
    few = [(size + i, size + j) for i in range(3) for j in range(3)]    # odd margins, and none
    for shape in SHAPES + few:
        image = grey_noise(*shape)
        for crop, first in (evaluation, int(size / 0.875) if size <= 224 else size), (center, size):
            resize = transforms.Resize(first, transforms.InterpolationMode.BICUBIC)
            want = np.asarray(transforms.CenterCrop(size)(resize(image)))
            assert np.array_equal(crop(image, (size, size))[..., 0], want), (crop.__name__, shape)


def test_sizes_of_a_thousand_shapes_are_torchvisions():
    resize = pytest.importorskip("torchvision.transforms").Resize(37)
    draws = Rng(5)
    for _ in range(1000):
        image = Image.new("L", (draws.integer(1, 90), draws.integer(1, 90)))
        assert resize_to_cover(image, (37, 37), Image.Resampling.BILINEAR).size == resize(image).size


@pytest.mark.parametrize("size", [31, 32, 96])
def test_the_simple_crop_is_torchvisions_at_every_corner(size, monkeypatch):
    """PixMIM's: Resize, which is bilinear, and RandomCrop with a padding of 4 by reflection."""
    transforms = pytest.importorskip("torchvision.transforms")
    for shape in [(500, 375), (333, 500), (97, 64), (64, 97), (400, 7), (96, 96), (31, 33)]:
        image = grey_noise(*shape)
        for down in (0.0, 0.5, 0.999):
            for right in (0.0, 0.5, 0.999):
                def place(padded, output_size, at=(down, right)):
                    top, left = (int(share * (side - size + 1))
                                 for share, side in zip(at, reversed(padded.size), strict=True))
                    return top, left, *output_size
                monkeypatch.setattr(transforms.RandomCrop, "get_params", staticmethod(place))
                crop = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
                want = np.asarray(crop(transforms.Resize(size)(image)))
                got = simple(image, (size, size), Fixed(down, right, 0.9))[..., 0]
                assert np.array_equal(got, want), shape


@pytest.mark.parametrize("size, want", [
    ((224, 224), (256, 256)), ((225, 225), (225, 225)), ((96, 96), (109, 109)), ((384, 384), (384, 384)),
    ((32, 32), (36, 36)), ((48, 48), (54, 54)), ((64, 64), (73, 73)), ((112, 112), (128, 128)),
    ((96, 192), (109, 219)), ((224, 448), (256, 512)), ((448, 224), (512, 256)), ((256, 448), (256, 448)),
])
def test_crops_are_cut_from_what_their_shorter_side_decides(size, want):
    assert cut_from(size) == want
    image = resize_to_cover(noise_image(300, 401), want, Image.Resampling.BICUBIC)
    slack = image.height - want[0], image.width - want[1]
    assert min(slack) == 0 and abs(image.width * 300 - image.height * 401) <= 401
    assert evaluation(noise_image(300, 401), size).shape == (*size, 3)


# ---------------------------------------------------------------- files


def test_class_folders_become_labels_and_flat_folders_have_one(folder, tmp_path):
    source = ImageFolder(folder, "train")
    assert source.classes == ["cat", "dog"] and source.is_split and len(source) == 12
    assert [source.label(i) for i in range(12)] == [0] * 6 + [1] * 6
    flat = ImageFolder(folder / "train" / "cat", "train")
    assert len(flat) == 6 and flat.label(0) == 0 and not flat.is_split
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert len(ImageFolder(tmp_path, "val")) == 12 and not ImageFolder(tmp_path, "val").is_split


@pytest.mark.parametrize("make, message", [
    (lambda path: path / "nowhere", "does not exist"),
    (lambda path: (path / "file").write_text("x") and path / "file", "is a file"),
    (lambda path: path, r"holds no images \(1 other files\)"),
])
def test_folders_without_images_are_refused(tmp_path, make, message):
    (tmp_path / "notes.txt").write_text("hello")
    if message == "is a file":
        (tmp_path / "notes.txt").unlink()
    with pytest.raises(UserError, match=message):
        open_data(str(make(tmp_path)), "train", tmp_path, print)


def test_links_are_followed_and_hidden_files_and_folders_are_not_seen(folder, tmp_path):
    (folder / "train" / ".trash").mkdir()
    noise_image(9, 9).save(folder / "train" / ".trash" / "a.png")
    noise_image(9, 9).save(folder / "train" / "cat" / "._0.png")
    (folder / "subset").mkdir()
    (folder / "subset" / "dog").symlink_to(folder / "train" / "dog")
    assert len(ImageFolder(folder, "train")) == 12
    linked = ImageFolder(folder / "subset", "train")
    assert len(linked) == 6 and linked.classes == ["dog"] and linked.open(0).size == (50, 40)


def test_validation_images_are_not_trained_on(folder):
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="has val/ but no train/"):
        ImageFolder(folder, "train")


@pytest.mark.parametrize("name, fine", [("cifar10", False), ("cifar100", True)])
def test_cifar_is_read_from_its_binary_files(tmp_path, name, fine):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(10, dtype=np.uint8)[:, None]
    record = [labels + 50, labels] if fine else [labels]                # CIFAR-100: coarse, then fine
    records = np.concatenate([*record, pixels.transpose(0, 3, 1, 2).reshape(10, -1)], axis=1)
    coarse_files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for file in ["train.bin", "test.bin"] if fine else coarse_files:
        records.tofile(tmp_path / file)
    train = open_data(f"{name}:{tmp_path}", "train", tmp_path, print)
    assert len(train) == (10 if fine else 50) and [train.label(i) for i in range(10)] == list(range(10))
    assert np.array_equal(np.asarray(train.open(3)), pixels[3])
    assert len(open_data(f"{name}:{tmp_path}", "val", tmp_path, print)) == 10
    (tmp_path / ("train.bin" if fine else "data_batch_2.bin")).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="has 100 bytes"):
        open_data(f"{name}:{tmp_path}", "train", tmp_path, print)


def save(path, array, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)


def test_16_bit_images_are_scaled_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for suffix in ("png", "tif"):
        save(tmp_path / f"ramp.{suffix}", ramp)
        with Image.open(tmp_path / f"ramp.{suffix}") as image:
            pixels = np.asarray(to_mode(eight_bits(image), 3)).astype(float)
        assert abs(pixels.mean() - 127.5) < 0.5 and pixels.min() == 0 and pixels.max() == 255
        assert np.abs(pixels[..., 0] - ramp / 257).max() <= 0.5


def test_unusual_modes_become_three_channels_by_the_stated_rules(tmp_path):
    rgb = noise_image(8, 8)
    alpha = Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1)))
    cases = {mode: rgb.convert(mode) for mode in ("L", "1", "CMYK")}
    cases |= {"RGBA": Image.merge("RGBA", [*rgb.split(), alpha]), "P": rgb.quantize(256),
              "LA": Image.merge("LA", [rgb.convert("L"), alpha])}
    for mode, image in cases.items():
        path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
        image.save(path)
        with Image.open(path) as read:
            got = np.asarray(to_mode(read, 3))
        assert got.shape == (8, 8, 3) and got.dtype == np.uint8
        if mode == "RGBA":
            assert np.array_equal(got, np.asarray(rgb))                 # dropped, not blended
        elif mode in ("L", "LA"):
            assert np.array_equal(got, np.asarray(rgb.convert("L").convert("RGB")))
        elif mode == "CMYK":
            assert np.abs(got.astype(int) - np.asarray(rgb)).max() <= 1
    assert to_mode(rgb, 1).mode == "L" and to_mode(rgb, 4).mode == "RGBA"


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(ValueError, match="integers of 32 bits have no known range"):
        eight_bits(Image.new("I", (4, 4)))
    for value in (1.5, -0.25, float("nan")):
        pixels = np.full((4, 4), 0.5, np.float32)
        pixels[1, 1] = value
        with pytest.raises(ValueError, match="expected 0 to 1"):
            eight_bits(Image.fromarray(pixels))


def damage(path):
    """One file for each way of being no image; returns their names."""
    good = (path / "0.png").read_bytes()
    (path / "truncated.png").write_bytes(good[:len(good) // 2])
    (path / "empty.png").write_bytes(b"")
    (path / "text.jpg").write_text("no image at all")
    (path / "link.png").symlink_to(path / "nowhere.png")
    Image.new("F", (9, 9), 2.0).save(path / "float.tif")
    return {"truncated.png", "empty.png", "text.jpg", "link.png", "float.tif"}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_replaced_by_a_function_of_seed_epoch_and_index(folder, workers, tmp_path):
    names = damage(folder / "train" / "cat")
    source = ImageFolder(folder, "train")
    assert len(source) == 17
    views = Views(source, "random_resized", (16, 16), 3, 4, seed=0)
    batches = list(make_loader(views, Stream(17, 17, 17, 0, 0, 2), workers, False))
    bad = [entry for batch in batches for entry in batch["bad"]]
    assert {name.split("/")[-1] for name, _ in bad} == names
    again = list(make_loader(views, Stream(17, 17, 17, 0, 0, 2), 0, False))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))


def test_each_damaged_file_is_named_once_and_too_many_stop_the_run(tmp_path, capsys):
    found = BadSamples(tmp_path, ALONE, num_samples=100, max_bad=0.02)
    for _ in range(3):
        found.add([("a.jpg", "empty"), ("b.jpg", "torn")])
        found.report()
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["a.jpg", "b.jpg"]
    assert capsys.readouterr().out.count("warning") == 1
    resumed = BadSamples(tmp_path, ALONE, num_samples=100, max_bad=0.02)
    resumed.add([("a.jpg", "empty"), ("c.jpg", "torn")])
    with pytest.raises(Fault, match="3 of 100 images cannot be read, more than --max-bad 0.02"):
        resumed.report()


def test_a_picture_that_would_be_huge_is_not_decoded(folder, monkeypatch):
    source = ImageFolder(folder, "train")
    assert source.open(0).size == (50, 40)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("was decoded"))
    source = ImageFolder(folder, "train", Reading(max_pixels=1999))
    with pytest.raises(ValueError, match="50 x 40 pixels are more than 1999: .* a larger --max-pixels"):
        source.open(0)


def test_when_nothing_can_be_read_the_last_file_is_named(tmp_path):
    (tmp_path / "a.png").write_text("x")
    views = Views(ImageFolder(tmp_path, "train"), "center", (8, 8), 3, 1, 0)
    message = r"20 images in a row cannot be read; the last is .*a.png \(not an image\)"
    with pytest.raises(Fault, match=message):
        views[0, 0]
