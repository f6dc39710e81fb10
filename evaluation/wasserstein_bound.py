"""Evaluate LFM's bound of the Wasserstein-2 distance between images and samples, with every factor, next to measured distances.

    python -m evaluation.wasserstein_bound CHECKPOINT --datadir data

The bound is the autoencoder's error plus the decoder's Lipschitz constant times a bound of the latents' distance
(flow/bounds.py). All distances are Euclidean, of pixels in [-1, 1] without padding and of scaled latents. Data are the training
images, with their mirror images if training used them. The flow has no guidance, because a guided one aims at another
distribution, and samples get the labels of training images. Numbers from finitely many points are estimates; only the product
bound of the decoder is a certificate. docs/theory.md derives the bounds and explains the results.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets_prep.datasets import crop_padding
from evaluation.excess_loss import ExcessOptions, Mean, measure_errors, midpoints
from evaluation.trained_flow import Latents, TrainedFlow, measure_checkpoint
from evaluation.wasserstein import DISTANCE_LINES, Distance, available_distances, over_subsets
from exits import exit_cleanly
from flow.bounds import decoded_bound, flow_bound, lfm_bound, young_bound
from flow.guidance import GuidanceOptions, GuidedVelocity, Network
from flow.lipschitz import jacobian_norm, logarithmic_norm
from flow.ode import SolverOptions
from flow.solvers import solve
from models.autoencoders.pixels import images_to_pixels
from options import option
from runtime.messages import labeled, note
from runtime.plots import figure_file
from runtime.progress import progress_bar
from runtime.randomness import generator_for

__all__ = ["BoundOptions", "FlowRates", "describe", "measure_bound"]

SUBSETS = 4  # of the points of each measured distance
HIGHEST_BAR = 1e30


@dataclass(frozen=True)
class BoundOptions(ExcessOptions):
    """Wasserstein bound."""

    paths: int = option(
        64, "pairs of paths from the same noise, along which rates are estimated", minimum=2, maximum=10**6
    )
    lanczos_steps: int = option(8, "Lanczos steps of each norm", minimum=1, maximum=1000)
    samples: int = option(
        2000, "points of each measured distance, divided into four subsets", minimum=2 * SUBSETS, maximum=10**6
    )
    batch_size: int = option(250, "points per batch", minimum=1, maximum=10**6)


@dataclass(frozen=True)
class FlowRates:
    """Errors and rates along pairs of paths from the same noise. One follows the exact velocity, the other the network's.

    Args:
        errors: distance of both velocities at the exact path [T, P].
        rates: logarithmic norm of the network's velocity, the largest of three points between the paths [T, P].
        norms: norm of its Jacobian at the same point, which the logarithmic norm never exceeds [T, P].
        ends: the paths' ends, of the exact velocity and of the network's [2, P, c, h, w].
    """

    errors: torch.Tensor
    rates: torch.Tensor
    norms: torch.Tensor
    ends: torch.Tensor


def measure_bound(flow: TrainedFlow, options: BoundOptions) -> dict[str, Any]:
    """Compute the bounds, their factors, and measured distances.

    Raises:
        UsageError: the dataset holds latents without images.
    """
    flow.dataset.check_images("the Wasserstein bound")
    measures = available_distances()
    count = _pairs_of_images(flow, options.samples)
    exact = flow.exact()
    excess = measure_errors(flow, exact, flow.training, options).excess.mean(2)  # per dimension [T, P]
    dimensions = math.prod(flow.header.latent_shape)
    errors = (dimensions * excess.mean(1)).sqrt()
    latents = flow.draw(flow.training, options.paths, generator_for(options.seed, "paths"))
    along = _follow(flow, exact, latents, options)
    decoder = _decoder_norms(flow, along.ends, options)
    reconstruction = _reconstruction_error(flow, options)
    of_latents, of_pixels = _bounds(flow, errors, along, decoder["largest"], reconstruction)
    in_latents, in_pixels = _measured(flow, options, measures, count)
    return {
        "times": midpoints(options.times).tolist(),
        "points": options.points,
        "paths": options.paths,
        "lanczos_steps": options.lanczos_steps,
        "samples": count,
        "subsets": SUBSETS,
        "seed": options.seed,
        "reconstruction": reconstruction,
        "decoder": decoder,
        "velocity_lipschitz": along.norms.max().item(),
        "rates": {"largest": along.rates.amax(1).tolist(), "mean": along.rates.mean(1).tolist()},
        "norms": {"largest": along.norms.amax(1).tolist(), "mean": along.norms.mean(1).tolist()},
        "errors": errors.tolist(),
        "excess": {"by_time": excess.mean(1).tolist(), "value": excess.mean().item()},
        "latents": {"bounds": of_latents, "measured": in_latents},
        "pixels": {"bounds": of_pixels, "measured": in_pixels},
        "certificates": [] if decoder["product"] is None else ["decoder: product"],  # all other numbers are estimates
    }


def _bounds(
    flow: TrainedFlow, errors: torch.Tensor, along: FlowRates, decoder: float, reconstruction: float
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Bounds of W2 in latents and in pixels, by name; None for those too large for a float.

    Args:
        flow: the flow.
        errors: root mean square errors of the velocity [T].
        along: what was found along the paths.
        decoder: Lipschitz constant of the decoder.
        reconstruction: root mean square distance of images and reconstructions.
    """
    widths = torch.full((len(errors),), 1 / len(errors), dtype=torch.float64)
    largest, lipschitz = along.rates.amax(1), along.norms.max().item()
    # W2 between the latents and the end of the exact flow, where a share of noise is left.
    leftover = flow.header.path.sigma_min * math.sqrt(math.prod(flow.header.latent_shape))
    of_latents = {
        "lfm": lfm_bound(0.0, 1.0, errors, lipschitz, widths),
        "young": young_bound(errors, largest, widths).item() + leftover,
        "uniform": flow_bound(errors, largest, widths).item() + leftover,
        "along_paths": flow_bound(along.errors, along.rates, widths).square().mean().sqrt().item() + leftover,
        "coupling": _apart(*along.ends) + leftover,
    }
    of_pixels = {name: decoded_bound(reconstruction, decoder, bound) for name, bound in of_latents.items()}
    of_pixels["lfm"] = lfm_bound(reconstruction, decoder, errors, lipschitz, widths)
    with torch.no_grad():
        decoded = _apart(*(_decoded(flow, each) for each in along.ends))
    of_pixels["coupling"] = decoded_bound(reconstruction + decoded, decoder, leftover)
    in_latents, in_pixels = (
        {name: bound if math.isfinite(bound) else None for name, bound in bounds.items()}
        for bounds in (of_latents, of_pixels)
    )
    return in_latents, in_pixels


