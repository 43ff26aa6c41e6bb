"""The embedded data set: what its docstrings claim, checked without a download or a GPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sources import ROOT

from mff_data import shapes
from mff_data.shapes import SHAPES, TEXTURES, load_shapes, render
from mff_data.sources import open_data
from mff_min.errors import Fault, UserError

GOLDEN = ROOT / "tests/golden/shapes.npz"       # by PYTHONPATH=tests python -m tests.data.test_shapes
GOLDEN_INDICES = [0, 1, 40, 12345]


def silent(line):
    """None; a progress callable that shows nothing."""


def equal(a, b):
    """True if two dicts of arrays have the same names, types and values."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def samples():
    return render("train", range(800))


# --- oracle ---

def test_images_equal_the_golden_ones_to_one_level():
    golden, ours = np.load(GOLDEN, allow_pickle=False), render("train", GOLDEN_INDICES)
    # sin and cos may differ in the last bit between CPUs, so a value may be rounded to either neighbour
    assert np.abs(np.int64(ours["images"]) - np.int64(golden["images"])).max() <= 1
    for name in ("shape", "texture", "box"):
        np.testing.assert_array_equal(ours[name], golden[name])


# --- determinism ---

def test_a_sample_does_not_depend_on_the_chunk_or_the_order():
    together = render("train", range(100, 140))
    alone = [render("train", [i]) for i in range(139, 99, -1)][::-1]
    assert equal(together, {name: np.concatenate([one[name] for one in alone]) for name in together})


def test_another_process_draws_the_same_samples():
    code = "import sys, mff_data.shapes as s; sys.stdout.buffer.write(s.render('val', [7])['images'])"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    assert drawn == render("val", [7])["images"].tobytes()


def test_train_and_val_share_no_image():
    train = {image.tobytes() for image in render("train", range(400))["images"]}
    val = {image.tobytes() for image in render("val", range(400))["images"]}
    assert len(train) == len(val) == 400 and not train & val


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", "import mff_data.shapes"], cwd=tmp_path, env=environment,
                          capture_output=True, check=True)
    assert done.stdout == done.stderr == b"" and not list(tmp_path.iterdir())


# --- properties of the samples ---

def test_types_and_shapes_are_those_of_the_docstring():
    for n, size in ((3, 64), (2, 48), (0, 32)):
        batch = render("val", range(n), size)
        found = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert found == {"images": ((n, size, size, 3), np.uint8), "shape": ((n,), np.int64),
                         "texture": ((n,), np.int64), "mask": ((n, size, size), bool),
                         "box": ((n, 4), np.int64)}


def test_every_pair_of_labels_comes_once_in_each_run_of_80(samples):
    pairs = (samples["shape"] * len(TEXTURES) + samples["texture"]).reshape(-1, len(SHAPES) * len(TEXTURES))
    assert len(SHAPES) == 10 and len(TEXTURES) == 8
    assert (np.sort(pairs, 1) == np.arange(80)).all()
    assert not (pairs[0] == pairs[1]).all()


def test_box_is_the_bounds_of_the_mask(samples):
    for mask, (x0, y0, x1, y1) in zip(samples["mask"], samples["box"], strict=True):
        rows, columns = np.nonzero(mask)
        assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_shape_is_inside_the_image_and_takes_a_good_part_of_it(samples):
    box = samples["box"]
    side = (box[:, 2:] - box[:, :2]).max(1) / 64
    assert box.min() >= 1 and box.max() <= 63                           # a pixel is left for the soft edge
    # the circle around it is 0.36 ... 0.60 wide, a square in it 1 / sqrt(2) of that; a pixel for rounding
    assert side.min() > 0.36 / 2 ** 0.5 - 1 / 64 and side.max() < 0.60 + 1 / 64


def test_mask_covers_the_area_of_the_shape(samples):
    diameter = 2 * (samples["mask"].sum((1, 2)) / np.pi) ** 0.5
    circle = samples["shape"] == SHAPES.index("circle")
    width = samples["box"][:, 2] - samples["box"][:, 0]
    assert np.abs(diameter - width)[circle].max() < 1                   # the box counts whole pixels


def test_distances_are_one_per_unit_near_the_edge_and_shapes_fit_the_unit_circle():
    y, x = np.meshgrid(*[np.linspace(-1.3, 1.3, 521)] * 2, indexing="ij")
    for name, distance in shapes.DISTANCE.items():
        d = distance(x, y)
        slope = np.hypot(*np.gradient(d, x[0, 1] - x[0, 0]))[np.abs(d) < 0.05]
        assert np.mean(np.abs(slope - 1) < 0.01) > 0.9, name            # corners are the rest
        assert np.hypot(x, y)[d < 0].max() <= 1.01, name


def test_a_person_sees_the_shape(samples):
    luma = samples["images"] @ np.array([0.299, 0.587, 0.114]) / 255
    inside = np.array([image[mask].mean() for image, mask in zip(luma, samples["mask"], strict=True)])
    outside = np.array([image[~mask].mean() for image, mask in zip(luma, samples["mask"], strict=True)])
    assert np.abs(inside - outside).min() > 0.2
    assert 0.45 < np.mean(inside > outside) < 0.55                      # 400 +- 14 of 800, three deviations


