"""Dormand and Prince's pair of order 5(4) with a separate step size, error and end for every sample.

Step size control and the first step follow Hairer, Norsett & Wanner 1993, section II.4. What a sample
takes does not depend on its batch mates; one that has arrived leaves the batch.
"""

from collections.abc import Sequence

import torch

from flow.ode import Draw, Solution, SolverOptions, Velocity, select_rows
from flow.runge_kutta import Tableau, combine
from options import UsageError

__all__ = ["DORMAND_PRINCE", "dopri5"]

# Dormand & Prince 1980. The last stage is the slope at the new point, and so the first stage of the next step.
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

SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0  # of the factor from one step size to the next
SMALLEST_STEP = 1e-9


def dopri5(velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw) -> Solution:
    """Integrate each sample from times[0] to times[-1] within the tolerances of `options`.

    A sample takes two evaluations to begin with, and six for every step, accepted or not.

    Raises:
        UsageError: tolerances that no step meets, or a velocity that is not finite.
    """
    end, direction = times[-1], 1 if times[-1] > times[0] else -1
    result, evaluations = torch.empty_like(x), torch.full((len(x),), 2, device=x.device)
    rows = torch.arange(len(x), device=x.device)  # the samples still on their way, and below what belongs to them
    t = torch.full((len(x),), times[0], dtype=torch.float64, device=x.device)
    slope = velocity(t.to(x.dtype), x)
    h = direction * _first_step(velocity, t, x, slope, direction, abs(end - times[0]), options)
    rejected = torch.zeros_like(rows, dtype=torch.bool)
    remaining_velocity = velocity
    while len(rows):
        if not (h.abs() > SMALLEST_STEP).all():
            raise UsageError(
                f"--method dopri5 finds no step that meets --atol {options.atol:g} and --rtol {options.rtol:g}: "
                "raise them, unless the velocity is not finite"
            )
        arrives = h.abs() >= (end - t).abs()
        h = torch.where(arrives, end - t, h)
        new, new_slope, error = _step(remaining_velocity, t, x, slope, h)
        evaluations[rows] += 6
        ratio = _norm(error, torch.maximum(x.abs(), new.abs()), options).nan_to_num(nan=torch.inf)
        accepted = ratio <= 1
        x, slope = (torch.where(_spread(accepted, x), *pair) for pair in ((new, x), (new_slope, slope)))
        t = torch.where(accepted, t + h, t)
        growth = (SAFETY * ratio ** (-1 / 5)).clamp(SLOWEST, FASTEST)
        h = h * torch.where(accepted & ~rejected, growth, growth.clamp(max=1))
        rejected = ~accepted
        done = arrives & accepted
        if done.any():
            result[rows[done]] = x[done]
            rows, t, x, slope, h, rejected = (kept[~done] for kept in (rows, t, x, slope, h, rejected))
            remaining_velocity = select_rows(velocity, rows)
    return Solution(result, evaluations)


def _step(
    velocity: Velocity, t: torch.Tensor, x: torch.Tensor, slope: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The point after a step h [B], its slope, and the estimated error of the point."""
    slopes, point, step = [slope], x, _spread(h, x).to(x.dtype)
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
    """Lengths of the first steps, float64 [B], from `slope` and one more evaluation (section II.4, eq. 4.14 and before)."""
    size, steepness = _norm(x, x.abs(), options), _norm(slope, x.abs(), options)
    guess = torch.where((size < 1e-5) | (steepness < 1e-5), 1e-6, 0.01 * size / steepness).clamp(max=longest)
    point = x + direction * _spread(guess, x).to(x.dtype) * slope
    change = velocity((t + direction * guess).to(x.dtype), point) - slope
    curvature = _norm(change, x.abs(), options) / guess
    largest = torch.maximum(steepness, curvature)
    better = torch.where(largest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
    return torch.minimum(100 * guess, better).clamp(max=longest)


def _norm(value: torch.Tensor, scale: torch.Tensor, options: SolverOptions) -> torch.Tensor:
    """Root mean square, float64 [B], of each sample's values in units of its tolerance atol + rtol |x|."""
    units = value / (options.atol + options.rtol * scale)
    return units.flatten(1).double().square().mean(1).sqrt()


def _spread(numbers: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers [B] as [B, 1, ...], one a sample of x."""
    return numbers.view(-1, *[1] * (x.ndim - 1))
