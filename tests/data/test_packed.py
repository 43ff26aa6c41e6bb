"""Packed images: the same views as of their folder, interruptions, damage, bad input."""

import copy
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from images import furthest, noise_image
from PIL import Image
from sources import ROOT

import train_pretrain
from mff_data import crops, packed
from mff_data.decode import Reading, open_image
from mff_data.packed import Packed, open_packed
from mff_data.sources import Subset, fingerprint, match_labels, open_data, subset
from mff_data.unchanged import UnchangedFile
from mff_data.views import Views, collate, make_loader
from mff_min.config import parse
from mff_min.errors import Fault, UserError
from mff_min.rng import Rng
from mff_min.stream import Stream
from tools import pack


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, PNG and JPEG of many sizes and modes, in train and in val; one is damaged."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                image = noise_image(40 + 9 * i, 70 - 9 * i, seed=i)
                image.save(root / split / name / f"{i}.{['png', 'jpg'][i % 2]}")
        noise_image(60, 50).convert("L").save(root / split / "cat" / "grey.jpg")
        ramp = np.linspace(0, 65535, 50 * 40).reshape(50, 40).astype(np.uint16)
        Image.fromarray(ramp).save(root / split / "dog" / "sixteen.png")
        (root / split / "dog" / "torn.png").write_bytes(b"no image")
    return root


def packing(folder, *flags, to="pack"):
    """The folder that tools.pack writes."""
    output = folder.parent / to
    pack.main(parse(pack.Config, [str(folder), str(output), "--max-bad", "1", *flags]))
    return output


def sources(folder, *flags, split="train"):
    """A folder's source, and that of its pack."""
    return [open_data(str(path), split, "", print) for path in (folder, packing(folder, *flags))]


def same_views(a, b, crop, size, in_chans=3):
    """Whether two sources show the same, to the bit, with the same labels and the same images replaced."""
    views = [Views(source, crop, size, in_chans, 9, seed=1) for source in (a, b)]
    batches = [collate([view[e, i] for e in range(3) for i in range(len(a))]) for view in views]
    bad = [[os.path.basename(name) for name, _ in batch["bad"]] for batch in batches]
    return bad[0] == bad[1] and all(torch.equal(batches[0][name], batches[1][name])
                                    for name in ("image", "label", "noise", "replaced"))


# ---------------------------------------------------------------- what a pack shows


@pytest.mark.parametrize("crop", list(crops.CROPS))
def test_a_pack_of_original_pixels_shows_what_its_folder_shows(folder, crop):
    assert same_views(*sources(folder, "--short-side", "0"), crop, (24, 32))


@pytest.mark.parametrize("resample, crop, size, short_side", [
    ("bicubic", "evaluation", 28, 32), ("bicubic", "evaluation", 30, 34), ("bicubic", "evaluation", 225, 225),
    ("bicubic", "center", 32, 32), ("bilinear", "simple", 32, 32)])
def test_a_pack_of_the_size_that_a_crop_begins_with_shows_what_its_folder_shows(
        folder, resample, crop, size, short_side):
    both = sources(folder, "--short-side", str(short_side), "--resample", resample)
    assert same_views(*both, crop, (size, size))
    assert not same_views(*both, "random_resized", (size, size))        # parts of fewer pixels


