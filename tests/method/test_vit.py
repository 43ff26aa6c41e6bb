"""The ViT against timm's, parameter by parameter, and its positions against the official tables."""

import pytest
import torch
import torch.nn.functional as F

from mff_min import vit as module
from mff_min.vit import MODELS, VisionTransformer, drop_path_branches, resize_pos_embed, sincos_pos_embed


def shapes(model):
    """The name and shape of every tensor in a model's state, in order."""
    return [(name, tensor.shape) for name, tensor in model.state_dict().items()]


def rounding(want, factor=32):
    """What fp32 rounding may do to a tensor: factor * eps * its largest value."""
    return factor * torch.finfo(torch.float32).eps * want.abs().max().item()


@pytest.mark.parametrize("model, name", [("vit_s", "vit_small_patch16_224"),
                                         ("vit_b", "vit_base_patch16_224")])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_keys_logits_and_gradients_are_timms(model, name, global_pool):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.create_model(name, num_classes=11, global_pool=global_pool)
    ours = VisionTransformer(224, num_classes=11, global_pool=global_pool, **MODELS[model])
    with torch.no_grad():
        for parameter in theirs.parameters():                           # no zero bias hides a wrong wire
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert shapes(ours) == shapes(theirs)

    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
    want, got = theirs(images), ours(images)
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(want))
    F.cross_entropy(want, labels).backward()
    F.cross_entropy(got, labels).backward()
    want = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        atol = rounding(want[key].grad, 256)
        torch.testing.assert_close(parameter.grad, want[key].grad, rtol=0, atol=atol, msg=key)


def test_parameter_counts_are_the_published_ones():
    counts = {name: sum(p.numel() for p in VisionTransformer(224, **MODELS[name]).parameters())
              for name in ("vit_s", "vit_b", "vit_l")}
    assert counts == {"vit_s": 21_665_664, "vit_b": 85_798_656, "vit_l": 303_301_632}


def test_embedding_only_the_visible_patches_equals_embedding_all_and_then_choosing():
    vit = VisionTransformer((32, 48), **MODELS["vit_test"])
    images, ids = torch.randn(2, 3, 32, 48), torch.tensor([[5, 0, 20], [1, 7, 3]])
    chosen = vit.embed(images)[:, 1:].gather(1, ids[..., None].expand(-1, -1, vit.embed_dim))
    torch.testing.assert_close(vit.embed(images, ids)[:, 1:], chosen, rtol=0, atol=rounding(chosen))


def heads(Q, T, d, dtype):
    """q (2, 3, Q, d), k and v (2, 3, T, d), and what their output's gradient is."""
    q, k, v, dy = (torch.randn(2, 3, n, d).to(dtype) for n in (Q, T, T, Q))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy


def attended(monkeypatch, products, q, k, v, dy):
    """Output and gradients of attend, by products or fused."""
    monkeypatch.setattr(module, "CPU_HAS_BF16", products)
    out = module.attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dy)]


