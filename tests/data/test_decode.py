"""People's own image files: their suffixes, more than 8 bits, more than four channels, large photographs."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from images import noise_image
from PIL import Image, features

import train_finetune
import train_pretrain
import train_probe
from mff_data.crops import CROPS, to_array, to_mode
from mff_data.decode import (
    MAX_PIXELS,
    Reading,
    UnknownLevels,
    formats,
    levels_of_flag,
    open_image,
    reason_of,
    suffixes,
)
from mff_data.packed import Journal, open_packed
from mff_data.sources import ImageFolder, describe_files, open_data
from mff_data.views import Views
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.rng import Rng
from tools import evaluate, pack, probe_layers
from tools import features as feature_tool

HAS = {"AVIF": features.check("avif"), "JPEG2000": features.check("jpg_2000")}


def write(root, name, image, **options):
    """Save an image or an array, or bytes, below root; returns the path as text."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    elif name.endswith(".npy"):
        np.save(path, image)
    else:
        image.save(path, **options)
    return str(path)


OTHERS = "left out, since docs/data.md does not have their format"


def said_of(*sources):
    """The lines that a stage prints of its files."""
    said = []
    describe_files(said.append, *sources)
    return said


def bad_of(folder, in_chans=3, reading=None):
    """The reasons for which files of a folder cannot be shown."""
    source = ImageFolder(folder, "train", reading or Reading())
    views = Views(source, "center", (8, 8), in_chans, 1, 0)
    return [reason for i in range(len(source)) for name, reason in views[0, i]["bad"][:1]
            if name == source.name(i)]


# ---------------------------------------------------------------- suffixes and kinds


@pytest.mark.parametrize("suffix, kind, mode", [
    *((suffix, "JPEG", "RGB") for suffix in (".jfif", ".jpe", ".JPG", ".mpo")),
    (".pgm", "PPM", "L"), (".pbm", "PPM", "1"), (".pnm", "PPM", "RGB"), (".ppm", "PPM", "RGB"),
    (".apng", "PNG", "RGB"), (".dib", "DIB", "RGB"), (".Tif", "TIFF", "RGB"), (".webp", "WEBP", "RGB"),
    (".avif", "AVIF", "RGB"), (".jp2", "JPEG2000", "RGB"), (".j2k", "JPEG2000", "RGB"),
])
def test_every_suffix_of_a_decoded_format_is_an_image(tmp_path, suffix, kind, mode):
    if not HAS.get(kind, True):
        pytest.skip(f"this Pillow has no {kind}")
    write(tmp_path, "a.png", noise_image(20, 20))
    write(tmp_path, f"b{suffix}", noise_image(20, 30).convert(mode), format=kind)
    source = ImageFolder(tmp_path, "train")
    assert len(source) == 2 and source.open(1).size == (30, 20) and bad_of(tmp_path) == []


def test_formats_that_pillow_lacks_have_no_suffixes():
    assert set(formats()) <= set(Image.OPEN) and not {".eps", ".psd", ".heic", ".h5"} & set(suffixes())
    assert all((name in formats()) == has for name, has in HAS.items())


