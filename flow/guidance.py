"""The velocity that a solver integrates: a network under a condition and guidance.

Guidance extrapolates away from a worse velocity: v_guided = v_worse + scale (v - v_worse). Classifier-free guidance takes
v_worse from the same network under the null condition (Ho & Salimans 2022, eq. 6). Autoguidance takes it from a weaker
network under the same condition (Karras et al. 2024, arXiv:2406.02507, eq. 3). Guidance acts at times within an interval
(Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5), on all channels or only on the first few.

The guided velocity jumps at the ends of the interval. `breakpoints` lists them, and `restrict` gives the velocity on either
side, so that a solver steps to each end and decides once per step whether to guide.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from options import UsageError, option

__all__ = ["GuidanceOptions", "GuidedVelocity", "Network", "VelocityCorrection"]

# network(t [B], x [B, C, h, w], condition) is the velocity [B, C, h, w]. The condition is a named tuple whose fields are
# tensors [B, ...] or None.
Network = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
# correction(velocity [B, C, h, w], condition) is the velocity that guidance extrapolates, where it differs from the network's.
VelocityCorrection = Callable[[torch.Tensor, Any], torch.Tensor]

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class GuidanceOptions:
    """Guidance."""

    on_resume: ClassVar = "freely"

    cfg_scale: float = option(
        1.0, "scale of classifier-free guidance or autoguidance; 1: no guidance", minimum=0, common=True
    )
    cfg_interval: tuple[float, ...] = option(
        ALWAYS, "times LOW HIGH within [0, 1] (0: data) between which guidance applies", minimum=0, common=True
    )
    cfg_channels: int = option(
        0, "number of leading channels to guide (3: as in DiT's published code); 0: all", minimum=0
    )

    def __post_init__(self) -> None:
        if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
            given = " ".join(map(str, self.cfg_interval))
            raise UsageError(f"--cfg_interval: expected two times 0 <= LOW <= HIGH <= 1, but {given} was given")


class GuidedVelocity:
    """velocity(t, x) of a network under a condition and guidance; it counts network evaluations.

    The worse velocity is evaluated only for samples whose time lies in the guidance interval, and never at scale 1.

    Args:
        network: the velocity network.
        condition: the condition of every sample.
        null_condition: the null condition, with the same fields.
        guidance: scale, interval and channels.
        guide: a weaker network, for autoguidance; it is evaluated under `condition`, and `null_condition` is not used.
        correction: applies to the velocity under `condition` where guidance acts.
    """

    def __init__(
        self,
        network: Network,
        condition: Any,
        null_condition: Any,
        guidance: GuidanceOptions,
        guide: Network | None = None,
        correction: VelocityCorrection | None = None,
    ) -> None:
        self.network = network
        self.condition = condition
        self.null_condition = null_condition
        self.guidance = guidance
        self.guide = guide
        self.correction = correction
        self._guided: bool | None = None  # whether guidance acts; None: at times within the interval
        self._rows: torch.Tensor | None = None  # indices of these samples in the whole batch; None: all samples
        self._tally: list[tuple[torch.Tensor | None, torch.Tensor]] = []  # rows and their evaluations, for each call

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Velocity [B, C, h, w] at times t ([] or [B]) and points x [B, C, h, w]."""
        # Contiguous to match a guided batch's strides, so that torch.compile does not recompile.
        times = t.expand(len(x)).contiguous()
        rows = self._guided_rows(times)
        self._tally.append((self._rows, torch.ones_like(times, dtype=torch.long).index_fill_(0, rows, 2)))
        if len(rows) == 0:
            return self.network(times, x, self.condition)
        velocity, worse = self._evaluate(times, x, rows)
        channels = slice(self.guidance.cfg_channels or None)
        guided = velocity[rows]
        better = guided if self.correction is None else self.correction(guided, _select(self.condition, rows))
        extrapolated = worse + self.guidance.cfg_scale * (better - worse)
        guided[:, channels] = extrapolated[:, channels]
        return velocity.index_copy(0, rows, guided)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The ends of the guidance interval, where the velocity jumps; empty if guidance acts always or never."""
        low, high = self.guidance.cfg_interval
        jumps = self._guided is None and self.guidance.cfg_scale != 1 and low < high
        return tuple(end for end in (low, high) if 0 < end < 1) if jumps else ()

    def restrict(self, start: float, end: float) -> "GuidedVelocity":
        """The velocity between two times, guided at all times if their midpoint is inside the guidance interval, else never.

        It shares this velocity's evaluation count.
        """
        low, high = self.guidance.cfg_interval
        part = copy.copy(self)
        part._guided = low < (start + end) / 2 < high
        return part

    def select_rows(self, rows: torch.Tensor) -> "GuidedVelocity":
        """The velocity of the samples `rows` of the batch. It shares this velocity's evaluation count."""
        part = copy.copy(self)
        part.condition, part.null_condition = _select(self.condition, rows), _select(self.null_condition, rows)
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def evaluations(self, samples: int) -> torch.Tensor:
        """Network evaluations of each sample of the batch so far, int64 [samples]; a guided velocity counts as two."""
        total = torch.zeros(samples, dtype=torch.long)
        for rows, counts in self._tally:
            total.index_add_(0, torch.arange(samples) if rows is None else rows.cpu(), counts.cpu())
        return total

    def _guided_rows(self, times: torch.Tensor) -> torch.Tensor:
        """Indices of the samples to guide."""
        all_rows = torch.arange(len(times), device=times.device)
        if self.guidance.cfg_scale == 1 or self._guided is False:
            return all_rows[:0]
        low, high = self.guidance.cfg_interval
        # A boolean index makes the host wait for the device, so it is skipped where guidance always applies.
        always = self._guided or (low, high) == ALWAYS
        return all_rows if always else all_rows[(times >= low) & (times <= high)]

    def _evaluate(self, times: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity [B, ...] of all samples, and the worse velocity of `rows`.

        Without a guide, one batch evaluates both.
        """
        if self.guide is not None:
            worse = self.guide(times[rows], x[rows], _select(self.condition, rows))
            return self.network(times, x, self.condition), worse
        parts = zip(self.condition, _select(self.null_condition, rows), strict=True)
        both = type(self.condition)(*(None if a is None else torch.cat([a, b]) for a, b in parts))
        velocity, worse = self.network(torch.cat([times, times[rows]]), torch.cat([x, x[rows]]), both).split(
            [len(x), len(rows)]
        )
        return velocity, worse


def _select(condition: Any, rows: torch.Tensor) -> Any:
    """The condition of the samples `rows`."""
    return type(condition)(*(None if tensor is None else tensor[rows] for tensor in condition))
