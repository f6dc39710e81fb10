"""The adaptive weight of a loss. The weighted loss and the reconstruction loss have gradients of the same norm.

It is equation 7 of VQGAN (Esser et al. 2021, arXiv:2012.09841). For a loss L next to the reconstruction loss R, and the weights
W of one layer,

    weight = |grad_W R| / (|grad_W L| + 1e-6),   at most LARGEST_WEIGHT.

The weight itself gets no gradient. VQGAN takes the decoder's last layer for its adversarial loss, and VA-VAE (Yao et al. 2025,
arXiv:2501.01423, section 3) the encoder's last convolution for its alignment.
"""

from typing import Any

import torch
from torch import nn

from runtime.distributed import Processes

__all__ = ["LARGEST_WEIGHT", "adaptive_weight", "gradient_only", "last_convolution"]

EPSILON = 1e-6
LARGEST_WEIGHT = 1e4  # of a loss whose gradient vanishes


def adaptive_weight(
    reconstruction: torch.Tensor,
    loss: torch.Tensor,
    weights: nn.Parameter,
    processes: Processes = Processes(),  # noqa: B008
) -> torch.Tensor:
    """The factor that gives `loss` the gradient norm of `reconstruction` at one layer, 0-d float32.

    The gradients are averaged over all processes before their norms are taken, so several processes agree with one that has the
    whole batch. Every process must call this. Both graphs are kept for the backward pass of the total loss.

    Args:
        reconstruction: the reconstruction loss, 0-d.
        loss: the loss to weight, 0-d.
        weights: the layer's weights, on which both depend.
        processes: the processes of the run, which have equal shares of the batch.
    """
    gradients = [torch.autograd.grad(each, weights, retain_graph=True)[0] for each in (reconstruction, loss)]
    reference, own = processes.mean(torch.stack(gradients).float()).flatten(1).norm(dim=1)
    return (reference / (own + EPSILON)).clamp(max=LARGEST_WEIGHT)


def gradient_only(loss: torch.Tensor) -> torch.Tensor:
    """Zero, 0-d, with the gradient of `loss`.

    An adaptive weight changes from step to step, so the values of losses before and after it could not be compared.
    """
    return loss - loss.detach()


def last_convolution(*parts: nn.Module | None) -> nn.Parameter:
    """The kernel of the last convolution among parts of a network, given in the order of their application."""
    layers: list[Any] = [
        layer for part in parts if part is not None for layer in part.modules() if isinstance(layer, nn.Conv2d)
    ]
    return layers[-1].weight
