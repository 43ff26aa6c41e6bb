"""MAE and MFF against the published implementations' numbers, and the properties of the paper's method."""

import re

import pytest
import torch
from torch import nn

from mff_min.kernels import reference
from mff_min.kernels.ops import TORCH, triton_column
from mff_min.mim import MaskedAutoencoder, count_visible, random_masking, spread_indices
from mff_min.optim import param_groups
from mff_min.targets import PixelTarget
from mff_min.vit import VisionTransformer


def build(cfg, out_indices, norm_pix_loss=True, ops=TORCH):
    """The tiny model that a golden file's cfg describes."""
    img_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = cfg[:8].tolist()
    encoder = VisionTransformer(img_size, patch_size, dim, depth, heads)
    target = PixelTarget(patch_size, norm_pix_loss=norm_pix_loss, ops=ops)
    return MaskedAutoencoder(encoder, out_indices, target, decoder_embed_dim=decoder_dim,
                             decoder_depth=decoder_depth, decoder_num_heads=decoder_heads, ops=ops)


def from_mae(name):
    """Our name for facebookresearch/mae's."""
    ours = name.startswith(("decoder", "mask_token"))
    return name if ours else f"encoder.{name}"


def from_mmpretrain(name):
    """Our name for mmpretrain's."""
    if name.startswith("backbone.proj_"):
        return name.removeprefix("backbone.")
    name = name.replace("neck.ln1", "neck.decoder_norm").replace("backbone.ln1", "backbone.norm")
    name = name.replace("backbone.layers", "backbone.blocks").replace("embed.projection", "embed.proj")
    name = re.sub(r"\.ln([12])\.", r".norm\1.", name)
    name = name.replace("ffn.layers.0.0.", "mlp.fc1.").replace("ffn.layers.1.", "mlp.fc2.")
    return name.replace("backbone.", "encoder.").replace("neck.", "")


GOLDEN = [("mae_pixels", from_mae), ("mae_norm_pix", from_mae),
          ("mff", from_mmpretrain), ("mff_single_layer", from_mmpretrain)]


@pytest.fixture(params=["torch", "twins", "kernels"])
def ops(request):
    """Each column of Ops; on CPU tensors the Triton column runs its CPU twins, or its kernels interpreted."""
    if request.param == "torch":
        yield TORCH
        return
    pytest.importorskip("triton")
    from test_kernels import TWINS_AND_KERNELS
    for op, twin, kernel in TWINS_AND_KERNELS:
        op.register_kernel("cpu")(kernel if request.param == "kernels" else twin)
    yield triton_column()
    for op, twin, _ in TWINS_AND_KERNELS:
        op.register_kernel("cpu")(twin)


@pytest.fixture(params=GOLDEN, ids=[name for name, _ in GOLDEN])
def published(request, golden, ops):
    """(the golden arrays with our parameter names, a model that holds the published weights)."""
    file, rename = request.param
    arrays = golden(file)
    for key in list(arrays):
        kind, _, name = key.partition("/")
        if kind in ("state", "grad"):
            arrays[f"{kind}/{rename(name)}"] = arrays.pop(key)
    cfg = arrays["cfg"]
    arrays.setdefault("state/proj_weights", torch.ones(1, 1, 1, 1))     # of one level: MAE has no weights
    out_indices = arrays.get("cfg_fuse_layers", cfg[3:4] - 1).tolist()
    model = build(cfg, out_indices, norm_pix_loss=file != "mae_pixels", ops=ops)
    model.load_state_dict({key.removeprefix("state/"): value for key, value in arrays.items()
                           if key.startswith("state/")}, strict=True)
    return arrays, model


def close(got, want, factor=64):
    """Equal but for fp32 rounding in another order of operations: factor * eps of the largest value."""
    atol = factor * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=atol)


