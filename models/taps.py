"""A tap of a transformer: its tokens after block K, from which heads predict other things than the velocity.

Heads serve internal guidance and training losses. A network with a tap is called as network(t, x, condition, tapped=True) and
then returns `TappedVelocity`; without `tapped`, it returns the velocity alone and evaluates no head.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from models.family import ClassOptions
from options import UsageError, option

__all__ = ["TapOptions", "Tapped", "TappedVelocity"]


@dataclass(frozen=True)
class TapOptions(ClassOptions):
    """Tap of a transformer (DiT)."""

    tap_block: int = option(
        0, "DiT: number K of the block whose tokens the auxiliary heads and losses read; 0: none", minimum=0
    )

    def check_blocks(self, depth: int) -> None:
        """Check that the network has the block that the options name.

        Raises:
            UsageError: it has fewer blocks.
        """
        if self.tap_block > depth:
            raise UsageError(
                f"--tap_block {self.tap_block}: expected a block from 1 to {depth}, the network's last one"
            )


class Tapped(NamedTuple):
    """The tokens [B, L, D] after block K."""

    tokens: torch.Tensor


class TappedVelocity(NamedTuple):
    """A velocity [B, C, h, w], and what the heads of the tap predict."""

    velocity: torch.Tensor
    tapped: Tapped