def test_a_resized_pack_shows_views_of_the_resized_images(folder, tmp_path):
    resized = tmp_path / "resized"
    for path in folder.glob("train/*/*"):
        (resized / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        if path.name != "torn.png":
            image = crops.to_mode(open_image(str(path)), 3)
            image = crops.resize_to_cover(image, (32, 32), crops.BICUBIC)
            image.save(resized / path.relative_to(folder), "PNG")
        else:
            shutil.copy(path, resized / path.relative_to(folder))
    want, got = open_data(str(resized), "train", "", print), sources(folder, "--short-side", "32")[1]
    for crop in crops.CROPS:
        assert same_views(want, got, crop, (24, 32)) and same_views(want, got, crop, (32, 24), in_chans=1)


def test_a_pack_has_the_labels_names_and_splits_of_its_folder(folder, tmp_path):
    spec = str(packing(folder))
    train, val = (open_data(spec, split, "", print) for split in ("train", "val"))
    train, val = match_labels(spec, train, val, print)
    images = open_data(str(folder), "train", "", print)
    assert train.classes == images.classes and len(train) == len(images) == 11
    assert [train.label(i) for i in range(11)] == [images.label(i) for i in range(11)]
    assert all(train.spellings(i) == images.spellings(i) for i in range(11))
    (tmp_path / "list").write_text("cat/0.png\ndog/3.jpg\n")
    few = subset(train, tmp_path / "list")
    assert [few.label(i) for i in range(2)] == [0, 1] and few.short_side == 256
    alone = Packed(Path(spec, "val.pack"), "train")
    assert len(alone) == 11 and not alone.is_split and Packed(Path(spec, "val.pack"), "val").is_split
    flat = open_data(str(packing(folder / "train" / "cat", to="flat")), "val", "", print)
    assert len(flat) == 5 and not flat.is_split and flat.classes == [""]


@pytest.mark.parametrize("spec", ["{}", "list:{}"])
def test_a_pack_of_other_layouts_has_the_labels_of_what_it_was_made_of(folder, tmp_path, spec, capsys):
    """Splits of other names with an empty class in train and an absent one in val, and text lists of them."""
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "validation")
    for name in ("ant", "zebra", "@eaDir"):
        (folder / "Training" / name).mkdir()
    noise_image(9, 9).save(folder / "Training" / "zebra" / "0.png")
    noise_image(9, 9).save(folder / "Training" / "@eaDir" / "0.png")
    for split, file in (("Training", "train"), ("validation", "val")):
        paths = folder.glob(f"{split}/[cdz]*/*")
        (folder / f"{file}.txt").write_text("".join(
            f"{path.relative_to(folder)},{path.parent.name}\n" for path in paths))
    spec = spec.format(folder)
    pack.main(parse(pack.Config, [spec, str(tmp_path / "pack"), "--max-bad", "1", "--short-side", "8"]))
    assert ("train: 12 images of " in capsys.readouterr().out)
    found = []
    for data in (spec, str(tmp_path / "pack")):
        splits = [open_data(data, split, "", print) for split in ("train", "val")]
        train, val = match_labels(data, *splits, print)
        found.append([{os.fsdecode(source.paths[i]): source.classes[source.label(i)]
                       for i in range(len(source))} for source in (train, val)])
        assert train.classes == val.classes == ["ant"] * (spec == str(folder)) + ["cat", "dog", "zebra"]
    assert found[0] == found[1] and [len(source) for source in found[0]] == [12, 11]
    said = capsys.readouterr().out
    assert said.count("warning: val has no images of ") == 2
    assert f"train: 12 images of {len(train.classes)} classes in {tmp_path}/pack/train.pack" in said


@pytest.mark.parametrize("source, message", [
    ("shapes", "shapes is no folder of images and needs no pack"), ("cifar10:x", "needs no pack: expected"),
    ("PACK", "is a pack already: expected the images that it was made of")])
def test_what_is_no_images_is_not_packed(folder, tmp_path, source, message):
    source = source.replace("PACK", str(packing(folder)))
    with pytest.raises(UserError, match=message):
        pack.main(parse(pack.Config, [source, str(tmp_path / "other")]))


def test_a_worker_gets_a_packs_path_and_not_its_pixels(folder):
    source = open_packed(packing(folder), "train")
    image = np.array(source.open(3))
    assert not source.open(3).flags.owndata and not source.open(3).flags.writeable      # as it was read
    assert len(pickle.dumps(source)) < image.nbytes
    assert np.array_equal(pickle.loads(pickle.dumps(source)).open(3), image)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("crop", ["random_resized", "simple"])
def test_workers_0_2_and_4_give_the_same_bytes(folder, crop):
    views = Views(open_packed(packing(folder, "--short-side", "32"), "train"), crop, (32, 32), 3, 9, seed=0)
    hashes = []
    for workers in (0, 2, 4):
        digest = hashlib.sha256()
        for batch in make_loader(views, Stream(11, 6, 3, 0, 0, 8), workers, pin_memory=False):
            for name in sorted(batch.keys() - {"bad"}):
                digest.update(batch[name].contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest())
    assert len(set(hashes)) == 1