def test_latent_mask_prediction_and_loss_are_the_published_ones(published):
    arrays, model = published
    images, noise = arrays["in/imgs"], arrays["in/noise"]
    ids_shuffle, mask = random_masking(noise, model.num_visible)
    assert torch.equal(mask, arrays["out/mask"])
    assert torch.equal(ids_shuffle.argsort(dim=1), arrays["out/ids_restore"])
    close(model.encode(images, ids_shuffle[:, :model.num_visible]), arrays["out/latent"])
    pred, ids, _ = model.predict(images, noise)
    close(pred, arrays["out/pred"].gather(1, ids[..., None].expand_as(pred)))
    close(model(images, noise), arrays["out/loss"])
    if "out/fusion_weights" in arrays:
        close(model.fusion_weights(), arrays["out/fusion_weights"])


def test_every_gradient_is_the_published_one(published):
    arrays, model = published
    model(arrays["in/imgs"], arrays["in/noise"]).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == {key.removeprefix("grad/") for key in arrays if key.startswith("grad/")}
    for name, grad in grads.items():
        close(grad, arrays[f"grad/{name}"], factor=512)


@pytest.mark.parametrize("published", GOLDEN[:2], indirect=True, ids=[name for name, _ in GOLDEN[:2]])
def test_five_steps_of_adamw_lose_what_the_published_code_loses(published):
    arrays, model = published
    losses = five_losses(lambda: model(arrays["in/imgs"], arrays["in/noise"]), param_groups(model, 0.05))
    for got, want in zip(losses, arrays["train/losses"], strict=True):
        close(got, want, factor=256)
    close(model.encoder.cls_token, arrays["train/final_cls_token"], factor=4096)
    close(model.decoder_pred.bias, arrays["train/final_pred_bias"], factor=4096)