def exact(q, k, v, dy):
    """Output and gradients of attention in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dy.double())]


@pytest.mark.parametrize("Q, T, d", [(50, 50, 64), (197, 197, 32), (147, 197, 32)])
def test_both_forms_of_attention_are_attention_within_rounding(monkeypatch, Q, T, d):
    q, k, v, dy = heads(Q, T, d, torch.bfloat16)
    truth = exact(q, k, v, dy)
    # A rounded score of size s moves its weight by s * eps / 2, and so does the rounded q; the weight, its
    # gradient, a product and the scale add eps / 2 each. So sums of magnitudes are off by this share at most:
    eps, s = torch.finfo(torch.bfloat16).eps, (q @ k.mT).abs().max().item() / d ** 0.5
    share, weights = (2 * s + 4) * eps / 2, (q.double() @ k.double().mT / d ** 0.5).softmax(dim=-1)
    dw = (dy.double() @ v.double().mT).abs()
    ds = 2 * weights * (dw + (weights * dw).sum(dim=-1, keepdim=True)) / d ** 0.5
    magnitudes = [weights @ v.abs().double(), ds @ k.abs().double(), ds.mT @ q.abs().double(),
                  weights.mT @ dy.abs().double()]
    fused, products = (attended(monkeypatch, form, q, k, v, dy) for form in (False, True))
    assert not torch.equal(fused[0], products[0])                       # they are two forms
    for results in (fused, products):
        for got, want, size in zip(results, truth, magnitudes, strict=True):
            assert got.dtype == torch.bfloat16
            assert ((got - want).abs() <= share * size + eps * want.abs()).all()


def test_attention_is_by_products_in_bfloat16_on_a_cpu_that_has_it_and_with_gradients(monkeypatch):
    def form(x, has_bf16=True):
        monkeypatch.setattr(module, "CPU_HAS_BF16", has_bf16)
        fused = F.scaled_dot_product_attention(x, x, x)
        return "fused" if torch.equal(module.attend(x, x, x), fused) else "products"

    x = torch.randn(2, 3, 50, 32, requires_grad=True)
    assert form(x.bfloat16()) == "products"
    assert form(x.bfloat16(), has_bf16=False) == form(x.detach().bfloat16()) == form(x) == "fused"


def test_products_work_under_autocast_recomputed_and_compiled(monkeypatch):
    monkeypatch.setattr(module, "CPU_HAS_BF16", True)
    images, results = torch.randn(2, 3, 16, 16), []
    for recompute, compiled in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        vit = VisionTransformer(16, num_classes=3, grad_checkpointing=recompute,
                                **(MODELS["vit_test"] | dict(depth=2)))
        run = torch.compile(vit, fullgraph=True, backend="aot_eager") if compiled else vit
        with torch.autocast("cpu", torch.bfloat16):
            run(images).sum().backward()
        results.append([p.grad for p in vit.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("branches", [None, torch.tensor([[0.5, 2.0], [0.0, 1.0]])])
def test_a_block_for_the_last_tokens_gives_what_the_whole_block_gives_them(branches):
    block, x = module.Block(24, num_heads=3), torch.randn(2, 9, 24, requires_grad=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)                       # no zero bias hides a wrong wire
    wanted = x, *block.parameters()
    whole, some = block(x, branches)[:, 4:], block(x, branches, 4)
    torch.testing.assert_close(some, whole, rtol=0, atol=rounding(whole))
    dy = torch.randn_like(whole)
    for got, want in zip(torch.autograd.grad(some, wanted, dy), torch.autograd.grad(whole, wanted, dy),
                         strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=rounding(want))


def test_recomputing_activations_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        vit = VisionTransformer(32, num_classes=3, grad_checkpointing=recompute, **MODELS["vit_test"])
        vit(torch.ones(2, 3, 32, 32)).sum().backward()
        grads.append([p.grad for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_sincos_positions_are_the_official_ones(golden):
    for key, want in golden("tables").items():
        if key.startswith("sincos/"):
            dim, side = map(int, key.removeprefix("sincos/").split("_"))
            got = sincos_pos_embed(dim, (side, side))[0]                # (1 + L, D); row 0 is the class token
            assert torch.equal(got[0], torch.zeros(dim))
            rows = torch.tensor([0, 1, 2, side, side + 1, side * side])
            torch.testing.assert_close(got[rows].double(), want, rtol=0, atol=1e-7)


def test_resized_positions_are_the_official_ones(golden):
    tables = golden("tables")
    for side in (24, 8):
        got = resize_pos_embed(tables["pos_interp/in14"], (14, 14), (side, side))
        torch.testing.assert_close(got, tables[f"pos_interp/out{side}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (dict(img_size=50, patch_size=8), "img_size 50x50 is not a multiple of patch_size 8"),
    (dict(img_size=64, global_pool="max"), "global_pool 'max' is unknown"),
    (dict(img_size=64, embed_dim=100, num_heads=3), "embed_dim 100 is not a multiple of num_heads 3"),
])
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**(MODELS["vit_test"] | arguments))


@pytest.mark.parametrize("name, global_pool", [("classifier_cls_token", "token"),
                                               ("classifier_global_pool", "avg")])
def test_logits_loss_and_gradients_of_a_classifier_are_the_golden_ones(golden, name, global_pool):
    """timm's VisionTransformer in eval mode, with label smoothing of 0.1."""
    arrays = golden(name)
    img_size, patch_size, dim, depth, heads, _, classes, _ = arrays["cfg"].tolist()
    model = VisionTransformer(img_size, patch_size, dim, depth, heads, num_classes=classes, drop_path=0.5,
                              global_pool=global_pool)                  # without noise it drops nothing
    model.load_state_dict({key.removeprefix("state/"): value for key, value in arrays.items()
                           if key.startswith("state/")}, strict=True)
    logits = model(arrays["in/imgs"])
    torch.testing.assert_close(logits, arrays["out/logits"], rtol=0, atol=rounding(arrays["out/logits"]))
    loss = F.cross_entropy(logits, arrays["in/labels"], label_smoothing=0.1)
    assert loss.item() == pytest.approx(arrays["out/loss"].item(), rel=1e-6)
    loss.backward()
    grads = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    assert grads
    for key, want in grads.items():
        got = model.get_parameter(key).grad
        torch.testing.assert_close(got, want, rtol=0, atol=rounding(want, 256), msg=key)


