"""What sampling costs: evaluations of each sample, and the time of a network's evaluation and of the whole pipeline."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flow.solvers import solve
from options import Options, option
from runtime.files import write_json
from runtime.progress import progress_bar
from sampling.sample_and_score import SamplingOptions, describe_evaluations, labels_of, output_folder
from sampling.sampler import Sampler, generate
from sampling.setup import open_sampler

__all__ = ["TimingOptions", "count_evaluations", "measure_time"]


@dataclass(frozen=True)
class TimingOptions:
    """Timing (--measure_time)."""

    time_batch_sizes: tuple[int, ...] = option((1, 8, 64), "batch sizes to time", minimum=1)
    time_repeats: int = option(7, "timed runs of each, after a warm-up", minimum=1)


def count_evaluations(options: Options) -> dict[str, Any]:
    """Evaluations that --n_sample samples take, without decoding or writing them."""
    sampling, opened = options[SamplingOptions], open_sampler(options)
    sampler, (labels, _) = opened.sampler, labels_of(sampling, opened.sampler)
    evaluations, network_evaluations = [], []
    for start in progress_bar(range(0, sampling.n_sample, sampling.batch_size), desc="counting", unit="batch"):
        indices = range(start, min(start + sampling.batch_size, sampling.n_sample))
        velocity = sampler.velocity(labels(indices, sampler.num_classes))
        solution = solve(velocity, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices))
        evaluations.append(solution.evaluations.cpu())
        network_evaluations.append(velocity.evaluations(len(indices)))
    counts = describe_evaluations(torch.cat(evaluations), torch.cat(network_evaluations))
    result = {**opened.result(), "samples": sampling.n_sample, **counts}
    result["summary"] = (
        f"{sampling.n_sample} samples: {counts['nfe']:g} evaluations on average, from {counts['nfe_range'][0]} to "
        f"{counts['nfe_range'][1]}; {counts['network_evaluations']:g} of networks"
    )
    write_json(sampling.output_json or output_folder(sampling, opened) / f"{opened.stem}_nfe.json", result)
    return result


def measure_time(options: Options) -> dict[str, Any]:
    """Seconds of one evaluation of the network, and of drawing and decoding a batch, for each batch size."""
    sampling, timing, opened = options[SamplingOptions], options[TimingOptions], open_sampler(options)
    rows: list[dict[str, Any]] = []
    for batch_size in timing.time_batch_sizes:
        network, pipeline = _network_call(opened.sampler, batch_size), _pipeline_call(opened.sampler, batch_size)
        measured: dict[str, Any] = {
            "network": _time(network, timing.time_repeats, opened.sampler.machine.device),
            "pipeline": _time(pipeline, timing.time_repeats, opened.sampler.machine.device),
        }
        rows.append({"batch_size": batch_size, **measured})
    result: dict[str, Any] = {**opened.result(), "device": str(opened.sampler.machine.device), "timing": rows}
    result["summary"] = "\n".join(
        f"batch of {row['batch_size']}: "
        + ", ".join(
            f"{what} {row[what]['median_s']:.4f} s ({row[what]['fastest_s']:.4f} to {row[what]['slowest_s']:.4f})"
            for what in ("network", "pipeline")
        )
        for row in rows
    )
    write_json(sampling.output_json or output_folder(sampling, opened) / f"{opened.stem}_time.json", result)
    return result


def _network_call(sampler: Sampler, batch_size: int) -> Callable[[], object]:
    """One evaluation of the velocity at pure noise, with its guidance."""
    x, t = sampler.noise(range(batch_size)), torch.ones((), device=sampler.machine.device)
    velocity = sampler.velocity(torch.zeros(batch_size, dtype=torch.long))
    return torch.no_grad()(lambda: velocity(t, x))


def _pipeline_call(sampler: Sampler, batch_size: int) -> Callable[[], object]:
    """From the seed to uint8 images."""
    return lambda: list(generate(sampler, range(batch_size), batch_size=batch_size))


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Median, fastest and slowest of `repeats` calls in seconds, after one to warm up."""
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
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
