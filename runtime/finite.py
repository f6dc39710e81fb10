"""Values that are not finite (NaN or infinity): counted, named by their index, and refused if they are more than a few.

A few samples that are not finite cause a warning. More than one, and more than 1 %, or all of them are an error.
"""

from collections.abc import Iterable, Sequence

import torch

from options import UsageError
from runtime.distributed import Processes
from runtime.messages import warn
from runtime.weights import list_names

__all__ = ["FiniteTally", "describe_not_finite", "finite_or_warn", "finite_rows", "require_finite"]

TOLERATED = 0.01  # share of all samples
SAMPLING_ADVICE = (
    "try --precision fp32 if they were computed in another precision; else check the checkpoint, because its training may "
    "have diverged"
)


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Which rows of `values` [B, ...] have no NaN or infinity, bool [B] on the same device."""
    return values.isfinite().flatten(1).all(1)


def describe_not_finite(what: str, indices: Sequence[int], total: int) -> str:
    """The sentence that names values that are not finite.

    Args:
        what: what the values are, such as "samples".
        indices: indices of those that are not finite.
        total: number of all values that were looked at.
    """
    return f"{len(indices)} of {total} {what} are not finite (NaN or infinity): index {list_names(map(str, indices))}"


class FiniteTally:
    """Counts the samples that are not finite.

    Args:
        total: number of samples that will be drawn, by all processes.
        what: what the samples are, for messages.
        advice: what to do about them.
    """

    def __init__(self, total: int, what: str = "samples", advice: str = SAMPLING_ADVICE) -> None:
        self._total, self._what, self._advice = total, what, advice
        self._seen = 0
        self._bad: list[int] = []

    def add(self, indices: Iterable[int], not_finite: Iterable[int]) -> None:
        """Count the samples `indices`; the ones in `not_finite` are not finite."""
        self._seen += len([*indices])
        self._bad += not_finite

    def gather(self, processes: Processes) -> "FiniteTally":
        """The counts of all processes, in every process, which must all call this."""
        whole = FiniteTally(self._total, self._what, self._advice)
        for seen, bad in processes.from_main(processes.gather((self._seen, self._bad))):
            whole._seen += seen
            whole._bad += bad
        whole._bad.sort()
        return whole

    @property
    def too_many(self) -> bool:
        """Whether more than one sample, and more than 1 % of all, or all samples so far are not finite."""
        bad = len(self._bad)
        most = max(1, int(TOLERATED * self._total))
        return bad > most or 0 < bad == self._seen >= min(2, self._total)

    def describe(self) -> str:
        """The warning about samples that are not finite; "" if there are none."""
        if not self._bad:
            return ""
        return f"{describe_not_finite(self._what, self._bad, self._seen)}; {self._advice}"

    def check(self) -> None:
        """Refuse more than a few samples that are not finite.

        Raises:
            UsageError: they are too many.
        """
        if self.too_many:
            raise UsageError(self.describe())


def finite_or_warn(tally: FiniteTally, what: str) -> bool:
    """Whether no more than a few samples are not finite. Any that are cause a warning, which begins with `what`."""
    if text := tally.describe():
        warn(f"{what}: {text}")
    return not tally.too_many


def require_finite(values: torch.Tensor, what: str, indices: Sequence[int] | None = None) -> torch.Tensor:
    """Print a warning about rows of `values` [B, ...] that are not finite. Returns which are finite, bool [B].

    Args:
        values: floating-point numbers, or for each row whether it is finite, bool [B].
        what: what the rows are, for messages.
        indices: their indices; None: 0 to B - 1.

    Raises:
        UsageError: more than a few rows are not finite.
    """
    good = values if values.dtype == torch.bool else finite_rows(values)
    names = range(len(good)) if indices is None else indices
    tally = FiniteTally(len(good), what)
    tally.add(names, [index for index, fine in zip(names, good.tolist(), strict=True) if not fine])
    tally.check()
    if text := tally.describe():
        warn(text)
    return good
