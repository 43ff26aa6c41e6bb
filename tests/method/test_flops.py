"""FLOPs of a step by formula are those that PyTorch counts; the rate that MFU refers to is sustained."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from sources import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mff_min.mim import MaskedAutoencoder, spread_indices
from mff_min.probe import LinearProbe, pool_tokens
from mff_min.targets import PixelTarget
from mff_min.vit import MODELS, VisionTransformer
from mff_run import flops
from mff_run.flops import classifier_flops, step_flops
from mff_run.world import World


def build(name, img_size, out_indices, **options):
    """A model of that size with the published decoder."""
    encoder = VisionTransformer(img_size, **MODELS[name])
    return MaskedAutoencoder(encoder, out_indices, PixelTarget(encoder.patch_size), **options)


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


# ---------------------------------------------------------------- the rate that MFU refers to

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_rate_is_the_median_of_at_least_half_a_second(monkeypatch):
    """Two slow products that warm up and one in four that is disturbed leave the rate as it is."""
    slow, now, products = itertools.chain([5.0, 5.0], itertools.cycle([0.001, 0.001, 0.001, 9.0])), [0.0], []

    def mm(x, y, out):
        assert x.dtype == torch.bfloat16 and x.shape == (8, 8)
        products.append(now[0])
        now[0] += next(slow)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    drawn = torch.get_rng_state()
    assert flops.product_tflops(CPU, side=8) == pytest.approx(2 * 8 ** 3 / 0.001 / 1e12)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(products) == 7                               # 2 warm up, 4 are timed, one is left to do

    slow, now[0], products = itertools.repeat(0.001), 0.0, []
    flops.product_tflops(CPU, side=8)
    assert 0.5 <= now[0] < 0.51


def test_a_gpu_has_work_left_whenever_it_is_waited_for(monkeypatch):
    """It multiplies without a rest, so its clocks are those of long work."""
    launched, waits = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.after = len(launched)

        def synchronize(self):
            waits.append(len(launched) - self.after)

        def elapsed_time(self, stop):
            return 100.0 * (stop.after - self.after)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert flops.batch_seconds(lambda: launched.append(1), GPU, 0.5) == [0.1] * 5
    assert waits == [1] * 5


@pytest.mark.parametrize("name, dtype, share", [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, ", 80 % of the 989 TFLOP/s of its data sheet"),
    ("NVIDIA H100 80GB HBM3", torch.float32, ""), ("NVIDIA H100 PCIe", torch.bfloat16, ""),
])
def test_a_run_says_what_its_mfu_refers_to(monkeypatch, capsys, name, dtype, share):
    monkeypatch.setattr(flops, "product_tflops", lambda device, dtype: 790.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_img_per_s(1e9, dtype, World(0, 2, 0, GPU)) == 2 * 790e3
    short = "bfloat16" if dtype == torch.bfloat16 else "float32"
    assert capsys.readouterr().out == (f"MFU refers to a {short} product's 790 TFLOP/s, sustained on {name}"
                                       f"{share}\n")


def test_a_cpu_has_no_peak(capsys):
    assert flops.peak_img_per_s(1e9, torch.float32, World(0, 1, 0, CPU)) == 0 == len(capsys.readouterr().out)


# (model, levels) of a recipe's pre-training, and how many images of ImageNet-1K an epoch has.
RECIPES = {"linear_probe": ("vit_b", None), "vit_s": ("vit_s", spread_indices(12)),
           "fused_levels": ("vit_b", (10, 11))}
EPOCH = 1_281_167


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_state_the_cost_that_the_formula_gives(name):
    model, levels = RECIPES[name]
    with torch.device("meta"):
        encoder, head = VisionTransformer(224, **MODELS[model]), nn.Linear(MODELS[model]["embed_dim"], 1000)
        of_epochs = {90: classifier_flops(encoder, head, True), 100: classifier_flops(encoder, head, False)}
        if levels:
            of_epochs[800] = step_flops(build(model, 224, levels))
    found = re.findall(r"(\d+) epochs: ([\d,]+) M images of 224 pixels, ([\d.]+) GFLOP each: (\d+) GPU hours",
                       (ROOT / "recipes" / f"{name}.sh").read_text())
    assert len(found) == (3 if levels else 1)
    for epochs, millions, each, hours in found:
        images, flops = int(epochs) * EPOCH, of_epochs[int(epochs)]
        assert f"{images / 1e6:,.0f}" == millions and f"{flops / 1e9:.1f}" == each
        assert round(images * flops / 1e14 / 3600) == int(hours)        # at 100 TFLOP/s
    if name == "vit_s":
        assert f"{step_flops(build(model, 224, (11,))) / 1e9:.1f}" == "37.8"            # MAE's
