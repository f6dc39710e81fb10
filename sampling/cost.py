"""The cost of sampling: network evaluations per sample, and seconds per network evaluation and per batch of images."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flow.solvers import solve
from options import option
from runtime.finite import finite_rows, require_finite
from runtime.messages import labeled
from runtime.progress import progress_bar
from sampling.labels import choose_labels
from sampling.loading import LoadedSampler
from sampling.request import SamplingOptions
from sampling.results import write_result
from sampling.sampler import Sampler, generate
from sampling.tally import describe_evaluations

__all__ = ["TimingOptions", "count_evaluations", "measure_time"]


@dataclass(frozen=True)
class TimingOptions:
    """Timing (--measure_time)."""

    time_batch_sizes: tuple[int, ...] = option((1, 8, 64), "batch sizes to time", minimum=1)
    time_repeats: int = option(7, "timed runs per batch size, after one warmup run", minimum=1)


def count_evaluations(loaded: LoadedSampler, sampling: SamplingOptions) -> dict[str, Any]:
    """Count the evaluations for `sampling.n_sample` samples, without decoding them. Writes the result as JSON.

    Raises:
        UsageError: more than a few samples are not finite.
    """
    sampler, count = loaded.sampler, sampling.n_sample
    labels = choose_labels(sampling.labels, sampler.seed, sampler.num_classes, count)
    evaluations, network_evaluations, finite = [], [], []
    for start in progress_bar(range(0, count, sampling.batch_size), desc="counting", unit="batch"):
        indices = range(start, min(start + sampling.batch_size, count))
        velocity = sampler.velocity(labels(indices, sampler.num_classes))
        solution = solve(velocity, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices))
        finite.append(finite_rows(solution.x).cpu())
        evaluations.append(solution.evaluations.cpu())
        network_evaluations.append(velocity.evaluations(len(indices)))
    require_finite(torch.cat(finite), "samples")
    counts = describe_evaluations(torch.cat(evaluations), torch.cat(network_evaluations))
    result = {**loaded.describe(), "samples": count, **counts}
    result["summary"] = labeled(
        "NFE",
        f"{counts['nfe']:g} on average of {count} samples, {counts['nfe_range'][0]} to {counts['nfe_range'][1]}; the "
        f"network runs {counts['network_evaluations']:g} times per sample",
    )
    default = loaded.output_folder(sampling.output_dir) / f"{loaded.stem}_nfe.json"
    write_result(sampling.output_json, default, result)
    return result


def measure_time(loaded: LoadedSampler, sampling: SamplingOptions, timing: TimingOptions) -> dict[str, Any]:
    """Time a network evaluation, and sampling with decoding, for each batch size. Writes the result as JSON."""
    sampler = loaded.sampler
    rows: list[dict[str, Any]] = []
    for batch_size in timing.time_batch_sizes:
        calls = {"network": _network_call(sampler, batch_size), "pipeline": _pipeline_call(sampler, batch_size)}
        measured: dict[str, Any] = {
            name: _time(call, timing.time_repeats, sampler.machine.device) for name, call in calls.items()
        }
        rows.append({"batch_size": batch_size, **measured})
    result: dict[str, Any] = {**loaded.describe(), "device": str(sampler.machine.device), "timing": rows}
    result["summary"] = "\n".join(
        labeled("time", f"batch of {row['batch_size']}: {_spread(row, 'network')}, {_spread(row, 'pipeline')}")
        for row in rows
    )
    default = loaded.output_folder(sampling.output_dir) / f"{loaded.stem}_time.json"
    write_result(sampling.output_json, default, result)
    return result


def _spread(row: dict[str, Any], what: str) -> str:
    times = row[what]
    return f"{what} {times['median_s']:.4f} s ({times['fastest_s']:.4f} to {times['slowest_s']:.4f})"


def _network_call(sampler: Sampler, batch_size: int) -> Callable[[], object]:
    """One evaluation of the guided velocity at pure noise."""
    x, t = sampler.noise(range(batch_size)), torch.ones((), device=sampler.machine.device)
    velocity = sampler.velocity(torch.zeros(batch_size, dtype=torch.long))
    return torch.no_grad()(lambda: velocity(t, x))


def _pipeline_call(sampler: Sampler, batch_size: int) -> Callable[[], object]:
    """Sampling and decoding of one batch of images."""
    return lambda: list(generate(sampler, range(batch_size), batch_size=batch_size))


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Median, fastest and slowest of `repeats` calls in seconds, after one warmup call."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    timed = seconds[1:]
    return {"median_s": statistics.median(timed), "fastest_s": min(timed), "slowest_s": max(timed)}


def _wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
