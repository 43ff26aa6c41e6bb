# SPDX-License-Identifier: Apache-2.0
"""MFF's fusion with M - 1 projections as one matrix product; specified by reference.project_sum_norm.

No longer in memory: the M - 1 projected levels, their gradients, and the sum before it is normalised.

    forward     p = softmax(logits[:-1])        product = [x_0 .. x_(M-2)] [p_0 A_0 .. p_(M-2) A_(M-2)]^T
                y = layer_sum_norm of product and x_(M-1)
    backward    dp_i = <d(p_i A_i), A_i>        from the gradient of the weights: no level is read for it

The product is PyTorch's: a hand-written one would not be faster. reference.merge_projections derives the two
weights that are left, and PyTorch differentiates it.
"""

from . import checks, reference
from .layer_sum_norm import layer_sum_norm


def project_sum_norm(xs, logits, projections, weight, bias, eps):
    """MFF's fusion (arXiv 2308.00261, sec. 3.2): project all but the last level, sum, LayerNorm -> (B, T, D).

    projections are M - 1 pairs: a weight (D, D) and a bias (D,), as in nn.Linear; the last level is not
    projected.
    """
    checks.check_levels(xs, logits)
    checks.check_projections(xs, projections)
    return layer_sum_norm(*reference.merge_projections(xs, logits, projections), weight, bias, eps)
