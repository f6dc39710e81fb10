"""Work in a thread that a request watches: it can look at the state so far, stop the work, and is limited in time."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch

from flow.guidance import VelocityNetwork
from options import UsageError
from sampling.sampler import Sampler

__all__ = ["Watch", "Watched"]

T = TypeVar("T")

LOOK_EVERY = 0.15  # seconds between two looks at the state


class Watch:
    """Counts the velocity evaluations of one request, and ends it after `seconds` or when it is stopped."""

    def __init__(self, seconds: float) -> None:
        self.evaluations = 0
        self._seconds, self._start = seconds, time.monotonic()
        self._stopped = False

    @property
    def elapsed(self) -> float:
        """Seconds since the request began."""
        return time.monotonic() - self._start

    def watched(self, sampler: Sampler) -> Sampler:
        """The sampler, with a network that this watch counts and ends."""
        network = cast(VelocityNetwork, sampler.network)
        return replace(sampler, network=VelocityNetwork(partial(self._evaluate, network.network), network.read))

    def stop(self) -> None:
        """Make the next evaluation raise an error."""
        self._stopped = True

    def describe(self) -> str:
        """The evaluations and seconds so far."""
        plural = "" if self.evaluations == 1 else "s"
        return f"{self.evaluations} evaluation{plural} of the velocity, {self.elapsed:.1f} s"

    def _evaluate(self, network: Callable[..., Any], *arguments: Any, **others: Any) -> Any:
        if self._stopped:
            raise UsageError("stopped")
        if self.elapsed >= self._seconds:
            raise UsageError(
                f"this took longer than {self._seconds:g} seconds (--max_seconds): choose fewer steps or samples"
            )
        self.evaluations += 1
        return network(*arguments, **others)


class Watched(Generic[T]):
    """Work in a thread. Iterating yields while it runs, and `result` is then its result.

    If the iteration ends early, the work is stopped at its next evaluation.

    Args:
        executor: runs the work.
        watch: ends it.
        work: a function without arguments.
    """

    def __init__(self, executor: ThreadPoolExecutor, watch: Watch, work: Callable[[], T]) -> None:
        self._watch = watch
        self._future: Future[T] = executor.submit(torch.no_grad()(work))

    def __iter__(self) -> Iterator[None]:
        try:
            while not self._future.done():
                wait([self._future], LOOK_EVERY)
                if not self._future.done():
                    yield
        finally:
            self._watch.stop()
            wait([self._future])

    @property
    def result(self) -> T:
        """The work's result.

        Raises:
            UsageError: the work's errors, or it took too long.
        """
        return self._future.result()
