"""Claim (docs/lab-notes/sampling.md): on a Gaussian mixture with exact velocity, each solver's error decreases at its order.

    python -m benchmarks.solver_orders [--picture docs/solvers.png]

The data are five Gaussians with standard deviation 0.15 on a circle of radius 1.5. A solver's error is its root mean square
distance from the exact solution of the ODE, over 64 noise samples in float64.

`stochastic` has no exact solution to compare with. Its error is the error of the variance of samples from N(0.7, 0.4^2).
This variance is computed exactly rather than estimated, because the sample is linear in every random draw.
"""

import argparse
import math
from collections.abc import Callable

import torch

from benchmarks._timing import markdown_table
from flow.diffusions import DIFFUSIONS
from flow.grids import GRIDS
from flow.solvers import SOLVERS, SolverOptions, solve

ANGLES = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
CENTERS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # [5, 2]
SPREAD = 0.15
NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEPS = (8, 16, 32, 64, 128, 256, 512)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
Curve = list[tuple[float, float]]  # evaluations per sample, error


def mixture_velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The mixture's exact velocity E[noise - data | x_t] at points [B, 2]."""
    t = t.expand(len(x))[:, None, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    centered = x[:, None] - (1 - t) * CENTERS  # [B, 5, 2]
    weights = torch.softmax(-centered.square().sum(2) / (2 * variance[..., 0]), dim=1)[..., None]
    return (weights * ((t - (1 - t) * SPREAD**2) / variance * centered - CENTERS)).sum(1)


def gaussian_velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The exact velocity E[noise - data | x_t] for data N(0.7, 0.4^2)."""
    variance = (1 - t) ** 2 * 0.16 + t**2
    return (t - (1 - t) * 0.16) / variance * (x - (1 - t) * 0.7) - 0.7


def point_errors(exact: torch.Tensor) -> dict[str, Curve]:
    """Error curves of the ODE solvers."""
    curves: dict[str, Curve] = {}
    for name, method in SOLVERS.items():
        if name in ("stochastic", "multistep"):
            continue
        settings = (
            [SolverOptions(name, atol=tolerance, rtol=tolerance) for tolerance in TOLERANCES]
            if method.adaptive
            else [SolverOptions(name, steps) for steps in STEPS]
        )
        solutions = [solve(mixture_velocity, NOISE, options) for options in settings]
        curves[name] = [
            (s.evaluations.double().mean().item(), (s.x - exact).square().sum(1).mean().sqrt().item())
            for s in solutions
        ]
    return curves


def variance_errors(diffusion: str) -> Curve:
    """Error curve of the SDE's variance, from the response to a batch of unit draws."""
    curve = []
    for steps in STEPS:
        unit = torch.eye(steps + 1, dtype=torch.float64).unbind(1)
        start = torch.cat([torch.zeros(1, dtype=torch.float64), unit[0]])[:, None]

        def draw(step: int, unit: tuple[torch.Tensor, ...] = unit) -> torch.Tensor:
            return torch.cat([torch.zeros(1, dtype=torch.float64), unit[step + 1]])[:, None]

        x = solve(gaussian_velocity, start, SolverOptions("stochastic", steps, diffusion=diffusion), draw=draw).x
        curve.append((float(steps), abs((x[1:] - x[0]).square().sum().item() - 0.16)))
    return curve


def errors_by_grid(exact: torch.Tensor) -> list[list[str]]:
    """Errors at 16 evaluations: one row per method, with a column per time grid and for shifts 0.5 and 2."""
    rows = []
    for name, steps in (("euler", 16), ("midpoint", 8), ("heun", 8), ("ab2", 16), ("dpm", 16)):
        settings = [SolverOptions(name, steps, time_grid=grid) for grid in GRIDS]
        settings += [SolverOptions(name, steps, time_shift=shift) for shift in (0.5, 2.0)]
        errors = [(solve(mixture_velocity, NOISE, s).x - exact).square().sum(1).mean().sqrt().item() for s in settings]
        rows.append([name, *(f"{error:.1e}" for error in errors)])
    return rows


def measured_order(curve: Curve) -> float:
    """Slope of log error against log evaluations, between the two finest runs with errors above rounding."""
    (work, error), (more, less) = [point for point in curve if point[1] > 1e-11][-2:]
    return math.log(error / less) / math.log(more / work)


def draw_picture(curves: dict[str, Curve], stochastic: dict[str, Curve], path: str) -> None:
    """Plot error against evaluations on logarithmic axes."""
    import matplotlib.pyplot as plt  # needed only for --picture

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    panels: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("fixed steps", lambda name: not SOLVERS[name].adaptive),
        ("adaptive, tolerances 1e-2 to 1e-7", lambda name: SOLVERS[name].adaptive),
    )
    for axis, (title, belongs) in zip(axes, panels, strict=False):
        for marker, (name, curve) in zip(
            "osv^Dd<>Px*", ((n, c) for n, c in curves.items() if belongs(n)), strict=False
        ):
            axis.loglog(*zip(*curve, strict=True), marker=marker, markersize=4, label=name)
        axis.set(title=title, ylabel="RMS distance to the exact sample", ylim=(1e-10, 3))
    for name, curve in stochastic.items():
        axes[2].loglog(*zip(*curve, strict=True), marker="o", markersize=4, label=f"stochastic, {name}")
    axes[2].set(title="SDE", ylabel="error of the variance")
    for axis in axes:
        axis.set_xlabel("evaluations per sample")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print the table, and plot it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", default="", help="PNG file to write; default: none")
    picture = parser.parse_args().picture
    exact = solve(mixture_velocity, NOISE, SolverOptions("dopri5", atol=1e-12, rtol=1e-12)).x
    curves = point_errors(exact)
    stochastic = {name: variance_errors(name) for name in DIFFUSIONS}
    rows = []
    for name, curve in [*curves.items(), *((f"stochastic, {name}", curve) for name, curve in stochastic.items())]:
        adaptive = name in SOLVERS and SOLVERS[name].adaptive
        shown = [curve[TOLERANCES.index(t)] for t in (1e-3, 1e-5, 1e-7)] if adaptive else curve[1:6:2]
        cells = [f"{error:.1e} ({work:.0f})" for work, error in shown]
        rows.append([name, "" if adaptive else f"{measured_order(curve):.2f}", *cells])
    header = [
        "method",
        "measured order",
        *(f"N = {n} / tol {t}" for n, t in zip(STEPS[1:6:2], ("1e-3", "1e-5", "1e-7"), strict=True)),
    ]
    print(markdown_table(header, rows))
    print("\nErrors at 16 evaluations, by grid:\n")
    print(markdown_table(["method", *GRIDS, "shift 0.5", "shift 2"], errors_by_grid(exact)))
    if picture:
        draw_picture(curves, stochastic, picture)


if __name__ == "__main__":
    main()