# ---------------------------------------------------------------- the two ways to make pixels


def smooth_image(height, width, seed):
    """Waves of many lengths, as smooth as a photograph."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width, :1, :1][:2]
    (down, right), phase = g.normal(0, 0.15, (2, 3, 12)), g.uniform(0, 6.3, (3, 12))
    waves = np.sin(y * down + x * right + phase)                        # (height, width, 3, 12)
    return (127.5 + 8 * waves.sum(-1)).astype(np.uint8)                 # no overshoot is cut off


# Two roundings of two passes each. The first pass may round to the other side of a tie, 1 off, and the second
# makes it at most 1.4 of it, the sum of the weights without their signs: after rounding, 2.
BOUND = 2
PILLOW = int(PIL.__version__.split(".")[0])


def parts(image, size, count):
    """Of random parts: whether rows shrink, and more than columns do, and the part by us and by Pillow twice.

    Pillow's are its own resize and, in two passes, columns first: an array (H', W', C) each.
    """
    height, width = size
    for i in range(count):
        top, left, h, w = box = crops.random_resized_box(*image.shape[:2], Rng(0, i))
        part = Image.fromarray(image[top:top + h, left:left + w])       # cut first, as in torchvision
        columns_first = part.resize((width, h), crops.BICUBIC).resize((width, height), crops.BICUBIC)
        yield (h > height and h * width > w * height, crops.resized_part(image, box, size),
               part.resize((width, height), crops.BICUBIC), columns_first)


@pytest.mark.parametrize("image, size", [
    (smooth_image(96, 130, 0), (64, 64)), (smooth_image(130, 97, 1), (72, 56)),
    (np.asarray(noise_image(150, 200)), (112, 112)), (np.asarray(noise_image(200, 150)), (96, 128)),
    (np.asarray(noise_image(150, 190)) // 128 * 255, (96, 96))])        # extremes overshoot most
def test_pytorch_and_pillow_make_the_same_pixels_of_a_part_columns_first(image, size):
    rows_first = 0
    for shrinks, ours, pillow, columns_first in parts(image, size, 60):
        assert furthest(ours, columns_first) <= BOUND
        assert shrinks or furthest(ours, pillow) <= BOUND
        rows_first += shrinks
    assert 0 < rows_first < 60


# Where rows shrink more than columns do, Pillow 13 takes rows first: what one pass cuts off at 0 and 255 the
# other does not see. Stated in parity.md.
@pytest.mark.parametrize("name, most", [("photograph", 13), ("noise", 31)])
def test_where_pillow_takes_rows_first_parts_differ_by_what_is_stated(name, most):
    image = np.asarray(noise_image(300, 400)) // 128 * 255
    if name == "photograph":
        path = pytest.importorskip("matplotlib.cbook").get_sample_data("grace_hopper.jpg", asfileobj=False)
        image = np.asarray(Image.open(path))                            # (600, 512, 3)
    found = [(shrinks, furthest(ours, pillow)) for shrinks, ours, pillow, _ in parts(image, (224, 224), 200)]
    assert max(far for shrinks, far in found if not shrinks) <= BOUND
    worst = max(far for shrinks, far in found if shrinks)
    assert BOUND < worst <= most if PILLOW >= 13 else worst <= BOUND
    pillow = Image.fromarray(image[:229, :223]).resize((224, 224), crops.BICUBIC)
    far = furthest(crops.resized_part(image, (0, 0, 229, 223), (224, 224)), pillow)
    assert (far > BOUND) == (PILLOW >= 13)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_a_part_has_the_channels_of_its_image(in_chans):
    image = crops.to_mode(noise_image(40, 50), in_chans)
    got = crops.random_resized(image, (24, 16), Rng(0))
    assert got.shape == (24, 16, in_chans) and got.flags.writeable
    assert np.array_equal(got, crops.random_resized(crops.to_array(image), (24, 16), Rng(0)))


def test_a_worker_writes_its_batch_into_memory_that_the_trainer_shares(folder):
    views = Views(sources(folder, "--short-side", "32")[1], "random_resized", (16, 16), 3, 9, seed=0)
    stream = Stream(11, 8, 8, 0, 0, 2)
    alone, shared = (list(make_loader(views, stream, workers, False)) for workers in (0, 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, shared, strict=True))
    assert all(batch["image"].is_shared() for batch in shared) and not alone[0]["image"].is_shared()


def test_a_record_is_checked_once_by_all_workers_together(folder):
    source = sources(folder, "--short-side", "32")[1]
    views = Views(source, "random_resized", (16, 16), 3, 9, seed=0)
    list(make_loader(views, Stream(11, 11, 11, 0, 0, 1), 1, False))
    assert source.checked.sum() == 10                                   # of 11 images one has no record


def test_simple_crops_at_any_place_are_slices_of_the_padded_image():
    image = np.asarray(noise_image(9, 12))
    padded = np.pad(image, [(5, 5), (5, 5), (0, 0)], mode="reflect")    # (19, 22, 3)
    for height, width in ((6, 7), (9, 12), (1, 2), (19, 22), (17, 3)):
        for top in range(-5, 14 - height + 1):
            for left in range(-5, 17 - width + 1):
                got = crops.reflected(image, top, left, (height, width))
                assert np.array_equal(got, padded[top + 5:, left + 5:][:height, :width])


# A JPEG at half its size is averaged by the decoder, not by the resize: of two pixels or more for each of the
# result, the mean difference is a share of what the image varies from pixel to pixel. Stated in parity.md.
def test_a_large_jpeg_is_decoded_at_half_its_size_within_the_stated_bound(tmp_path):
    Image.fromarray(smooth_image(600, 800, 2)).save(tmp_path / "large.jpg", quality=92)
    for i in range(20):
        box = crops.random_resized_box(600, 800, Rng(1, i))
        with Image.open(tmp_path / "large.jpg") as image:
            got = crops.resized_part(image, box, (60, 60))
            scale = 600 // image.height
        whole = crops.resized_part(np.asarray(Image.open(tmp_path / "large.jpg")), box, (60, 60))
        assert scale == (4 if min(box[2:]) >= 480 else 2 if min(box[2:]) >= 240 else 1)
        assert furthest(got, whole) == 0 if scale == 1 else np.abs(got - whole.astype(int)).mean() < 1.5
        assert furthest(got, whole) <= 32


# ---------------------------------------------------------------- interruptions


def content(output):
    """{name: bytes} of all that tools.pack left, but for its lock."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name != "run.lock"}


