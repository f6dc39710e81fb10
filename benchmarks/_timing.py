"""Alternating timings: noise that drifts over minutes hits all sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["compare", "markdown_table"]


def compare(sides: Mapping[str, Callable[[], object]], rounds: int = 7, settled: bool = False) -> dict[str, float]:
    """Median seconds of each side over `rounds` alternating rounds, after one warm-up call each.

    `settled`: the warm-up call comes in every turn, so that a side finds caches and freed memory as it left them itself.
    """
    if not settled:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            if settled:
                run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
