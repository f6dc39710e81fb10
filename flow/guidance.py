"""The velocity that a solver integrates: a network bound to its condition and guidance.

Guidance leads away from a worse velocity, v = v_worse + scale (v - v_worse): that of the null condition (classifier-free
guidance, Ho & Salimans 2022, eq. 6), or that of a weaker network (autoguidance, Karras et al. 2024, arXiv:2406.02507,
eq. 3). It acts at times within an interval (Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5), on all channels
or on the first few.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from options import UsageError, option

__all__ = ["GuidanceOptions", "GuidedVelocity", "Network"]

# network(t [B], x [B, C, h, w], condition), the condition being a named tuple of tensors [B, ...] or None.
Network = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class GuidanceOptions:
    """Guidance."""

    on_resume: ClassVar = "freely"

    cfg_scale: float = option(1.0, "scale of classifier-free guidance (or autoguidance), 1: none", minimum=0)
    cfg_interval: tuple[float, ...] = option(
        ALWAYS, "times LOW HIGH within [0, 1] (0: data) between which there is guidance", minimum=0
    )
    cfg_channels: int = option(0, "guide the first so many channels only (3: DiT's published form); 0: all", minimum=0)

    def __post_init__(self) -> None:
        if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
            given = " ".join(map(str, self.cfg_interval))
            raise UsageError(f"--cfg_interval: expected two times 0 <= LOW <= HIGH <= 1, but {given} was given")


class GuidedVelocity:
    """velocity(t, x) of a network under a condition and guidance, which counts what it evaluates.

    A sample's worse velocity is evaluated only where its time lies in the interval, and never at scale 1.

    Args:
        network: the velocity network.
        condition: what is asked for.
        null_condition: the same for "nothing".
        guidance: scale, interval and channels.
        guide: a weaker network, for autoguidance: it is asked for the same condition in the place of the null condition.
    """

    def __init__(
        self,
        network: Network,
        condition: Any,
        null_condition: Any,
        guidance: GuidanceOptions,
        guide: Network | None = None,
    ) -> None:
        self.network = network
        self.condition = condition
        self.null_condition = null_condition
        self.guidance = guidance
        self.guide = guide
        self._rows: torch.Tensor | None = None  # of the whole batch, which this velocity is for; None: all
        self._tally: list[tuple[torch.Tensor | None, torch.Tensor]] = []  # rows, and what a call evaluated for each

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Velocity [B, C, h, w] at times t, [] or [B], and points x [B, C, h, w]."""
        times = t.expand(len(x)).contiguous()  # as those of a guided batch are: a compiled network tells strides apart
        rows = self._guided_rows(times)
        self._tally.append((self._rows, torch.ones_like(times, dtype=torch.long).index_fill_(0, rows, 2)))
        if len(rows) == 0:
            return self.network(times, x, self.condition)
        asked, worse = self._evaluate(times, x, rows)
        channels = slice(self.guidance.cfg_channels or None)
        towards = asked[rows]
        away = worse + self.guidance.cfg_scale * (towards - worse)
        towards[:, channels] = away[:, channels]
        return asked.index_copy(0, rows, towards)

    def select_rows(self, rows: torch.Tensor) -> "GuidedVelocity":
        """The velocity of some samples of the batch alone; it counts into the same tally."""
        part = copy.copy(self)
        part.condition, part.null_condition = _select(self.condition, rows), _select(self.null_condition, rows)
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def evaluations(self, samples: int) -> torch.Tensor:
        """Network evaluations that each of the batch's samples took so far, int64 [samples]; guided ones count two."""
        total = torch.zeros(samples, dtype=torch.long)
        for rows, counts in self._tally:
            total.index_add_(0, torch.arange(samples) if rows is None else rows.cpu(), counts.cpu())
        return total

    def _guided_rows(self, times: torch.Tensor) -> torch.Tensor:
        """The samples that guidance concerns; the host waits for the device only where there is an interval."""
        everyone = torch.arange(len(times), device=times.device)
        if self.guidance.cfg_scale == 1:
            return everyone[:0]
        low, high = self.guidance.cfg_interval
        return everyone if (low, high) == ALWAYS else everyone[(times >= low) & (times <= high)]

    def _evaluate(self, times: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity [B, ...] of all samples, and the worse one of `rows`; of one network, both in one batch."""
        if self.guide is not None:
            worse = self.guide(times[rows], x[rows], _select(self.condition, rows))
            return self.network(times, x, self.condition), worse
        parts = zip(self.condition, _select(self.null_condition, rows), strict=True)
        both = type(self.condition)(*(None if a is None else torch.cat([a, b]) for a, b in parts))
        asked, worse = self.network(torch.cat([times, times[rows]]), torch.cat([x, x[rows]]), both).split(
            [len(x), len(rows)]
        )
        return asked, worse


def _select(condition: Any, rows: torch.Tensor) -> Any:
    """A condition of some samples of its batch."""
    return type(condition)(*(None if tensor is None else tensor[rows] for tensor in condition))
