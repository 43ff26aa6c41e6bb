"""tools.features against timm, and what it refuses. Nothing is masked."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.vit import MODELS, VisionTransformer
from mff_run.process import run
from mff_weights.checkpoint import load_encoder
from tools import features

SIZE = MODELS["vit_test"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Six noise images in a folder, one of them damaged, beside encoder.pth, which is where we are."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    torn = (tmp_path / "images" / "4.png").read_bytes()[:300]
    (tmp_path / "images" / "4.png").write_bytes(torn)
    state = VisionTransformer(16, **SIZE).state_dict()
    torch.save({name: torch.randn_like(value) for name, value in state.items()}, tmp_path / "encoder.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images"


def featured(flags):
    features.main(parse(features.Config, flags.split()))
    return np.load(flags.split()[2])


def test_features_are_rows_in_the_order_of_the_images(images, capsys):
    found = featured("encoder.pth images f.npy --layers 3,11 --batch-size 4")
    assert found.shape == (6, 2, 64) and found.dtype == np.float32
    about = json.loads((images.parent / "f.json").read_text())
    assert about["images"] == [f"images/{i}.png" for i in range(6)] and about["layers"] == [3, 11]
    assert about["unreadable"] == ["images/4.png"] and "1 images cannot be read" in capsys.readouterr().out
    assert np.isnan(found[4]).all() and not np.isnan(found[[0, 1, 2, 3, 5]]).any()
    with pytest.raises(UserError, match="f.npy is there already"):
        featured("encoder.pth images f.npy")


def test_nothing_is_masked_and_patches_average_to_the_mean(images):
    keep = [0, 1, 2, 3, 5]
    patches = featured("encoder.pth images patch.npy --layers 11 --pool patch")[keep]
    mean = featured("encoder.pth images mean.npy --pool mean")[keep]
    again = featured("encoder.pth images again.npy --pool mean")[keep]
    assert patches.shape == (5, 1, 16, 64)                              # every patch of 16 pixels by 4
    np.testing.assert_allclose(patches.mean(2), mean, rtol=0, atol=1e-5)
    assert np.array_equal(mean, again)


@pytest.mark.parametrize("norm", [True, False])
def test_features_are_timms_intermediate_layers(images, norm):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(16, 4, embed_dim=64, depth=12, num_heads=2, num_classes=0).eval()
    theirs.load_state_dict(torch.load("encoder.pth", weights_only=True))
    batch = torch.randn(2, 3, 16, 16)
    want = theirs.get_intermediate_layers(batch, [3, 11], return_prefix_tokens=True, norm=norm)
    encoder = load_encoder("encoder.pth", say=lambda text: None)
    for pool, of in (("cls", lambda patch, cls: cls[:, 0]), ("mean", lambda patch, cls: patch.mean(1)),
                     ("patch", lambda patch, cls: patch)):
        got = features.layer_features(encoder, batch, [3, 11], pool, norm)
        expected = torch.stack([of(*layer) for layer in want], dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_classifier_of_means_gives_what_its_head_receives(images):
    model = VisionTransformer(16, **SIZE, num_classes=5, global_pool="avg").eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    torch.save(model.state_dict(), "classifier.pth")
    batch = torch.randn(2, 3, 16, 16)
    encoder = load_encoder("classifier.pth", say=lambda text: None)
    got = features.layer_features(encoder, batch, [11], "mean", True)[:, 0]
    torch.testing.assert_close(model.head(got), model(batch))
    with pytest.raises(UserError, match="--pool cls: this encoder has a norm for the mean alone"):
        featured("classifier.pth nowhere f.npy")


def test_features_that_are_not_finite_are_a_fault_and_no_array(images, capfd):
    state = torch.load("encoder.pth")
    torch.save({name: value * 1e30 for name, value in state.items()}, "huge.pth")
    with pytest.raises(SystemExit) as stop:
        run(features.main, parse(features.Config, ["huge.pth", "images", "f.npy"]))
    said = capfd.readouterr().err
    assert stop.value.code == 3 and said.startswith("error: the features of ") and said.count("\n") == 1
    assert not list(images.parent.glob("f.*"))


@pytest.mark.parametrize("flags, message", [
    ("encoder.pth nowhere f.npy", "data folder nowhere does not exist"),
    ("encoder.pth images f.txt", "f.txt: expected a name that ends in .npy"),
    ("encoder.pth images f.npy --layers 12", "--layers 12: expected all, or numbers of blocks from 0 to 11"),
    ("encoder.pth images f.npy --mean 0.5", "--mean has 1 numbers: expected 3"),
    ("encoder.pth images f.npy --img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
    ("images images f.npy", "images holds none of last.pt"),
])
def test_features_of_bad_input_are_one_line_and_code_2(images, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(features.main, parse(features.Config, flags.split()))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (images.parent / "f.npy").exists()
