"""FLOPs of a step by formula are those that PyTorch counts; the published sizes have the expected ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mff_min.flops import classifier_flops, step_flops
from mff_min.mim import MaskedAutoencoder, spread_indices
from mff_min.probe import LinearProbe, pool_tokens
from mff_min.vit import MODELS, VisionTransformer


def build(name, img_size, out_indices, **options):
    """A model of that size with the published decoder."""
    return MaskedAutoencoder(VisionTransformer(img_size, **MODELS[name]), out_indices, **options)


@pytest.mark.parametrize("name, img_size, out_indices, options", [
    ("vit_test", (16, 24), (11,), {}), ("vit_test", (16, 24), spread_indices(12), {}),
    ("vit_test", (16, 24), spread_indices(12), dict(detach_shallow=True)),
    ("vit_test", (16, 24), spread_indices(12), dict(decoder_depth=1, mask_ratio=0.5)),
    ("vit_s", (224, 224), (11,), {}), ("vit_s", (224, 224), spread_indices(12), {}),
])
def test_the_formula_counts_every_product_that_runs(name, img_size, out_indices, options):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build(name, img_size, out_indices, **options)
        model(torch.empty(2, 3, *img_size), torch.empty(2, model.encoder.num_patches)).backward()
    # Without memory attention runs as products; fused, its backward pass computes q k^T once more, which is
    # how it is done and no work of the model's.
    assert counter.get_total_flops() == 2 * step_flops(model)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name, img_size", [("vit_test", (16, 24)), ("vit_s", (224, 224))])
def test_the_formula_counts_every_product_of_a_classifier(name, img_size, frozen):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = VisionTransformer(img_size, num_classes=0 if frozen else 7, **MODELS[name])
        images = torch.empty(2, 3, *img_size)
        if frozen:
            probe = LinearProbe(encoder.embed_dim, 7)
            with torch.no_grad():
                features = pool_tokens(encoder.forward_features(images), "token")
            probe(features).sum().backward()
        else:
            encoder(images).sum().backward()
    head = probe.head if frozen else encoder.head
    assert counter.get_total_flops() == 2 * classifier_flops(encoder, head, frozen)


@pytest.mark.parametrize("name, mae, overhead", [("vit_s", 37.8, 0.6), ("vit_b", 57.1, 1.5),
                                                 ("vit_l", 122.8, 1.3), ("vit_h", 289, 1.1)])
def test_published_sizes_cost_what_an_independent_count_says(name, mae, overhead):
    with torch.device("meta"):
        depth = MODELS[name]["depth"]
        plain, fused = (step_flops(build(name, 224, levels))
                        for levels in ((depth - 1,), spread_indices(depth)))
    assert plain / 1e9 == pytest.approx(mae, rel=0.001)
    assert 100 * (fused / plain - 1) == pytest.approx(overhead, abs=0.05) and overhead < 2.5