def five_losses(loss_of, groups):
    """The losses of five steps of AdamW with MAE's betas, which change what loss_of() returns."""
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)), []
    for _ in range(5):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def by_formula(w, images, noise, cfg, levels, radius, norm_pix=True):
    """The loss of MAE, MFF (levels) and PixMIM (radius), formula by formula, with nothing of mff_min.

    w holds weights by our names. All patches are projected, decoded in image order, predicted and compared;
    only then are visible ones left out.
    """
    P, depth, heads, decoder_depth, decoder_heads = (cfg[i].item() for i in (1, 3, 4, 6, 7))
    B, L = noise.shape
    V = L // 4

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(name, x, heads):
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).unflatten(2, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B, heads, tokens, width)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear(f"{name}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        return x + linear(f"{name}.mlp.fc2", hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2)

    def patches(x):
        return x.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1).reshape(B, L, -1)

    def take(x, ids):
        return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))

    ids_shuffle = noise.argsort(1)
    rank = ids_shuffle.argsort(1)                                       # (B, L): below V is visible
    kernel, bias = (w[f"encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    x = patches(images) @ kernel.permute(0, 2, 3, 1).flatten(1).T + bias + w["encoder.pos_embed"][:, 1:]
    cls_token = w["encoder.cls_token"] + w["encoder.pos_embed"][:, :1]
    x = torch.cat([cls_token.expand(B, -1, -1), take(x, ids_shuffle[:, :V])], 1)
    outputs = [x := block(f"encoder.blocks.{i}", x, heads) for i in range(depth)]
    share = w["proj_weights"].flatten().softmax(0)
    x = share[-1] * outputs[-1]
    for i, level in enumerate(levels[:-1]):
        x = x + share[i] * linear(f"proj_layers.{i}", outputs[level])
    x = linear("decoder_embed", norm("encoder.norm", x))
    tokens = torch.cat([x[:, 1:], w["mask_token"].expand(B, L - V, -1)], 1)
    x = torch.cat([x[:, :1], take(tokens, rank)], 1) + w["decoder_pos_embed"]
    for i in range(decoder_depth):
        x = block(f"decoder_blocks.{i}", x, decoder_heads)
    pred = linear("decoder_pred", norm("decoder_norm", x))[:, 1:]

    target = patches(low_passed(images, radius) if radius else images)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    masked = (rank >= V).float()
    return ((pred - target).square().mean(-1) * masked).sum() / masked.sum()


def low_passed(images, radius):
    """PixMIM's target, formula by formula: the spectrum shifted, a disk half a bin off, absolute values."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    down, right = (torch.arange(side) - (side - 1) / 2 for side in images.shape[2:])
    disk = down[:, None] ** 2 + right ** 2 <= radius ** 2
    spectrum = torch.fft.fftshift(torch.fft.fft2(images * std + mean), dim=(2, 3))
    return (torch.fft.ifft2(spectrum * disk).abs() - mean) / std


def five_losses_by_formula(arrays, *options):
    """The losses of five steps of by_formula from a golden file's weights, and the weights after them."""
    w = {key.removeprefix("state/"): value.clone() for key, value in arrays.items()
         if key.startswith("state/")}
    trained = [name for name in w if f"grad/{name}" in arrays]
    decayed = [w[name].requires_grad_() for name in trained if w[name].ndim > 1]        # biases are 1-D
    others = [w[name].requires_grad_() for name in trained if w[name].ndim == 1]
    groups = [dict(params=decayed, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    return five_losses(lambda: by_formula(w, arrays["in/imgs"], arrays["in/noise"], *options), groups), w


@pytest.mark.parametrize("published", GOLDEN[:2], indirect=True, ids=[name for name, _ in GOLDEN[:2]])
@pytest.mark.parametrize("ops", ["torch"], indirect=True)
def test_five_steps_by_the_formulas_lose_what_the_published_code_loses(published, ops):
    arrays, model = published
    losses, w = five_losses_by_formula(arrays, arrays["cfg"], [2], 0, model.target.norm_pix_loss)
    close(torch.stack(losses), arrays["train/losses"], factor=256)
    close(w["encoder.cls_token"], arrays["train/final_cls_token"], factor=4096)


@pytest.mark.parametrize("radius", [0, 10])
@pytest.mark.parametrize("published", GOLDEN[2:], indirect=True, ids=["mff", "single"])
def test_five_steps_of_mff_and_pixmim_lose_what_the_published_formulas_lose(published, radius):
    """MFF_MAE and, with one level, MAE; with a radius MFF_PixMIM and PixMIM. The weights are mmpretrain's."""
    arrays, model = published
    model.target = PixelTarget(8, mean=MEAN, std=STD, low_pass_radius=radius, ops=model.target.ops)
    losses = five_losses(lambda: model(arrays["in/imgs"], arrays["in/noise"]), param_groups(model, 0.05))
    wanted, w = five_losses_by_formula(arrays, arrays["cfg"], arrays["cfg_fuse_layers"].tolist(), radius)
    if not radius:
        close(wanted[0], arrays["out/loss"])                            # the formulas are mmpretrain's
    assert wanted[4] < 0.99 * wanted[0]
    for got, want in zip(losses, wanted, strict=True):
        close(got, want, factor=256)
    close(model.encoder.cls_token, w["encoder.cls_token"].detach(), factor=4096)
    close(model.fusion_weights(), w["proj_weights"].detach().flatten().softmax(0), factor=4096)


def small(out_indices=(2,), img_size=(16, 24), in_chans=3, norm_pix_loss=True, ops=TORCH, **options):
    torch.manual_seed(3)
    encoder = VisionTransformer(img_size, patch_size=4, embed_dim=24, depth=3, num_heads=3, in_chans=in_chans)
    target = PixelTarget(4, in_chans, norm_pix_loss, MEAN, STD, ops=ops)
    return MaskedAutoencoder(encoder, out_indices, target, decoder_embed_dim=16, decoder_depth=2,
                             decoder_num_heads=2, ops=ops, **options)


def test_with_one_level_mff_is_mae_bit_for_bit():
    model, images, noise = small(), torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    ids_keep = random_masking(noise, model.num_visible)[0][:, :model.num_visible]
    plain = model.encoder.norm(model.encoder.forward_blocks(model.encoder.embed(images, ids_keep), [2])[0])
    assert torch.equal(model.encode(images, ids_keep), plain)
    assert not model.proj_weights.requires_grad and len(model.proj_layers) == 0


def test_fusion_starts_uniform_and_weighs_by_softmax():
    model = small((0, 1, 2))
    torch.testing.assert_close(model.fusion_weights(), torch.full((3,), 1 / 3))
    with torch.no_grad():
        model.proj_weights.copy_(torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1))
    images, ids = torch.randn(2, 3, 16, 24), torch.tensor([[3, 1], [0, 5]])
    levels = model.encoder.forward_blocks(model.encoder.embed(images, ids), (0, 1, 2))
    weights = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    fused = weights[0] * model.proj_layers[0](levels[0]) + weights[1] * model.proj_layers[1](levels[1])
    torch.testing.assert_close(model.encode(images, ids), model.encoder.norm(fused + weights[2] * levels[2]))


def test_detached_shallow_blocks_get_their_gradient_through_the_last_block_alone():
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    grads = {}
    for detach in (False, True):
        model = small((0, 2), detach_shallow=detach)
        nn.init.zeros_(model.encoder.blocks[1].attn.proj.weight)        # the residual path is left alone
        model(images, noise).backward()
        grads[detach] = model.encoder.blocks[0].mlp.fc2.weight.grad, model.proj_layers[0].weight.grad
    assert not torch.allclose(grads[True][0], grads[False][0])
    assert torch.equal(grads[True][1], grads[False][1])                 # the projection learns either way

    model = small((0, 2), detach_shallow=True)
    with torch.no_grad():                                               # all weight is on the shallow level
        model.proj_weights.copy_(torch.tensor([200.0, 0.0]).view(2, 1, 1, 1))
    model(images, noise).backward()
    assert model.encoder.blocks[0].mlp.fc2.weight.grad.abs().max() == 0


def test_cls_token_is_fused_too():
    model, images, ids = small((0, 2)), torch.randn(1, 3, 16, 24), torch.tensor([[3, 1]])
    fused = model.encode(images, ids)[:, 0]
    with torch.no_grad():
        model.proj_layers[0].bias.add_(torch.randn(24))
    assert not torch.allclose(model.encode(images, ids)[:, 0], fused)


def test_loss_ignores_visible_patches():
    model, images, noise = small(), torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    pred, ids, mask = model.predict(images, noise)
    loss, patches = model.target.loss, reference.patchify(images, 4)
    changed = reference.unpatchify(patches + (1 - mask[..., None]) * torch.randn_like(patches), 4, (4, 6))
    assert torch.equal(loss(pred, ids, changed), model(images, noise))
    changed = reference.unpatchify(patches + mask[..., None] * torch.randn_like(patches), 4, (4, 6))
    assert not torch.equal(loss(pred, ids, changed), model(images, noise))


def test_pixels_as_targets_give_the_loss_and_the_gradients_of_normalised_images(ops):
    pixels, noise = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8), torch.rand(2, 24)
    images = reference.prepare(pixels, torch.tensor(MEAN), torch.tensor(STD))
    for norm_pix in (True, False):
        model = small((0, 2), norm_pix_loss=norm_pix, ops=ops)
        want, got = model(images, noise), model(images, noise, pixels)
        close(got, want, factor=8)
        wanted = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted), strict=True):
            close(a, b)


