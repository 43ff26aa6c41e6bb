"""PixMIM's low-pass target against the published generator, and predictions turned back into pictures."""

import numpy as np
import pytest
import torch

from mff_min.kernels import reference
from mff_min.kernels.ops import TORCH
from mff_min.mim import random_masking
from mff_min.targets import low_pass_radius_at, low_pass_target, patch_mean_loss, reconstruction
from mff_run.picture import grey_out, reconstruction_sheet, to_uint8

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("size, radius", [(64, 10), (48, 5)])
def test_low_pass_target_is_the_published_one(golden, size, radius):
    arrays = golden("pixmim_low_pass")
    got = low_pass_target(arrays[f"in/{size}_r{radius}"], MEAN, STD, radius, TORCH)
    want = arrays[f"out/{size}_r{radius}"]
    atol = 64 * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_published_disk_is_half_a_bin_off_centre():
    disk = torch.fft.fftshift(reference.low_pass_disk(224, 224, 40, "cpu"))
    assert disk.sum() == 5024                                           # a centred one would keep 5025
    kept = disk[112].nonzero().flatten() - 112
    assert (kept.min(), kept.max()) == (-40, 39)


def test_low_pass_keeps_a_slow_wave_and_removes_a_fast_one():
    x = torch.arange(64) / 64
    slow, fast = (0.5 + 0.4 * torch.cos(2 * torch.pi * k * x).expand(1, 1, 48, 64) for k in (3, 25))
    torch.testing.assert_close(reference.low_pass(slow, 10), slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.low_pass(fast, 10), torch.full_like(fast, 0.5), rtol=0, atol=1e-5)


def test_radius_scales_with_the_image_side():
    assert low_pass_radius_at(40, (224, 224)) == 40 and low_pass_radius_at(40, (112, 224)) == 20


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perfect_predictions_give_back_the_image(norm_pix):
    targets, noise = torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    ids = random_masking(noise, 6)[0][:, 6:]
    patches = reference.take_tokens(reference.patchify(targets, 4), ids)
    pred = reference.normalise_patches(patches) if norm_pix else patches
    torch.testing.assert_close(reconstruction(pred, targets, ids, 4, norm_pix), targets, rtol=0, atol=1e-5)
    assert reference.patch_loss(pred, targets, ids, 4, norm_pix) == 0


def test_norm_pix_uses_the_unbiased_variance():
    patches = torch.randn(2, 5, 48)
    var = patches.var(-1, keepdim=True, unbiased=True)
    want = (patches - patches.mean(-1, keepdim=True)) / (var + 1e-6).sqrt()
    assert torch.equal(reference.normalise_patches(patches), want)


def test_loss_of_predicting_means_is_known_in_closed_form():
    images, ids = torch.randn(2, 3, 16, 24), torch.tensor([[3, 1, 7], [0, 5, 23]])
    loss = patch_mean_loss(images, ids, 4, norm_pix=True, ops=TORCH)
    assert loss.item() == pytest.approx(47 / 48, rel=1e-4)
    patches = reference.take_tokens(reference.patchify(images, 4), ids)
    loss = patch_mean_loss(images, ids, 4, norm_pix=False, ops=TORCH)
    assert loss.item() == pytest.approx(patches.var(-1, unbiased=False).mean().item(), rel=1e-5)


def test_prepare_normalises_and_pictures_undo_it():
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    images = reference.prepare(pixels, MEAN, STD)
    want = (pixels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(images, want, rtol=0, atol=2e-6)
    assert np.array_equal(to_uint8(images, MEAN, STD), pixels.permute(0, 2, 3, 1).numpy())


def test_greyed_out_patches_are_the_masked_ones():
    images = torch.randn(1, 3, 8, 8) + 5
    masked = grey_out(images, torch.tensor([[1.0, 0, 0, 0]]), 4)
    assert (masked[..., :4, :4] == 0).all() and torch.equal(masked[..., 4:], images[..., 4:])


def test_a_reconstruction_shows_what_it_owes_to_the_means_of_the_true_patches():
    """With norm_pix a prediction of nothing looks like the last column, a right one like the image."""
    images, ids = torch.randn(1, 3, 16, 24), torch.tensor([[3, 1, 7, 23]])
    mask = torch.zeros(1, 24).scatter(1, ids, 1.0)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.1)
    right = reference.normalise_patches(reference.take_tokens(reference.patchify(images, 4), ids))

    def tiles(pred, norm_pix):
        sheet = reconstruction_sheet(images, images, pred, ids, mask, 4, norm_pix, mean, std, "")
        assert sheet.size[1] > 46 + 128 + 6                             # a note stands below
        return [np.asarray(sheet)[46:46 + 128, 6 + j * 198:6 + j * 198 + 192].astype(int) for j in range(5)]
    image, _, _, pasted, means = tiles(right, True)
    assert abs(pasted - image).max() <= 1 and (means != image).any()
    image, _, _, pasted, again = tiles(0 * right, True)
    assert (pasted == again).all() and (again == means).all()
    hidden = means[:32, 32:64]                                          # patch 1
    assert (hidden == hidden[0, 0]).all() and abs(hidden.mean() - image[:32, 32:64].mean()) < 1
    assert (tiles(right, False)[4] == means).all() and (tiles(right, False)[3] != pasted).any()
