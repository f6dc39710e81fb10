import pytest
import torch

from flow.flow_maps.reflow import Reflow, ReflowOptions
from tests.flow.flow_maps.gaussian import MEAN, STD, Streams, wide


def straight(t, x, condition=None):
    """The velocity of the pairs (noise, m + s noise): constant along the straight line through x."""
    noise = (x - (1 - wide(t)) * MEAN) / ((1 - wide(t)) * STD + wide(t))
    return (1 - STD) * noise - MEAN


@pytest.mark.parametrize("huber", [0.0, 0.1])
def test_pairs_of_a_gaussian_flow_are_joined_by_straight_lines(huber):
    noise = torch.randn(6, 2, 2, 2, dtype=torch.float64)
    objective = Reflow(ReflowOptions(sigma_min=0.0, reflow_huber=huber))
    draws = objective.draw(Streams())
    losses = objective.loss(straight, MEAN + STD * noise, noise, draws, None)
    assert losses.abs().max() < 1e-12
    other = objective.loss(straight, MEAN + STD * noise.flip(0), noise, draws, None)
    assert other.min() > 1e-3


def test_the_loss_is_pseudo_huber_in_training_only():
    objective = Reflow(ReflowOptions(sigma_min=0.0, reflow_huber=0.5))
    data, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    draws = objective.draw(Streams(count=2))

    def zero(t, x, condition):
        return torch.zeros_like(x)

    assert objective.loss(zero, data, noise, objective.at(draws.t), None).tolist() == [1, 1]
    assert objective.loss(zero, data, noise, draws, None)[0].item() == pytest.approx(5**0.5 - 1)
