"""Time grids of the fixed-step solvers: functions of u, the uniform grid from 1 down to 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from flow.times import AUTO_SHIFT, dimension_shift, shift_times
from options import UsageError, option

__all__ = ["GRIDS", "TimeGridOptions", "time_grid"]

EDM_SIGMAS = (0.002, 80.0)  # Karras et al. 2022, table 1


def _uniform(u: torch.Tensor, options: "TimeGridOptions") -> torch.Tensor:
    return u


def _quadratic(u: torch.Tensor, options: "TimeGridOptions") -> torch.Tensor:
    return u.square()


def _logit_normal(u: torch.Tensor, options: "TimeGridOptions") -> torch.Tensor:
    """Quantiles of the logit-normal distribution (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(options.grid_location + options.grid_scale * torch.special.ndtri(u))


def _edm(u: torch.Tensor, options: "TimeGridOptions") -> torch.Tensor:
    """EDM's noise levels (Karras et al. 2022, eq. 5) with sigma = t / (1 - t); pure noise replaces the highest level."""
    steps = len(u) - 1
    low, high = (sigma ** (1 / options.grid_rho) for sigma in EDM_SIGMAS)
    fraction = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    sigma = (high + fraction * (low - high)) ** options.grid_rho
    return torch.cat([u[:1], (sigma / (1 + sigma))[1:], u[-1:]])


GRIDS: dict[str, Callable[[torch.Tensor, "TimeGridOptions"], torch.Tensor]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logit_normal": _logit_normal,
    "edm": _edm,
}


@dataclass(frozen=True)
class TimeGridOptions:
    """Method and time grid."""

    method: str = option(
        "dopri5",
        "euler, midpoint, heun, rk3, rk4, ab2 (or multistep), ab3, ab4, dpm, stochastic, euler_maruyama, flow_map; adaptive: "
        "dopri5, torchdiffeq_dopri5, dopri8, adaptive_heun, bosh3 (docs/sampling.md)",
        common=True,
    )
    num_steps: int = option(40, "number of intervals of the fixed-step solvers", minimum=0, common=True)
    step_size: float | None = option(
        None, "fixed-step solvers: length h of an interval, which gives 1/h intervals", minimum=1e-6
    )
    time_grid: str = option("uniform", "fixed-step solvers: spacing of the intervals", choices=GRIDS)
    time_shift: float = option(
        1.0,
        "fixed-step solvers: s in the shifted grid t' = s t / (1 + (s - 1) t); values below 1 give shorter steps near data; "
        "auto (or 0): sqrt(d / 4096) for latents of d numbers, at least 1",
        minimum=0,
        words=AUTO_SHIFT,
    )
    grid_location: float = option(0.0, "logit_normal grid: location; values above 0 give shorter steps near noise")
    grid_scale: float = option(1.0, "logit_normal grid: scale", minimum=1e-6)
    grid_rho: float = option(7.0, "edm grid: exponent; larger values give shorter steps near data", minimum=1e-6)
    last_step: float = option(
        0.0,
        "uniform grid: length of the last interval, before the shift (SiT's SDE: 0.04); 0: as long as the others",
        minimum=0,
    )
    end_time: float = option(
        0.0, "uniform grid: time at which sampling ends, before the shift (RAE: 0.001); 0: data", minimum=0
    )
    fit_grid: bool = option(
        True,
        "fixed-step solvers: move grid points onto the ends of guidance intervals; off: leave the grid as it is, and guide "
        "where an evaluation's time lies in the interval, as other projects do",
    )

    @property
    def steps(self) -> int:
        """Number of intervals of the fixed-step solvers, from `step_size` if given, else from `num_steps`."""
        return self.num_steps if self.step_size is None else max(1, round(1 / self.step_size))


def time_grid(options: TimeGridOptions, breakpoints: Sequence[float] = (), dimensions: int = 0) -> list[float]:
    """The `options.steps` + 1 times from 1 down to 0, or to `end_time`, with both ends exact.

    `time_shift` s maps any grid to t' = s t / (1 + (s - 1) t) (Esser et al. 2024, section 5.3.2). After that, the grid point
    nearest to each of the decreasing `breakpoints` moves onto it, and the steps between two of them stretch in proportion.
    The number of steps stays the same. With too few steps to reach all breakpoints, or without `fit_grid`, no point moves.

    Args:
        options: the grid.
        breakpoints: times that the grid must contain.
        dimensions: d, numbers per latent, for the shift `auto`; 0: it is then 1.

    Raises:
        UsageError: fewer than one step, a grid so uneven that times coincide, or `last_step` and `end_time` that do not fit.
    """
    if options.steps < 1:
        raise UsageError(f"--method {options.method} needs --num_steps of at least 1, but {options.steps} was given")
    t = GRIDS[options.time_grid](_even_grid(options), options)
    t = shift_times(t, options.time_shift or dimension_shift(dimensions))
    if not (t.diff() < 0).all():
        raise UsageError(
            f"--time_grid {options.time_grid} has coinciding times at {options.steps} steps: "
            "choose a more even grid or fewer steps"
        )
    if options.fit_grid:
        t = _stretch(t, [time for time in breakpoints if time > t[-1]])
    return t.tolist()


def _even_grid(options: TimeGridOptions) -> torch.Tensor:
    """Evenly spaced times from 1 to `end_time`, except for a last interval of length `last_step` if there is one."""
    end, last = options.end_time, options.last_step
    if (end or last) and options.time_grid != "uniform":
        raise UsageError(f"--last_step and --end_time need --time_grid uniform, but {options.time_grid} was given")
    if end + last >= 1:
        raise UsageError(f"--last_step {last:g} and --end_time {end:g}: expected a sum below 1, where sampling starts")
    if not last:
        return torch.linspace(1, end, options.steps + 1, dtype=torch.float64)
    even = torch.linspace(1, end + last, options.steps, dtype=torch.float64)
    return torch.cat([even, even.new_tensor([end])])


def _stretch(t: torch.Tensor, breakpoints: Sequence[float]) -> torch.Tensor:
    """Move the grid points t [N + 1] that are nearest to the breakpoints onto them, and stretch the grid in between."""
    steps, fixed = len(t) - 1, [0]
    if steps <= len(breakpoints):
        return t
    for number, time in enumerate(breakpoints):
        first, last = fixed[-1] + 1, steps - len(breakpoints) + number  # each piece keeps at least one step
        distance = (t[first : last + 1] - time).abs().round(decimals=9)
        fixed.append(first + int(distance.argmin()))  # of two equally near, the noisier
    stretched = t.clone()
    ends = zip(pairwise([*fixed, steps]), pairwise([1.0, *breakpoints, float(t[-1])]), strict=True)
    for (first, last), (start, end) in ends:
        share = (t[first : last + 1] - t[last]) / (t[first] - t[last])
        stretched[first : last + 1] = share * start + (1 - share) * end
    return stretched
