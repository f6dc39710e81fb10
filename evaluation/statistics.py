"""Mean and covariance of features: accumulated over batches in float64, saved and loaded.

Batches are merged by the shifted update of Chan, Golub & LeVeque (1979). For n and m rows whose means differ by d, the merged
scatter matrix is S = S_n + S_m + d d^T n m / (n + m). This update never subtracts large numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from options import UsageError, as_json
from runtime.files import UNREADABLE, atomic_path
from runtime.finite import describe_not_finite
from runtime.unpickling import load_numpy_pickle

__all__ = [
    "RunningMoments",
    "Statistics",
    "load_statistics",
    "require_finite_features",
    "save_statistics",
]

BUFFERED = 1024  # rows


@dataclass(frozen=True)
class Statistics:
    """Statistics of the features of an image set.

    Attributes:
        mean: float64 [D].
        covariance: unbiased covariance, float64 [D, D].
        count: number of images, or None if not recorded.
        meta: JSON-serializable description of the images and the feature network.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    meta: dict[str, Any] = field(default_factory=dict)


class RunningMoments:
    """Mean and covariance of rows that arrive in batches, accumulated in float64 on the CPU.

    BUFFERED rows are processed at once, so that small batches cost no more than large ones.
    """

    def __init__(self, dims: int) -> None:
        self.dims = dims
        self._count = 0
        self._mean = torch.zeros(dims, dtype=torch.float64)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64)
        self._pending: list[torch.Tensor] = []
        self._pending_count = 0

    @classmethod
    def of(cls, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> "RunningMoments":
        """Rebuild the object from the values of `triple`, which may come from another process."""
        rebuilt = cls(len(mean))
        rebuilt._add(count, mean, scatter)
        return rebuilt

    @property
    def count(self) -> int:
        """Number of rows added so far."""
        return self._count + self._pending_count

    def update(self, features: torch.Tensor) -> None:
        """Add rows [B, dims]."""
        self._pending.append(features.detach().cpu())
        self._pending_count += len(features)
        if self._pending_count >= BUFFERED:
            self._flush()

    def merge(self, other: "RunningMoments") -> None:
        """Add all rows of `other`."""
        self._flush()
        self._add(*other.triple())

    def triple(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Count, mean float64 [dims] and scatter matrix float64 [dims, dims], to be sent to another process."""
        self._flush()
        return self._count, self._mean, self._scatter

    @property
    def mean(self) -> np.ndarray:
        """Mean float64 [dims]."""
        return self.triple()[1].numpy().copy()

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance float64 [dims, dims] (divisor count - 1).

        Raises:
            UsageError: fewer than two rows.
        """
        count, _, scatter = self.triple()
        if count < 2:
            raise UsageError(f"a covariance needs at least two images, but the set has {count}")
        return (scatter / (count - 1)).numpy()

    def statistics(self, meta: dict[str, Any] | None = None) -> Statistics:
        """Statistics of the rows so far. `meta` is a JSON-serializable description of their origin."""
        return Statistics(self.mean, self.covariance, self.count, meta or {})

    def _flush(self) -> None:
        if self._pending_count:
            rows = torch.cat(self._pending).double()
            self._pending, self._pending_count = [], 0
            mean = rows.mean(0)
            centered = rows - mean
            self._add(len(rows), mean, centered.T @ centered)

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if count:
            total = self._count + count
            shift = mean - self._mean
            self._scatter += scatter + torch.outer(shift, shift) * (self._count * count / total)
            self._mean += shift * (count / total)
            self._count = total


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz file atomically, with the arrays `mu` and `sigma` and the JSON string `metadata`."""
    metadata = json.dumps(as_json({"count": statistics.count, **statistics.meta}))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, metadata=np.array(metadata))


def load_statistics(path: str | Path) -> Statistics:
    """Load statistics from an .npz or .npy file.

    The .npz holds `mu` and `sigma`, as written by `save_statistics` or pytorch-fid. The .npy is a pickled dict, as in LFM's
    published code. Only arrays are ever unpickled.

    Raises:
        UsageError: the file is missing, damaged, or holds something else.
    """
    try:
        with Path(path).open("rb") as file:
            content = _read_npy(file) if Path(path).suffix == ".npy" else _read_npz(file)
        mean, covariance = (np.asarray(content[key], dtype=np.float64) for key in ("mu", "sigma"))
        meta = dict(json.loads(str(content.get("metadata", "{}"))))
        _check_metadata(meta)
    except UNREADABLE as error:
        raise UsageError(f"cannot read statistics (arrays mu and sigma) from {path}: {error}") from error
    if mean.ndim != 1 or not mean.size or covariance.shape != mean.shape * 2:
        raise UsageError(
            f"{path}: expected arrays mu [D] and sigma [D, D], but found shapes {mean.shape} and {covariance.shape}"
        )
    require_finite_features(f"{path}: ", mean, covariance)
    return Statistics(mean, covariance, meta.pop("count", None), meta)


def require_finite_features(where: str, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Check that no feature has a mean [D] or a covariance [D, D] with NaN or infinity.

    Raises:
        UsageError: some have; the message begins with `where` and names them.
    """
    bad = ~(np.isfinite(mean) & np.isfinite(covariance).all(1) & np.isfinite(covariance).all(0))
    if not np.isfinite(np.diag(covariance)).all():  # one such feature fills a row and a column
        bad = ~(np.isfinite(mean) & np.isfinite(np.diag(covariance)))
    if bad.any():
        found = describe_not_finite("features have a mean or covariance that", np.flatnonzero(bad).tolist(), len(mean))
        raise UsageError(f"{where}{found}; compute the statistics again, from images whose features are finite")


def _check_metadata(meta: dict[str, Any]) -> None:
    """Check the entries that comparisons use.

    Raises:
        ValueError: an entry has another type than `save_statistics` writes.
    """
    count, size, features = (meta.get(key) for key in ("count", "resolution", "features"))
    if count is not None and type(count) is not int:
        raise ValueError(f"expected a number of images in its metadata, but found {count!r}")
    pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if size not in (None, "mixed") and not pair:
        raise ValueError(f"expected an image size in its metadata, but found {size!r}")
    if features is not None:
        named = isinstance(features, dict) and all(
            isinstance(features.get(k), str) for k in ("name", "label", "sha256")
        )
        if not named:
            raise ValueError(f"expected a feature network in its metadata, but found {features!r}")


def _read_npz(file: BinaryIO) -> dict[str, Any]:
    """Read only the arrays of statistics: a file may also hold gigabytes of images."""
    with np.load(file, allow_pickle=False) as archive:
        return {key: archive[key] for key in ("mu", "sigma", "metadata") if key in archive}


def _read_npy(file: BinaryIO) -> dict[str, Any]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unsupported version of the .npy format")
    _, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject:
        raise ValueError("expected a pickled dict, but found a plain array; save images with numpy.savez instead")
    content = load_numpy_pickle(file)
    value = content.item() if isinstance(content, np.ndarray) and content.size == 1 else content
    if not isinstance(value, dict):
        raise ValueError(f"expected a pickled dict, but found a pickled {type(value).__name__}")
    return value
