"""Couplings of data and noise in a batch, by name in COUPLINGS.

Flow matching may pair data and noise in any way that leaves the distribution of both unchanged. Minibatch optimal transport
pairs them so that the sum of squared distances is least (Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023,
arXiv:2304.14772): paths cross less, which helps with few network evaluations. In a conditional network, the noise would then
depend on the condition, but samples start from noise that does not. So noise is only exchanged within a class (Cheng & Schwing
2025, arXiv:2503.10636, "C2OT"). The noise of each class is then a reordering of independent normal noise.
"""

from collections.abc import Callable

import torch

__all__ = ["COUPLINGS", "optimal_transport"]

# coupling(data [B, C, h, w], noise, labels [B]) is the index [B] of the noise for each sample.
Coupling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def optimal_transport(data: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The exact assignment of noise to data within each class, by squared Euclidean distance.

    Samples of an unconditional network have one label, so all are assigned together.

    Args:
        data: latents [B, C, h, w].
        noise: standard normal, like `data`.
        labels: class ids [B] before label dropout.
    """
    from scipy.optimize import linear_sum_assignment

    # |data - noise|^2 = |data|^2 + |noise|^2 - 2 <data, noise>, and an assignment does not change the sum of the squares.
    products = (data.flatten(1) @ noise.flatten(1).mT).double().cpu()
    labels = labels.cpu()
    chosen = torch.arange(len(data))
    present, counts = labels.unique(return_counts=True)
    for label in present[counts > 1].tolist():
        rows = (labels == label).nonzero().flatten()
        _, columns = linear_sum_assignment(products[rows][:, rows].numpy(), maximize=True)
        chosen[rows] = rows[torch.from_numpy(columns)]
    return chosen.to(data.device)


COUPLINGS: dict[str, Coupling | None] = {"independent": None, "optimal_transport": optimal_transport}
