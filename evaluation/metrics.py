"""Distances between image sets (Fréchet) and between images (PSNR).

Fréchet distance of two Gaussians, which is the FID when the features are Inception's (Heusel et al. 2017):
d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).
"""

import math
import sys

import numpy as np

from evaluation.statistics import Statistics
from options import UsageError

__all__ = ["frechet_distance", "psnr"]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance d^2 between two Gaussians, in float64; singular covariances are admitted.

    A note on stderr says so when there are too few images for a covariance of full rank, which raises the score.

    Raises:
        UsageError: statistics of different features.
    """
    _check_comparable(a, b)
    difference = a.mean - b.mean
    # With C = R R^T, the eigenvalues of C_a C_b are the squared singular values of R_a^T R_b.
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))


def psnr(mse: float, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; `value_range` is 2 for pixels in [-1, 1]."""
    return 10 * math.log10(value_range**2 / mse) if mse > 0 else math.inf


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [D, D] with R R^T = covariance, by symmetric eigen-decomposition; rounding below zero counts as zero."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(values.clip(min=0))


def _check_comparable(a: Statistics, b: Statistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"cannot compare statistics of {len(a.mean)} with statistics of {len(b.mean)} features")
    names = [s.meta.get("features", {}) for s in (a, b)]
    if all(names) and names[0]["sha256"] != names[1]["sha256"]:
        described = [f"{item['name']} {item['sha256'][:8]}" for item in names]
        raise UsageError(f"cannot compare statistics of different feature networks: {described[0]} and {described[1]}")
    counts = [s.count for s in (a, b) if s.count is not None and s.count <= len(s.mean)]
    if counts:
        print(
            f"note: {min(counts)} images are too few for {len(a.mean)} features; the score is larger than that of many",
            file=sys.stderr,
        )