def test_what_was_left_out_is_counted_by_suffix_once_and_sidecars_are_not(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            write(tmp_path, f"{split}/x/{i}.png", noise_image(9, 9))
            write(tmp_path, f"{split}/x/{i}.HEIC", b"x")
        write(tmp_path, f"{split}/x/plain", b"x")
        for name in ("a.txt", "a.json", "b.xml", "c.csv", "README.md", "Thumbs.db", ".DS_Store"):
            write(tmp_path, f"{split}/x/{name}", b"x")
    train, val = (open_data(str(tmp_path), split, "", print) for split in ("train", "val"))
    assert said_of(train, val) == [
        f"{tmp_path}/train: 2 images; {OTHERS}: 2 .heic, 1 without a suffix",
        f"{tmp_path}/val: 1 images; {OTHERS}: 1 .heic, 1 without a suffix"]
    flat = tmp_path / "train" / "x"
    assert len(said_of(*(open_data(str(flat), split, "", print) for split in ("train", "val")))) == 1
    for path in flat.glob("*.png"):
        path.unlink()
    message = r"no images \(\d+ other files: 2 .heic, 1 without a suffix\): expected"
    with pytest.raises(UserError, match=message):
        ImageFolder(flat, "train")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("content, reason", [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC, which cannot be decoded"),
    (b"\n<!DOCTYPE html><html>not found</html>", "an HTML page, which cannot be decoded"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs, which cannot be decoded"),
    (b"", "an empty file, which cannot be decoded"), (b"some text", "not an image"),
    (encoded(noise_image(30, 30), "PNG")[:900], "; it is a PNG"),
    (bytes(128) + b"DICM" + bytes(99), "a DICOM file, which cannot be decoded"),
])
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, content, reason):
    write(tmp_path, "a.jpg", content)
    write(tmp_path, "b.png", noise_image(9, 9))
    got, = bad_of(tmp_path)
    assert got.endswith(reason)
    output = tmp_path.parent / f"{tmp_path.name}-pack"
    pack.main(parse(pack.Config, [str(tmp_path), str(output), "--max-bad", "1"]))
    assert open_packed(output, "train").header["bad"]["0"].endswith(reason)


def test_a_file_named_for_another_format_is_shown_for_what_it_is(tmp_path):
    write(tmp_path, "a.jpg", encoded(noise_image(9, 9), "PNG"))
    assert bad_of(tmp_path) == [] and reason_of(OSError("x"), str(tmp_path / "none")) == "OSError: x"


# ---------------------------------------------------------------- more than 8 bits

RAMP = np.linspace(0, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)
GREY = np.round(RAMP / 4095 * 255)


def png_with_bits(pixels, bits):
    """A PNG of 16-bit greys whose sBIT chunk says how many bits signify."""
    whole = encoded(Image.fromarray(pixels), "PNG")
    chunk = b"sBIT" + bytes([bits])
    return whole[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


def tiff(pixels, tags=(), bits=16, photometric=1):
    """A little-endian TIFF of one strip with more tags: (tag, value) of 16 bits."""
    entries = sorted([(256, pixels.shape[1]), (257, pixels.shape[0]), (258, bits), (259, 1),
                      (262, photometric), (277, 1), (278, pixels.shape[0]), *tags, (273, None),
                      (279, pixels.nbytes)])
    start = 8 + 2 + 12 * len(entries) + 4
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, start if value is None else value)
                      for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + pixels.tobytes()


def grey_of(file, white=None):
    """The greys (H, W) of a file in bytes, or at a path."""
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    image = to_mode(open_image(file, Reading(levels_of_flag(white))), 1)
    return to_array(image)[..., 0].astype(int)


SIGNED = (RAMP.astype(int) - 1000).astype(np.int16)


@pytest.mark.parametrize("file, white", [
    (encoded(Image.fromarray(RAMP), "PNG"), "4095"), (encoded(Image.fromarray(RAMP), "TIFF"), "4095"),
    (encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"), "0:4095"),
    (encoded(Image.fromarray(RAMP), "PPM"), "4095"),
    (b"P5\n64 64\n8191\n" + RAMP.astype(">u2").tobytes(), "4095"),
    (b"P2\n64 64\n8191\n" + b" ".join(b"%d" % value for value in RAMP.flat), "4095"),
    (b"P5\n64 64\n4095\n" + RAMP.astype(">u2").tobytes(), None),
    (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "4095"),
    (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "4095"),
    (encoded(Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()), "TIFF"), "4095"),
    (tiff(SIGNED, [(339, 2)]), "-1000:3095"), (tiff(4095 - RAMP, photometric=0), "4095"),
    # what the formats say themselves
    (png_with_bits(RAMP, 12), None), (png_with_bits(RAMP << 4 | RAMP >> 8, 12), None),
    (tiff(RAMP, [(340, 0), (341, 4095)]), None), (tiff(RAMP + 100, [(340, 100), (341, 4195)]), None),
    (tiff((4095 - RAMP) * 16, photometric=0), None),
])
def test_white_is_what_the_flag_or_the_format_says(file, white):
    assert np.abs(grey_of(file, white) - GREY).max() <= 1
    assert len(np.unique(grey_of(file, white))) > 250


def test_arrays_of_numpy_and_values_outside_white(tmp_path):
    for name, pixels, white in (("a", RAMP, "4095"), ("b", RAMP.astype(">u2"), "4095"),
                                ("c", SIGNED, "-1000:3095"), ("d", RAMP / np.float32(4095), "1")):
        assert np.abs(grey_of(write(tmp_path, f"{name}.npy", pixels), white) - GREY).max() <= 1
    got = grey_of(write(tmp_path, "e.npy", RAMP), "1000:2000")
    assert got[0, 0] == 0 and got[-1, -1] == 255 and 0 < got[20, 0] < 255
    assert np.array_equal(grey_of(write(tmp_path, "f.npy", RAMP), "4095:0"),
                          255 - grey_of(write(tmp_path, "f.npy", RAMP), "4095"))


def test_a_dark_image_that_says_its_bits_is_not_brightened():
    dark = np.full((8, 8), 37, np.uint16) << 4                          # as the standard has 12 bits
    dark[0, 0] = 0
    assert grey_of(png_with_bits(dark, 12)).max() == 2


@pytest.mark.parametrize("file, message", [
    (tiff(SIGNED, [(339, 2)]), "signed integers of 16 bits have no known range, here -1000 to 3095: expected "
                               "--white=BLACK:WHITE"),
    (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "integers of 32 bits"),
    (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "pixels of 0 to 4095: expected 0 to 1, or "),
    (tiff(RAMP, [(341, 1023)]), "pixels of 0 to 4095: expected 0 to 1023, or --white=BLACK:WHITE"),
    (tiff(RAMP, [(340, 9), (341, 9)]), "SMinSampleValue 9 and SMaxSampleValue 9"),
])
def test_what_nothing_tells_is_refused_before_work_and_named(tmp_path, file, message):
    with pytest.raises(UnknownLevels, match=message):
        grey_of(file)
    write(tmp_path, "a.tif", file)
    with pytest.raises(UserError, match=message):
        said_of(ImageFolder(tmp_path, "train"))
    assert said_of(ImageFolder(tmp_path, "train", Reading(levels_of_flag("-32768:32767")))) == []


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
def test_sixteen_bits_that_are_not_full_are_warned_of_once(tmp_path, bits, name):
    pixels = RAMP >> 12 - bits if bits < 12 else RAMP << bits - 12
    for split in ("train", "val"):
        write(tmp_path, f"{split}/{name}", Image.fromarray(pixels) if name != "a.npy" else pixels)
    sources = [ImageFolder(tmp_path, split) for split in ("train", "val")]
    line, = said_of(*sources)
    assert line.startswith("warning: 1 images of more than 8 bits in ")
    assert f"of 0 to {pixels.max()}, and 65535 is white" in line
    assert f"--white {2 ** bits - 1} or --white=BLACK:WHITE" in line
    assert said_of(ImageFolder(tmp_path, "train", Reading((0, 2 ** bits - 1)))) == []
    line, = said_of(ImageFolder(tmp_path, "train", Reading((0, 255))))
    assert "those outside 0 to 255, which --white says, become black or white" in line


def test_full_sixteen_bits_and_ordinary_images_are_not_warned_of(tmp_path):
    write(tmp_path, "a.png", noise_image(9, 9))
    write(tmp_path, "dark.png", Image.new("RGB", (9, 9)))
    assert said_of(ImageFolder(tmp_path, "train")) == []
    write(tmp_path, "b.png", Image.fromarray(RAMP * 16))
    write(tmp_path, "c.png", Image.fromarray(RAMP))                     # one of them is full
    assert said_of(ImageFolder(tmp_path, "train")) == []


def test_colours_of_16_bits_that_are_not_full_are_warned_of_and_lead_to_arrays(tmp_path):
    rows = [b"\0" + row.tobytes() for row in np.repeat(RAMP.astype(">u2")[..., None], 3, axis=2)]
    body = zlib.compress(b"".join(rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    write(tmp_path, "a.png", b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))
    line, = said_of(ImageFolder(tmp_path, "train"))
    assert "values of 0 to 4095, and 65535 is white" in line and "save them as .npy arrays of uint16" in line
    with pytest.raises(UserError, match="16-bit colour, .*expected a .npy array of uint16"):
        said_of(ImageFolder(tmp_path, "train", Reading((0, 4095))))


def test_a_ppm_of_16_bits_that_are_not_full_is_no_silent_loss(tmp_path):
    for name, most, step in (("a", 65535, 1), ("b", 4095, 1), ("c", 65535, 16)):
        values = (np.repeat(RAMP[..., None], 3, axis=2) * step).astype(">u2")
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.ppm").write_bytes(b"P6\n64 64\n%d\n" % most + values.tobytes())
    line, = said_of(ImageFolder(tmp_path / "a", "train"))
    assert "few greys are left" in line and "save them as .npy arrays of uint16" in line
    assert said_of(ImageFolder(tmp_path / "b", "train")) == []
    assert said_of(ImageFolder(tmp_path / "c", "train")) == []
    with pytest.raises(UserError, match="16-bit colour, .*expected a .npy array of uint16"):
        said_of(ImageFolder(tmp_path / "a", "train", Reading((0, 4095))))


def test_one_image_of_unknown_levels_among_good_ones_ends_no_run(tmp_path):
    write(tmp_path, "a.png", Image.new("RGB", (9, 9)))
    write(tmp_path, "b.tif", Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)))
    assert said_of(ImageFolder(tmp_path, "train")) == []
    (tmp_path / "train" / "a.png").unlink(missing_ok=True)
    (tmp_path / "a.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="b.tif: "):
        said_of(ImageFolder(tmp_path, "train"))


def test_a_black_below_0_has_its_way_on_the_command_line(capsys):
    assert parse(pack.Config, ["a", "b", "--white=-1000:3000"]).white == "-1000:3000"
    with pytest.raises(SystemExit):
        parse(pack.Config, ["a", "b", "--white", "-1000:3000"])
    assert "--white: expected one argument; one that begins with - is given as --FLAG=VALUE" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "white", "1:2:3", "5:5", "nan", "0:inf", ":"])
