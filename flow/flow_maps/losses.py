"""Losses of few-step objectives, one number per sample, and guidance inside their targets."""

from typing import Any

import torch

from flow.flow_maps.networks import StepNetwork, bind

__all__ = ["adaptive_loss", "guide_velocity", "pseudo_huber", "squared_error", "summed_square"]


def squared_error(difference: torch.Tensor) -> torch.Tensor:
    """Mean of squares [B] over channels and positions of differences [B, C, h, w]."""
    return difference.square().flatten(1).mean(1)


def summed_square(difference: torch.Tensor) -> torch.Tensor:
    """Sum of squares [B] over channels and positions of differences [B, C, h, w]."""
    return difference.square().flatten(1).sum(1)


def adaptive_loss(difference: torch.Tensor, power: float, constant: float) -> torch.Tensor:
    """|d|^2 / sg(|d|^2 + c)^p for differences d [B, C, h, w], with sums over channels and positions (MeanFlow, section 4.3)."""
    squared = summed_square(difference)
    return squared / (squared.detach() + constant) ** power


def pseudo_huber(difference: torch.Tensor, constant: float) -> torch.Tensor:
    """sqrt(|d|^2 + c^2) - c [B] for differences d [B, C, h, w], with sums over channels and positions."""
    return (summed_square(difference) + constant**2).sqrt() - constant


def guide_velocity(
    network: StepNetwork,
    t: torch.Tensor,
    x: torch.Tensor,
    velocity: torch.Tensor,
    condition: Any,
    null: Any,
    guided: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The guided velocity omega v + kappa v_c + (1 - omega - kappa) v_null, without gradients (MeanFlow, section 4.2).

    The network learns the scale w = omega / (1 - kappa): if v_c is the guided velocity, then
    v_c = w v + (1 - w) v_null.

    Args:
        network: gives its own velocities v_c and v_null.
        t: times [B].
        x: points [B, C, h, w].
        velocity: v, of the pairs of data and noise [B, C, h, w].
        condition: of v_c.
        null: the null condition, of v_null.
        guided: bool [B]; the other samples keep v.
        weights: omega and kappa [B].
        guidance: scales that the network takes as an input for v_c [B]; None if it takes none.
    """
    omega, kappa = (weight.view(-1, *[1] * (x.ndim - 1)) for weight in weights)
    conditional = bind(network.network, condition, guidance)(t, x, t)
    unconditional = bind(network.network, null)(t, x, t)
    mixed = velocity + (omega - 1) * (velocity - unconditional) + kappa * (conditional - unconditional)
    return torch.where(guided.view(-1, *[1] * (x.ndim - 1)), mixed, velocity)
