"""Alternating timings: noise that drifts over minutes hits all sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["compare", "markdown_table"]

TURN = 1.0  # seconds


def compare(sides: Mapping[str, Callable[[], object]], rounds: int = 7, settled: bool = False) -> dict[str, float]:
    """Median seconds of each side over `rounds` alternating rounds, after one warm-up call each.

    `settled`: in each of its turns a side runs for a second, at least twice, and the first call is left out, since it finds
    caches and freed memory as another side left them.
    """
    if not settled:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times = [_seconds(run)]
            while settled and (len(times) < 2 or sum(times) < TURN):
                times.append(_seconds(run))
            seconds[name] += times[settled:]
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
