"""Reading in a thread, one step ahead of training."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from runtime.precision import use_device

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(
    reader: Callable[[int], Callable[[], T]], first: int, last: int, device: torch.device
) -> Iterator[tuple[int, T]]:
    """Yield the steps first .. last - 1 with the result of `reader(step)()`, read in a thread during the previous step.

    With a latent cache, the thread only reads. Without one, it encodes images and so runs torch's parallel loops, which get a
    second set of OpenMP threads. Once there are more threads than processors, all of them sleep at the end of every loop,
    which also slows down the training step.
    """
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(device,)) as thread:
        upcoming: deque[Future[T]] = deque()
        for step in range(first, last):
            for ahead in range(step + len(upcoming), min(step + 2, last)):
                upcoming.append(thread.submit(reader(ahead)))
            yield step, upcoming.popleft().result()