def test_levels_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UserError, match="expected the value that is white, such as 4095, or two that differ"):
        levels_of_flag(text)


# ---------------------------------------------------------------- arrays of any number of channels


@pytest.mark.parametrize("crop", list(CROPS))
def test_each_channel_of_an_array_is_what_an_image_of_it_alone_would_be(tmp_path, crop):
    rgb = np.asarray(noise_image(50, 70))
    more = np.array(noise_image(50, 70, seed=1))
    more[:20] = 0                                                       # Pillow would take a fourth for alpha
    for channels in (4, 5):
        pixels = np.concatenate([rgb, more], axis=2)[..., :channels]
        array = open_image(write(tmp_path, "a.npy", pixels))
        image = open_image(write(tmp_path, "a.png", Image.fromarray(rgb)))
        got, want = (CROPS[crop](to_mode(one, len_), (24, 32), Rng(0, 1, 2, 3))
                     for one, len_ in ((array, channels), (image, 3)))
        assert got.shape == (24, 32, channels) and np.array_equal(got[..., :3], want)
        alone = CROPS[crop](Image.fromarray(pixels[..., channels - 1]), (24, 32), Rng(0, 1, 2, 3))
        assert np.array_equal(got[..., channels - 1:], alone)


def test_an_array_is_not_copied_and_two_dimensions_are_one_channel(tmp_path):
    array = open_image(write(tmp_path, "a.npy", np.asarray(noise_image(9, 8))))
    assert not array.flags.owndata and not array.flags.writeable and type(array) is np.ndarray
    assert open_image(write(tmp_path, "b.npy", np.zeros((9, 8), np.uint8))).shape == (9, 8, 1)
    source = ImageFolder(tmp_path, "train")
    assert Views(source, "center", (8, 8), 3, 1, 0)[0, 1]["image"].shape == (3, 8, 8)
    assert bad_of(tmp_path) == []


