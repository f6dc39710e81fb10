"""Precision, recall, density and coverage, computed from nearest neighbors.

Each image is the center of a ball whose radius is the distance to its k-th nearest neighbor in the same set.

- Precision is the fraction of samples inside at least one real image's ball. Recall is the fraction of real images inside at
  least one sample's ball. Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. 1-2; k = 3.
- Density is the average number of real balls that contain a sample, divided by k. Coverage is the fraction of real balls that
  contain at least one sample. Naeem et al. 2020, arXiv:2002.09797, Eq. 4-6; k = 5.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch

from evaluation.summary import Summary, center_of

__all__ = ["DENSITY_K", "PRECISION_K", "neighbour_scores"]

PRECISION_K = 3
DENSITY_K = 5
CHUNK = 1000  # rows per block of the distance matrix; a block takes 4 MB per thousand columns
ROUNDING = 1e-3  # of the rows' norms; smaller float32 distances are rounding errors of equal rows


def neighbour_scores(generated: Summary, reference: Summary) -> dict[str, float]:
    """Compute precision, recall, density and coverage of generated rows [n, D] against real rows [m, D].

    All pairs are compared. Time grows with n^2 + n m, memory with the larger of n and m.
    """
    samples, real = _rows(generated), _rows(reference)
    sample_radii, real_radii = _radii(generated, (PRECISION_K,)), _radii(reference, (PRECISION_K, DENSITY_K))
    precise, dense = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for start, distances in _distances(samples, real, real):
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


@lru_cache(maxsize=2)  # error bars score many subsets of the samples against one reference
def _radii(summary: Summary, ks: tuple[int, ...]) -> torch.Tensor:
    """Distance [len(ks), n] from each row to its k-th nearest neighbor, not counting the row itself."""
    rows = _rows(summary)
    nearest = [distances.topk(max(ks) + 1, largest=False).values for _, distances in _distances(rows, rows, rows)]
    return torch.cat(nearest)[:, list(ks)].T


def _distances(a: torch.Tensor, b: torch.Tensor, near: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield blocks of the distance matrix: the first row of `a` in the block, and its distances [CHUNK, len(b)] to `b`.

    Distances are computed in float32 relative to the mean of the rows `near`, so that they keep their digits far from zero.
    Equal rows have the distance 0.
    """
    center = center_of(near)
    a, b = a - center, b - center
    norms = [rows.norm(dim=1) for rows in (a, b)]
    for start in range(0, len(a), CHUNK):
        distances = torch.cdist(a[start : start + CHUNK], b)
        reach = norms[0][start : start + CHUNK, None] + norms[1]
        yield start, distances.masked_fill_(distances <= ROUNDING * reach, 0)


def _rows(summary: Summary) -> torch.Tensor:
    assert summary.rows is not None
    return summary.rows.to(summary.device)
