"""Precision, recall, density and coverage: how the samples lie among the nearest neighbours of real images.

Around every image of a set lies a ball that reaches to its k-th nearest neighbour in the same set.
Precision is the share of samples within some real ball, recall that of real images within some sample's ball (Kynkäänniemi
et al. 2019, arXiv:1904.06991, Eq. 1-2; k = 3). Density counts for each sample the real balls that hold it, divided by k, and
coverage is the share of real balls that hold a sample (Naeem et al. 2020, arXiv:2002.09797, Eq. 4-6; k = 5).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch

from evaluation.summary import Summary

__all__ = ["neighbour_scores"]

PRECISION_K = 3
DENSITY_K = 5
CHUNK = 1000  # rows whose distances to all others are held at a time: 4 MB for every thousand others


def neighbour_scores(generated: Summary, reference: Summary) -> dict[str, float]:
    """The four scores of rows [n, D] against rows [m, D].

    All pairs are compared: time grows with n^2 + n m, memory with the longer of both.
    """
    samples, real = _rows(generated), _rows(reference)
    sample_radii, real_radii = _radii(generated, (PRECISION_K,)), _radii(reference, (PRECISION_K, DENSITY_K))
    precise, dense = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for start, distances in _distances(samples, real):
        precise += int((distances <= real_radii[0]).any(1).sum())
        inside = distances <= real_radii[1]
        dense += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (distances <= sample_radii[0, start : start + len(distances), None]).any(0)
    return {
        "precision": precise / len(samples),
        "recall": recalled.double().mean().item(),
        "density": dense / (DENSITY_K * len(samples)),
        "coverage": covered.double().mean().item(),
    }


@lru_cache(maxsize=2)  # the reference's serve for the whole set of samples and for its halves
def _radii(summary: Summary, ks: tuple[int, ...]) -> torch.Tensor:
    """Distance [len(ks), n] of every row to its k-th nearest neighbour; the row itself does not count."""
    rows = _rows(summary)
    nearest = [distances.topk(max(ks) + 1, largest=False).values for _, distances in _distances(rows, rows)]
    return torch.cat(nearest)[:, list(ks)].T


def _distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Distances [CHUNK, len(b)] of the rows of `a` from `start` on to those of `b`."""
    for start in range(0, len(a), CHUNK):
        yield start, torch.cdist(a[start : start + CHUNK], b)


def _rows(summary: Summary) -> torch.Tensor:
    assert summary.rows is not None
    return summary.rows.to(summary.device)