@pytest.mark.parametrize("torn", [False, True])
def test_a_pack_that_is_interrupted_anywhere_becomes_the_same_bytes(folder, monkeypatch, torn):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(pack, "BLOCK", 3)
    want, flush, points = content(packing(folder, to="whole")), packed.flush, 0

    def deadly(file):
        nonlocal calls
        calls += 1
        if calls == last:
            if torn:                                                    # half of it never reached the disk
                file.flush()
                os.ftruncate(file.fileno(), max(0, os.fstat(file.fileno()).st_size - 7))
            raise Killed
        flush(file)

    for last in range(1, 100):
        calls, output = 0, f"parts-{last}"
        monkeypatch.setattr(packed, "flush", deadly)
        try:
            packing(folder, to=output)
            break
        except Killed:
            points += 1
        monkeypatch.setattr(packed, "flush", flush)
        assert content(packing(folder, to=output)) == want, last
    assert points == 2 * (1 + 2 * 4 + 1) and list(want) == ["train.pack", "val.pack"]


def test_a_pack_that_is_killed_goes_on_to_the_same_bytes(folder):
    code = "import sys, pack; pack.BLOCK = 1; pack.run(pack.main, pack.parse(pack.Config, sys.argv[1:]))"
    want, output = content(packing(folder, to="whole")), folder.parent / "killed"
    command = [sys.executable, "-c", code, str(folder), str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (output / "val.pack").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert content(packing(folder, to="killed")) == want


def test_an_interrupted_pack_says_so_in_a_line_and_goes_on(folder, capfd, monkeypatch):
    want = content(packing(folder, to="whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(pack, "announce", lambda *rest: signal.raise_signal(signal.SIGINT))
        packing(folder, to="cut")
    assert stop.value.code == 130
    assert capfd.readouterr().err == "stopped: interrupted; the same line goes on from there\n"
    assert content(packing(folder, to="cut")) == want


def test_a_pack_that_is_killed_when_it_is_done_leaves_no_journal_behind(folder):
    want = content(packing(folder))
    output = packing(folder)
    (output / "val.pack.journal").write_text("{}\n")                    # killed before it was removed
    assert content(packing(folder)) == want


def test_workers_pack_the_same_bytes(folder):
    assert content(packing(folder, "--workers", "2", to="two")) == content(packing(folder, to="none"))


def test_a_second_pack_py_is_kept_out_of_a_folder(folder):
    output = folder.parent / "pack"
    output.mkdir()
    code = "import sys; from mff_run.files import lock; held = lock(sys.argv[1], print); print(1); input()"
    first = subprocess.Popen([sys.executable, "-uc", code, output], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(UserError, match=rf"pack is in use by process {first.pid} on"):
        packing(folder)
    first.communicate("\n")
    assert content(packing(folder)) == content(packing(folder, to="again"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_source_that_goes_away_leaves_no_pack_of_holes(folder, capsys, monkeypatch, workers):
    with monkeypatch.context() as patch:
        patch.setattr(pack, "announce", lambda *rest: folder.rename(folder.with_name("away")))
        with pytest.raises(Fault, match=r"0.png: No such file or directory; what is packed is kept"):
            packing(folder, "--workers", workers)
    folder.with_name("away").rename(folder)
    assert content(packing(folder)) == content(packing(folder, to="again"))


def test_more_unreadable_images_than_max_bad_leave_no_pack(folder):
    with pytest.raises(Fault, match=r"1 of 11 images cannot be read, more than --max-bad 0.01 allows"):
        packing(folder, "--max-bad", "0.01")
    with pytest.raises(UserError, match="was not finished"):
        open_packed(folder.parent / "pack", "train")
    assert len(open_packed(packing(folder), "train")) == 11


def test_an_image_that_would_become_huge_counts_as_one_that_cannot_be_read(folder):
    Image.new("L", (1, 20_000)).save(folder / "train" / "cat" / "line.png")
    source = open_data(str(packing(folder)), "train", "", print)
    reasons = [reason for _, reason in Views(source, "simple", (16, 16), 3, 1, 0)[0, 5]["bad"]]
    assert "1 x 20000 pixels would become 256 x 5120000" in reasons[0]


# ---------------------------------------------------------------- damage


def test_a_pack_that_was_cut_short_or_whose_index_was_altered_is_refused(folder):
    path = packing(folder) / "train.pack"
    whole = path.read_bytes()
    length = int.from_bytes(whole[-48:-40], "little")
    for cut in (0, 10, 16, 100, len(whole) // 2, len(whole) - 49, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut short|is no pack"):
            Packed(path, "train")
    for at in (len(whole) - 48 - length, len(whole) - 60, len(whole) - 48, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match="damaged"):
            Packed(path, "train")
    path.write_bytes(whole[:100] + whole[200:])                         # a hole, and an intact end
    with pytest.raises(UserError, match="damaged"):
        Packed(path, "train")


def test_an_altered_record_is_never_shown_and_verify_names_it(folder):
    output = packing(folder, "--short-side", "32")
    path, source = output / "train.pack", open_packed(output, "train")
    whole, at = path.read_bytes(), int(source.index["offsets"][4]) + 99
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    item = Views(open_packed(output, "train"), "center", (16, 16), 3, 1, seed=0)[0, 4]
    (name, reason), *_ = item["bad"]
    assert name == str(path / "cat" / "grey.jpg") and "checksum differs" in reason
    with pytest.raises(UserError, match=r"1 of 11 images are altered, first .*grey.jpg"):
        packing(folder, "--verify")
    path.write_bytes(whole)
    packing(folder, "--verify")
    path.rename(path.with_suffix(".pack.partial"))
    with pytest.raises(UserError, match="holds a pack that was not finished"):
        packing(folder, "--verify")


def ends_with(work):
    """The exit code of a process that does this, or the text of the Fault that ends it."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def begin():
        try:
            work()
        except Fault as error:
            theirs.send(str(error))
    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    theirs.close()
    process.join()
    return ours.recv() if ours.poll() and not process.exitcode else process.exitcode


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_that_is_cut_short_or_written_to_while_it_is_read_is_named_in_a_fault(folder, workers):
    """Where a pack is mapped, SIGBUS ends the process."""
    path = packing(folder, "--short-side", "32") / "train.pack"
    whole = path.read_bytes()

    def read_while(change):
        views = Views(Packed(path, "train"), "random_resized", (16, 16), 3, 9, seed=0)
        batches = iter(make_loader(views, Stream(11, 4, 4, 0, 0, 99), workers, False))
        next(batches)
        change()
        list(batches)
    for change in (lambda: os.truncate(path, 5000), lambda: os.truncate(path, 0),
                   lambda: path.write_bytes(whole[::-1]), lambda: path.write_bytes(whole)):
        end = ends_with(lambda change=change: read_while(change))
        assert f"{path} was cut short, written to or replaced while it was read: expected" in str(end)
        path.write_bytes(whole)


def test_a_pack_that_is_replaced_or_removed_while_it_is_read_is_read_as_it_was(folder):
    path = packing(folder, "--short-side", "32") / "train.pack"
    source, same = Packed(path, "train"), copy.copy(Packed(path, "train"))
    want = source.open(0).tobytes()
    os.replace(packing(folder, "--short-side", "16", to="other") / "train.pack", path)
    assert source.open(0).tobytes() == same.open(0).tobytes() == want
    with pytest.raises(Fault, match="train.pack was cut short, written to or replaced"):
        pickle.loads(pickle.dumps(source)).open(0)                      # what a worker of spawn would read
    path.unlink()
    assert min(source.open(3).shape[:2]) == 32 and source.open(0).tobytes() == want


def test_a_pack_of_other_pixels_under_the_same_names_has_another_fingerprint(folder):
    before, folders = (fingerprint(source) for source in sources(folder, "--short-side", "32")[::-1])
    shutil.rmtree(folder.parent / "pack")
    assert torch.equal(fingerprint(sources(folder, "--short-side", "32")[1]), before)
    shutil.rmtree(folder.parent / "pack")
    noise_image(40, 70, seed=99).save(folder / "train" / "cat" / "0.png")
    images, packs = (fingerprint(source) for source in sources(folder, "--short-side", "32"))
    assert torch.equal(images, folders) and not set(packs.tolist()) & set(before.tolist())
    few = Subset(open_packed(folder.parent / "pack", "train"), np.array([2, 5]))
    assert set(fingerprint(few).tolist()) < set(packs.tolist())


@pytest.mark.parametrize("key, change", [
    ("label", lambda x: x[0]), ("label", lambda x: x + 5), ("label", lambda x: -x - 1),
    ("label", lambda x: x.astype(str)),
    ("height", lambda x: x * 2), ("width", lambda x: x * 0 + 2 ** 62), ("height", lambda x: x.astype(float)),
    ("offsets", lambda x: x[::-1]), ("offsets", lambda x: x.astype("u8") * 2 ** 60), ("crc", lambda x: x[1:]),
    ("in_chans", lambda x: 10 ** 400), ("classes", lambda x: []), ("classes", lambda x: [1]),
    ("bad", lambda x: []), ("white", lambda x: 1)])
def test_an_index_that_tools_pack_never_writes_is_refused_though_its_sum_is_right(folder, key, change):
    path = packing(folder, "--short-side", "32") / "train.pack"
    whole = path.read_bytes()
    start = len(whole) - 48 - int.from_bytes(whole[-48:-40], "little")
    header, index, _ = packed.read_index(UnchangedFile(path))
    holder = index if key in index else header
    holder[key] = change(holder[key])
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **index)
    content = file.getvalue()
    path.write_bytes(whole[:start] + content + len(content).to_bytes(8, "little")
                     + hashlib.sha256(content).digest() + whole[:8])
    with pytest.raises(UserError, match="train.pack is damaged or was cut short: delete it"):
        Packed(path, "train")


def test_a_pack_of_images_above_max_pixels_is_refused_before_they_are_read(folder):
    output = packing(folder, "--short-side", "0")
    with pytest.raises(UserError, match=r"of \d+ pixels: expected 2000 at most, or --max-pixels \d+"):
        open_data(str(output), "train", "", print, Reading(None, 2000))


# ---------------------------------------------------------------- files of others


@pytest.mark.parametrize("name", ["train.pack.partial", "val.pack.partial", "val.pack.journal", "run.lock"])
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_a_link_leads_to_is_not_written_to(folder, name, link):
    output, theirs = folder.parent / "pack", folder.parent / "letter"
    output.mkdir()
    theirs.write_text("a letter")
    link(theirs, output / name)
    with pytest.raises(UserError, match=rf"{name} is a link"):
        packing(folder)
    assert theirs.read_text() == "a letter" and (output / name).exists()


@pytest.mark.parametrize("name, content", [
    ("val.pack.partial", "a letter"), ("val.pack.journal", "a letter"), ("val.pack.journal", "a letter\n"),
    ("val.pack.journal", "[[\n"), ("val.pack.journal", '{"settings": 1, "files": []}\n'),
    ("val.pack.journal", "[" * 100_000 + "\n"), ("val.pack.journal", '{"settings": {}, "files": [[1, 2]]}\n'),
    ("val.pack.journal", '{"settings": {}, "files": []}\n[[1, 2]]\n')])
def test_what_tools_pack_did_not_write_is_not_written_over(folder, name, content):
    output = folder.parent / "pack"
    output.mkdir()
    (output / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is damaged, or not what tools.pack writes: remove it"):
        packing(folder)
    assert (output / name).read_text() == content


def test_a_pack_that_is_a_link_to_what_is_not_there_stays(folder):
    (folder.parent / "pack").mkdir()
    (folder.parent / "pack" / "val.pack").symlink_to("/nowhere/val.pack")
    with pytest.raises(UserError, match=r"val.pack is a link to what is not there \(is a disk not mounted"):
        packing(folder)


def test_a_signal_ends_packing_in_a_line_and_what_came_before_is_kept(folder, capfd, monkeypatch):
    want, encode = content(packing(folder, to="whole")), packed.encode

    def signalled(source, i, settings):
        if i == 5 and not (folder.parent / "cut" / "val.pack").exists():
            signal.raise_signal(signal.SIGTERM)
        return encode(source, i, settings)
    monkeypatch.setattr(pack, "announce", lambda *rest: None)
    monkeypatch.setattr(pack, "encode", signalled)
    with pytest.raises(SystemExit) as stop:
        packing(folder, to="cut")
    assert stop.value.code == 143 and "stopped: signal 15; what is packed is kept" in capfd.readouterr().err
    journal = (folder.parent / "cut" / "val.pack.journal").read_text().splitlines()
    assert len(json.loads(journal[1])) == 5
    monkeypatch.setattr(pack, "encode", encode)
    assert content(packing(folder, to="cut")) == want


# ---------------------------------------------------------------- bad input


def test_packing_again_says_whether_the_folder_changed(folder, capsys):
    packing(folder)
    packing(folder)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="is of --short-side 256, not 128: expected the same flags"):
        packing(folder, "--short-side", "128")
    (folder / "train" / "dog" / "1.jpg").unlink()
    noise_image(9, 9).save(folder / "train" / "dog" / "9.png")
    with pytest.raises(UserError, match=r"2 of 11 files, first dog/1.jpg, which is gone"):
        packing(folder)
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match="has no val/ any more: expected another folder to write to"):
        packing(folder)


def test_a_folder_that_changed_before_packing_went_on_is_named(folder, monkeypatch):
    def full(self, *rest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed.Journal, "finish", full)
        with pytest.raises(Fault, match="No space left on device; what is packed is kept"):
            packing(folder)
    with pytest.raises(UserError, match="was not finished"):
        open_data(str(folder.parent / "pack"), "train", "", print)
    (folder / "val" / "cat" / "0.png").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"1 of 11 files, first cat/0.png, which has 14 bytes and had \d+"):
        packing(folder)


def test_a_small_disk_is_refused_and_one_that_fills_up_keeps_what_is_packed(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(10 ** 9, 0, 10 ** 6)
    with monkeypatch.context() as patch:
        patch.setattr(pack.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"needs about \d\.\d MB more, and 1.0 MB are free"):
            packing(folder)
        assert not content(folder.parent / "pack")
    packing(folder, "--short-side", "32")
    shutil.rmtree(folder.parent / "pack")

    monkeypatch.setattr(pack, "BLOCK", 3)
    add, blocks = packed.Journal.add, []

    def fill_up(self, block):
        blocks.append(block)
        if len(blocks) == 2:
            raise OSError(28, "No space left on device")
        add(self, block)
    with monkeypatch.context() as patch:
        patch.setattr(packed.Journal, "add", fill_up)
        with pytest.raises(Fault, match="No space left on device; what is packed is kept"):
            packing(folder)
    assert content(packing(folder)) == content(packing(folder, to="again"))


def test_a_pack_of_another_version_and_files_that_are_no_pack_are_refused(folder, tmp_path):
    path = packing(folder) / "train.pack"
    path.write_bytes(path.read_bytes().replace(b"pack 001", b"pack 002", 1))
    with pytest.raises(UserError, match="is a pack of version 002: expected 001"):
        open_data(str(path), "train", "", print)
    (tmp_path / "some.pack").write_bytes(b"something")
    with pytest.raises(UserError, match="is no pack"):
        open_data(str(tmp_path / "some.pack"), "train", "", print)


def test_a_pack_of_jpeg_files_of_an_older_version_is_refused(tmp_path):
    path, settings = tmp_path / "train.pack", dict(short_side=0, resample="bicubic")
    plans = [dict(settings=settings | more, files=[["a.jpg", 1]]) for more in (dict(jpeg=95), {})]
    journal = packed.Journal(path, plans[0])
    journal.add([(b"x", 1, 1, "")])
    with pytest.raises(UserError, match="train.pack is of --jpeg 95, not 0: expected the same flags"):
        packed.Journal(path, plans[1], pack.lines_of(journal.path))
    journal.finish([0], [""], "train")
    with pytest.raises(UserError, match="holds JPEG files, which are not read from packs any more: expected"):
        open_data(str(tmp_path), "train", "", print)


def test_a_pack_smaller_than_the_crop_is_refused(folder):
    source = open_packed(packing(folder, "--short-side", "32"), "train")
    with pytest.raises(UserError, match="short side 32, and the crop random_resized of 48x40 needs 40"):
        Views(source, "random_resized", (48, 40), 3, 1, 0)
    Views(source, "evaluation", (28, 28), 3, 1, 0)
    with pytest.raises(UserError, match="short side 32, and the crop evaluation of 29x32 needs 33"):
        Views(source, "evaluation", (29, 32), 3, 1, 0)
    source.short_side = 256                                             # a pack's with the default flags
    for side in (224, 225, 256):
        Views(source, "evaluation", (side, side), 3, 1, 0)
    message = ("short side 256, and the crop evaluation of 384x384 needs 384: expected a smaller --img-size, "
               "or a pack made with a larger --short-side")
    with pytest.raises(UserError, match=message):
        Views(source, "evaluation", (384, 384), 3, 1, 0)


SMALL = ("--model vit_test --img-size 32 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
         "--global-batch 8 --batch-size 8 --steps 3 --device cpu --max-bad 1").split()


def test_pretraining_on_a_pack_of_original_pixels_is_pretraining_on_its_folder(folder, tmp_path):
    losses = [train_pretrain.main(parse(train_pretrain.Config, [
        *SMALL, "--data", str(data), "--output-dir", str(tmp_path / name)]))["loss"]
        for name, data in (("files", folder), ("pack", packing(folder, "--short-side", "0")))]
    assert losses[0] == losses[1]
