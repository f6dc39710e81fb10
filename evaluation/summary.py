"""Summaries of image sets: the inputs of all metrics, gathered in one pass over the images.

Images are not stored. The memory for D features depends on the metrics:

- The mean and covariance take 8 D^2 bytes (34 MB for 2048 features) for any number of images.
- Metrics that compare individual images need each image's features, 4 D bytes (8 KB, so 410 MB for 50,000 images).
- The Inception Score stores logits (4 KB per image).

A grouped gatherer assigns images to eight groups by index, so that metrics can also be computed on halves of the set (see
`evaluation.metrics.error_bars`). This takes eight times the memory for means and covariances.
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
from runtime.finite import describe_not_finite, finite_rows

__all__ = ["GROUPS", "NEEDS", "Gatherer", "Share", "Summary", "center_of"]

GROUPS = 8
# Inputs of metrics, each with the network output that provides it. "moments" and "spatial" are means and covariances; "rows"
# and "logits" have one row per image.
NEEDS = {"moments": "features", "spatial": "spatial", "rows": "features", "logits": "logits"}
CHUNK = 1000  # rows
HASH_MULTIPLIER = 0x9E3779B1  # 2^32 / golden ratio; spreads images evenly over the groups for any order of the classes


@dataclass(frozen=True, eq=False)
class Summary:
    """Summary of an image set or of a subset. Inputs that no metric needs are None.

    Attributes:
        count: number of images, or None if not recorded.
        meta: JSON-serializable description of the images and the feature network.
        device: where metrics may process rows.
        statistics: mean and covariance of the features.
        spatial: mean and covariance of the spatial features.
        rows: features of individual images, float32 [n, D], ordered by image index.
        logits: logits of individual images, float32 [n, K], ordered by image index.
    """

    count: int | None
    meta: dict[str, Any]
    device: torch.device | str = "cpu"
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    @property
    def known_count(self) -> int | None:
        """Number of images or, if it is not recorded, of the rows; None if there are none either."""
        return len(self.rows) if self.count is None and self.rows is not None else self.count

    def sha256(self) -> str:
        """Hash of the statistics and the rows."""
        digest = hashlib.sha256()
        for known in (self.statistics, self.spatial):
            if known is not None:
                digest.update(known.mean.tobytes())
                digest.update(np.ascontiguousarray(known.covariance).tobytes())
        if self.rows is not None:
            digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()


def center_of(rows: torch.Tensor) -> torch.Tensor:
    """The mean [D] of rows float32 [n, D], rounded to float32. Differences from it keep their digits far from zero."""
    sums = [part.double().sum(0) for part in rows.split(CHUNK)]
    return (torch.stack(sums).sum(0) / len(rows)).float()


class Share(NamedTuple):
    """The values gathered by one process, in picklable form."""

    counts: list[int]
    resolutions: set[tuple[int, int]]
    moments: dict[tuple[str, int], tuple[int, torch.Tensor, torch.Tensor]]
    rows: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]]


class Gatherer:
    """Gathers the inputs of metrics from batches of images.

    Args:
        features: the feature network.
        needs: keys of NEEDS.
        grouped: keep the eight groups separate, so that `summary` can select some of them.
        keep: indices of the images whose rows are stored. None: all.

    Raises:
        UsageError: the network lacks a needed output. `update` raises it for features that are not finite.
    """

    def __init__(
        self, features: FeatureNetwork, needs: Iterable[str], *, grouped: bool = False, keep: torch.Tensor | None = None
    ) -> None:
        self._counts = [0] * GROUPS
        self._features, self._needs = features, frozenset(needs)
        self._outputs = frozenset(NEEDS[need] for need in self._needs)
        if missing := self._outputs - features.outputs.keys():
            raise UsageError(
                f"the feature network {features.name} has no output {' or '.join(sorted(missing))}, which some --metrics "
                "need: use --features inception with --dims 2048, or drop those metrics"
            )
        self._grouped, self._keep = grouped, keep
        self._moments: dict[tuple[str, int], RunningMoments] = {}
        self._rows: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}  # (indices, values)
        self._resolutions: set[tuple[int, int]] = set()

    @property
    def count(self) -> int:
        """Number of images added so far."""
        return sum(self._counts)

    def update(self, images: torch.Tensor, indices: Sequence[int] | None = None) -> None:
        """Add images uint8 [B, C, H, W]. `indices` are their indices in the set; None: the next ones."""
        numbers = torch.arange(self.count, self.count + len(images)) if indices is None else torch.tensor([*indices])
        self._resolutions.add((images.shape[2], images.shape[3]))
        outputs = {name: value.cpu() for name, value in self._features(images, self._outputs).items()}
        self._check_finite(outputs, numbers)
        groups = _group_of(numbers) if self._grouped else torch.zeros_like(numbers)
        for group in groups.unique().tolist():
            chosen = groups == group
            self._counts[group] += int(chosen.sum())
            for need in self._needs:
                self._add((need, group), outputs[NEEDS[need]][chosen], numbers[chosen])

    def merge_all(self, processes: Processes) -> None:
        """Merge the values of all processes in the main process."""
        for share in processes.gather(self.share())[1:]:
            self.merge(share)

    def share(self) -> "Share":
        """Return all values gathered so far, for `merge` in another process."""
        moments = {key: known.triple() for key, known in self._moments.items()}
        return Share(self._counts, self._resolutions, moments, self._rows)

    def merge(self, share: "Share") -> None:
        """Add the values of another gatherer with the same needs, for other images of the same set."""
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, share.counts, strict=True)]
        self._resolutions |= share.resolutions
        for key, triple in share.moments.items():
            theirs = RunningMoments.of(*triple)
            self._moments.setdefault(key, RunningMoments(theirs.dims)).merge(theirs)
        for key, parts in share.rows.items():
            self._rows.setdefault(key, []).extend(parts)

    def summary(self, meta: dict[str, Any] | None = None, groups: Sequence[int] = range(GROUPS)) -> Summary:
        """Summarize all images so far, or those in `groups`. `meta` is a JSON-serializable description of their origin."""
        resolution = list(next(iter(self._resolutions))) if len(self._resolutions) == 1 else "mixed"
        meta = {**(meta or {}), "resolution": resolution, "features": describe_features(self._features)}
        return Summary(
            sum(self._counts[group] for group in groups),
            meta,
            self._features.device,
            self._merge_statistics("moments", groups, meta),
            self._merge_statistics("spatial", groups, meta),
            self._concatenate_rows("rows", groups),
            self._concatenate_rows("logits", groups),
        )

    def _check_finite(self, outputs: dict[str, torch.Tensor], numbers: torch.Tensor) -> None:
        for name, values in outputs.items():
            if not (finite := finite_rows(values)).all():
                found = describe_not_finite(f"images have {name} that", numbers[~finite].tolist(), len(finite))
                raise UsageError(
                    f"in one batch, {found}; check the weights of the feature network {self._features.name}, or use "
                    "--feature_precision fp32"
                )

    def _add(self, key: tuple[str, int], values: torch.Tensor, numbers: torch.Tensor) -> None:
        if key[0] in ("moments", "spatial"):
            self._moments.setdefault(key, RunningMoments(values.shape[1])).update(values)
            return
        if key[0] == "rows" and self._keep is not None:
            kept = torch.isin(numbers, self._keep)
            values, numbers = values[kept], numbers[kept]
        self._rows.setdefault(key, []).append((numbers, values))

    def _merge_statistics(self, need: str, groups: Sequence[int], meta: dict[str, Any]) -> Statistics | None:
        parts = [self._moments[need, group] for group in groups if (need, group) in self._moments]
        if not parts:
            return None
        total = RunningMoments(parts[0].dims)
        for part in parts:
            total.merge(part)
        return total.statistics(meta)

    def _concatenate_rows(self, need: str, groups: Sequence[int]) -> torch.Tensor | None:
        parts = [part for group in groups for part in self._rows.get((need, group), [])]
        if not parts:
            return None
        numbers, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return values[numbers.argsort()]


def _group_of(numbers: torch.Tensor) -> torch.Tensor:
    """Map indices [B] to groups 0..7, the top three bits of a multiplicative hash (Knuth, section 6.4)."""
    return (numbers * HASH_MULTIPLIER % 2**32) >> 29
