"""Summaries of image sets: all that the metrics need, gathered in one pass over the images.

Images are not kept. Moments take 8 D^2 bytes (34 MB for 2048 features) however many images there are; metrics that
compare single images keep the features, 4 D bytes an image (8 KB, so 410 MB for 50,000), and the Inception Score the logits
(4 KB an image).

A grouped gatherer deals images to eight groups by their index, so that a metric can also be computed on halves of the set
(see `evaluation.metrics.error_bars`). This takes eight times the memory for moments.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.statistics import RunningMoments, Statistics
from options import UsageError
from runtime.distributed import Processes

__all__ = ["GROUPS", "NEEDS", "Gatherer", "Share", "Summary"]

GROUPS = 8
NEEDS = {"moments": "features", "spatial": "spatial", "rows": "features", "logits": "logits"}  # to a network's output
GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: multiples of it fall evenly, whatever the classes' order


@dataclass(frozen=True, eq=False)
class Summary:
    """One image set, or a part of it; what was not asked for is None.

    `statistics` and `spatial` are moments of features, `rows` float32 [n, D] the features and `logits` float32 [n, K] the
    logits of single images, in the order of their indices. `device` is where rows may be compared.
    """

    count: int | None
    meta: dict[str, Any]
    device: torch.device | str = "cpu"
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def sha256(self) -> str:
        """Hash of all numbers."""
        digest = hashlib.sha256()
        for known in (self.statistics, self.spatial):
            if known is not None:
                digest.update(known.mean.tobytes())
                digest.update(np.ascontiguousarray(known.covariance).tobytes())
        if self.rows is not None:
            digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()


class Share(NamedTuple):
    """One process's gathered values, all picklable."""

    counts: list[int]
    resolutions: set[tuple[int, int]]
    moments: dict[tuple[str, int], tuple[int, torch.Tensor, torch.Tensor]]
    rows: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]]


class Gatherer:
    """Takes batches of images and keeps what the metrics need of them.

    Args:
        features: the feature network.
        needs: keys of NEEDS.
        grouped: whether `summary` will be called for some of the groups.
        keep: indices of the images whose rows are kept; None: all.

    Raises:
        UsageError: the network lacks an output that is needed.
    """

    def __init__(
        self, features: FeatureNetwork, needs: Iterable[str], *, grouped: bool = False, keep: torch.Tensor | None = None
    ) -> None:
        self._counts = [0] * GROUPS
        self._features, self._needs = features, frozenset(needs)
        self._outputs = frozenset(NEEDS[need] for need in self._needs)
        if missing := self._outputs - features.outputs.keys():
            raise UsageError(
                f"the features {features.name} have no {' or '.join(sorted(missing))}, which some of the --metrics need: "
                "use --features inception at --dims 2048, or leave those metrics out"
            )
        self._grouped, self._keep = grouped, keep
        self._moments: dict[tuple[str, int], RunningMoments] = {}
        self._rows: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}  # with the images' indices
        self._resolutions: set[tuple[int, int]] = set()

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(self._counts)

    def update(self, images: torch.Tensor, indices: Sequence[int] | None = None) -> None:
        """Add images uint8 [B, C, H, W], which have these `indices` in the set (default: the next ones)."""
        numbers = torch.arange(self.count, self.count + len(images)) if indices is None else torch.tensor([*indices])
        self._resolutions.add((images.shape[2], images.shape[3]))
        outputs = {name: value.cpu() for name, value in self._features(images, self._outputs).items()}
        groups = _group_of(numbers) if self._grouped else torch.zeros_like(numbers)
        for group in groups.unique().tolist():
            chosen = groups == group
            self._counts[group] += int(chosen.sum())
            for need in self._needs:
                self._add((need, group), outputs[NEEDS[need]][chosen], numbers[chosen])

    def merge_all(self, processes: Processes) -> None:
        """Collect in the main process what all processes gathered."""
        for share in processes.gather(self.share())[1:]:
            self.merge(share)

    def share(self) -> "Share":
        """All that was gathered so far, in a form that another process can `merge`."""
        moments = {key: known.triple() for key, known in self._moments.items()}
        return Share(self._counts, self._resolutions, moments, self._rows)

    def merge(self, share: "Share") -> None:
        """Add what a gatherer of other images of the same set, with the same needs, has gathered."""
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, share.counts, strict=True)]
        self._resolutions |= share.resolutions
        for key, triple in share.moments.items():
            theirs = RunningMoments.of(*triple)
            self._moments.setdefault(key, RunningMoments(theirs.dims)).merge(theirs)
        for key, parts in share.rows.items():
            self._rows.setdefault(key, []).extend(parts)

    def summary(self, meta: dict[str, Any] | None = None, groups: Sequence[int] = range(GROUPS)) -> Summary:
        """Summarise all images so far, or some `groups`; `meta` (JSON's types) says where they come from."""
        resolution = list(next(iter(self._resolutions))) if len(self._resolutions) == 1 else "mixed"
        meta = {**(meta or {}), "resolution": resolution, "features": describe_features(self._features)}
        return Summary(
            sum(self._counts[group] for group in groups),
            meta,
            self._features.device,
            self._merged("moments", groups, meta),
            self._merged("spatial", groups, meta),
            self._joined("rows", groups),
            self._joined("logits", groups),
        )

    def _add(self, key: tuple[str, int], values: torch.Tensor, numbers: torch.Tensor) -> None:
        if key[0] in ("moments", "spatial"):
            self._moments.setdefault(key, RunningMoments(values.shape[1])).update(values)
            return
        if key[0] == "rows" and self._keep is not None:
            kept = torch.isin(numbers, self._keep)
            values, numbers = values[kept], numbers[kept]
        self._rows.setdefault(key, []).append((numbers, values))

    def _merged(self, need: str, groups: Sequence[int], meta: dict[str, Any]) -> Statistics | None:
        parts = [self._moments[need, group] for group in groups if (need, group) in self._moments]
        if not parts:
            return None
        total = RunningMoments(parts[0].dims)
        for part in parts:
            total.merge(part)
        return total.statistics(meta)

    def _joined(self, need: str, groups: Sequence[int]) -> torch.Tensor | None:
        parts = [part for group in groups for part in self._rows.get((need, group), [])]
        if not parts:
            return None
        numbers, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return values[numbers.argsort()]


def _group_of(numbers: torch.Tensor) -> torch.Tensor:
    """The group 0..7 of every index [B]: three bits of a multiplicative hash (Knuth, section 6.4)."""
    return (numbers * GOLDEN % 2**32) >> 29
