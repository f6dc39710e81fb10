"""Losses on the tap of a network (models/taps.py), each a function of what the tap gives and of the batch.

    velocity     L(v_k): the objective's own loss, for the auxiliary head's velocity (arXiv:2512.24176, eq. 5)
    latents      mean smooth-L1(P(h), data), where smooth-L1(e) = e^2 / (2 beta) for |e| < beta, else |e| - beta / 2
                 (SRA 2, arXiv:2601.17830)
    features     -mean over tokens of cos(P(h), y), with y the image encoder's features (REPA, arXiv:2410.06940, eq. 5)
    dispersive   log mean_ij exp(-|z_i - z_j|^2 / (tau dim)) over the batch, where z_i are all tokens of sample i and i = j
                 counts (Wang & He 2025, arXiv:2506.09027, algorithm 1)

The dispersive loss compares the samples of one process, and of one part of a batch that --grad_accumulation splits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from options import option

__all__ = [
    "SMOOTH_L1_BETA",
    "AuxiliaryOptions",
    "TapBatch",
    "dispersion",
    "feature_loss",
    "latent_loss",
    "normalize_over_tokens",
    "velocity_loss",
]

SMOOTH_L1_BETA = 0.05
EPS = 1e-6


@dataclass(frozen=True)
class AuxiliaryOptions:
    """Auxiliary losses."""

    dispersive: float = option(
        0.0, "loss weight of the dispersive loss on the tokens after --tap_block (usually 0.5); 0: none", minimum=0
    )
    dispersive_tau: float = option(0.5, "temperature of the dispersive loss", minimum=1e-6)
    align_normalization: float = option(
        0.0,
        "iREPA: share of the mean over tokens to subtract from --align_encoder's features, which are then divided by their "
        "standard deviation over tokens; 0: neither",
        minimum=0,
        maximum=1,
    )
    auxiliary_until: int = option(
        0,
        "step after which the alignment and dispersive losses end; the auxiliary velocity trains on; 0: never",
        minimum=0,
        on_resume="on_request",
    )


class TapBatch(NamedTuple):
    """A batch's inputs to the auxiliary losses.

    Args:
        tapped: what the network's tap gives (`models.taps.Tapped`).
        data: latents [B, C, h, w].
        features: the image encoder's features [B, d, rows, columns]; None without an encoder.
        velocity_loss: the objective's losses [B] of another velocity [B, C, h, w] for the same batch.
    """

    tapped: Any
    data: torch.Tensor
    features: torch.Tensor | None
    velocity_loss: Callable[[torch.Tensor], torch.Tensor]


def velocity_loss(batch: TapBatch) -> torch.Tensor:
    """The objective's losses [B] of the auxiliary head's velocity."""
    return batch.velocity_loss(batch.tapped.velocity)


def latent_loss(batch: TapBatch) -> torch.Tensor:
    """Smooth-L1 distances [B] of the predicted latents to the clean ones."""
    predicted = batch.tapped.latents.float()
    losses = functional.smooth_l1_loss(predicted, batch.data, reduction="none", beta=SMOOTH_L1_BETA)
    return losses.flatten(1).mean(1)


def feature_loss(batch: TapBatch, normalization: float = 0.0) -> torch.Tensor:
    """Negative cosine similarities [B] of predicted and true features, averaged over tokens."""
    if batch.features is None:
        raise ValueError("the loss of features needs an image encoder's features in the batch")
    target = normalize_over_tokens(batch.features.float(), normalization)
    return -functional.cosine_similarity(batch.tapped.features.float(), target, dim=1).flatten(1).mean(1)


def normalize_over_tokens(features: torch.Tensor, share: float) -> torch.Tensor:
    """iREPA's (y - share mean y) / std y over the tokens of features [B, d, rows, columns]; unchanged for share 0."""
    if not share:
        return features
    mean, deviation = features.mean((2, 3), keepdim=True), features.std((2, 3), keepdim=True, unbiased=False)
    return (features - share * mean) / (deviation + EPS)


def dispersion(batch: TapBatch, tau: float) -> torch.Tensor:
    """The batch's dispersive loss, as [B] with the same value for each sample."""
    states = batch.tapped.tokens.float().flatten(1)  # [B, L D]
    similarities = -_squared_distances(states) / (tau * states.shape[1])
    value = torch.logsumexp(similarities.flatten(), 0) - 2 * math.log(len(states))
    return value.expand(len(states))


def _squared_distances(states: torch.Tensor) -> torch.Tensor:
    """Squared distances [B, B] between the rows of states [B, n]; at least 0."""
    norms = states.square().sum(1)
    return (norms[:, None] + norms[None] - 2 * states @ states.T).clamp(min=0)
