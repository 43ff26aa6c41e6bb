"""The reference itself, against what it says it computes: Pillow, F.interpolate, the published formulas."""

import numerics
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mff_min.kernels import reference

BOXES = torch.tensor([[3, 4, 30, 40], [0, 0, 10, 50], [20, 10, 7, 9], [0, 0, 40, 50]])
FLIP = torch.tensor([True, False, True, False])


def crops(images):
    """Each image's crop, mirrored where FLIP is true: what resized_crop resizes."""
    for image, (top, left, height, width), flip in zip(images, BOXES.tolist(), FLIP, strict=True):
        crop = image[:, top:top + height, left:left + width]
        yield crop.flip(-1) if flip else crop


@pytest.mark.parametrize("size", [(16, 24), (64, 64), (30, 20)])        # (7, 90): rows first in Pillow 13
def test_resized_crop_equals_pillow_in_bytes(size):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 40, 50), generator=g, dtype=torch.uint8)
    got = reference.resized_crop(images, BOXES, size, FLIP)
    for crop, ours in zip(crops(images), got, strict=True):
        picture = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
        want = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (ours.int() - want.int()).abs().max() <= 1       # ties: Pillow's sums are of 22-bit integers
        assert (ours != want).float().mean() < 0.01


@pytest.mark.parametrize("size", [(16, 24), (64, 64), (7, 90)])
def test_resized_crop_equals_interpolate_in_floats(size):
    images = torch.rand(4, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    got = reference.resized_crop(images, BOXES, size, FLIP)
    for crop, ours in zip(crops(images), got, strict=True):
        want = F.interpolate(crop[None], size, mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("H, W, radius", [(32, 48, 9), (31, 33, 6.5), (224, 224, 40)])
def test_both_forms_of_low_pass_are_the_published_filter(H, W, radius):
    images = torch.rand(1, 2, H, W, generator=torch.Generator().manual_seed(H))
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    disk = (y - (H - 1) / 2) ** 2 + (x - (W - 1) / 2) ** 2 <= radius ** 2
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.double()), dim=(-2, -1)) * disk
    want = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs().float()
    torch.testing.assert_close(reference.low_pass_fft(images, radius), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.low_pass_products(images, radius), want, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reference.low_pass_products(images, radius), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.low_pass(images, radius), want, rtol=0, atol=1e-5)


def test_prepare_mirrors_then_mixes():
    (images, mean, std), (flip, partner, lam, box) = numerics.mixture(6, 3, 8, 12)
    got = reference.prepare(images, mean, std, torch.float32, flip, partner, lam, box)
    plain = [(image.float() / 255 - mean[:, None, None]) / std[:, None, None] for image in images]
    plain = [x.flip(-1) if mirrored else x for x, mirrored in zip(plain, flip, strict=True)]
    for b in range(6):
        want = lam[b] * plain[b] + (1 - lam[b]) * plain[partner[b]]
        top, left, bottom, right = box[b].tolist()
        want[:, top:bottom, left:right] = plain[partner[b]][:, top:bottom, left:right]
        torch.testing.assert_close(got[b], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("M", [1, 2, 5])
def test_merged_projections_have_the_same_sum(M):
    xs, logits, _, _ = numerics.layers(M, (2, 3, 8), torch.float64, parameter_dtype=torch.float64)
    projections = numerics.linear_layers(M, 8, parameter_dtype=torch.float64)
    projected = [F.linear(x, *projection) for x, projection in zip(xs[:-1], projections, strict=True)]
    want = reference.layer_sum([*projected, xs[-1]], logits)
    merged = reference.merge_projections(xs, logits, projections)
    torch.testing.assert_close(reference.layer_sum(*merged), want)


def test_loss_of_bytes_is_the_loss_of_prepared_images():
    pred, images, ids, mean, std = numerics.patches(2, 3, (2, 3), 4, 3, torch.float32, True)
    for norm_pix in (True, False):
        want = reference.patch_loss(pred, reference.prepare(images, mean, std), ids, 4, norm_pix)
        torch.testing.assert_close(reference.patch_loss(pred, images, ids, 4, norm_pix, mean, std), want)
