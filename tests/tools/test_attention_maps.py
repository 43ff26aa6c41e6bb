"""tools.attention: its rows are the softmax, rollout of the identity is the identity, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from images import noise_image
from PIL import Image

from mff_min.config import parse
from mff_min.vit import MODELS, VisionTransformer
from mff_run.picture import principal_colours
from mff_run.process import run
from tools import attention


def random_encoder(size=16, **changes):
    encoder = VisionTransformer(size, **MODELS["vit_test"] | changes)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))           # else attention is nearly uniform
    return encoder.requires_grad_(False).eval()


def wide():
    """A checkpoint of an encoder of 16 x 24 pixels."""
    return dict(model=random_encoder((16, 24)).state_dict(), config=dict(img_size=(16, 24)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """images/ with three of several sizes, mae.pth and mff.pth; it is where we are."""
    for i, size in enumerate([(40, 30), (16, 24), (33, 70)]):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise_image(*size, seed=i).save(tmp_path / "images" / f"{i}.png")
    for seed, name in enumerate(("mae", "mff")):
        torch.manual_seed(seed)
        torch.save(random_encoder().state_dict(), tmp_path / f"{name}.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def apply(*flags):
    line = ["--device", "cpu", "--output-dir", "out", *" ".join(map(str, flags)).split()]
    return attention.main(parse(attention.Config, line))


# ---------------------------------------------------------------- the numbers


def test_rows_sum_to_1_and_are_a_softmax_by_brute_force():
    encoder, images = random_encoder((16, 24)), torch.randn(2, 3, 16, 24)
    x = encoder.embed(images)
    for query in (0, 9):
        found, rolled, features = attention.look(encoder, images, [0, 11], query)
        assert list(found) == [0, 11] and found[0].shape == (2, 2, 25) and rolled.shape == (2, 25)
        for rows in (*found.values(), rolled):
            torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)
        block = encoder.blocks[0]
        y = block.norm1(x).double()
        weight, bias = block.attn.qkv.weight.double(), block.attn.qkv.bias.double()
        for b in range(2):
            for h in range(2):
                rows = slice(32 * h, 32 * h + 32), slice(64 + 32 * h, 96 + 32 * h)      # q and k of the head
                q, k = (y[b] @ weight[part].T + bias[part] for part in rows)
                logits = [float(sum(q[query] * k[t])) / math.sqrt(32) for t in range(25)]
                want = [math.exp(value - max(logits)) for value in logits]
                np.testing.assert_allclose(found[0][b, h], np.array(want) / sum(want), rtol=0, atol=1e-6)
    torch.testing.assert_close(features, encoder.forward_features(images)[:, 1:])


def test_rollout_of_identity_attention_is_the_identity():
    eye = torch.eye(7)
    rolled = eye.expand(2, 7, 7)
    for _ in range(5):
        rolled = attention.roll(rolled, eye.expand(2, 3, 7, 7))
    assert torch.equal(rolled, eye.expand(2, 7, 7))


def test_rollout_is_the_product_of_all_blocks_in_their_order():
    encoder, images = random_encoder(), torch.randn(1, 3, 16, 16)
    x, product = encoder.embed(images), torch.eye(17, dtype=torch.float64)
    for block in encoder.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        heads = [(q[0, :, h:h + 32] @ k[0, :, h:h + 32].T / math.sqrt(32)).softmax(dim=-1) for h in (0, 32)]
        product = (sum(heads).double() / 4 + torch.eye(17) / 2) @ product
        x = block(x)
    _, rolled, _ = attention.look(encoder, images, [], 3)
    torch.testing.assert_close(rolled[0].double(), product[3], rtol=0, atol=1e-5)


def test_colours_are_the_principal_components():
    x = torch.randn(1, 50, 3) @ torch.diag(torch.tensor([9.0, 3.0, 1.0])) @ torch.randn(3, 8) + 5
    colours, = principal_colours(x)
    assert colours.shape == (1, 50, 3) and colours.min() == 0 and colours.max() == 1
    centred = (x - x.mean(dim=1, keepdim=True))[0]
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    for i in range(3):
        projected = centred @ vectors[:, -1 - i]
        assert abs(torch.corrcoef(torch.stack([projected, colours[0, :, i]]))[0, 1]) > 0.999
    assert torch.isfinite(principal_colours(torch.ones(1, 2, 2))[0]).all()      # fewer than three, and flat


def test_a_patch_is_a_token_behind_the_class_token():
    assert [attention.token_of(text, (4, 6)) for text in ("", "0,0", "0,5", "3,5")] == [0, 1, 6, 24]


# ---------------------------------------------------------------- the pictures


def tile_of(path, column, row, start, side):
    left, top, sheet = start + column * (side + 6), 46 + row * (side + 6), np.asarray(Image.open(path))
    return sheet[top:top + side, left:left + side]


def test_two_models_are_drawn_below_each_other_by_head_and_as_a_whole(folder):
    found = apply("mae.pth images --beside mff.pth --layers 3,11 --patch 1,2")
    assert found == dict(images=3, unreadable={})
    for kind, side, columns, rows in (("heads", 128, 3, 4), ("overview", 224, 5, 2)):
        for i in range(3):
            width, height = Image.open(f"out/{kind}/{i}.png").size
            start = width - columns * (side + 6)
            assert 10 < start < 200 and height > 46 + rows * (side + 6) + 17
        last = tile_of(f"out/{kind}/0.png", columns - 1, 0, start, side)
        other = tile_of(f"out/{kind}/0.png", columns - 1, rows - 1, start, side)
        assert (last != other).mean() > 0.1                             # of another model
        image = tile_of(f"out/{kind}/0.png", 0, 0, start, side)
        place = side // 4
        assert (image[place, 2 * place] == 255).all() and (image[place + 1, 2 * place + 1] == 0).all()
    about = json.loads((folder / "out/metrics.json").read_text())
    assert about["layers"] == [3, 11] and about["config"]["beside"] == "mff.pth"


def test_the_most_attended_patch_is_the_brightest_and_its_share_is_written():
    weights = np.full((2, 3), 0.01, np.float32)
    weights[1, 2] = 0.4
    tile = attention.overlay(np.full((8, 12, 3), 100, np.uint8), weights, (128, 192)).astype(int)
    assert tile.shape == (128, 192, 3)
    bright = tile[96, 160]
    np.testing.assert_array_equal(bright, np.round(0.65 * attention.COLOURS[-1] + 0.35 * 100))
    assert (tile[32, 32] == tile[32, 100]).all() and tile[32, 32].sum() < bright.sum() - 200
    assert (tile[-15:, :40] == 0).any() and (tile[-15:, :40] > 180).any()      # "40 %"
    black = attention.overlay(np.zeros((8, 12, 3), np.uint8), 0 * weights, (128, 192))
    assert np.isfinite(black).all() and black[20, 20].max() < 60        # nothing is attended to


def test_one_model_of_more_patches_and_an_image_that_cannot_be_read(folder, capsys):
    (folder / "images/1.png").write_bytes(b"\x89PNG no")
    found = apply("mae.pth images --img-size 32x48 --layers all")
    assert found["unreadable"] == {"1.png": "a PNG, which cannot be decoded"}
    output = capsys.readouterr().out
    assert "warning: 1.png cannot be read" in output and "from 4x4 to 8x12 patches" in output
    assert "heads/ and overview/ of 2 of 3 images, from the class token" in output
    assert Image.open("out/heads/0.png").size[1] > 12 * 134 and not (folder / "out/heads/1.png").exists()


def test_encoders_of_means_and_of_other_heads_are_drawn_too(folder):
    torch.save(random_encoder(global_pool="avg").state_dict(), "avg.pth")
    torch.save(random_encoder((32, 32), patch_size=8).state_dict(), "coarse.pth")
    torch.save(wide(), "wide.pt")
    assert apply("avg.pth images/0.png --beside coarse.pth --img-size 32")["images"] == 1
    assert apply("mae.pth images/0.png --beside wide.pt --img-size 16 --output-dir b")["images"] == 1


@pytest.mark.parametrize("flags, message", [
    ("mae.pth nowhere", "nowhere does not exist: expected a folder of images, or images"),
    ("mae.pth images --patch 4,0", "--patch 4,0: expected ROW,COLUMN, from 0,0 to 3,3: there are 4"),
    ("mae.pth images --patch x", "--patch x: expected ROW,COLUMN, from 0,0 to 3,3"),
    ("mae.pth images --layers 12", "--layers 12: expected all, or numbers of blocks from 0 to 11"),
    ("mae.pth images --beside nowhere.pth", "checkpoint nowhere.pth does not exist"),
    ("mae.pth images --beside wide.pt", "mae.pth sees 16x16 pixels and wide.pt 16x24: expected one"),
    ("images images", "images holds none of last.pt"),
    ("mae.pth torn", "none of the 1 images in torn can be read: the first is torn.png (a PNG, which"),
    ("mae.pth images --output-dir images", "--output-dir images is there already and not an empty"),
])
def test_bad_input_is_one_line_and_code_2(folder, capfd, flags, message):
    (folder / "torn").mkdir()
    (folder / "torn/torn.png").write_bytes(b"\x89PNG no")
    torch.save(wide(), "wide.pt")
    capfd.readouterr()
    line = ["--output-dir", "out", "--device", "cpu", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        run(attention.main, parse(attention.Config, line))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_weights_that_give_no_finite_numbers_are_a_fault(folder, capfd):
    state = torch.load("mae.pth", weights_only=True)
    torch.save({name: value * 1e30 for name, value in state.items()}, "huge.pth")
    with pytest.raises(SystemExit) as stop:
        run(attention.main, parse(attention.Config, "huge.pth images --output-dir out".split()))
    assert stop.value.code == 3 and "are not finite" in capfd.readouterr().err