@torch.no_grad()
def _follow(flow: TrainedFlow, exact: Network, latents: Latents, options: BoundOptions) -> FlowRates:
    """Integrate both flows from the same noise by the midpoint rule, and look at each midpoint."""
    condition = flow.condition(latents.labels)
    generator = generator_for(options.seed, "directions")
    start = torch.randn(latents.noise.shape, generator=generator).to(latents.noise)
    z = other = latents.noise
    errors, rates, norms = [], [], []
    for time in progress_bar(midpoints(options.times).flip(0).tolist(), desc="paths", unit="time"):
        half = 0.5 / options.times
        early, middle = (torch.full((len(z),), at, device=z.device) for at in (time + half, time))
        at, beside = (x - half * velocity(early, x, condition) for velocity, x in ((exact, z), (flow.network, other)))
        best, predicted = exact(middle, at, condition), flow.network(middle, at, condition)
        velocity = partial(_with_condition, flow.network, middle, condition)
        between = [at + share * (beside - at) for share in (0.0, 0.5, 1.0)]
        grown = torch.stack([logarithmic_norm(velocity, x, start, options.lanczos_steps) for x in between])
        rate, steepest = grown.max(0)
        points = torch.stack(between)[steepest, torch.arange(len(z), device=z.device)]
        norm = jacobian_norm(velocity, points, start, options.lanczos_steps)
        errors.append((best - predicted).double().flatten(1).norm(dim=1))
        rates.append(rate)
        norms.append(torch.maximum(norm, rate))  # few Lanczos steps may leave the estimate below the rate
        z, other = z - 2 * half * best, other - 2 * half * flow.network(middle, beside, condition)
    of_velocities, of_paths, of_jacobians = (torch.stack(each[::-1]).cpu() for each in (errors, rates, norms))
    return FlowRates(of_velocities, of_paths, of_jacobians, torch.stack([z, other]))


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square distance of pairs of points [P, ...]."""
    return (first - second).double().flatten(1).norm(dim=1).square().mean().sqrt().item()


def _with_condition(network: Network, t: torch.Tensor, condition: Any, x: torch.Tensor) -> torch.Tensor:
    return network(t, x, condition)


def _decoder_norms(flow: TrainedFlow, ends: torch.Tensor, options: BoundOptions) -> dict[str, Any]:
    """Norms of the decoder's Jacobian, one point on the segment of each pair of ends, and the certified product."""
    share = torch.linspace(0, 1, ends.shape[1], device=ends.device).view(-1, 1, 1, 1)
    latents = torch.lerp(ends[0], ends[1], share)
    generator = generator_for(options.seed, "decoder")
    start = torch.randn(latents.shape, generator=generator).to(latents)
    norms = torch.cat(
        [
            jacobian_norm(partial(_decoded, flow), part, direction, options.lanczos_steps)
            for part, direction in zip(latents.split(16), start.split(16), strict=True)
        ]
    )
    product = flow.autoencoder.lipschitz_bound(flow.header.latent_size)
    certified = None if product is None or math.isinf(product) else product
    return {"largest": norms.max().item(), "mean": norms.mean().item(), "product": certified}


