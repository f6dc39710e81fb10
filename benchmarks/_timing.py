"""What benchmarks share. Timings alternate: noise that drifts over minutes hits all sides alike."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, Protocol

__all__ = ["Comparison", "Side", "compare", "compare_apart", "markdown_table", "parse_no_options"]

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
            seconds[name].append(statistics.median(_times(run, TURN, least=2)[1:]) if settled else _seconds(run))
    return {name: statistics.median(times) for name, times in seconds.items()}


class Comparison(NamedTuple):
    """Of a side and the reference: median seconds of each, and the median over turns of how many times as fast the side was."""

    reference: float
    side: float
    times: float


class Side(Protocol):
    """Something whose calls are timed."""

    def __call__(self) -> object:
        """Do what is timed."""

    def results(self) -> dict[str, Sequence[float]]:
        """Vectors that two calls must have led to on every side."""


Maker = Callable[[], Side]


def compare_apart(
    reference: Maker, sides: Mapping[str, Maker], seconds: float, tolerances: Mapping[str, float]
) -> dict[str, Comparison]:
    """Compare one side after another with the reference: for some seconds, each takes a turn of a second.

    What is compared is made, by functions that can be pickled, in processes of their own, so that memory and the settings of
    its allocator are those of a program that does nothing else. A turn's first call counts only where it fills the turn.

    Raises:
        SystemExit: a side's results after two calls are not those of the reference.
    """
    results = {}
    with _process(reference) as base:
        expected = _warm_up(base)
        for name, make in sides.items():
            with _process(make) as process:
                require_agreement(name, _warm_up(process), expected, tolerances)
                turns, end = [], time.monotonic() + seconds
                while not turns or time.monotonic() < end:
                    turns.append([each.submit(_turn).result() for each in (base, process)])
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            results[name] = Comparison(*medians, statistics.median(slow / fast for slow, fast in turns))
    return results


def require_agreement(
    side: str,
    results: Mapping[str, Sequence[float]],
    expected: Mapping[str, Sequence[float]],
    tolerances: Mapping[str, float],
) -> None:
    """Raise SystemExit where a vector is further from the expected one than that share of its length."""
    for name, tolerance in tolerances.items():
        away = math.dist(results[name], expected[name]) / math.hypot(*expected[name])
        print(f"{side}: {name} {100 * away:.2g} % from the reference's", flush=True)
        if not away <= tolerance:
            raise SystemExit(f"error: {side}: its {name} must be within {100 * tolerance:g} % of the reference's")


def _process(make: Maker) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _make_side, (make,))


def _warm_up(process: ProcessPoolExecutor) -> dict[str, Sequence[float]]:
    """Results of two calls, after which memory is settled."""
    return process.submit(_first_results).result()


_side: Side  # of this process


def _make_side(make: Maker) -> None:
    global _side
    _side = make()


def _first_results() -> dict[str, Sequence[float]]:
    _side()
    _side()
    return _side.results()


def _turn() -> float:
    times = _times(_side, TURN)
    return statistics.median(times[1:] or times)


def _times(run: Callable[[], object], seconds: float, least: int = 1) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        times.append(_seconds(run))
    return times


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_no_options(documentation: str | None) -> None:
    """Refuse flags, and answer `--help` with a benchmark's own documentation."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=documentation, formatter_class=formatter).parse_args()
