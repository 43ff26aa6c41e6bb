"""tools.reconstruct: its pictures are the stage's own, a drawn mask is obeyed, and what it refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import noise_image
from PIL import Image, ImageDraw

import train_pretrain
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.kernels.reference import normalise_patches, patchify
from mff_run.process import run
from mff_weights.pretrained import read_pretrained
from tools import convert, reconstruct

SMALL = ("--model vit_test --img-size 16x24 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
         "--global-batch 4 --batch-size 4 --steps 1 --device cpu --picture-images 4 --seed 7").split()
HOW = ["--device", "cpu", "--seed", "7"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of four images of several sizes."""
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate([(40, 30), (16, 24), (33, 70), (50, 50)]):
        noise_image(*size, seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory, images):
    """A function that pre-trains on these images with more flags and returns the run's folder."""
    made = {}

    def make(*flags):
        if flags not in made:
            made[flags] = folder = tmp_path_factory.mktemp("run")
            train_pretrain.main(parse(train_pretrain.Config, [*SMALL, *flags, "--data", str(images),
                                                              "--output-dir", str(folder)]))
        return made[flags]
    return make


def apply(checkpoint, images, out, *flags):
    line = [checkpoint, images, "--output-dir", out, *HOW, *flags]
    return reconstruct.main(parse(reconstruct.Config, list(map(str, line))))


def columns_of(path, count, row=0, height=128, width=192):
    """The tiles (height, width, 3) of a row of a sheet."""
    sheet, top = np.asarray(Image.open(path)), 46 + row * (height + 6)
    return [sheet[top:top + height, 6 + j * (width + 6):6 + j * (width + 6) + width] for j in range(count)]


def patches_of(tile, side=4 * 8):
    """Each patch of a tile of 4 x 6 patches, (24, P, P, 3)."""
    return tile.reshape(4, side, 6, side, 3).transpose(0, 2, 1, 3, 4).reshape(24, side, side, 3)


