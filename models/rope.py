"""Rotary positions in two dimensions (Su et al. 2021, arXiv:2104.09864, section 3.2; 2-D as in LightningDiT, arXiv:2501.01423).

The first half of a head's channels encodes a token's row, the second half its column. With d channels per axis, neighboring
channels (x_2i, x_2i+1) of queries and keys rotate by the angle

    position * 10000^(-2 i / d),      i = 0, ..., d / 2 - 1,

so that products of queries and keys depend on differences of positions only. Grids other than the training grid have their
positions scaled to its range.
"""

from typing import NamedTuple

import torch
from torch import nn

from options import UsageError

__all__ = ["RotaryPositions", "Rotation", "rotate"]

LONGEST_PERIOD = 10000.0


class Rotation(NamedTuple):
    """Cosines and sines of the angles of L tokens; both channels of a pair have the same angle.

    They are [L, d], or [B, 1, L, d] where the tokens' positions differ between samples.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate pairs of channels of x [B, heads, L, d], in at least float32; (a, b) becomes (a cos - b sin, b cos + a sin)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return wide * rotation.cos.to(wide.dtype) + turned * rotation.sin.to(wide.dtype)


class RotaryPositions(nn.Module):
    """Rotations of the tokens of a grid. The state dict holds the training grid's.

    Args:
        side: rows and columns of the training grid.
        head_width: channels d of an attention head.

    Raises:
        UsageError: the heads' width is not a multiple of 4.
    """

    freqs_cos: torch.Tensor
    freqs_sin: torch.Tensor

    def __init__(self, side: int, head_width: int) -> None:
        super().__init__()
        if head_width % 4:
            raise UsageError(
                f"--rope needs attention heads whose width is a multiple of 4, but theirs is {head_width}: choose "
                "another --model_type, or leave the flag out"
            )
        self.side, self.head_width = side, head_width
        cos, sin = _rotation(side, side, side, head_width)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)
        self._other_grids: dict[tuple[int, int], Rotation] = {}

    def forward(self, rows: int, columns: int, context: int = 0) -> Rotation:
        """Rotations of `context` tokens, which do not rotate, and then of a grid's tokens in row-major order."""
        cos, sin = self._table(rows, columns)
        if not context:
            return Rotation(cos, sin)
        still = torch.ones_like(cos[:1]).expand(context, -1)
        return Rotation(torch.cat([still, cos]), torch.cat([torch.zeros_like(still), sin]))

    def _table(self, rows: int, columns: int) -> Rotation:
        if rows == columns == self.side:
            return Rotation(self.freqs_cos, self.freqs_sin)
        if (rows, columns) not in self._other_grids:
            self._other_grids[rows, columns] = _rotation(rows, columns, self.side, self.head_width)
        table = Rotation(*(each.to(self.freqs_cos.device) for each in self._other_grids[rows, columns]))
        self._other_grids[rows, columns] = table
        return table


def _rotation(rows: int, columns: int, side: int, width: int) -> Rotation:
    """Rotations [rows x columns, width] of a grid whose positions lie in [0, side)."""
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)

    def angles(count: int) -> torch.Tensor:  # [count, width / 2]
        positions = torch.arange(count, dtype=torch.float64) * (side / count)
        return (positions[:, None] * LONGEST_PERIOD**-exponents).repeat_interleave(2, dim=1)

    down, across = angles(rows)[:, None].expand(-1, columns, -1), angles(columns)[None].expand(rows, -1, -1)
    both = torch.cat([down, across], dim=-1).reshape(rows * columns, width)
    return Rotation(both.cos().float(), both.sin().float())
