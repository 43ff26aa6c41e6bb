"""Relative positions and windows: every pair of tokens by a loop, and a zero bias that changes nothing."""

import copy
import math

import pytest
import torch
from sources import FILES
from test_shape_comments import false_comments

from mff_min.vit import Attention, VisionTransformer
from mff_tasks.attention import (
    RelativeAttention,
    WindowAttention,
    add_relative_positions,
    add_windows,
    global_blocks_of,
    relative_positions,
)

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


# ---------------------------------------------------------------- windows

def window_attention(grid, window, dim=8, num_heads=2):
    """(WindowAttention with random tables, tokens without class token), in float64."""
    layer = WindowAttention(dim, num_heads, grid, window).double()
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    torch.nn.init.normal_(layer.qkv.bias)                   # so that a zero token is not a zero key
    return layer, torch.randn(2, math.prod(grid), dim, dtype=torch.float64)


def by_pairs(layer, x, grid, sides):
    """Attention pair by pair: each patch to all places of its window, those outside the grid being zeros."""
    (B, L, D), d = x.shape, x.shape[-1] // 2
    want = torch.empty_like(x)
    for b, h, i in [(b, h, i) for b in range(B) for h in range(2) for i in range(L)]:
        part = slice(h * d, h * d + d)
        q_weight, k_weight, v_weight = (w[part] for w in layer.qkv.weight.split(D))
        q_bias, k_bias, v_bias = (w[part] for w in layer.qkv.bias.split(D))
        (row, column), scores, values = divmod(i, grid[1]), [], []
        q = q_weight @ x[b, i] + q_bias
        top, left = row // sides[0] * sides[0], column // sides[1] * sides[1]
        for y in range(top, top + sides[0]):
            for u in range(left, left + sides[1]):
                inside = y < grid[0] and u < grid[1]
                token = x[b, y * grid[1] + u] if inside else torch.zeros(D, dtype=x.dtype)
                scores.append(q @ (k_weight @ token + k_bias) / math.sqrt(d)
                              + q @ layer.rel_pos_h[row - y + sides[0] - 1]
                              + q @ layer.rel_pos_w[column - u + sides[1] - 1])
                values.append(v_weight @ token + v_bias)
        want[b, i, part] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return want @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("grid, window, sides", [
    ((4, 4), 2, (2, 2)), ((3, 5), 2, (2, 2)), ((5, 3), 4, (4, 3)), ((2, 3), None, (2, 3)),
    ((2, 3), 9, (2, 3)), ((3, 3), 1, (1, 1))])
def test_windows_are_the_formula_pair_by_pair(grid, window, sides, first):
    """Also where they do not divide the grid: then zeros behind the norm are keys and values too."""
    layer, x = window_attention(grid, window)
    assert layer.window == sides
    want = by_pairs(layer, x, grid, sides)
    torch.testing.assert_close(layer(x, first), want[:, first:], rtol=1e-11, atol=1e-11)


def test_one_window_over_the_grid_is_global_attention():
    windowed, x = window_attention((3, 4), 4)
    whole = WindowAttention(8, 2, (3, 4)).double()
    whole.load_state_dict(windowed.state_dict())
    assert torch.equal(windowed(x), whole(x))


@pytest.mark.parametrize("window", [None, 2])
def test_zero_tables_are_plain_attention(window):
    layer = WindowAttention(8, 2, (4, 6), window).double()
    plain = Attention(8, 2).double()
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "rel_pos" not in name})
    assert not layer.rel_pos_h.any() and not layer.rel_pos_w.any()
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    if window is None:
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    else:
        parts = x.view(2, 2, 2, 3, 2, 8).transpose(2, 3)    # (B, windows down, windows across, 2, 2, D)
        want = plain(parts.reshape(12, 4, 8)).view(2, 2, 3, 2, 2, 8).transpose(2, 3).reshape(2, 24, 8)
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_a_window_sees_nothing_of_others():
    layer, x = window_attention((4, 6), 2)
    y = x.clone()
    y[:, 0] += 1.0                                          # in the window of the first two rows and columns
    changed = (layer(x) != layer(y)).any(dim=-1).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_every_row_of_both_tables_gets_a_gradient():
    layer, x = window_attention((5, 4), 3)
    layer(x).square().sum().backward()
    assert layer.rel_pos_h.shape == (5, 4) and layer.rel_pos_w.shape == (5, 4)
    assert layer.rel_pos_h.grad.any(dim=1).all() and layer.rel_pos_w.grad.any(dim=1).all()


def test_windows_in_bfloat16_differ_by_rounding_alone():
    layer, x = window_attention((6, 6), 4, dim=32)
    layer, x = layer.float(), x.float()
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert (found - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("depth, blocks", [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31)),
                                           (4, (0, 1, 2, 3)), (2, (0, 1)), (1, (0,))])
def test_the_last_block_of_each_quarter_is_global(depth, blocks):
    assert global_blocks_of(depth) == blocks


def test_an_encoder_with_windows_keeps_its_weights():
    encoder = VisionTransformer((8, 12), 2, 8, 5, 2)        # a grid of 4 x 6
    weights = {name: p for name, p in encoder.named_parameters()}
    before = copy.deepcopy(encoder)
    add_windows(encoder, 3, global_blocks=(1, 4))
    found = dict(encoder.named_parameters())
    assert all(found[name] is p for name, p in weights.items())
    new = {f"blocks.{i}.attn.rel_pos_{side}" for i in range(5) for side in "hw"}
    assert found.keys() - weights.keys() == new
    assert [block.attn.window for block in encoder.blocks] == [(3, 3), (4, 6), (3, 3), (3, 3), (4, 6)]
    add_windows(before, 99)                                 # windows as large as the grid
    tokens, whole = torch.randn(2, 24, 8), copy.deepcopy(before)
    add_windows(whole, 99, global_blocks=range(5))
    assert torch.equal(before.forward_blocks(tokens, [4])[0], whole.forward_blocks(tokens, [4])[0])
    assert not torch.allclose(before.forward_blocks(tokens, [4])[0], encoder.forward_blocks(tokens, [4])[0])


# ---------------------------------------------------------------- shape comments

def test_shape_comments_are_true():
    path = "mff_tasks/attention.py"
    truth = dict(B=[3], D=[8], h=[2], d=[4], T=[25], L=[24], Q=[25, 20, 24], n=[12], y=[3], x=[3],
                 S=[9])

    def work():
        RelativeAttention(8, 2, (4, 6))(torch.randn(3, 25, 8), 5)
        WindowAttention(8, 2, (4, 6), 3)(torch.randn(3, 24, 8))
    false, unseen, _ = false_comments({path: FILES[path]}, truth, work)
    assert false == unseen == []