def test_texture_is_the_peak_of_the_spectrum_of_the_background(samples):
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    found = []
    for image, mask in zip(samples["images"][:240], samples["mask"], strict=False):
        behind = np.where(mask[..., None], 0, image - image[~mask].mean(0))
        power = (np.abs(np.fft.rfft2(behind, (256, 256), axes=(0, 1))) ** 2).sum(-1)
        peak = frequency.flat[power.argmax()]
        found.append(np.abs(np.log(shapes.WAVELENGTHS * peak)).argmin())
    assert np.mean(found == samples["texture"][:240]) > 0.95


def test_ridge_regression_on_raw_pixels_stays_near_chance_for_the_shape():
    train, val = render("train", range(2000), 32), render("val", range(1000), 32)
    x, z = (s["images"].reshape(len(s["images"]), -1).astype(np.float32) / 255 for s in (train, val))
    x, z = x - x.mean(0), z - x.mean(0)
    y, gram = np.eye(len(SHAPES))[train["shape"]] - 1 / len(SHAPES), x @ x.T
    for strength in (1e-3, 1e-1, 1e1):
        ridge = strength * np.trace(gram) / len(x) * np.eye(len(x))
        accuracy = ((z @ x.T @ np.linalg.solve(gram + ridge, y)).argmax(1) == val["shape"]).mean()
        assert accuracy < 0.138                                         # chance + 4 sqrt(0.1 * 0.9 / 1000)


def test_bad_arguments_are_refused_by_value(tmp_path):
    for arguments, named in ((("test", [0]), "'test'"), (("train", [0], 16), "size 16")):
        with pytest.raises(ValueError, match=named):
            render(*arguments)
    for arguments, named in ((("test", 8), "'test'"), (("train", 0), "count 0")):
        with pytest.raises(ValueError, match=named):
            load_shapes(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


# --- the cache ---

def test_cache_returns_what_render_returns_and_the_second_call_does_not_draw(tmp_path, monkeypatch):
    lines = []
    first = load_shapes(tmp_path, "val", 100, 32, lines.append)
    assert equal(first, render("val", range(100), 32))
    assert lines[-1].startswith("shapes val: 100 / 100 images") and lines[-1].endswith("s left")
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in first.values())

    monkeypatch.setattr(shapes, "write_shapes", lambda *arguments: pytest.fail("drawn again"))
    assert equal(load_shapes(tmp_path, "val", 100, 32, pytest.fail), first)


def test_count_size_split_and_version_have_their_own_folders(tmp_path, monkeypatch):
    load_shapes(tmp_path, "train", 5, 32, silent)
    for split, count, size in (("train", 6, 32), ("val", 5, 32), ("train", 5, 40)):
        loaded = load_shapes(tmp_path, split, count, size, silent)
        assert equal(loaded, render(split, range(count), size))
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    load_shapes(tmp_path, "train", 5, 32, silent)
    assert len(list(tmp_path.glob("*/*"))) == 5


def test_interrupted_generation_leaves_nothing(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_shapes(tmp_path, "train", 200, 32, interrupt)
    assert not list(tmp_path.glob("*/*"))


def test_what_a_killed_process_left_is_not_taken_for_complete(tmp_path):
    code = "import os, sys; from mff_data.shapes import load_shapes;" \
           "load_shapes(sys.argv[1], 'train', 200, 32, lambda line: os._exit(9))"
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT).returncode == 9
    assert len(list(tmp_path.glob("*/*"))) == 1
    assert equal(load_shapes(tmp_path, "train", 200, 32, silent), render("train", range(200), 32))


def test_the_loser_of_a_race_uses_the_files_of_the_winner(tmp_path):
    winner = []

    def overtake(line):
        if not winner:
            winner.append(load_shapes(tmp_path, "train", 200, 32, silent))

    loser = load_shapes(tmp_path, "train", 200, 32, overtake)
    assert equal(loser, winner[0]) and equal(loser, render("train", range(200), 32))
    assert loser["images"].filename == winner[0]["images"].filename
    assert [folder.name for folder in tmp_path.glob("*/*")] == ["train-200"]


def test_a_cache_that_is_cut_short_is_named_before_a_run_and_in_it(tmp_path):
    source = open_data("shapes:20", "train", tmp_path, silent)
    path, = tmp_path.glob("*/train-20/images.npy")
    want = render("train", [7])["images"][0]
    assert np.array_equal(source.open(7), want) and len(source) == 20
    os.truncate(path, 5000)                                             # where it is mapped, this kills
    with pytest.raises(Fault, match="images.npy was cut short, written to or replaced while it was read"):
        source.open(7)
    with pytest.raises(UserError, match=r"the embedded images in .* are damaged \(.*\): delete their folder"):
        open_data("shapes:20", "train", tmp_path, silent)


def test_an_error_of_the_disk_is_raised(tmp_path):
    (tmp_path / f"shapes-v{shapes.VERSION}-32px").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        load_shapes(tmp_path, "train", 8, 32, silent)


if __name__ == "__main__":
    golden = render("train", GOLDEN_INDICES)
    np.savez_compressed(GOLDEN, **{name: golden[name] for name in ("images", "shape", "texture", "box")})
