"""The velocity that a solver integrates: a network under a condition and guidance.

Guidance extrapolates away from a worse velocity: v_guided = v_worse + scale (v - v_worse). Classifier-free guidance takes
v_worse from the same network under the null condition (Ho & Salimans 2022, eq. 6). Autoguidance takes it from a weaker
network under the same condition (Karras et al. 2024, arXiv:2406.02507, eq. 3). Guidance acts at times within an interval
(Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5), on all channels or only on the first few.

Internal guidance takes v_worse from the network's own auxiliary head after its block K, in the same forward pass and without
classes (Zhou et al. 2025, arXiv:2512.24176): v_k + scale (v - v_k). It has its own interval. Where both kinds of guidance act,
it applies to the conditional velocity first: the result is v_null + scale_cfg (v_k + scale_ig (v - v_k) - v_null).

A network may also take a guidance scale as an input (`--guidance_embedding`), at no further cost. Then other guidance starts
from the velocity under that scale, and v_null is the null class's velocity without it.

The average velocities of flow maps are guided in the same way, over the whole interval [until, t] of a step.

The guided velocity jumps at the ends of both intervals. `breakpoints` lists them, and `restrict` gives the velocity on either
side, so that a solver steps to each end and decides once per step whether to guide.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch

from options import UsageError, option

__all__ = ["GuidanceOptions", "GuidedVelocity", "Network", "VelocityCorrection", "VelocityNetwork"]

# network(t [B], x [B, C, h, w], condition) is the velocity [B, C, h, w]. The condition is a named tuple whose fields are
# tensors [B, ...] or None. Some networks take more by name: `until` [B], for the average velocity over [until, t], and guidance
# scales `guidance` [B].
Network = Callable[..., torch.Tensor]
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

    internal_guidance: float = option(
        1.0,
        "scale of internal guidance, for networks trained with --auxiliary_velocity; 1: none",
        minimum=0,
        common=True,
    )
    internal_guidance_interval: tuple[float, ...] = option(
        ALWAYS, "times LOW HIGH within [0, 1] (0: data) between which internal guidance applies", minimum=0
    )
    embedded_guidance: float = option(
        1.0,
        "guidance scale that the network gets as an input, if trained with --guidance_embedding; 1: no guidance",
        minimum=1,
    )

    def __post_init__(self) -> None:
        for name in ("cfg_interval", "internal_guidance_interval"):
            interval = getattr(self, name)
            if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
                given = " ".join(map(str, interval))
                raise UsageError(f"--{name}: expected two times 0 <= LOW <= HIGH <= 1, but {given} was given")

    def to_json(self) -> dict[str, Any]:
        """All options, without newer kinds of guidance that are off, so that samples of older versions have equal settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        off = [kind for kind in ("internal_guidance", "embedded_guidance") if values[kind] == 1]
        return {name: value for name, value in values.items() if not name.startswith(tuple(off))}

    def __repr__(self) -> str:
        # Training states, also of older versions, store this text with the score of best.safetensors.
        return f"GuidanceOptions({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"


@dataclass(frozen=True)
class VelocityNetwork:
    """A trained network as the velocity network that its objective defines.

    Args:
        network: network(t, x, condition); for internal guidance, it also has an auxiliary velocity head
            (`models.taps.TappedVelocity`).
        read: the objective's `velocity`.
    """

    network: Callable[..., Any]
    read: Callable[[Network], Network]

    def __call__(self, t: torch.Tensor, x: torch.Tensor, condition: Any, **others: torch.Tensor) -> torch.Tensor:
        """Velocity [B, C, h, w] at times t [B] and points x [B, C, h, w]; the network gets the `others` unchanged."""
        return self.read(self.network)(t, x, condition, **others)

    def internally_guided(self, scales: torch.Tensor) -> Network:
        """The velocity network under internal guidance, with one scale per sample [B]; scale 1 keeps a sample's velocity.

        Objectives read velocities from outputs by affine maps, which commute with the extrapolation.
        """
        return self.read(partial(_extrapolate, self.network, scales))


def _extrapolate(
    network: Callable[..., Any], scales: torch.Tensor, t: torch.Tensor, x: torch.Tensor, condition: Any, **others: Any
) -> torch.Tensor:
    """v_k + scale (v - v_k), written so that scale 1 gives v exactly."""
    output, tapped = network(t, x, condition, tapped=True, **others)
    output, scales = output.float(), scales.view(-1, *[1] * (output.ndim - 1))
    return output + (scales - 1) * (output - tapped.velocity.float())


