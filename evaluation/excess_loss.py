"""Measure how much of a checkpoint's flow matching loss could be learned, and where along t it lies.

    python -m evaluation.excess_loss CHECKPOINT --datadir data

The loss is the irreducible loss of the exact velocity v* (flow/empirical.py) plus the excess E |v - v*|^2 of the network's
velocity v, both per dimension and averaged over uniform times. A network that memorizes its training images has no excess. On
held-out images, the network is compared with v* itself and with v* of a kernel density estimate. docs/theory.md explains the
results.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets_prep.moments import MomentSource
from evaluation.trained_flow import Latents, TrainedFlow, measure_checkpoint
from exits import exit_cleanly
from flow.guidance import Network
from flow.paths import straight_path
from options import option
from runtime.messages import labeled
from runtime.plots import figure_file
from runtime.progress import progress_bar
from runtime.randomness import generator_for

__all__ = ["Errors", "ExcessOptions", "Mean", "choose_bandwidth", "measure_errors", "measure_excess", "midpoints"]

BANDWIDTHS = [2.0 ** (power / 2) for power in range(-14, 3)]  # 0.008 to 2, in units of the latents' standard deviation


@dataclass(frozen=True)
class ExcessOptions:
    """Excess loss."""

    times: int = option(32, "number of times, at the midpoints of equal intervals of [0, 1]", minimum=1, maximum=10**5)
    points: int = option(256, "images per time, with new noise for each time", minimum=2, maximum=10**6)
    seed: int = option(0, "seed of images and noise", minimum=0)
    output_dir: str = option("", "folder of the JSON file and the plot; default: samples/ next to the checkpoint")


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


class Errors(NamedTuple):
    """Mean squared errors over positions, by time, point and channel, float64 [T, P, C].

    Args:
        loss: of the network's velocity from the path's.
        irreducible: of the exact velocity from the path's.
        excess: of the network's velocity from the exact one.
        labels: class ids of the points' images in the dataset [T, P].
    """

    loss: torch.Tensor
    irreducible: torch.Tensor
    excess: torch.Tensor
    labels: torch.Tensor


def midpoints(count: int) -> torch.Tensor:
    """Midpoints of `count` equal intervals of [0, 1], float64 [count]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@torch.no_grad()
def measure_errors(
    flow: TrainedFlow, exact: Network, source: MomentSource, options: ExcessOptions, conditional: bool = True
) -> Errors:
    """Compare the network's velocity with the exact one at points on the path of a source's images.

    Args:
        flow: the network.
        exact: the exact velocity.
        source: images whose latents are the data.
        options: numbers of times and points, and the seed.
        conditional: whether velocities get the images' labels instead of the null class.
    """
    collected: list[tuple[torch.Tensor, ...]] = []
    for number, time in enumerate(progress_bar(midpoints(options.times).tolist(), desc="excess loss", unit="time")):
        latents = flow.draw(source, options.points, generator_for(options.seed, "excess", number))
        labels = latents.labels if conditional else torch.full_like(latents.labels, flow.header.num_classes)
        times = torch.full((len(labels),), time, device=labels.device)
        x_t, target = straight_path(times, latents.data, latents.noise, flow.header.path.sigma_min)
        predicted, best = (network(times, x_t, flow.condition(labels)).double() for network in (flow.network, exact))
        errors = (predicted - target, best - target, predicted - best)
        collected.append((*(error.square().mean((2, 3)).cpu() for error in errors), source.labels[latents.indices]))
    return Errors(*(torch.stack(each) for each in zip(*collected, strict=True)))


def choose_bandwidth(flow: TrainedFlow, points: Latents) -> float:
    """The bandwidth of BANDWIDTHS at which the kernel density estimate gives held-out points the highest likelihood."""
    start = torch.zeros((), device=points.data.device)
    condition = flow.condition(points.labels)
    likelihoods = [
        flow.exact(bandwidth).log_density(start, points.data, condition).mean().item()
        for bandwidth in progress_bar(BANDWIDTHS, desc="bandwidth", unit="bandwidth")
    ]
    return BANDWIDTHS[likelihoods.index(max(likelihoods))]


