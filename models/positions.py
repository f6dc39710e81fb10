"""Sine-cosine position tables of token grids (Vaswani et al. 2017, section 3.5, in two dimensions as in DiT)."""

import torch

from models.embeddings import sinusoids
from models.family import Weights
from runtime.messages import note

__all__ = ["PositionTables", "sincos_table", "with_own_positions"]

POSITIONS = ("pos_embed", "freqs_cos", "freqs_sin")  # last parts of names of tables that depend on the grid only


def sincos_table(rows: int, columns: int, hidden_size: int) -> torch.Tensor:
    """2-D sine-cosine table [1, rows x columns, D]: the first half of the channels encodes columns, the second rows."""

    def waves(count: int) -> torch.Tensor:  # [count, D / 2]
        return sinusoids(torch.arange(count, dtype=torch.float64), hidden_size // 4, sines_first=True)

    across, down = waves(columns)[None].expand(rows, -1, -1), waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).reshape(1, rows * columns, hidden_size).float()


class PositionTables:
    """Tables for the grids of latents: a stored one for the training grid, and others computed by the same formula.

    Args:
        side: rows and columns of the stored table's grid.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self._others: dict[tuple[int, int], torch.Tensor] = {}

    def table(self, stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The table [1, rows x columns, D], with a note the first time that it is not `stored` [1, side x side, D]."""
        if rows == columns == self.side:
            return stored
        if (rows, columns) not in self._others:
            note(f"position table recomputed for {rows} x {columns} patches (stored: {self.side} x {self.side})")
            self._others[rows, columns] = sincos_table(rows, columns, stored.shape[-1])
        table = self._others[rows, columns] = self._others[rows, columns].to(stored.device)
        return table


def with_own_positions(own: Weights, weights: Weights) -> Weights:
    """Fit `weights` to a DiT with the state dict `own`, whose position tables replace those for another grid.

    All other entries are unchanged. If there is nothing to replace, the result is `weights` itself, not a copy.
    """
    replaced = {
        name: mine
        for name, mine in own.items()
        if name.split(".")[-1] in POSITIONS and name in weights and _differ_in_length(mine, weights[name])
    }
    return {**weights, **replaced} if replaced else weights


def _differ_in_length(mine: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether two tables [..., L, D] differ in L only."""
    same_kind = mine.ndim == stored.ndim and mine.shape[-1] == stored.shape[-1]
    return same_kind and mine.shape != stored.shape
