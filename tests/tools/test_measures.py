"""Spectra, attention distance and CKA against closed forms, brute force and the model's own attention."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch

from mff_min import vit
from mff_min.vit import MODELS, VisionTransformer
from tools.measures import (
    attention_distance,
    attention_weights,
    cka,
    frequencies,
    gram,
    log_amplitudes,
    patch_distances,
    unbiased_hsic,
)

# ---------------------------------------------------------------- frequencies


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (6, 12), (12, 6)])
def test_a_known_filter_adds_its_own_spectrum(grid):
    """Features convolved with a kernel h have the curve of before plus log|H(k, k) / H(0, 0)|."""
    x = 100 * torch.randn(4, grid[0] * grid[1], 32, dtype=torch.float64)   # far above the 1e-6 in the log
    kernel = torch.rand(grid, dtype=torch.float64)
    kernel[0, 0] += 5
    H = torch.fft.fft2(kernel)
    maps = x.mT.unflatten(-1, grid)
    filtered = torch.fft.ifft2(torch.fft.fft2(maps) * H).real.flatten(2).mT
    before, after = (log_amplitudes(tokens, grid) for tokens in (x, filtered))
    side = min(grid)
    diagonal = [H[k * grid[0] // side, k * grid[1] // side].abs() for k in range(math.ceil(side / 2))]
    want = [math.log(value / diagonal[0]) for value in diagonal]
    found = (after - after[0]) - (before - before[0])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_one_wave_is_found_at_its_frequency():
    """cos(2 pi 3 (row + column) / 14) has all its amplitude, L / 2, at k = 3: what is left is log 1e-6."""
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    wave = torch.cos(2 * math.pi * 3 * (row + column) / 14).reshape(1, 196, 1)
    found = log_amplitudes(wave.double(), (14, 14))
    assert found[3] == pytest.approx(math.log(98), abs=1e-6)
    assert (found[[0, 1, 2, 4, 5, 6]] < math.log(1e-4)).all()


def test_the_mean_is_taken_after_the_log():
    x = torch.ones(2, 4, 1)
    x[1] *= 100                                                         # amplitudes 4 and 400 at frequency 0
    assert log_amplitudes(x, (2, 2))[0] == pytest.approx((math.log(4) + math.log(400)) / 2, abs=1e-6)


def test_frequencies_are_below_nyquist():
    assert frequencies((14, 14)) == [2 * k / 14 for k in range(7)]      # the last is 12 / 14, not 1
    assert frequencies((7, 7))[-1] == 6 / 7 and frequencies((4, 14)) == [0, 0.5]
    for grid in ((14, 14), (7, 9), (2, 5), (1, 1)):
        assert len(frequencies(grid)) == len(log_amplitudes(torch.rand(1, grid[0] * grid[1], 3), grid))


def test_bfloat16_features_are_measured_in_double_precision():
    x = torch.randn(3, 36, 8).bfloat16()
    assert torch.equal(log_amplitudes(x, (6, 6)), log_amplitudes(x.double(), (6, 6)))
    assert torch.equal(gram(x), gram(x.double()))


# ---------------------------------------------------------------- attention


def test_uniform_attention_has_its_closed_form():
    """The mean distance of two places of 14 x 14, both drawn alike, times 16 pixels; then of 3 x 5."""
    uniform = torch.full((2, 3, 197, 197), 1 / 197)
    found = attention_distance(uniform, (14, 14), 16)
    places = np.stack(np.mgrid[:14, :14], -1).reshape(-1, 2)
    want = 16 * np.linalg.norm(places[:, None] - places, axis=-1).mean()
    np.testing.assert_allclose(found, [want] * 3, rtol=1e-6)
    assert want == pytest.approx(116.49, abs=0.005)
    oblong = attention_distance(torch.full((1, 1, 16, 16), 1 / 16), (3, 5), 4)
    assert float(oblong) == pytest.approx(float(patch_distances((3, 5), 4).mean()), rel=1e-6)


def test_attention_to_oneself_has_distance_0():
    assert attention_distance(torch.eye(17).expand(2, 4, 17, 17), (4, 4), 16).tolist() == [0] * 4


def test_attention_to_a_neighbour_has_the_patch_side_as_its_distance():
    """Each patch attends to the one on its right, the last of a row to the one on its left."""
    weights = torch.zeros(1, 1, 7, 7)
    for patch, other in enumerate((1, 0, 3, 2, 5, 4)):                  # rows of two
        weights[0, 0, 1 + patch, 1 + other] = 1
    assert attention_distance(weights, (3, 2), 16).tolist() == [16]


def test_the_share_of_the_class_token_changes_no_distance():
    weights = torch.rand(2, 3, 10, 10).softmax(-1)
    more = weights.clone()
    more[..., 1:, 0] += 0.5 + torch.rand(2, 3, 9)
    more[..., 0, :] = torch.rand(10).softmax(-1)
    more = more / more.sum(-1, keepdim=True)
    want, found = (attention_distance(each, (3, 3), 4) for each in (weights, more))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    more[..., 1:, 1:], more[..., 1:, 0] = 0, 1
    assert attention_distance(more, (3, 3), 4).tolist() == [0] * 3


def seen_by_the_model(encoder, images):
    """(weights of each block, levels): weights are what a block makes of values that are unit vectors."""
    weights, plain = [], vit.attend

    def attend(q, k, v):
        units = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
        weights.append(plain(q, k, units))
        return plain(q, k, v)

    with mock.patch.object(vit, "attend", attend), torch.no_grad():
        levels = encoder.forward_blocks(encoder.embed(images), range(len(encoder.blocks)))
    return weights, levels


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2 ** -8)])
def test_attention_weights_are_what_the_model_computes(dtype, tolerance):
    """On an oblong image; in bfloat16 the model rounds its weights, half a unit of the last place at most."""
    encoder = VisionTransformer((12, 20), **MODELS["vit_test"]).eval().to(dtype)
    images = torch.randn(3, 3, 12, 20, dtype=dtype)
    wanted, levels = seen_by_the_model(encoder, images)
    with torch.no_grad():
        for block, x, want in zip(encoder.blocks, [encoder.embed(images), *levels[:-1]], wanted, strict=True):
            found = attention_weights(block.attn, block.norm1(x))
            assert found.dtype == torch.float32 and found.shape == (3, 2, 16, 16)
            torch.testing.assert_close(found, want.float(), rtol=tolerance, atol=1e-6)
    assert float(wanted[0].float().std()) > 1e-4                        # not uniform: the comparison tells


# ---------------------------------------------------------------- similarity


def minibatches(x, size=25):
    return [gram(part) for part in x.split(size)]


def test_cka_of_a_rotation_and_scale_is_1():
    x = torch.randn(100, 4, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    turned = 0.03 * x.flatten(1) @ rotation + 7
    assert cka(minibatches(x), minibatches(turned)) == pytest.approx(1, abs=1e-9)
    assert cka(minibatches(x), minibatches(x)) == pytest.approx(1, abs=1e-12)


def test_cka_of_independent_features_is_near_0():
    """Unbiased over minibatches; the plain form is not, and is what this test would find in its place."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 20), torch.randn(200, 20)
    assert abs(cka(minibatches(x), minibatches(y))) < 0.03
    assert abs(cka([gram(x)], [gram(y)])) < 0.03
    a, b = gram(x), gram(y)
    biased = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    assert biased > 0.08


def test_hsic_is_the_u_statistic_of_its_definition():
    """The mean of a_ij b_ij + a_ij b_qr - 2 a_ij b_iq over all quadruples of different images."""
    x, y = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    a, b = x @ x.T, y @ y.T                                             # neither centred
    terms = [a[i, j] * b[i, j] + a[i, j] * b[q, r] - 2 * a[i, j] * b[i, q]
             for i, j, q, r in itertools.permutations(range(7), 4)]
    assert unbiased_hsic(a, b) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-10)
    assert unbiased_hsic(gram(x), gram(y)) == pytest.approx(unbiased_hsic(a, b), rel=1e-9)


def test_features_far_from_0_lose_no_precision():
    x = torch.randn(50, 30)
    assert cka(minibatches(x + 1e3), minibatches(x)) == pytest.approx(1, abs=1e-6)


def test_a_layer_that_never_changes_is_like_no_other():
    x = torch.randn(8, 3)
    assert cka([gram(torch.ones(8, 3))], [gram(x)]) == 0


def test_hsic_needs_four_images():
    with pytest.raises(ValueError, match="HSIC of 3 images: expected 4 or more"):
        unbiased_hsic(torch.ones(3, 3), torch.ones(3, 3))
