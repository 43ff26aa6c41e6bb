"""LARS, the schedule, the layer-wise decay and the weight-decay groups against the official code's tables."""

import pytest
import torch

from mff_min.mim import MaskedAutoencoder
from mff_min.optim import LARS, cosine_lr, make_schedule, param_groups, set_lr
from mff_min.targets import PixelTarget
from mff_min.vit import MODELS, VisionTransformer


@pytest.mark.parametrize("table, schedule", [
    ("pretrain800", dict(lr=2.4e-3, min_lr=0.0, warmup_epochs=40, epochs=800)),
    ("finetune100", dict(lr=4e-3, min_lr=1e-6, warmup_epochs=5, epochs=100)),
    ("probe90", dict(lr=6.4, min_lr=0.0, warmup_epochs=10, epochs=90)),
])
def test_learning_rates_are_the_official_ones(golden, table, schedule):
    for epoch, want in golden("tables")[f"lr/{table}"].tolist():
        assert cosine_lr(epoch, **schedule) == pytest.approx(want, rel=1e-12, abs=1e-18)


def test_layer_decay_of_every_vit_b_parameter_is_the_official_one(golden):
    tables = golden("tables")
    want = {name: (scale, decay) for name, scale, decay in
            zip(tables["layer_decay/names"].tolist(), tables["layer_decay/lr_scale"].tolist(),
                tables["layer_decay/weight_decay"].tolist(), strict=True)}
    model = VisionTransformer(224, num_classes=1000, global_pool="avg", **MODELS["vit_b"])
    groups = param_groups(model, 0.05, layer_decay=0.75, depth=12, undecayed=("pos_embed", "cls_token"))
    got = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert set(got) == set(want)
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-12), name


def test_pretraining_decays_matrices_tokens_and_fusion_logits_but_no_bias_or_norm():
    encoder = VisionTransformer(16, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    model = MaskedAutoencoder(encoder, (0, 1), PixelTarget(8), decoder_embed_dim=8, decoder_depth=1,
                              decoder_num_heads=1)
    decay = {name: group["weight_decay"] for group in param_groups(model, 0.05) for name in group["names"]}
    assert decay["encoder.cls_token"] == decay["mask_token"] == decay["proj_weights"] == 0.05
    assert decay["proj_layers.0.weight"] == decay["encoder.patch_embed.proj.weight"] == 0.05
    for name in ("proj_layers.0.bias", "encoder.norm.weight", "decoder_blocks.0.norm1.bias"):
        assert decay[name] == 0
    assert "encoder.pos_embed" not in decay and "decoder_pos_embed" not in decay      # frozen
    assert len(decay) == sum(p.requires_grad for p in model.parameters())


def test_six_steps_of_lars_are_the_official_ones(golden):
    """facebookresearch/mae's, of four parameters: one is 1-D, one all zero, and one has a zero gradient."""
    arrays = golden("lars")
    weight_decay, momentum, trust = arrays["cfg/wd_momentum_trust"].tolist()
    params = [torch.nn.Parameter(arrays[f"in/p{i}"].clone()) for i in range(4)]
    optimizer = LARS(params, 0.0, weight_decay, momentum, trust)
    for step, lr in enumerate(arrays["cfg/lr"].tolist()):
        for i, param in enumerate(params):
            param.grad = arrays[f"in/grad{step}_p{i}"].clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, param in enumerate(params):
            want = arrays[f"out/step{step}_p{i}"]
            torch.testing.assert_close(param.detach(), want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


def test_lars_is_plain_momentum_where_the_ratio_has_no_meaning():
    zero, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([zero, bias], lr=0.5, weight_decay=0.1)
    for param in (zero, bias):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(zero, torch.full((2, 2), -0.5)) and torch.equal(bias, torch.full((2,), 0.5))


def test_a_schedule_that_is_not_given_is_the_published_one_or_what_the_steps_make():
    probe = make_schedule(1_281_167, 16384, 512 * 8, None, None, None, 0.1, None, published=(90, 10))
    assert (probe.epochs, probe.warmup_epochs, probe.accumulation) == (90, 10, 4)
    assert probe.lr == pytest.approx(6.4) and probe.stop == 7038        # ceil(90 * 1281167 / 16384)
    short = make_schedule(1000, 100, 50, None, 20, None, 0.1, 3.0, published=(90, 10))
    assert (short.epochs, short.warmup_epochs, short.stop, short.lr) == (2, 0.4, 20, 3.0)
    cut = make_schedule(1000, 100, 50, 90, 20, None, 0.1, None, published=(90, 10))
    assert (cut.epochs, cut.warmup_epochs, cut.stop) == (90, 10, 20)


def test_set_lr_scales_each_group():
    groups = [dict(lr_scale=1.0), dict(lr_scale=0.5)]
    set_lr(type("Optimizer", (), {"param_groups": groups}), 0.2)
    assert [group["lr"] for group in groups] == [0.2, 0.1]
