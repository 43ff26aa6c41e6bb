"""Kernels run on a GPU: the error bound at full size, two runs bit equal, opcheck, torch.compile."""

import numerics
import pytest
import torch

from mff_min.kernels import ops as kernels
from mff_min.kernels import reference
from tools.bench.ops import milliseconds

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = "cuda"


@pytest.fixture
def ops():
    return kernels.load("triton")


def calls(dtype, full):
    """(field of Ops, arguments) for every op that trains: a ViT-B at batch 64, or odd and small."""
    M, shape = (6, (64, 50, 768)) if full else (12, (3, 5, 1023))
    xs, logits, weight, bias = numerics.layers(M, shape, dtype, CUDA)
    yield "layer_sum", (xs, logits)
    yield "layer_sum_norm", (xs, logits, weight, bias, 1e-6)
    logits = numerics.convert(logits, dtype)
    projections = numerics.linear_layers(M, shape[-1], CUDA, dtype)
    yield "project_sum_norm", (xs, logits, projections, weight, bias, 1e-6)
    for uint8 in (True, False):
        for norm_pix in (True, False):
            B, C, grid, P, K = (64, 3, (14, 14), 16, 147) if full else (3, 4, (2, 5), 7, 3)
            pred, images, ids, mean, std = numerics.patches(B, C, grid, P, K, dtype, uint8, CUDA)
            yield "patch_loss", (pred, images, ids, P, norm_pix, mean, std)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_within_the_error_bound(ops, dtype, full):
    for name, arguments in calls(dtype, full):
        numerics.assert_within_bound(getattr(ops, name), getattr(reference, name), arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_images_are_within_the_error_bound(ops, dtype):
    for shape in ((64, 3, 224, 224), (3, 1, 5, 7)):
        (images, mean, std), mix = numerics.mixture(*shape, CUDA)
        for chosen in ([None] * 3, mix):
            got = ops.prepare(images, mean, std, dtype, *chosen).double()
            plain = reference.prepare(images, mean, std, dtype, *chosen).double()
            truth = reference.prepare(images, mean.double(), std.double(), torch.float64, *chosen)
            bound = 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (got - truth).abs().max() <= bound


def test_two_runs_are_bit_equal(ops):
    for name, arguments in calls(torch.bfloat16, full=True):
        first = numerics.output_and_gradients(getattr(ops, name), arguments)
        second = numerics.output_and_gradients(getattr(ops, name), arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


def test_every_op_passes_opcheck_on_cuda(ops):
    from mff_min.kernels import layer_sum, layer_sum_norm, patch_loss, prepare
    by_name = {"layer_sum": layer_sum.layer_sum_op, "layer_sum_norm": layer_sum_norm.layer_sum_norm_op,
               "patch_loss": patch_loss.patch_loss_op}
    for name, arguments in calls(torch.float32, full=False):
        if name in by_name:
            torch.library.opcheck(by_name[name], arguments)
    (images, mean, std), mix = numerics.mixture(3, 3, 16, 16, CUDA)
    torch.library.opcheck(prepare.prepare_op, (images, mean, std, torch.bfloat16, *mix))


def test_every_op_compiles_as_one_graph(ops):
    for name, arguments in calls(torch.bfloat16, full=True):
        op = getattr(ops, name)
        whole = torch.compile(op, fullgraph=True, dynamic=False)
        results = zip(numerics.output_and_gradients(whole, arguments),
                      numerics.output_and_gradients(op, arguments), strict=True)
        assert all((a - b).abs().max() <= 2 ** -6 * b.abs().max() for a, b in results), name


def test_ops_work_under_autocast_and_cuda_graphs(ops):
    xs, logits, weight, bias = numerics.layers(3, (8, 5, 64), torch.bfloat16, CUDA)
    projections = numerics.linear_layers(3, 64, CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        out = ops.project_sum_norm(xs, logits, projections, weight, bias, 1e-6)
        want = reference.project_sum_norm(xs, logits, projections, weight, bias, 1e-6)
    torch.testing.assert_close(out.float(), want.float(), rtol=5e-2, atol=5e-2)

    still = [x.detach() for x in xs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    ops.layer_sum(still, logits.detach())
    with torch.cuda.graph(graph):
        captured = ops.layer_sum(still, logits.detach())
    still[0].mul_(2)
    graph.replay()
    assert torch.equal(captured, ops.layer_sum(still, logits.detach()))


def test_an_id_outside_the_image_makes_the_loss_nan(ops):
    pred, images, ids, mean, std = numerics.patches(2, 3, (2, 3), 2, 3, torch.float32, True, CUDA)
    ids[1, 2] = 10 ** 9
    assert ops.patch_loss(pred, images, ids, 2, True, mean, std).isnan()


def test_both_forms_of_low_pass_agree():
    images = torch.rand(4, 3, 224, 224, device=CUDA)
    torch.testing.assert_close(reference.low_pass_products(images, 40), reference.low_pass_fft(images, 40),
                               rtol=0, atol=2e-5)


def test_a_time_is_of_the_gpu_unless_the_op_waits_for_it():
    x = torch.zeros(1, device=CUDA)

    def short():
        for _ in range(20):
            x.add_(1)
    assert not milliseconds(short, CUDA)[1] and milliseconds(x.item, CUDA)[1]
