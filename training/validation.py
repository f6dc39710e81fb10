"""The loss on held-out images at fixed times and noise, as a whole and by quarter of t."""

import torch
from torch import nn

from datasets_prep.moments import MomentSource
from flow.paths import straight_path
from models.autoencoder import Autoencoder, PixelSpace
from models.conditions import Condition
from runtime.precision import Machine
from runtime.randomness import generator_for

__all__ = ["validation_loss"]

LARGEST_SET = 2048
IMAGES_PER_BATCH = 256
QUARTERS = 4


@torch.no_grad()
def validation_loss(
    network: nn.Module, source: MomentSource, autoencoder: Autoencoder | PixelSpace, machine: Machine, sigma_min: float
) -> dict[str, float]:
    """Mean squared velocity error of the first images of `source`, the same at every call.

    Returns:
        "loss", and "loss_q1" .. "loss_q4" for t in [0, 1/4), ..., [3/4, 1].
    """
    count = min(len(source), LARGEST_SET)
    generator = generator_for(0, "validation")
    times = (torch.randperm(count, generator=generator) + 0.5) / count
    errors = []
    for chosen in torch.arange(count).split(IMAGES_PER_BATCH):
        moments = source.moments(chosen, torch.zeros(len(chosen), dtype=torch.bool)).to(machine.device)
        shape = (len(chosen), autoencoder.latent_channels, *moments.shape[2:])
        posterior, noise = (torch.randn(shape, generator=generator).to(machine.device) for _ in range(2))
        t = times[chosen].to(machine.device)
        x_t, velocity = straight_path(t, autoencoder.sample(moments, posterior), noise, sigma_min)
        with machine.autocast():
            predicted = network(t, x_t, Condition(source.labels[chosen].to(machine.device)))
        errors.append((predicted.float() - velocity).square().mean((1, 2, 3)).cpu())
    error, quarter = torch.cat(errors), (times * QUARTERS).long().clamp(max=QUARTERS - 1)
    by_quarter = {f"loss_q{q + 1}": error[quarter == q].mean().item() for q in range(QUARTERS) if (quarter == q).any()}
    return {"loss": error.mean().item(), **by_quarter}