def test_an_array_outlives_its_file(tmp_path):
    image = noise_image(99, 80)
    array = open_image(write(tmp_path, "a.npy", np.asarray(image)))
    os.truncate(tmp_path / "a.npy", 0)                                  # else the next line kills
    assert np.array_equal(array, np.asarray(image))


def npy(header, body=b"", length=None):
    text = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", length or len(text)) + text + body


def described(kind="|u1", columns=False, shape=(8, 8, 5), size=320):
    """A .npy file whose header says this, with so many bytes behind it."""
    return npy(f"{{'descr': '{kind}', 'fortran_order': {columns}, 'shape': {shape}, }}\n", bytes(size))


@pytest.mark.parametrize("content, reason", [
    (described(shape=(10 ** 7, 10 ** 7, 3)), "pixels are more than"),
    (described(shape=(9000, 9000, 10 ** 6)), "320 bytes of values, and its header says 81000000000000: "),
    (described(size=319), "319 bytes of values, and its header says 320"),
    (described(shape=(-8, -8, 5)), "of shape (-8, -8, 5): expected (H, W)"),
    (described(shape=(8, 8, 5, 1)), "expected (H, W) or (H, W, C)"), (described(shape=8), "of shape 8"),
    (described(columns=True), "in Fortran's order: expected C's, as numpy.ascontiguousarray"),
    (described("<f8", size=2560), "an array of <f8: expected uint8 (|u1) or uint16"),
    (described("<f4", size=1280), "an array of float32: expected uint8 or uint16, or --white=BLACK:WHITE"),
    (described("|O"), "an array of Python objects: expected uint8 or uint16"),
    (npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (8, 8)}", bytes(64)),
     "an array of records"),
    (npy("(" * 900), "the header of the .npy file is damaged"), (npy("__import__('os')"), "is damaged"),
    (npy("{", length=60_000), "is damaged"), (npy("[]"), "is damaged"),
    (b"\x93NUMPY", "no .npy file of version"), (b"", "no .npy file"),
    (encoded(noise_image(9, 9), "PNG"), "no .npy file of version 1 or 2; it is a PNG"),
    (described(shape=(8, 8, 4), size=256), "has 4 channels: expected 5, which the model takes"),
    (described(shape=(5, 8, 9), size=360), "to be (C, H, W): numpy.moveaxis(array, 0, -1) turns it"),
])
def test_an_array_that_cannot_be_read_says_why(tmp_path, content, reason):
    write(tmp_path, "a.npy", content)
    write(tmp_path, "b.npy", np.zeros((8, 8, 5), np.uint8))
    got, = bad_of(tmp_path, in_chans=5)
    assert reason in got and got.isprintable()


