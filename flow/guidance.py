"""The velocity that a solver integrates: a network bound to its condition and guidance.

Classifier-free guidance (Ho & Salimans 2022, eq. 6): v = v_null + scale (v_cond - v_null), on all channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from options import option

__all__ = ["GuidanceOptions", "Velocity", "guided_velocity"]

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GuidanceOptions:
    """Guidance."""

    cfg_scale: float = option(1.0, "scale of classifier-free guidance, 1: none", minimum=0)


def guided_velocity(
    network: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor],
    condition: Any,
    null_condition: Any,
    scale: float,
) -> Velocity:
    """velocity(t, x) of a network under `condition`; at scale 1 the null condition is not evaluated.

    Both halves go through the network as one batch; conditions are named tuples of tensors [B, ...] or None.
    """

    def plain(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return network(t.expand(x.shape[0]), x, condition)

    def guided(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        times = t.expand(x.shape[0])
        both = type(condition)(
            *(None if a is None else torch.cat([a, b]) for a, b in zip(condition, null_condition, strict=True))
        )
        conditional, null = network(torch.cat([times, times]), torch.cat([x, x]), both).chunk(2)
        return null + scale * (conditional - null)

    return plain if scale == 1 else guided
