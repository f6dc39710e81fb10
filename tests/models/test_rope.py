"""Rotary positions: formula, dependence on differences, other grids, and tokens that do not rotate."""

import pytest
import torch

from models.rope import RotaryPositions, rotate
from options import UsageError

WIDTH = 16


def test_pairs_rotate_by_row_and_then_by_column():
    rotation = RotaryPositions(5, WIDTH)(5, 5)
    x = torch.randn(25, WIDTH, dtype=torch.float64)
    turned = rotate(x, rotation)
    for token, (row, column) in {7: (1, 2), 20: (4, 0)}.items():
        for pair in range(WIDTH // 2):
            position, i = (row, pair) if pair < WIDTH // 4 else (column, pair - WIDTH // 4)
            angle = torch.tensor(position * 10000 ** (-2 * i / (WIDTH // 2)), dtype=torch.float64)
            number = torch.complex(*x[token, 2 * pair : 2 * pair + 2]) * torch.polar(torch.ones_like(angle), angle)
            found = torch.complex(*turned[token, 2 * pair : 2 * pair + 2])
            assert abs(found - number) < 1e-6


def test_products_depend_on_differences_of_positions_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, WIDTH, dtype=torch.float64)
    rotation = RotaryPositions(6, WIDTH)(6, 6)
    products = (rotate(query.expand(36, -1), rotation) @ rotate(key.expand(36, -1), rotation).T).view(6, 6, 6, 6)
    by_difference = {}
    for row, column, other_row, other_column in torch.cartesian_prod(*4 * [torch.arange(6)]).tolist():
        value = products[row, column, other_row, other_column].item()
        known = by_difference.setdefault((row - other_row, column - other_column), value)
        assert value == pytest.approx(known, abs=1e-5)
    assert len({round(value, 3) for value in by_difference.values()}) > 100


def test_a_rotation_keeps_lengths_and_computes_in_float32():
    x = torch.randn(2, 3, 9, WIDTH).bfloat16()
    turned = rotate(x, RotaryPositions(3, WIDTH)(3, 3))
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.norm(dim=-1), x.float().norm(dim=-1))


def test_positions_of_another_grid_are_scaled_to_the_training_grid():
    positions = RotaryPositions(4, WIDTH)
    stored, twice = positions(4, 4), positions(8, 4)
    for known, finer in zip(stored, twice, strict=True):
        torch.testing.assert_close(finer.view(8, 4, WIDTH)[::2], known.view(4, 4, WIDTH))
    torch.testing.assert_close(positions(8, 8).cos.view(8, 8, WIDTH)[::2, ::2], stored.cos.view(4, 4, WIDTH))


def test_context_tokens_do_not_rotate():
    positions, x = RotaryPositions(2, WIDTH), torch.randn(7, WIDTH)
    turned = rotate(x, positions(2, 2, context=3))
    assert torch.equal(turned[:3], x[:3])
    assert torch.equal(turned[3:], rotate(x[3:], positions(2, 2)))


def test_heads_of_other_widths_are_refused():
    with pytest.raises(UsageError, match="multiple of 4, but theirs is 6"):
        RotaryPositions(4, 6)