@pytest.mark.parametrize("make, in_chans, message", [
    (lambda root: write(root, "a.npy", np.zeros((8, 8, 5), np.uint8)), 3, "has 5 channels: expected 3"),
    (lambda root: write(root, "a.png", noise_image(9, 9)), 5, r"mode RGB: expected a .npy array \(H, W, 5\)"),
])
def test_images_of_other_channels_are_refused_before_work(tmp_path, make, in_chans, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        Views(ImageFolder(tmp_path, "train"), "center", (8, 8), in_chans, 1, 0)
    with pytest.raises(UserError, match=message):
        pack.main(parse(pack.Config, [str(tmp_path), str(tmp_path / "pack"), "--in-chans", str(in_chans)]))


def test_embedded_images_have_three_channels(tmp_path):
    source = open_data("shapes:5", "train", str(tmp_path), print)
    with pytest.raises(UserError, match="has 3 channels: expected 5, which the model takes"):
        Views(source, "center", (8, 8), 5, 1, 0)


SMALL = ("--model vit_test --img-size 32 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
         "--global-batch 8 --batch-size 8 --steps 2 --device cpu").split()
TUNED = "--global-batch 8 --batch-size 8 --steps 1 --device cpu --ops torch".split()
FIVE = "--in-chans 5 --mean .5,.5,.5,.4,.3 --std .2,.2,.2,.2,.1".split()


@pytest.fixture
def spectra(tmp_path):
    """Two classes of arrays of five channels of 12 bits in each of train and val."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("field", "forest"):
            for i in range(5):
                pixels = draws.integers(0, 4096, (40 + i, 50, 5), dtype=np.uint16)
                write(tmp_path, f"images/{split}/{name}/{i}.npy", pixels)
    return tmp_path / "images"


def run_stage(stage, *flags):
    return stage.main(parse(stage.Config, [str(flag) for flag in flags]))


def test_every_stage_takes_five_channels_and_a_later_stage_takes_white_from_the_checkpoint(
        spectra, tmp_path, capsys):
    run = tmp_path / "run"
    found = run_stage(train_pretrain, "--data", spectra, "--output-dir", run, "--white", 4095, *FIVE, *SMALL)
    assert np.isfinite(found["loss"]) and (run / "reconstruction.png").exists()
    assert torch.load(run / "encoder.pt")["config"]["white"] == "4095"
    more = ["--checkpoint", run, "--data", spectra, *TUNED]
    write(spectra, "train/field/a.heic", b"x")
    run_stage(train_probe, *more, "--output-dir", tmp_path / "probe")
    run_stage(train_probe, *more, "--output-dir", tmp_path / "knn", "--knn", 3)
    message = "--rand-augment 9 changes the colours .* has 5: expected --rand-augment 0"
    with pytest.raises(UserError, match=message):
        run_stage(train_finetune, *more, "--output-dir", tmp_path / "tuned")
    run_stage(train_finetune, *more, "--output-dir", tmp_path / "tuned", "--rand-augment", 0, "--reprob", 0.5)
    run_stage(feature_tool, run, spectra, tmp_path / "features.npy", "--device", "cpu")
    assert np.isfinite(np.load(tmp_path / "features.npy")).all()
    measured = ["--data", spectra, "--output-dir", tmp_path / "measured", "--device", "cpu"]
    run_stage(evaluate, "--checkpoint", tmp_path / "tuned", *measured)
    run_stage(probe_layers, "--checkpoint", run, *measured)
    said = capsys.readouterr().out
    assert said.count(f"{OTHERS}: 1 .heic") == 5                        # evaluate reads val alone
    assert "warning" not in said                                        # of levels: white is known
    run_stage(evaluate, "--checkpoint", tmp_path / "tuned", *measured, "--white", 65535)
    assert "few greys are left of them; give --white 4095" in capsys.readouterr().out
    with pytest.raises(UserError, match="white +4095 +2047"):
        run_stage(train_pretrain, "--data", spectra, "--output-dir", run, "--white", 2047, "--resume", "auto",
                  *FIVE, *SMALL)


def test_a_pack_holds_five_channels_and_remembers_white(spectra, tmp_path, capsys):
    output, flags = tmp_path / "pack", ["--in-chans", "5", "--short-side", "0"]
    run_stage(pack, spectra, output, *flags, "--white", 4095)
    reading = Reading((0, 4095))
    folder = ImageFolder(spectra, "train", reading)
    packed = open_data(str(output), "train", "", print)
    for crop in CROPS:
        a, b = (Views(source, crop, (24, 24), 5, 1, 0)[0, 3]["image"] for source in (folder, packed))
        assert torch.equal(a, b) and a.float().std() > 20
    with pytest.raises(UserError, match="is of --white 4095, not None: expected the same flags"):
        run_stage(pack, spectra, output, *flags)
    with pytest.raises(UserError, match="is of --in-chans 5, not 3"):
        run_stage(pack, spectra, output, "--short-side", 0, "--white", 4095)
    capsys.readouterr()
    open_data(str(output), "train", "", print, reading)
    assert "warning" not in capsys.readouterr().out
    open_data(str(output), "train", "", print, Reading((0, 99)))
    assert "--white does not change a pack: " in capsys.readouterr().out
    plan = dict(settings=dict(short_side=0, resample="bicubic", in_chans=-1), files=[["a.npy", 1]])
    journal = Journal(tmp_path / "planted.pack", plan)
    journal.add([(bytes(80), 4, 4, "")])
    journal.finish([0], [""], "train")
    with pytest.raises(UserError, match="planted.pack is damaged"):
        open_packed(tmp_path / "planted.pack", "train")
    with pytest.raises(UserError, match="has 5 channels: expected 3"):
        Views(packed, "center", (24, 24), 3, 1, 0)


# ---------------------------------------------------------------- large photographs


def test_the_limit_is_pillows_own():
    # Where this process has not opened an image yet; Pillow's source has the same number.
    assert MAX_PIXELS == int(1024 * 1024 * 1024 // 4 // 3) and Reading().max_pixels == MAX_PIXELS


def test_an_image_above_the_limit_is_refused_with_the_flag_and_one_below_is_not(tmp_path):
    write(tmp_path, "a.png", Image.new("L", (100, 80)))
    for most, fits in ((8000, True), (7999, False), (3000, False)):     # Pillow refuses the last by itself
        reasons = [reason for reason in [fault(tmp_path / "a.png", most)] if reason]
        assert not reasons if fits else "--max-pixels" in reasons[0]


def fault(path, most):
    try:
        open_image(str(path), Reading(max_pixels=most)).load()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("most, size", [(8000, (100, 80)), (7999, (50, 40)), (1999, (25, 20)),
                                        (499, (13, 10))])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_counts_after_the_fraction_at_which_it_is_decoded(tmp_path, most, size, mode):
    path = write(tmp_path, "a.jpg", Image.new(mode, (100, 80)))
    assert to_mode(open_image(path, Reading(max_pixels=most)), 3).size == size
    assert "100 x 80 pixels are more than 120: expected fewer, or a larger --max-pixels" in fault(path, 120)
    write(tmp_path, "b.jpg", Image.new(mode, (100, 80)), progressive=True)
    assert "100 x 80 pixels are more than 7999" in fault(tmp_path / "b.jpg", 7999)  # its decoder holds all


def test_a_telephones_photograph_of_200_megapixels_is_shown(tmp_path):
    Image.new("L", (16320, 12240), 78).save(tmp_path / "a.jpg", quality=10)
    source = ImageFolder(tmp_path, "train")
    for crop in ("random_resized", "evaluation"):
        assert (Views(source, crop, (16, 16), 3, 1, 0)[0, 0]["image"] == 78).all()


def test_a_telephones_jpeg_with_a_second_picture_is_decoded_at_a_fraction_too(tmp_path):
    image = noise_image(800, 1000)
    jpeg = write(tmp_path, "a.jpg", image, quality=90)
    mpo = write(tmp_path, "b.jpg", image, format="MPO", save_all=True, append_images=[noise_image(9, 9)],
                quality=90)
    crops = [CROPS["random_resized"](open_image(path), (16, 16), Rng(0, 1, 2, 3)) for path in (jpeg, mpo)]
    assert open_image(mpo).format == "MPO" and np.array_equal(*crops)
    assert open_image(mpo, Reading(max_pixels=200_000)).size == (500, 400)


def test_workers_however_they_start_have_the_limit_and_white(tmp_path):
    write(tmp_path, "a.png", Image.fromarray(RAMP))
    source = pickle.loads(pickle.dumps(ImageFolder(tmp_path, "train", Reading((0, 4095), 10 ** 8))))
    assert np.asarray(source.open(0)).max() == 255 and source.reading.max_pixels == 10 ** 8


# ---------------------------------------------------------------- time


def segments(kind, body, count):
    return (bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body) * count


def test_images_with_much_metadata_or_small_chunks_are_read(tmp_path):
    noise, text = np.random.default_rng(0).bytes(12_000_000), b"<x:xmpmeta>" * 10_000
    image = noise_image(60, 50)
    jpeg, gif = encoded(image, "JPEG", progressive=True), encoded(image.quantize(16), "GIF")
    profile = b"".join(segments(0xE2, noise[i:i + 60_000], 1) for i in range(0, len(noise), 60_000))
    large = np.random.default_rng(1).integers(0, 256, (1000, 1000, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in large)
    packed = zlib.compress(rows, 0)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1000, 1000, 8, 2, 0, 0, 0)),
             *((b"IDAT", packed[i:i + 512]) for i in range(0, len(packed), 512)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts)
    first = 13 + (3 << (gif[10] & 7) + 1)
    blocks = b"".join(b"\x46" + text[i:i + 70] for i in range(0, 99_400, 70))
    xmp = b"\x21\xff\x0bXMP DataXMP" + blocks + b"\0"
    tall = Image.new("L", (3, 60_000))                                  # a strip for each row
    for name, file in (("a.jpg", jpeg[:2] + profile + jpeg[2:]), ("b.png", png),
                       ("c.gif", gif[:first] + xmp + gif[first:]),
                       ("d.tif", encoded(tall, "TIFF", tiffinfo={278: 1})),
                       ("e.png", encoded(image, "PNG", exif=b"Exif\0\0" + noise))):
        assert np.asarray(to_mode(open_image(write(tmp_path, name, file)), 3)).any() or name == "d.tif"


@pytest.mark.parametrize("white", [1, 7, 100, 254, 1000, 4095, 65534])
@pytest.mark.parametrize("kind, bands", [(b"P5", 1), (b"P6", 3)])
def test_a_ppm_of_another_white_is_pillows_to_the_bit(tmp_path, white, kind, bands):
    top, depth = min(2 * white, 65535), ">u2" if white > 255 else "u1"
    values = np.random.default_rng(white).integers(0, min(top, 255 if depth == "u1" else 65535) + 1,
                                                   (9, 11, bands)).astype(depth)
    file = kind + b"\n11 9\n%d\n" % white + values.tobytes()
    most = 65535 if bands == 1 and white > 255 else 255
    want = [[[min(most, round(int(value) / white * most)) for value in pixel] for pixel in row]
            for row in values]                                          # as PpmImagePlugin has it
    with Image.open(write(tmp_path, "a.ppm", file)) as image:
        assert np.array_equal(np.atleast_3d(np.asarray(image)), want)
    torn = write(tmp_path, "torn.ppm", file[:-3])
    with pytest.raises(ValueError, match="not enough image data"):
        np.asarray(open_image(torn))
