"""Dormand-Prince 5(4) solver with a separate step size and error estimate for every sample.

Step size control and the initial step size follow Hairer, Norsett & Wanner 1993, section II.4. A sample's steps do not
depend on the rest of its batch. Finished samples leave the batch.
"""

from collections.abc import Sequence

import torch

from flow.ode import (
    Draw,
    Solution,
    SolverOptions,
    Velocity,
    check_evaluations,
    select_rows,
)
from flow.runge_kutta import Tableau, combine
from options import UsageError
from runtime.finite import finite_rows

__all__ = ["DORMAND_PRINCE", "dopri5"]

# Dormand & Prince 1980. The last stage is evaluated at the new point, so the next step reuses it as its first stage.
DORMAND_PRINCE = Tableau(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
FOURTH_ORDER = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
ERROR_WEIGHTS = tuple(fifth - fourth for fifth, fourth in zip(DORMAND_PRINCE.weights, FOURTH_ORDER, strict=True))

SAFETY = 0.9
MIN_GROWTH, MAX_GROWTH = 0.2, 10.0  # bounds on the ratio of successive step sizes
SMALLEST_STEP = 1e-9


def dopri5(velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw) -> Solution:
    """Integrate each sample from times[0] to times[-1] within the tolerances of `options`.

    Each sample takes two evaluations to start and six per step, whether the step is accepted or rejected. A sample whose
    velocity is not finite, at any step size, becomes NaN; the others are not affected.

    Raises:
        UsageError: no step size meets the tolerances, or the batch takes too many evaluations.
    """
    end, direction = times[-1], 1 if times[-1] > times[0] else -1
    result, evaluations = torch.empty_like(x), torch.full((len(x),), 2, device=x.device)
    # Batch indices of the unfinished samples. t, x, slope, h and rejected hold one row for each of them.
    rows = torch.arange(len(x), device=x.device)
    t = torch.full((len(x),), times[0], dtype=torch.float64, device=x.device)
    slope = velocity(t.to(x.dtype), x)
    h = direction * _first_step(velocity, t, x, slope, direction, abs(end - times[0]), options)
    rejected = torch.zeros_like(rows, dtype=torch.bool)
    remaining_velocity, calls = velocity, 2
    while len(rows):
        reaches_end = h.abs() >= (end - t).abs()
        if not (reaches_end | (h.abs() > SMALLEST_STEP)).all():
            raise UsageError(
                f"--method dopri5 found no step size that meets --atol {options.atol:g} and --rtol {options.rtol:g}: "
                "raise the tolerances"
            )
        calls += 6
        check_evaluations(options, calls)
        h = torch.where(reaches_end, end - t, h)
        new, new_slope, error = _step(remaining_velocity, t, x, slope, h)
        evaluations[rows] += 6
        ratio = _norm(error, torch.maximum(x.abs(), new.abs()), options)
        lost = ~_is_finite(ratio, error, options)
        ratio = ratio.nan_to_num(nan=torch.inf)
        accepted = ratio <= 1
        x, slope = (torch.where(_expand_dims(accepted, x), *pair) for pair in ((new, x), (new_slope, slope)))
        t = torch.where(accepted, t + h, t)
        growth = (SAFETY * ratio ** (-1 / 5)).clamp(MIN_GROWTH, MAX_GROWTH)
        h = h * torch.where(accepted & ~rejected, growth, growth.clamp(max=1))
        rejected = ~accepted
        lost &= h.abs() <= SMALLEST_STEP
        x = torch.where(_expand_dims(lost, x), torch.nan, x)
        done = lost | (reaches_end & accepted)
        if done.any():
            result[rows[done]] = x[done]
            rows, t, x, slope, h, rejected = (state[~done] for state in (rows, t, x, slope, h, rejected))
            remaining_velocity = select_rows(velocity, rows)
    return Solution(result, evaluations)


def _step(
    velocity: Velocity, t: torch.Tensor, x: torch.Tensor, slope: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take one step of length h [B]; return the new point, the slope there, and the point's estimated error."""
    slopes, point, step = [slope], x, _expand_dims(h, x).to(x.dtype)
    for node, row in zip(DORMAND_PRINCE.nodes[1:], DORMAND_PRINCE.stages[1:], strict=True):
        point = x + step * combine(row, slopes)
        slopes.append(velocity((t + node * h).to(x.dtype), point))
    return point, slopes[-1], step * combine(ERROR_WEIGHTS, slopes)


def _first_step(
    velocity: Velocity,
    t: torch.Tensor,
    x: torch.Tensor,
    slope: torch.Tensor,
    direction: int,
    longest: float,
    options: SolverOptions,
) -> torch.Tensor:
    """Initial step sizes, float64 [B], from `slope` and one more evaluation (section II.4, up to eq. 4.14).

    They are close to SMALLEST_STEP for samples with an evaluation that is not finite.
    """
    size, steepness = _norm(x, x.abs(), options), _norm(slope, x.abs(), options)
    guess = torch.where((size < 1e-5) | (steepness < 1e-5), 1e-6, 0.01 * size / steepness).clamp(max=longest)
    point = x + direction * _expand_dims(guess, x).to(x.dtype) * slope
    change = velocity((t + direction * guess).to(x.dtype), point) - slope
    curvature = _norm(change, x.abs(), options) / guess
    largest = torch.maximum(steepness, curvature)
    better = torch.where(largest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
    found = torch.minimum(100 * guess, better).clamp(max=longest)
    return torch.where(_is_finite(steepness + curvature, change, options), found, 2 * SMALLEST_STEP)


def _norm(value: torch.Tensor, scale: torch.Tensor, options: SolverOptions) -> torch.Tensor:
    """Root mean square, float64 [B], of each sample's values relative to its tolerance atol + rtol * scale."""
    units = value / (options.atol + options.rtol * scale)
    return units.flatten(1).double().square().mean(1).sqrt()


def _is_finite(norm: torch.Tensor, value: torch.Tensor, options: SolverOptions) -> torch.Tensor:
    """Whether each sample's norm, float64 [B], is finite. At --atol 0 it may not be, so the values [B, ...] decide."""
    return norm.isfinite() if options.atol else finite_rows(value)


def _expand_dims(numbers: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape numbers [B] to [B, 1, ...], to broadcast over x [B, ...]."""
    return numbers.view(-1, *[1] * (x.ndim - 1))