def measure_excess(flow: TrainedFlow, options: ExcessOptions) -> dict[str, Any]:
    """Measure losses, irreducible losses and excesses by time, class and channel, on training and held-out images."""
    exact = flow.exact()
    result: dict[str, Any] = {
        "times": midpoints(options.times).tolist(),
        "points": options.points,
        "seed": options.seed,
    }
    errors = measure_errors(flow, exact, flow.training, options)
    result["training"] = _summarize(errors, flow.header.dataset.class_names)
    if flow.header.drops_labels:
        without = measure_errors(flow, exact, flow.training, options, conditional=False)
        result["training_without_labels"] = _summarize(without, ())
    bandwidth = choose_bandwidth(
        flow, flow.draw(flow.held_out, options.points, generator_for(options.seed, "bandwidth"))
    )
    memorized = measure_errors(flow, exact, flow.held_out, options)
    smoothed = measure_errors(flow, flow.exact(bandwidth), flow.held_out, options)
    result["held_out"] = {
        "bandwidth": bandwidth,
        "network": _by_time(memorized.loss),
        "exact": _by_time(memorized.irreducible),
        "smoothed": _by_time(smoothed.irreducible),
        "distance_from_smoothed": _by_time(smoothed.excess),
    }
    return result


def _summarize(errors: Errors, class_names: tuple[str, ...]) -> dict[str, Any]:
    parts: dict[str, torch.Tensor] = {"loss": errors.loss, "irreducible": errors.irreducible, "excess": errors.excess}
    channels = [_mean(errors.excess[..., [channel]])._asdict() for channel in range(errors.excess.shape[2])]
    classes = {}
    for label, name in enumerate(class_names):
        chosen = errors.excess.mean(2)[errors.labels == label]
        if len(chosen) > 1:
            classes[name] = Mean(chosen.mean().item(), chosen.std().item() / math.sqrt(len(chosen)))._asdict()
    return {**{name: _by_time(part) for name, part in parts.items()}, "by_channel": channels, "by_class": classes}


def _mean(errors: torch.Tensor) -> Mean:
    """The mean of [T, P, C], with the standard error for fixed times and random points."""
    points = errors.mean(2)
    variance = points.var(1) / points.shape[1]  # of each time's mean
    return Mean(points.mean().item(), (variance.sum().sqrt() / len(points)).item())


def _by_time(errors: torch.Tensor) -> dict[str, Any]:
    points = errors.mean(2)
    at_times = (points.std(1) / math.sqrt(points.shape[1])).tolist()
    return {**_mean(errors)._asdict(), "by_time": points.mean(1).tolist(), "errors_by_time": at_times}


def describe(result: dict[str, Any]) -> str:
    """The result in a few labeled lines."""
    training, held_out = result["training"], result["held_out"]
    loss, irreducible, excess = (
        Mean(training[name]["value"], training[name]["error"]) for name in ("loss", "irreducible", "excess")
    )
    highest = max(zip(training["excess"]["by_time"], result["times"], strict=True))
    lines = [
        labeled("excess", f"{excess} of the loss {loss}; irreducible loss: {irreducible} (per dimension, uniform t)"),
        labeled("", f"largest at t = {highest[1]:.3f}: {highest[0]:.4f}"),
    ]
    if without := result.get("training_without_labels"):
        null = Mean(without["excess"]["value"], without["excess"]["error"])
        lines.append(labeled("no labels", f"excess {null}, given the null class"))
    if classes := training["by_class"]:
        order = sorted(classes, key=lambda name: classes[name]["value"])
        least, most = (f"{name} {classes[name]['value']:.4f}" for name in (order[0], order[-1]))
        lines.append(labeled("classes", f"smallest excess: {least}; largest: {most}"))
    values = (f"{name} {held_out[key]['value']:.4f}" for name, key in HELD_OUT_LINES.items())
    lines.append(labeled("held out", f"loss: {', '.join(values)} (bandwidth {held_out['bandwidth']:.3g})"))
    return "\n".join(lines)


HELD_OUT_LINES = {"network": "network", "exact velocity v*": "exact", "smoothed v*": "smoothed"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot loss, irreducible loss and excess of training images over t, and the losses of held-out images."""
    with figure_file(path, columns=2) as (left, right):
        for name, label in {
            "loss": "network's loss",
            "irreducible": "irreducible loss of v*",
            "excess": "excess",
        }.items():
            _draw(left, result["times"], result["training"][name], label)
        for label, key in HELD_OUT_LINES.items():
            _draw(right, result["times"], result["held_out"][key], label)
        left.set(
            title="training images", xlabel="t (0: data, 1: noise)", ylabel="squared error per dimension", yscale="log"
        )
        right.set(title="loss on held-out images", xlabel="t (0: data, 1: noise)", yscale="log")
        for axis in (left, right):
            axis.legend()
            axis.grid(alpha=0.3)


def _draw(axis: Any, times: list[float], curve: dict[str, Any], label: str) -> None:
    axis.errorbar(times, curve["by_time"], curve["errors_by_time"], marker=".", capsize=2, label=label)


def main() -> None:
    """Measure a checkpoint's excess loss, print it, and write JSON and plot."""
    measure_checkpoint(str(__doc__), ExcessOptions, "excess", measure_excess, describe, plot)


if __name__ == "__main__":
    exit_cleanly(main)
