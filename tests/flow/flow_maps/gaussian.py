"""Data with the distribution N(m, s^2 I), whose average velocity is known exactly, and batches that test objectives at it."""

from typing import NamedTuple

import torch

from flow.flow_maps.objective import MapDraws

MEAN, STD = 0.7, 0.5
SHAPE = (6, 2, 2, 2)


class Condition(NamedTuple):
    labels: torch.Tensor | None = None


class Streams:
    """A step's random numbers."""

    def __init__(self, number=0.5, step=0, last_step=100, count=6):
        self.coin, self.step, self.last_step, self.count = number, step, last_step, count

    def uniform(self, purpose):
        return torch.rand(self.count, generator=torch.Generator().manual_seed(sum(map(ord, purpose))))

    def number(self, purpose):
        return self.coin


def wide(t):
    return t.view(-1, 1, 1, 1)


def transport(x, t, until, mean=MEAN, std=STD):
    """The point at `until` of the flow that is at x at time t."""
    spread_t, spread = (((1 - s) ** 2 * std**2 + s**2).sqrt() for s in (t, until))
    return (1 - until) * mean + spread / spread_t * (x - (1 - t) * mean)


def velocity(t, x, mean=MEAN, std=STD):
    t = wide(t)
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean


def exact(t, x, condition=None, until=None, mean=MEAN, std=STD):
    """The exact average velocity over [until, t], and the velocity where both are equal."""
    if until is None:
        return velocity(t, x, mean, std)
    span = wide(t - until)
    average = (x - transport(x, wide(t), wide(until), mean, std)) / torch.where(span == 0, 1.0, span)
    return torch.where(span == 0, velocity(t, x, mean, std), average)


class Pairs(NamedTuple):
    """A batch in two halves with the same points x_t. The mean of both velocities at each point is the exact velocity."""

    data: torch.Tensor
    noise: torch.Tensor
    draws: MapDraws


def opposite_pairs(draws, mean=MEAN, std=STD, size=0.8):
    """Two pairs of data and noise for each draw, whose velocities deviate from the exact one in opposite directions."""
    x, deviation = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = wide(draws.t)
    x = (1 - t) * mean + ((1 - t) ** 2 * std**2 + t**2).sqrt() * x
    velocities = [velocity(draws.t, x, mean, std) + sign * size * deviation for sign in (1, -1)]
    data = torch.cat([x - t * v for v in velocities])
    noise = torch.cat([x + (1 - t) * v for v in velocities])
    return Pairs(data, noise, MapDraws(*(None if each is None else torch.cat([each, each]) for each in draws)))


def draws_of(fraction=None):
    """Intervals of a sixteenth to a half; all times are exact in binary."""
    t = torch.tensor([0.25, 0.5, 0.625, 0.75, 1.0, 1.0], dtype=torch.float64)
    until = t - torch.tensor([0.25, 0.25, 0.125, 0.5, 0.5, 0.0625], dtype=torch.float64)
    return MapDraws(t, until, None if fraction is None else torch.full_like(t, fraction))


def gradients(objective, pairs, network=exact):
    """The gradient of each sample's loss with respect to the prediction [2 N, C, h, w], with stop-gradient targets."""
    offset = torch.zeros_like(pairs.data, requires_grad=True)

    def shifted(t, x, condition, **inputs):
        return network(t, x, condition, **inputs) + offset

    losses = objective.loss(shifted, pairs.data, pairs.noise, pairs.draws, Condition())
    (gradient,) = torch.autograd.grad(losses.sum(), offset)
    return gradient


def bias(gradient):
    """The largest mean gradient of both halves."""
    first, second = gradient.chunk(2)
    return ((first + second).abs().max() / 2).item()
