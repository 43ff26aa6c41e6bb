"""The reference itself, against what it says it computes: the published formulas."""

import numerics
import pytest
import torch
import torch.nn.functional as F

from mff_min.kernels import reference


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


def test_prepare_normalises_and_mixes():
    (images, mean, std), (partner, lam, box) = numerics.mixture(6, 3, 8, 12)
    got = reference.prepare(images, mean, std, torch.float32, partner, lam, box)
    plain = [(image.float() / 255 - mean[:, None, None]) / std[:, None, None] for image in images]
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
