"""Timing on a device whose work runs ahead of the host, and the largest batch that fits into its memory."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.training_step import Case
from models.conditions import Condition
from training.data import Batch

__all__ = ["describe", "fitting", "moved", "peak", "release", "seconds_of", "wait"]


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    draws: Any = type(batch.draws)(*(column.to(device) for column in batch.draws))
    labels = None if batch.condition.labels is None else batch.condition.labels.to(device)
    return Batch(batch.data.to(device), batch.noise.to(device), draws, Condition(labels))


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> float:
    """Median seconds of a call, after three calls to warm up, over `seconds` and at least `least` turns of several calls.

    The host waits for the device only between turns, because in training it runs ahead of the device.
    """
    for _ in range(2):
        run()
    calls = max(1, round(seconds / 10 / _seconds_per_call(run, device, 1)))
    times: list[float] = []
    while len(times) < least or calls * sum(times) < seconds:
        times.append(_seconds_per_call(run, device, calls))
    return statistics.median(times)


def _seconds_per_call(run: Callable[[], object], device: torch.device, calls: int) -> float:
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - started) / calls


def peak(device: torch.device, side: int) -> float:
    """Peak FLOP/s: the fastest of several products of square bfloat16 matrices."""
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device, 0.2) for _ in range(5))


def fitting(
    case: Case, make: Callable[[Case], Callable[[], None]], device: torch.device
) -> tuple[Callable[[], None], int]:
    """The step with the largest batch that fits, and its batch size. The batch is halved until it does.

    The first step creates the optimizer's state after its peak, and CUDA graphs are recorded in the second step.
    """
    size, step = case.batch_size, None
    while True:
        release(device)
        try:
            step = make(case._replace(batch_size=size))
            for _ in range(3):
                step()
            wait(device)
            return step, size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        step = None  # frees its memory before the next attempt
        size //= 2


def release(device: torch.device) -> None:
    """Forget compiled code, return freed memory to the device, and measure peak memory from here on."""
    torch.compiler.reset()
    gc.collect()  # compiled networks refer to themselves
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def describe(device: torch.device) -> str:
    """The card, its memory, its driver and torch on one line."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
    facts = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    card = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"
    return f"{card}, driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}"
