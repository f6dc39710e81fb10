"""Alternating timings: noise that drifts over minutes hits all sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

__all__ = ["Comparison", "compare", "compare_apart", "markdown_table"]

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


class Comparison(NamedTuple):
    """Median seconds of a side and of the reference, in turns with it, and what the first call of each returned."""

    reference: float
    side: float
    first_of_reference: float
    first: float


Maker = Callable[[], Callable[[], float]]


def compare_apart(reference: Maker, sides: Mapping[str, Maker], seconds: float) -> dict[str, Comparison]:
    """Compare one side after another with the reference: for some seconds, at least twice, both take a turn of a second.

    What is compared is made, by functions that can be pickled, in processes of their own, so that memory and the settings of
    its allocator are those of a program that does nothing else.
    """
    results = {}
    with _process(reference) as base:
        first_of_reference = base.submit(_call_side).result()
        for name, make in sides.items():
            with _process(make) as process:
                first, _ = (process.submit(_call_side).result() for _ in range(2))  # memory settles after the second
                turns, end = [], time.monotonic() + seconds
                while time.monotonic() < end or len(turns) < 2:
                    turns.append([each.submit(_turn, _call_side).result() for each in (base, process)])
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            results[name] = Comparison(*medians, first_of_reference, first)
    return results


def _process(make: Maker) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _make_side, (make,))


_sides: list[Callable[[], float]] = []  # of this process: one


def _make_side(make: Maker) -> None:
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
