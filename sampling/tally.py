"""Counts and images that are collected from a stream of samples."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from runtime.distributed import Processes
from runtime.finite import FiniteTally
from sampling.sampler import GeneratedBatch

__all__ = ["Tally", "count_finite", "describe_evaluations"]


class Tally:
    """Counts the evaluations and labels of a stream of batches, and keeps the batches with the first samples.

    Args:
        count: keep batches with samples below this index.
        num_classes: number of label values, including the null class if samples may have it.
        total: number of samples that all processes draw together.
    """

    def __init__(self, count: int, num_classes: int, total: int) -> None:
        self.batches: list[GeneratedBatch] = []
        self.label_counts = torch.zeros(num_classes, dtype=torch.long)
        self._count = count
        self._counts: list[torch.Tensor] = []
        self._finite = FiniteTally(total)

    def watch(self, batches: Iterable[GeneratedBatch]) -> Iterator[GeneratedBatch]:
        """Yield the batches unchanged, and count them.

        Raises:
            UsageError: more than a few samples are not finite.
        """
        for batch in count_finite(batches, self._finite):
            self._finite.check()
            self._counts.append(torch.stack([batch.evaluations, batch.network_evaluations]))
            self.label_counts += torch.bincount(batch.labels, minlength=len(self.label_counts))
            if min(batch.indices) < self._count:
                self.batches.append(batch)
            yield batch

    def counts(self, processes: Processes) -> torch.Tensor:
        """Velocity evaluations and network evaluations of all processes' samples, int64 [2, N]."""
        parts = [part for counts in processes.gather(self._counts) for part in counts]
        return processes.from_main(torch.cat(parts, dim=1) if parts else torch.empty(2, 0))

    def warnings(self, processes: Processes) -> list[str]:
        """Warnings about the samples of all processes: those that are not finite, if there are any.

        Raises:
            UsageError: they are more than a few.
        """
        whole = self._finite.gather(processes)
        whole.check()
        return [text] if (text := whole.describe()) else []


def count_finite(batches: Iterable[GeneratedBatch], tally: FiniteTally) -> Iterator[GeneratedBatch]:
    """Yield the batches unchanged, and count in `tally` the samples that are not finite."""
    for batch in batches:
        tally.add(batch.indices, batch.not_finite)
        yield batch


def describe_evaluations(evaluations: torch.Tensor, network_evaluations: torch.Tensor) -> dict[str, Any]:
    """The entries of a result that describe the cost of its samples.

    Args:
        evaluations: velocity evaluations of each sample [N]; the entries are their mean, minimum and maximum.
        network_evaluations: network evaluations of each sample [N]; a guided velocity evaluation takes two.
    """
    return {
        "nfe": evaluations.double().mean().item(),
        "nfe_range": [int(evaluations.min()), int(evaluations.max())],
        "network_evaluations": network_evaluations.double().mean().item(),
    }