class GuidedVelocity:
    """velocity(t, x) of a network under a condition and guidance; it counts network evaluations.

    The worse velocity is evaluated only for samples whose time lies in the guidance interval, and never at scale 1.

    Args:
        network: the velocity network.
        condition: the condition of every sample.
        null_condition: the null condition, with the same fields.
        guidance: scale, interval and channels.
        guide: a weaker network, for autoguidance; it is evaluated under `condition`, and `null_condition` is not used. It gets
            no embedded guidance.
        correction: applies to the velocity under `condition` where guidance acts.
        internal: gives the network under internal guidance for scales [B], as `VelocityNetwork.internally_guided` does.
    """

    def __init__(
        self,
        network: Network,
        condition: Any,
        null_condition: Any,
        guidance: GuidanceOptions,
        guide: Network | None = None,
        correction: VelocityCorrection | None = None,
        internal: Callable[[torch.Tensor], Network] | None = None,
    ) -> None:
        if internal is None and guidance.internal_guidance != 1:
            raise ValueError("internal guidance needs the argument `internal`")
        self.network = network
        self.condition = condition
        self.null_condition = null_condition
        self.guidance = guidance
        self.guide = guide
        self.correction = correction
        self.internal = internal
        # Whether guidance and internal guidance act; None: at times within the interval.
        self._guided: bool | None = None
        self._internally_guided: bool | None = None
        self._rows: torch.Tensor | None = None  # indices of these samples in the whole batch; None: all samples
        self._tally: list[tuple[torch.Tensor | None, torch.Tensor]] = []  # rows and their evaluations, for each call

    def __call__(self, t: torch.Tensor, x: torch.Tensor, until: torch.Tensor | None = None) -> torch.Tensor:
        """Velocity [B, C, h, w] at times t ([] or [B]) and points x [B, C, h, w]; with `until`, the average over [until, t]."""
        # Contiguous to match a guided batch's strides, so that torch.compile does not recompile.
        times = t.expand(len(x)).contiguous()
        others = {} if until is None else {"until": until.expand(len(x)).contiguous()}
        rows = self._guided_rows(times)
        self._tally.append((self._rows, torch.ones_like(times, dtype=torch.long).index_fill_(0, rows, 2)))
        if len(rows) == 0:
            return self._network(times)(times, x, self.condition, **others, **self._scales(times))
        velocity, worse = self._evaluate(times, x, others, rows)
        channels = slice(self.guidance.cfg_channels or None)
        guided = velocity[rows]
        better = guided if self.correction is None else self.correction(guided, _select(self.condition, rows))
        extrapolated = worse + self.guidance.cfg_scale * (better - worse)
        guided[:, channels] = extrapolated[:, channels]
        return velocity.index_copy(0, rows, guided)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The ends of the guidance intervals, where the velocity jumps; none of guidance that acts always or never."""
        own = self.guidance
        kinds = (
            (self._guided, own.cfg_scale, own.cfg_interval),
            (self._internally_guided, own.internal_guidance, own.internal_guidance_interval),
        )
        jumping = [ends for acts, scale, ends in kinds if acts is None and scale != 1 and ends[0] < ends[1]]
        return tuple(dict.fromkeys(end for ends in jumping for end in ends if 0 < end < 1))

    def restrict(self, start: float, end: float) -> "GuidedVelocity":
        """The velocity between two times. Each kind of guidance acts at all times if their midpoint is inside its interval.

        Otherwise, it never acts. The result shares this velocity's evaluation count.
        """
        middle, part = (start + end) / 2, copy.copy(self)
        low, high = self.guidance.cfg_interval
        part._guided = low < middle < high
        low, high = self.guidance.internal_guidance_interval
        part._internally_guided = low < middle < high
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

    def _evaluate(
        self, times: torch.Tensor, x: torch.Tensor, others: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity [B, ...] of all samples, and the worse velocity of `rows`.

        Without a guide, one batch evaluates both.
        """
        chosen = {name: value[rows] for name, value in others.items()}
        if self.guide is not None:
            worse = self.guide(times[rows], x[rows], _select(self.condition, rows), **chosen)
            return self._network(times)(times, x, self.condition, **others, **self._scales(times)), worse
        parts = zip(self.condition, _select(self.null_condition, rows), strict=True)
        both = type(self.condition)(*(None if a is None else torch.cat([a, b]) for a, b in parts))
        joined = {name: torch.cat([value, chosen[name]]) for name, value in others.items()}
        network, scales = self._network(times, len(rows)), self._scales(times, len(rows))
        velocity, worse = network(
            torch.cat([times, times[rows]]), torch.cat([x, x[rows]]), both, **joined, **scales
        ).split([len(x), len(rows)])
        return velocity, worse

    def _scales(self, times: torch.Tensor, null_rows: int = 0) -> dict[str, torch.Tensor]:
        """The network's input `guidance` for samples with `times` [B] and, without guidance, for `null_rows` more."""
        if self.guidance.embedded_guidance == 1:
            return {}
        scales = torch.ones_like(torch.cat([times, times[:1].expand(null_rows)]))
        scales[: len(times)] = self.guidance.embedded_guidance
        return {"guidance": scales}

    def _network(self, times: torch.Tensor, null_rows: int = 0) -> Network:
        """The network, under internal guidance where it acts at `times` [B], but not in the `null_rows` after these samples."""
        scale, (low, high) = self.guidance.internal_guidance, self.guidance.internal_guidance_interval
        if self.internal is None or scale == 1 or self._internally_guided is False:
            return self.network
        always = self._internally_guided or (low, high) == ALWAYS
        inside = torch.ones_like(times, dtype=torch.bool) if always else (times >= low) & (times <= high)
        scales = torch.ones_like(times).masked_fill(inside, scale)
        return self.internal(torch.cat([scales, torch.ones_like(times[:1]).expand(null_rows)]))


def _select(condition: Any, rows: torch.Tensor) -> Any:
    """The condition of the samples `rows`."""
    return type(condition)(*(None if tensor is None else tensor[rows] for tensor in condition))
