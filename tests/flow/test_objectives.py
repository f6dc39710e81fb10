import math
from typing import NamedTuple

import pytest
import torch

from flow.objectives import OBJECTIVES, FlowMatching
from flow.paths import PathOptions

SHAPE = (6, 2, 3, 3)


class Condition(NamedTuple):
    labels: torch.Tensor


class Streams:
    """Uniform and normal numbers for each purpose, and a record of the purposes requested."""

    def __init__(self):
        self.asked = []

    def uniform(self, purpose):
        self.asked.append(purpose)
        return (torch.arange(SHAPE[0]) + 0.5) / SHAPE[0]

    def normal(self, purpose):
        raise AssertionError("flow matching draws no further noise")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, *SHAPE, generator=generator)
    return data, noise, Condition(torch.arange(SHAPE[0]))


def exact(data, noise, sigma_min):
    """A network that returns the exact velocity of these pairs."""
    return lambda t, x, condition: (1 - sigma_min) * noise - data


def test_the_loss_is_the_mean_squared_error(batch):
    data, noise, condition = batch
    objective = FlowMatching(PathOptions(sigma_min=0.1))
    draws = objective.at(torch.linspace(0, 1, SHAPE[0]))
    assert objective.loss(exact(data, noise, 0.1), data, noise, draws, condition).abs().max() == 0
    losses = objective.loss(lambda t, x, c: torch.zeros_like(x), data, noise, draws, condition)
    assert losses.shape == (SHAPE[0],)
    torch.testing.assert_close(losses, (0.9 * noise - data).square().mean((1, 2, 3)))


def test_a_samples_loss_does_not_depend_on_its_batch(batch):
    data, noise, condition = batch
    objective = FlowMatching(PathOptions())
    t = torch.linspace(0.1, 0.9, SHAPE[0])

    def network(t, x, condition):
        return x * t.view(-1, 1, 1, 1) + condition.labels.view(-1, 1, 1, 1)

    whole = objective.loss(network, data, noise, objective.at(t), condition)
    alone = [
        objective.loss(
            network, data[i : i + 1], noise[i : i + 1], objective.at(t[i : i + 1]), Condition(torch.tensor([i]))
        )
        for i in range(SHAPE[0])
    ]
    assert torch.equal(whole, torch.cat(alone))


def test_the_network_is_evaluated_on_the_path(batch):
    data, noise, condition = batch
    seen = []

    def network(t, x, condition):
        seen.append((t, x, condition))
        return torch.zeros_like(x)

    objective, streams = FlowMatching(PathOptions(sigma_min=0.1)), Streams()
    draws = objective.draw(streams)
    assert streams.asked == ["time"]
    objective.loss(network, data, noise, draws, condition)
    ((t, x, given),) = seen
    assert torch.equal(t, streams.uniform("time"))
    assert given is condition
    wide = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(x, (1 - wide) * data + (0.1 + 0.9 * wide) * noise)


def test_times_follow_the_options():
    t = FlowMatching(PathOptions("logit_normal", time_location=2.0)).draw(Streams()).t
    assert t.median() > 1 / (1 + math.exp(-1.5))


def test_the_loss_is_computed_in_float32(batch):
    data, noise, condition = batch
    objective = FlowMatching(PathOptions())
    losses = objective.loss(lambda t, x, c: x.bfloat16(), data, noise, objective.at(torch.ones(SHAPE[0])), condition)
    assert losses.dtype == torch.float32


def test_every_objective_builds_from_its_own_options():
    for family in OBJECTIVES.values():
        objective = family.build(family.options())
        assert len(objective.at(torch.zeros(3))[0]) == 3