def test_drop_path_keeps_the_expectation_and_drops_deeper_blocks_more_often():
    n = 40_000
    branches = drop_path_branches(torch.rand(n, 5, 2), 0.4)
    p = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])[:, None]
    dropped = (branches == 0).double().mean(dim=0)
    assert ((dropped - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()             # five standard errors
    assert ((branches.mean(dim=0) - 1).abs() <= 5 * (p / (1 - p) / n).sqrt() + 1e-6).all()
    assert (branches[:, 0] == 1).all()


def test_a_dropped_branch_is_left_out_and_a_kept_one_is_scaled():
    vit = VisionTransformer(16, num_classes=3, drop_path=0.5, **(MODELS["vit_test"] | {"depth": 2}))
    images = torch.randn(3, 3, 16, 16)
    noise = torch.tensor([[[0.9, 0.9], [0.9, 0.1]],                     # drops block 1's mlp
                          [[0.9, 0.9], [0.1, 0.1]],                     # both of its branches
                          [[0.0, 0.0], [0.9, 0.9]]])                    # nothing: block 0 never drops
    x = vit.blocks[0](vit.embed(images))
    block = vit.blocks[1]
    first = x + 2 * block.attn(block.norm1(x))
    want = torch.stack([first[0], x[1], (first + 2 * block.mlp(block.norm2(first)))[2]])
    got = vit.forward_blocks(vit.embed(images), [1], noise)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(want))


def test_drop_path_with_recomputed_activations_changes_no_gradient():
    noise, grads = torch.rand(2, 12, 2), []
    for recompute in (False, True):
        torch.manual_seed(0)
        vit = VisionTransformer(16, num_classes=3, drop_path=0.5, grad_checkpointing=recompute,
                                **MODELS["vit_test"])
        vit(torch.ones(2, 3, 16, 16), noise).sum().backward()
        grads.append([p.grad for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_drop_path_is_timms_where_the_same_branches_are_dropped(global_pool, monkeypatch):
    timm = pytest.importorskip("timm")
    size = dict(img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=3, num_classes=5)
    theirs = timm.models.VisionTransformer(**size, global_pool=global_pool, drop_path_rate=0.6)
    ours = VisionTransformer(**size, global_pool=global_pool, drop_path=0.6)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    noise, images = torch.rand(6, 3, 2), torch.randn(6, 3, 16, 16)
    branches = iter(drop_path_branches(noise, 0.6)[:, 1:].flatten(1).T)     # timm draws none for block 0

    def drop(x, drop_prob, training, scale_by_keep):
        return x * next(branches)[:, None, None]
    monkeypatch.setattr("timm.layers.drop.drop_path", drop)
    want = theirs.train()(images)
    torch.testing.assert_close(ours(images, noise), want, rtol=0, atol=rounding(want, 64))
    assert next(branches, None) is None
