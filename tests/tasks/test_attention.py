"""Relative positions: the bias of every pair of tokens by a loop, and a zero bias that changes nothing."""

import copy
import math

import pytest
import torch

from mff_min.vit import Attention, VisionTransformer
from mff_tasks.attention import RelativeAttention, add_relative_positions, relative_positions

GRIDS = [(2, 3), (1, 4), (3, 3)]


def row_of(query, key, grid):
    """The row of the table for two tokens, 0 the class token: its offset, row by row, or one of three."""
    rows, columns = grid
    last = (2 * rows - 1) * (2 * columns - 1)
    if query == 0 or key == 0:
        return last + (2 if query == key else 0 if query == 0 else 1)
    (y, x), (v, u) = divmod(query - 1, columns), divmod(key - 1, columns)
    return (y - v + rows - 1) * (2 * columns - 1) + (x - u + columns - 1)


def attention(grid, dim=8, num_heads=2):
    """(RelativeAttention with a random table, tokens), in float64."""
    layer = RelativeAttention(dim, num_heads, grid).double()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer, torch.randn(2, 1 + math.prod(grid), dim, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_pair_of_tokens_gets_the_bias_of_its_offset(grid):
    T = 1 + math.prod(grid)
    index = relative_positions(grid)
    assert index.tolist() == [[row_of(query, key, grid) for key in range(T)] for query in range(T)]
    rows, _ = RelativeAttention(4, 1, grid).relative_position_bias_table.shape
    assert index.unique().tolist() == list(range(rows))     # each row is used


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_layer_is_the_formula_pair_by_pair(grid, first):
    layer, x = attention(grid)
    (B, T, D), d, table = x.shape, 4, layer.relative_position_bias_table
    q, k, v = (part.view(B, T, 2, d) for part in (x @ layer.qkv.weight.T + layer.qkv.bias).split(D, dim=-1))
    want = torch.empty(B, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(2):
            for i in range(T):
                scores = torch.stack([q[b, i, h] @ k[b, j, h] / math.sqrt(d) + table[row_of(i, j, grid), h]
                                      for j in range(T)])
                weights = scores.exp() / scores.exp().sum()
                want[b, i, h * d:(h + 1) * d] = sum(weights[j] * v[b, j, h] for j in range(T))
    want = want @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, first), want[:, first:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [0, 3])
def test_a_zero_bias_is_plain_attention(first):
    relative, plain = RelativeAttention(8, 2, (2, 3)).double(), Attention(8, 2).double()
    relative.load_state_dict(plain.state_dict(), strict=False)
    assert not relative.relative_position_bias_table.any()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    outputs = [layer(x, first) for layer in (relative, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-13, atol=1e-13)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(relative.qkv.weight.grad, plain.qkv.weight.grad, rtol=1e-12, atol=1e-12)


def test_every_row_of_the_table_gets_a_gradient():
    layer, x = attention((2, 3))
    layer(x).square().sum().backward()
    assert layer.relative_position_bias_table.grad.ne(0).all()


def test_an_encoder_keeps_its_weights_and_its_features():
    encoder = VisionTransformer((8, 12), 4, 8, 3, 2)
    before, weights = copy.deepcopy(encoder), {name: p for name, p in encoder.named_parameters()}
    add_relative_positions(encoder)
    found = dict(encoder.named_parameters())
    assert all(found[name] is p for name, p in weights.items())
    new = {f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)}
    assert found.keys() - weights.keys() == new
    assert encoder.state_dict().keys() == found.keys()      # the index is not stored
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(encoder.forward_features(images), before.forward_features(images))
    for name in new:
        torch.nn.init.normal_(found[name])
    assert not torch.allclose(encoder.forward_features(images), before.forward_features(images), atol=1e-3)
