"""The kernel error bound, and the inputs that kernels are tested with, interpreted and on a GPU alike.

Kernel and reference start from the same rounded inputs; truth is the reference in the next wider type. For
the output and every gradient: max |kernel - truth| <= 2 * max |reference - truth| + eps(dtype) * scale. scale
is max |truth|, and for a gradient that is a sum over the whole batch (of logits, weight and bias) the largest
sum of the magnitudes of its terms: no order of summation is sure to do better, and the reference may be
lucky.

Shapes: B images, T tokens, D width, M levels, C H W, P patch side, K masked patches, N = P * P * C.
"""

import torch

from mff_min.kernels import reference


def layers(M, shape, dtype, device="cpu", parameter_dtype=torch.float32):
    """M levels of shape (B, T, D), and logits, weight and bias as the model keeps them: parameters stay in
    fp32."""
    g = torch.Generator().manual_seed(M)
    xs = [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(M)]
    logits = torch.randn(M, 1, 1, 1, generator=g).to(device, parameter_dtype).requires_grad_()
    weight = (1 + torch.randn(shape[-1], generator=g) / 4).to(device, parameter_dtype).requires_grad_()
    bias = torch.randn(shape[-1], generator=g).to(device, parameter_dtype).requires_grad_()
    return xs, logits, weight, bias


def linear_layers(M, D, device="cpu", parameter_dtype=torch.float32):
    """M - 1 projections (weight, bias) of a size that keeps the scale of what they project."""
    g = torch.Generator().manual_seed(D)
    return [tuple(t.to(device, parameter_dtype).requires_grad_()
                  for t in (torch.randn(D, D, generator=g) / D ** 0.5, torch.randn(D, generator=g)))
            for _ in range(M - 1)]


def patches(B, C, grid, P, K, dtype, uint8, device="cpu"):
    """pred (B, K, N), images (B, C, H, W), ids (B, K), and for uint8 images their mean and std."""
    g = torch.Generator().manual_seed(P)
    H, W = grid[0] * P, grid[1] * P
    images = torch.randint(0, 256, (B, C, H, W), generator=g, dtype=torch.uint8).to(device)
    mean, std = torch.full((C,), 0.45, device=device), torch.full((C,), 0.22, device=device)
    if not uint8:
        images, mean, std = reference.prepare(images, mean, std), None, None
    ids = torch.rand(B, grid[0] * grid[1], generator=g).argsort(dim=1)[:, :K].to(device)
    pred = torch.randn(B, K, P * P * C, generator=g).to(device, dtype).requires_grad_()
    return pred, images, ids, mean, std


def mixture(B, C, H, W, device="cpu"):
    """uint8 images, their mean and std, and how to mix them: three images of each kind and more."""
    g = torch.Generator().manual_seed(B)
    images = torch.randint(0, 256, (B, C, H, W), generator=g, dtype=torch.uint8)
    mean, std = torch.rand(C, generator=g), 0.2 + torch.rand(C, generator=g)
    partner = torch.randperm(B, generator=g)
    lam = torch.where(torch.arange(B) % 2 == 0, torch.rand(B, generator=g), 1.0)
    box = torch.tensor([[0, 0, 0, 0], [1, 2, H - 1, W], [0, 0, H, W]])[torch.arange(B) % 3]
    return [t.to(device) for t in (images, mean, std)], [t.to(device) for t in (partner, lam, box)]


def leaves(tree):
    """Every tensor with a gradient in nested lists, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.requires_grad else []
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, (list, tuple)) else []


def convert(tree, dtype):
    """A copy of nested lists with every floating tensor in dtype, detached."""
    if isinstance(tree, torch.Tensor):
        x = tree.detach().to(dtype if tree.is_floating_point() else tree.dtype)
        return x.requires_grad_(tree.requires_grad)
    return type(tree)(convert(part, dtype) for part in tree) if isinstance(tree, (list, tuple)) else tree


def output_and_gradients(op, inputs):
    """What op returns, and the gradient of its product with fixed numbers for every input that has one."""
    out = op(*inputs)
    wanted = leaves(inputs)
    return [out.detach(), *(torch.autograd.grad(out, wanted, cotangent(out)) if wanted else ())]


def cotangent(out):
    """Fixed numbers of the shape and type of out, the same ones in every type."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(out.shape, generator=g).bfloat16().to(out.device, out.dtype)


def scales(truth, inputs):
    """What the error of each result is measured against: max |truth|, or for a sum the magnitudes of its
    terms."""
    result = [t.abs().max() for t in truth]
    if isinstance(inputs[0], list):                     # levels and logits follow the output
        xs, M = inputs[0], len(inputs[0])
        result[1 + M] = max((dx * x).abs().sum() for dx, x in zip(truth[1:1 + M], xs, strict=True))
    if isinstance(inputs[0], list) and len(inputs) > 2:     # ..., weight, bias, eps
        dy, weight, bias = cotangent(truth[0]), *inputs[-3:-1]
        result[-2] = (dy * (truth[0] - bias) / weight).abs().flatten(0, -2).sum(dim=0).max()
        result[-1] = dy.abs().flatten(0, -2).sum(dim=0).max()
    return [x.item() for x in result]


def assert_within_bound(kernel, specification, inputs, dtype):
    """Check the bound for the output and every gradient, and return the largest error of kernel over its
    scale."""
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    exact = convert(inputs, wider)
    got = output_and_gradients(kernel, inputs)
    plain = output_and_gradients(specification, inputs)
    truth = output_and_gradients(specification, exact)
    worst = 0.0
    for i, (k, p, t, scale) in enumerate(zip(got, plain, truth, scales(truth, exact), strict=True)):
        assert k.shape == p.shape and k.dtype == p.dtype, f"{i}: {k.shape} {k.dtype}, not {p.shape} {p.dtype}"
        error = (k.double() - t.double()).abs().max().item()
        bound = 2 * (p.double() - t.double()).abs().max().item() + torch.finfo(dtype).eps * scale
        assert error <= bound, f"result {i}: error {error:.3g} is above the bound {bound:.3g}"
        worst = max(worst, error / scale if scale else 0.0)
    return worst
