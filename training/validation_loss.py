"""The loss on held-out images at fixed times and noise, as a whole and by quarter of t."""

import torch
from torch import nn

from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import HELD_OUT_IMAGES
from datasets_prep.moments import MomentSource
from flow.paths import straight_path
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.randomness import generator_for

__all__ = ["validation_loss"]

IMAGES_PER_BATCH = 256
QUARTERS = 4


@torch.no_grad()
def validation_loss(
    network: nn.Module,
    source: MomentSource,
    autoencoder: Autoencoder,
    machine: Machine,
    sigma_min: float,
    processes: Processes = Processes(),  # noqa: B008
    condition: ConditionSource | None = None,
) -> dict[str, float]:
    """Mean squared velocity error of the first images of `source`, the same at every call and in all `processes`.

    `condition`: of the same images; number i of its random parts goes to image i.

    Returns:
        "loss", and "loss_q1" .. "loss_q4" for t in [0, 1/4), ..., [3/4, 1].
    """
    count = min(len(source), HELD_OUT_IMAGES)
    generator = generator_for(0, "validation")
    times = (torch.randperm(count, generator=generator) + 0.5) / count
    unmirrored = torch.zeros(count, dtype=torch.bool)
    sides = source.moments(torch.tensor([0]), unmirrored[:1]).shape[2:]
    own = torch.zeros(count)  # errors of this process's batches
    for number, chosen in enumerate(torch.arange(count).split(IMAGES_PER_BATCH)):
        shape = (len(chosen), autoencoder.latent_channels, *sides)
        draws = 2 if condition is None else 3
        posterior, noise, *others = (torch.randn(shape, generator=generator).to(machine.device) for _ in range(draws))
        if number % processes.count != processes.rank:
            continue
        moments = source.moments(chosen, unmirrored[chosen]).to(machine.device)
        t, labels = times[chosen].to(machine.device), source.labels[chosen].to(machine.device)
        dense = None
        if condition is not None:
            dense = condition.encode(condition.read(chosen, unmirrored[chosen], chosen.tolist()), *others)
        x_t, velocity = straight_path(t, autoencoder.sample(moments, posterior), noise, sigma_min)
        with machine.autocast():
            predicted = network(t, x_t, Condition(labels, dense))
        own[chosen] = (predicted.float() - velocity).square().mean((1, 2, 3)).cpu()
    error, quarter = processes.sum(own), (times * QUARTERS).long().clamp(max=QUARTERS - 1)
    by_quarter = {f"loss_q{q + 1}": error[quarter == q].mean().item() for q in range(QUARTERS) if (quarter == q).any()}
    return {"loss": error.mean().item(), **by_quarter}
