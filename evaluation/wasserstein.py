"""Wasserstein-2 distances between two sets of equally many points, with the squared Euclidean distance as cost.

Distances of finite sets are too large: two independent samples of one distribution have a distance above 0, too. So compare
every distance with the distance between two samples of the data.
"""

import math
from collections.abc import Callable

import torch

from runtime.messages import note

__all__ = [
    "DISTANCE_LINES",
    "Distance",
    "available_distances",
    "exact_distance",
    "over_subsets",
    "sinkhorn_distance",
    "sliced_distance",
]

Distance = Callable[[torch.Tensor, torch.Tensor], float]
DIRECTIONS = 500
ENTROPY = 0.05  # regularization, relative to the mean cost
# Names of the distances in results and in printed lines.
DISTANCE_LINES = {"exact": "best assignment", "sliced": "sliced (at most W2 / sqrt(D))", "sinkhorn": "entropic"}


def exact_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """W2 of two sets of points [N, D] by the best assignment. It takes O(N^3) time.

    Args:
        a: one set.
        b: the other one, of the same size.
    """
    from scipy.optimize import linear_sum_assignment

    costs = _costs(a, b)
    rows, columns = linear_sum_assignment(costs.numpy())
    return math.sqrt(costs[rows, columns].mean().item())


def sliced_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced W2 of two sets of points [N, D]: the root mean square over directions of the projections' W2.

    The directions are fixed. The distance is at most W2 / sqrt(D) in expectation over directions (Bonneel et al. 2015).
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    first, second = ((points.double() @ directions).sort(dim=0).values for points in (a, b))
    return (first - second).square().mean().sqrt().item()


def sinkhorn_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Square root of the Sinkhorn divergence of two sets of points [N, D] (Genevay et al. 2018, arXiv:1706.00292, eq. 4).

    Raises:
        ImportError: POT is missing.
    """
    import ot

    reg = ENTROPY * _costs(a, b).mean().item()
    divergence = ot.bregman.empirical_sinkhorn_divergence(
        a.double().numpy(), b.double().numpy(), reg, method="sinkhorn_log", numIterMax=2000, stopThr=1e-6, warn=False
    )
    return math.sqrt(max(0.0, float(divergence)))


def available_distances() -> dict[str, Distance]:
    """Distances by name; a note names the one that lacks its package, before the long work."""
    distances: dict[str, Distance] = {"exact": exact_distance, "sliced": sliced_distance}
    try:
        import ot  # noqa: F401
    except ImportError:
        note("POT is missing, so the result has no entropic distances: pip install POT")
        return distances
    return distances | {"sinkhorn": sinkhorn_distance}


def over_subsets(distance: Distance, a: torch.Tensor, b: torch.Tensor, subsets: int) -> tuple[float, float]:
    """The mean distance of disjoint subsets of two sets [N, D], and its standard error.

    Args:
        distance: one of this module.
        a: one set.
        b: the other one, of the same size.
        subsets: number of subsets, at least 2; each has N / subsets points.
    """
    size = len(a) // subsets
    pairs = zip(a[: size * subsets].split(size), b[: size * subsets].split(size), strict=True)
    values = torch.tensor([distance(*pair) for pair in pairs], dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(subsets)).item()


def _costs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances [N, M], float64."""
    return torch.cdist(a.double(), b.double()).square()