LAYOUTS = {"the run": ([], None), "PixMIM": (["--low-pass-radius", "40", "--no-norm-pix-loss"], None),
           "MFF in mmpretrain's names": ([], "mmpretrain"), "MAE's names": (["--out-indices", "last"], "mae"),
           "Transformers' names": (["--out-indices", "last"], "hf"),
           "MAE in mmpretrain's names": (["--out-indices", "last"], "mmpretrain")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reconstructions_of_every_layout_are_the_stages_own_pictures(tmp_path, images, pretrain, layout):
    flags, family = LAYOUTS[layout]
    checkpoint, more, count = pretrain(*flags), [], 6 if "--low-pass-radius" in flags else 5
    if family:
        target = tmp_path / ("weights" if family == "hf" else "weights.pth")
        given = [str(checkpoint), str(target), "--to", family, "--part", "whole"]
        convert.main(parse(convert.Config, given))
        more = ["--img-size", "16x24"]                                  # its positions are of no square
        if family != "hf":                                              # which has a config.json
            more += ["--decoder-num-heads", "2", "--norm-pix", "yes"]
        own, checkpoint = checkpoint, target
    else:
        own = checkpoint
    found = apply(checkpoint, images, tmp_path / "out", *more)
    for row in range(4):
        theirs = columns_of(own / "reconstruction.png", count, row)
        ours = columns_of(tmp_path / f"out/{row}.png", count)
        assert all(map(np.array_equal, theirs, ours)), f"image {row}"
    assert len(found["loss"]) == 4 and min(found["loss"].values()) > 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["loss"] == found["loss"]


def test_a_larger_image_has_more_patches(tmp_path, images, pretrain):
    found = apply(pretrain(), images, tmp_path / "out", "--img-size", "32x48")
    assert len(found["loss"]) == 4
    assert Image.open(tmp_path / "out/0.png").size[0] == 6 + 5 * (4 * 48 + 6)


def test_another_seed_masks_other_patches_and_another_ratio_more(tmp_path, images, pretrain):
    tiles = {}
    for name, flags in dict(a=[], b=["--seed", 8], c=["--mask-ratio", 0.5], d=[]).items():
        apply(pretrain(), images / "3.png", tmp_path / name, *flags)
        tiles[name] = patches_of(columns_of(tmp_path / name / "3.png", 2)[1])
    grey = {name: (patches == patches[:, :1, :1]).all(axis=(1, 2, 3)) for name, patches in tiles.items()}
    assert grey["a"].sum() == grey["b"].sum() == 18 and grey["c"].sum() == 12
    assert (grey["a"] == grey["d"]).all() and (grey["a"] != grey["b"]).any()


@pytest.mark.parametrize("shape", [(16, 24), (160, 240), (33, 70)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "1"])
def test_a_drawn_mask_is_obeyed(tmp_path, images, pretrain, shape, mode):
    """Of the crop's shape at any scale, or of the image's own: its right half is white."""
    H, W = shape
    mask = Image.new("L", (W, H))
    ImageDraw.Draw(mask).rectangle([W // 2, 0, W, H], fill=255)
    if mode == "RGBA":                                                  # transparent on the left
        mask = Image.merge("RGBA", [Image.new("L", (W, H), 255)] * 3 + [mask])
    mask.convert(mode).save(tmp_path / "mask.png")
    apply(pretrain(), images / "2.png", tmp_path / "out", "--mask", tmp_path / "mask.png")
    image, masked, prediction, pasted, means = map(patches_of, columns_of(tmp_path / "out/2.png", 5))
    hidden = np.arange(24) % 6 >= 3
    assert (masked[hidden] == masked[hidden][0, 0, 0]).all() and (masked[~hidden] == image[~hidden]).all()
    assert (pasted[~hidden] == image[~hidden]).all() and (prediction[hidden] == pasted[hidden]).all()
    assert (means[hidden] == means[hidden][:, :1, :1]).all() and (means[~hidden] == image[~hidden]).all()


@pytest.mark.parametrize("fill, size, message", [
    (0, (24, 16), "masks 0 of 24 patches: expected some that are white by half or more"),
    (255, (24, 16), "masks 24 of 24 patches: expected some that"),
    (None, (24, 16), "mask.png cannot be read (a PNG, which cannot be decoded): expected an image whose"),
    ("half", (20, 30), "the mask has 20 x 30 pixels, the image 70 x 33: expected the same shape, or that of"),
])
def test_a_mask_that_fits_nothing_is_refused(tmp_path, images, pretrain, fill, size, message):
    mask = Image.new("L", size, fill if isinstance(fill, int) else 0)
    if fill == "half":
        ImageDraw.Draw(mask).rectangle([0, 0, 10, 30], fill=255)
    mask.save(tmp_path / "mask.png")
    if fill is None:
        (tmp_path / "mask.png").write_bytes(b"\x89PNG no")
    with pytest.raises(UserError) as error:
        apply(pretrain(), images / "2.png", tmp_path / "out", "--mask", tmp_path / "mask.png")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_predictions_tell_whether_they_are_of_normalised_patches():
    """Plain pixels of ramps have their brightness, normalised ones none; what is told or given counts."""
    cfg = SimpleNamespace(norm_pix="auto", in_chans=3, img_size=(16, 24), mean=(0.5,) * 3, std=(0.25,) * 3)

    def of(change):
        def predict(images, noise):
            ids = noise.argsort(dim=1)[:, 6:]
            return change(patchify(images, 4)[:, ids[0]]), ids, None
        encoder = SimpleNamespace(num_patches=24, patch_size=4)
        return SimpleNamespace(predict=predict, encoder=encoder)
    said = []
    plain, normal = of(lambda x: 0.7 * x + 1), of(lambda x: normalise_patches(x))
    assert reconstruct.is_normalised(cfg, {}, plain, "a.pth", said.append) is False
    assert reconstruct.is_normalised(cfg, {}, normal, "a.pth", said.append) is True
    assert reconstruct.is_normalised(cfg, {}, of(lambda x: 0 * x), "a.pth", said.append) is True
    assert "its predictions have 0.70 of the brightness: --norm-pix no is used" in said[0] and len(said) == 3
    assert reconstruct.is_normalised(cfg, dict(norm_pix_loss=True), plain, "", said.append) is True
    cfg.norm_pix = "no"
    assert reconstruct.is_normalised(cfg, dict(norm_pix_loss=True), plain, "", said.append) is False
    assert len(said) == 3


def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(tmp_path, images, pretrain, capsys):
    for path in images.iterdir():
        (tmp_path / "images" / path.stem).mkdir(parents=True)
        (tmp_path / "images" / path.stem / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images/0/0.png").write_bytes(b"\x89PNG no")
    found = apply(pretrain(), tmp_path / "images", tmp_path / "out")
    assert found["unreadable"] == {"0/0.png": "a PNG, which cannot be decoded"}
    output = capsys.readouterr().out
    assert "warning: 0/0.png cannot be read (a PNG, which cannot be decoded)" in output
    assert "reconstructions of 3 of 4 images" in output and "(norm_pix)" in output
    for i in (1, 2, 3):                                                 # each keeps its own mask
        ours = columns_of(tmp_path / f"out/{i}/{i}.png", 5)
        assert all(map(np.array_equal, columns_of(pretrain() / "reconstruction.png", 5, i), ours))


def without_decoder(path, run):
    return run / "encoder.pt"


def of_features(path, run):
    weights = torch.load(run / "last.pt", weights_only=True)
    weights["config"]["target"] = "clip"
    torch.save(weights, path / "clip.pt")
    return path / "clip.pt"


def of_unknown_heads(path, run):
    state = read_pretrained(run).weights.state
    torch.save({name.removeprefix("encoder."): value for name, value in state.items()}, path / "mae.pth")
    return path / "mae.pth"


@pytest.mark.parametrize("make, flags, message", [
    (without_decoder, "", "holds an encoder without a decoder, which is what reconstructs: expected"),
    (of_features, "", "predicts 48 values per patch (--target clip): expected the 48 pixels of a patch"),
    (of_unknown_heads, "--img-size 16x24", "is 16 wide, and its number of heads is not known or does not"),
    (None, "--out-indices 0,11", "fuses 6 blocks, and 0,11 names 2: expected --out-indices with 6 blocks"),
    (None, "--decoder-num-heads 3", "its number of heads is not known or does not divide it: give --decoder"),
    (None, "--adapt --patch-size 8", "a decoder predicts those that it was trained on: expected"),
    (None, "--mask-ratio 1", "mask_ratio 1.0 is outside (0, 1)"),
    (None, "--mask nowhere.png", "--mask nowhere.png cannot be read (No such file or directory): expected"),
    (None, "--img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
])
def test_what_does_not_reconstruct_is_one_line_and_code_2(tmp_path, images, pretrain, capfd, make, flags,
                                                          message):
    checkpoint = make(tmp_path, pretrain()) if make else pretrain()
    line = [str(checkpoint), str(images), "--output-dir", str(tmp_path / "out"), *flags.split()]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(reconstruct.main, parse(reconstruct.Config, line))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()
