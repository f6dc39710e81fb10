"""Timing and tables for the benchmarks. Variants alternate, so that slow drift of the machine affects all of them equally."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, Protocol

__all__ = ["Comparison", "Side", "compare", "compare_apart", "markdown_table", "parse_no_options", "processor_seconds"]

TURN_SECONDS = 1.0


def compare(sides: Mapping[str, Callable[[], object]], rounds: int = 7, settled: bool = False) -> dict[str, float]:
    """Median seconds per call of each variant over `rounds` alternating rounds.

    By default each variant is called once to warm up, then once per round. With `settled`, it is called for a second per
    round, at least twice. The first call of each turn is then ignored, because it finds caches and freed memory in the
    state that another variant left them in; the median of the other calls counts.
    """
    if not settled:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(
                statistics.median(_times(run, TURN_SECONDS, least=2)[1:]) if settled else _seconds(run)
            )
    return {name: statistics.median(times) for name, times in seconds.items()}


class Comparison(NamedTuple):
    """Result of comparing a variant with the reference.

    Attributes:
        reference: the reference's median seconds.
        side: the variant's median seconds.
        times: speedup, the median over turns.
    """

    reference: float
    side: float
    times: float


class Side(Protocol):
    """A callable to time."""

    def __call__(self) -> object:
        """Run the timed code once."""

    def results(self) -> dict[str, Sequence[float]]:
        """Vectors that must agree between variants after two calls."""


Maker = Callable[[], Side]


def compare_apart(
    reference: Maker, sides: Mapping[str, Maker], seconds: float, tolerances: Mapping[str, float]
) -> dict[str, Comparison]:
    """Compare each variant with the reference, alternating turns of a second for `seconds` per variant.

    Each variant is built in a separate process by a picklable function, so that variants share neither memory nor allocator
    settings. A turn's first call is ignored unless it is the only one.

    Raises:
        SystemExit: a variant's results after two calls differ from the reference's.
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
    """Raise SystemExit if a vector's distance from the expected vector, relative to its norm, exceeds the tolerance."""
    for name, tolerance in tolerances.items():
        difference = math.dist(results[name], expected[name]) / math.hypot(*expected[name])
        print(f"{side}: {name} differs by {100 * difference:.2g} % from the reference", flush=True)
        if not difference <= tolerance:
            raise SystemExit(f"error: {side}: {name} must be within {100 * tolerance:g} % of the reference")


def _process(make: Maker) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _make_side, (make,))


def _warm_up(process: ProcessPoolExecutor) -> dict[str, Sequence[float]]:
    """Call the variant twice, so that memory use settles, and return its results."""
    return process.submit(_first_results).result()


_side: Side  # the variant that this process times


def _make_side(make: Maker) -> None:
    global _side
    _side = make()


def _first_results() -> dict[str, Sequence[float]]:
    _side()
    _side()
    return _side.results()


def _turn() -> float:
    times = _times(_side, TURN_SECONDS)
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


def processor_seconds(run: Callable[[], object]) -> float:
    """Processor time of a call on all threads, which other programs disturb less than the time on the clock."""
    started = time.process_time()
    run()
    return time.process_time() - started


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_no_options(documentation: str | None) -> None:
    """Parse the command line of a benchmark without options: reject flags, print `documentation` for `--help`."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=documentation, formatter_class=formatter).parse_args()