def test_the_last_decoder_block_computes_masked_tokens_alone():
    model, sizes = small(), []
    for block in model.decoder_blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    model(torch.randn(2, 3, 16, 24), torch.rand(2, 24))
    assert sizes == [1 + 24, 24 - model.num_visible]


def test_ten_compiled_steps_in_bfloat16_lose_what_ten_eager_ones_lose(ops):
    """One graph for the forward pass and one for the backward, with the custom ops in them."""
    pixels, noise = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8), torch.rand(2, 24)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    losses = []
    for compiled in (False, True):
        model = small((0, 2), ops=ops)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
        losses.append([])
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(reference.prepare(pixels, mean, std), noise, pixels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=torch.finfo(torch.bfloat16).eps)


def test_shuffling_inverts_and_keeps_the_smallest_noise():
    noise = torch.rand(5, 30)
    ids_shuffle, mask = random_masking(noise, 7)
    restored = noise.gather(1, ids_shuffle).gather(1, ids_shuffle.argsort(dim=1))
    assert torch.equal(restored, noise)
    assert mask.sum(dim=1).tolist() == [23.0] * 5
    assert (noise[mask == 0].reshape(5, 7).amax(1) <= noise[mask == 1].reshape(5, 23).amin(1)).all()


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 12)])
def test_unpatchify_inverts_patchify(in_chans, size):
    images = torch.randn(2, in_chans, *size)
    patches = reference.patchify(images, 4)
    assert patches.shape == (2, size[0] * size[1] // 16, 16 * in_chans)
    assert torch.equal(reference.unpatchify(patches, 4, (size[0] // 4, size[1] // 4)), images)
    assert torch.equal(patches[0, 1, :in_chans], images[0, :, 0, 4])    # patch 1 is to the right of patch 0


@pytest.mark.parametrize("in_chans, img_size", [(1, (8, 24)), (4, (16, 12))])
def test_other_channels_and_sides_train(in_chans, img_size):
    model = small((0, 1, 2), img_size, in_chans)
    L = model.encoder.num_patches
    model(torch.randn(2, in_chans, *img_size), torch.rand(2, L)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_initial_weights_are_drawn_as_published():
    encoder = VisionTransformer(16, patch_size=4, embed_dim=240, depth=2, num_heads=3)
    model = MaskedAutoencoder(encoder, (0, 1), PixelTarget(4), decoder_embed_dim=160, decoder_depth=1,
                              decoder_num_heads=2)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):                                # Xavier-uniform
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6), name
            assert layer.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.03), name
            assert layer.bias.abs().max() == 0, name
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all() and layer.eps == 1e-6
    patch = model.encoder.patch_embed.proj
    bound = (6 / (240 + 48)) ** 0.5
    assert 0.99 * bound < patch.weight.abs().max() <= bound * (1 + 1e-6)
    assert 0 < patch.bias.abs().max() <= 48 ** -0.5                     # Conv2d's own, as officially
    for token in (model.encoder.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)
    assert not model.encoder.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


def test_published_parameter_counts():
    def count(out_indices):
        from mff_min.vit import MODELS
        model = MaskedAutoencoder(VisionTransformer(224, **MODELS["vit_b"]), out_indices, PixelTarget(16))
        return sum(p.numel() for p in model.parameters())
    assert count((11,)) == 111_907_840 + 1
    assert count((0, 2, 4, 6, 8, 11)) == 111_907_840 + 2_952_966


@pytest.mark.parametrize("indices", [(11,), (0, 11), (0, 4, 8, 11), (0, 2, 4, 6, 8, 11), tuple(range(12))])
def test_every_row_of_table_4_can_be_built(indices):
    encoder = VisionTransformer(16, patch_size=8, embed_dim=12, depth=12, num_heads=3)
    model = MaskedAutoencoder(encoder, indices, PixelTarget(8), decoder_embed_dim=8, decoder_depth=1,
                              decoder_num_heads=1)
    assert len(model.proj_layers) == len(indices) - 1 and model.proj_weights.shape == (len(indices), 1, 1, 1)
    assert model(torch.randn(1, 3, 16, 16), torch.rand(1, 4)).isfinite()


def test_spread_is_the_published_choice_for_twelve_blocks():
    assert spread_indices(12) == (0, 2, 4, 6, 8, 11)
    assert spread_indices(24) == (0, 4, 8, 12, 16, 23)
    assert [spread_indices(depth)[-1] for depth in range(1, 40)] == list(range(39))
    assert all(list(spread_indices(depth)) == sorted(set(spread_indices(depth))) for depth in range(1, 40))


@pytest.mark.parametrize("indices, message", [
    ((), "empty"), ((2, 0), "must ascend"), ((0, 0, 2), "must ascend"),
    ((0, 1), "end with the last block, 2"), ((0, 3), r"lie in 0 \.\.\. 2"), ((-1, 2), r"lie in 0 \.\.\. 2"),
])
def test_impossible_out_indices_are_named(indices, message):
    with pytest.raises(ValueError, match=message):
        small(indices)


@pytest.mark.parametrize("ratio, message", [
    (0.0, "outside"), (1.0, "outside"), (1.5, "outside"), (-0.1, "outside"), (0.99, "leaves 0 of 24"),
])
def test_impossible_mask_ratios_are_named(ratio, message):
    with pytest.raises(ValueError, match=message):
        small(mask_ratio=ratio)


def test_published_number_of_visible_patches():
    assert count_visible(196, 0.75) == 49 and count_visible(256, 0.75) == 64
