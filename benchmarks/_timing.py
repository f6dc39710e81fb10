"""Alternating timings: noise that drifts over minutes hits all sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

__all__ = ["compare", "compare_apart", "markdown_table"]

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
            seconds[name].append(_turn(run, unsettled=1) if settled else _seconds(run))
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare_apart(
    sides: Mapping[str, Callable[[], Callable[[], float]]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each side over alternating turns of a second, and what its very first call returned.

    Each side is made, by a function that can be pickled, in a process of its own, so that its memory and the allocator's
    settings are those of a program that does nothing else.
    """
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _make_side, (make,)))
            for name, make in sides.items()
        }
        first = {name: process.submit(_call_side).result() for name, process in processes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, process in processes.items():
                seconds[name].append(process.submit(_turn, _call_side).result())
    return {name: statistics.median(times) for name, times in seconds.items()}, first


_sides: list[Callable[[], float]] = []  # of this process: one


def _make_side(make: Callable[[], Callable[[], float]]) -> None:
    _sides.append(make())


def _call_side() -> float:
    return _sides[0]()


def _turn(run: Callable[[], object], unsettled: int = 0) -> float:
    """Median seconds of calls for TURN seconds, without the first `unsettled` ones."""
    times: list[float] = []
    while sum(times) < TURN or len(times) <= unsettled:
        times.append(_seconds(run))
    return statistics.median(times[unsettled:])


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
