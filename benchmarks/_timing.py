"""Alternating timings: noise that drifts over minutes hits all sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["compare", "markdown_table"]

TURN = 1.0  # seconds


def compare(sides: Mapping[str, Callable[[], object]], rounds: int = 7, settled: bool = False) -> dict[str, float]:
    """Median seconds of each side over `rounds` alternating rounds.

    A side runs once in its turn, after one warm-up call each at the start. `settled`: it runs for a second, at least twice, and
    of all calls but the first, which finds caches and freed memory as another side left them, the median counts.
    """
    if not settled:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(_settled_seconds(run) if settled else _seconds(run))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _settled_seconds(run: Callable[[], object]) -> float:
    times = [_seconds(run), _seconds(run)]
    while sum(times) < TURN:
        times.append(_seconds(run))
    return statistics.median(times[1:])


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
