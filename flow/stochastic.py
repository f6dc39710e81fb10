"""Solvers that add noise: SiT's reverse SDE by two methods, and EDM's sampler with churn."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from flow.diffusions import DIFFUSIONS
from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count, time_tensor
from flow.runge_kutta import TABLEAUS, combine, slopes_of_step
from options import UsageError

__all__ = ["check_diffusion", "euler_maruyama", "heun", "reverse_sde"]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def reverse_sde(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Solve the reverse SDE dx = [v - w(t) s / 2] dt + sqrt(w(t)) dW, backwards in time (Ma et al. 2024, eq. 6 and 7).

    For the straight path, the score is s = -E[noise | x] / t, where x = (1 - t) E[data | x] + t E[noise | x] and
    E[data | x] = x - t v. Each step holds the data prediction D constant and is otherwise exact, as SDE-DPM-Solver++ (Lu et
    al. 2022, arXiv:2211.01095, section 5). With a = exp(-integral of w / (2 t^2) over the step),

        x_end = (1 - end) D + end (a noise + sqrt(1 - a^2) z),    noise = (x - (1 - start) D) / start,    z ~ N(0, I).

    D is extrapolated in t from the last two predictions to the middle of the step. This also makes up for the noise of the
    step before, which that step's prediction could not respond to; without it, coarse steps lose more variance than those of
    the Euler-Maruyama method. Unlike that method, this one is stable near data for any w. The first step has no history, and
    the last returns the mean, E[data | x]. The weak order is 2, up to a logarithm, if w vanishes at t = 0, else 1.
    """
    before: tuple[float, torch.Tensor] | None = None
    for step, (start, end) in enumerate(pairwise(times)):
        data = prediction = x - start * velocity(time_tensor(start, x), x)
        if before is not None and end > 0:
            prediction = data + (start - end) / (2 * (before[0] - start)) * (data - before[1])
        a = _noise_decay(options, start, end)
        noise = a * (x - (1 - start) * prediction) / start + math.sqrt(1 - a**2) * draw(step) if end else 0
        x = (1 - end) * prediction + end * noise
        before = start, data
    return solution_with_count(x, len(times) - 1)


def euler_maruyama(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Solve the SDE of `reverse_sde` by the Euler-Maruyama method, as SiT (arXiv:2401.08740) and REPA (arXiv:2410.06940) do.

    A step of length h, with the score s = -(x + (1 - t) v) / t, is

        x - h (v - w s / 2) + sqrt(w h) z,    z ~ N(0, I).

    A step to t = 0 adds no noise. SiT's sampler of 250 steps has diffusion `sigma` with norm 2 and a last step of 0.04.
    """
    for step, (start, end) in enumerate(pairwise(times)):
        w, h = options.diffusion_norm * DIFFUSIONS[options.diffusion](np.array(start)).item(), start - end
        v = velocity(time_tensor(start, x), x)
        x = x - h * (v + w / (2 * start) * (x + (1 - start) * v))
        if end > 0:
            x = x + math.sqrt(w * h) * draw(step)
    return solution_with_count(x, len(times) - 1)


def check_diffusion(options: SolverOptions) -> None:
    """Check that the diffusion is finite at t = 1, where `euler_maruyama` evaluates it.

    Raises:
        UsageError: it is not.
    """
    with np.errstate(divide="ignore"):
        if not np.isfinite(DIFFUSIONS[options.diffusion](np.array(1.0))):
            raise UsageError(
                f"--diffusion {options.diffusion} is infinite at t = 1, where --method {options.method} starts: use --method "
                "stochastic, or another diffusion"
            )


def heun(velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw) -> Solution:
    """EDM's sampler (Karras et al. 2022, algorithm 2) on the straight path, where sigma = t / (1 - t).

    Every step uses the trapezoidal rule, including the last. With churn, a step starts slightly closer to noise: sigma grows
    by the factor 1 + min(churn / steps, sqrt(2) - 1), and noise is added to match.
    """
    factor = 1 + min(options.churn / options.steps, math.sqrt(2) - 1)
    low, high = options.churn_interval
    for step, (start, end) in enumerate(pairwise(times)):
        if options.churn and low <= start <= high and start < 1:
            sigma, data_share = start / (1 - start), 1 - start
            start = factor * sigma / (1 + factor * sigma)
            added = sigma * math.sqrt(factor**2 - 1) * options.churn_noise
            x = (1 - start) * (x / data_share + added * draw(step))
        x = x + (end - start) * combine(
            TABLEAUS["heun"].weights, slopes_of_step(TABLEAUS["heun"], velocity, x, start, end)
        )
    return solution_with_count(x, 2 * (len(times) - 1))


def _noise_decay(options: SolverOptions, start: float, end: float) -> float:
    """exp(-integral of w(t) / (2 t^2) from `end` to `start`), by Gauss-Legendre quadrature in log t; 0 for end = 0."""
    if end == 0:
        return 0.0
    half = math.log(start / end) / 2
    t = np.exp(math.log(end) + half * (1 + NODES))
    rate = DIFFUSIONS[options.diffusion](t) / (2 * t)  # per unit of log t
    return math.exp(-options.diffusion_norm * half * float(WEIGHTS @ rate))