def _decoded(flow: TrainedFlow, latents: torch.Tensor) -> torch.Tensor:
    return crop_padding(flow.autoencoder.decode(latents), flow.header.dataset)


@torch.no_grad()
def _reconstruction_error(flow: TrainedFlow, options: BoundOptions) -> float:
    """Root mean square distance of training images and decoded posterior samples."""
    latents = flow.draw(flow.training, options.samples, generator_for(options.seed, "reconstruction"))
    total = 0.0
    for part in zip(*(each.split(options.batch_size) for each in latents), strict=True):
        batch = Latents(*part)
        total += (_decoded(flow, batch.data) - _images(flow, batch).to(batch.data)).double().square().sum().item()
    return math.sqrt(total / len(latents.data))


def _images(flow: TrainedFlow, latents: Latents) -> torch.Tensor:
    """Pixels in [-1, 1] of the latents' images or mirror images, without padding."""
    images = torch.stack([flow.dataset[index] for index in latents.indices.tolist()])
    images = torch.where(latents.mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return crop_padding(images_to_pixels(images), flow.header.dataset)


@torch.no_grad()
def _measured(
    flow: TrainedFlow, options: BoundOptions, measures: dict[str, Distance], count: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances of samples, and of other training images, from `count` training images, in latents and in pixels."""
    both = flow.draw(flow.training, 2 * count, generator_for(options.seed, "measured"))
    first, second = (Latents(*(each[part] for each in both)) for part in (slice(count), slice(count, None)))
    batches = zip(first.noise.split(options.batch_size), first.labels.split(options.batch_size), strict=True)
    samples = torch.cat([_sample(flow, noise, labels, options.times) for noise, labels in batches])
    decoded = torch.cat([_decoded(flow, part).clamp(-1, 1).cpu() for part in samples.split(options.batch_size)])
    latents = (first.data, samples, second.data)
    pixels = (_images(flow, first), decoded, _images(flow, second))
    in_latents, in_pixels = (
        _distances(measures, *(each.flatten(1).cpu() for each in points)) for points in (latents, pixels)
    )
    return in_latents, in_pixels


def _sample(flow: TrainedFlow, noise: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples of the network's flow without guidance, by the midpoint rule."""
    condition = flow.condition(labels)
    velocity = GuidedVelocity(flow.network, condition, condition, GuidanceOptions())
    return solve(velocity, noise, SolverOptions(method="midpoint", num_steps=steps)).x


def _distances(
    measures: dict[str, Distance], real: torch.Tensor, samples: torch.Tensor, other: torch.Tensor
) -> dict[str, Any]:
    """Distances of samples from real points, and of other real points from them, which shows the bias of finite sets."""
    return {
        name: {
            role: Mean(*over_subsets(measure, real, points, SUBSETS))._asdict()
            for role, points in (("samples", samples), ("real", other))
        }
        for name, measure in measures.items()
    }


def _pairs_of_images(flow: TrainedFlow, wanted: int) -> int:
    """The number of pairs of different training images to measure distances with; a note says if they are too few."""
    count = min(wanted, max(SUBSETS, len(flow.training) // 2))
    if count < wanted:
        note(f"--samples {wanted}: {len(flow.training)} images give only {count} pairs of different images")
    return count


BOUND_LINES = {
    "lfm": "LFM's form",
    "young": "logarithmic norms, Young",
    "uniform": "logarithmic norms",
    "along_paths": "along paths",
    "coupling": "distance of paired paths",
}


def describe(result: dict[str, Any]) -> str:
    """The result in labeled lines."""
    decoder = result["decoder"]
    product = "none" if decoder["product"] is None else f"10^{math.log10(decoder['product']):.1f}"
    lines = [
        labeled("autoencoder", f"error {result['reconstruction']:.3f} (estimate)"),
        labeled(
            "decoder",
            f"Lipschitz constant {decoder['largest']:.3f} (estimate; mean {decoder['mean']:.3f}); certificate: {product}",
        ),
        labeled("velocity", f"Lipschitz constant {result['velocity_lipschitz']:.2f} (estimate)"),
    ]
    sets = f"{result['subsets']} pairs of sets of {result['samples'] // result['subsets']}"
    for space in ("latents", "pixels"):
        lines.append(labeled(space, "bounds of W2 (estimates):"))
        for name, text in BOUND_LINES.items():
            bound = result[space]["bounds"][name]
            lines.append(labeled("", f"{text}: {'too large for a float' if bound is None else f'{bound:.4g}'}"))
        lines.append(labeled("", f"measured distances (mean of {sets}, too large):"))
        for name, values in result[space]["measured"].items():
            samples, real = (Mean(**values[role]) for role in ("samples", "real"))
            lines.append(labeled("", f"{DISTANCE_LINES[name]}: {samples}; of other images: {real}"))
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot errors and rates along t, and all bounds and distances."""
    times = result["times"]
    with figure_file(path, columns=3) as (left, middle, right):
        left.plot(times, result["errors"], marker=".")
        left.set(title="error of the velocity, e(t)", xlabel="t (0: data, 1: noise)")
        for key, name in (("norms", "norm of the Jacobian"), ("rates", "logarithmic norm")):
            for statistic, style in (("largest", "-"), ("mean", ":")):
                middle.plot(times, result[key][statistic], style, label=f"{name}, {statistic}")
        middle.set(title="spreading of the network's flow", xlabel="t (0: data, 1: noise)")
        middle.legend()
        bars = {text: result["pixels"]["bounds"][name] for name, text in BOUND_LINES.items()}
        measured = result["pixels"]["measured"]
        bars |= {f"measured, {DISTANCE_LINES[name]}": each["samples"]["value"] for name, each in measured.items()}
        lengths = [min(HIGHEST_BAR if value is None else value, HIGHEST_BAR) for value in bars.values()]
        right.barh(list(bars)[::-1], lengths[::-1])
        right.set(title="W2 in pixels: bounds (estimates) and distances", xscale="log")
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)


def main() -> None:
    """Evaluate the bound for a checkpoint, print it, and write JSON and plot."""
    measure_checkpoint(str(__doc__), BoundOptions, "bound", measure_bound, describe, plot)


if __name__ == "__main__":
    exit_cleanly(main)
