from typing import NamedTuple

import torch

from flow.auxiliary.objective import training_losses
from flow.flow_maps.decoupled_mean_flow import DecoupledMeanFlow, DecoupledMeanFlowOptions
from flow.flow_maps.objective import MapDraws
from tests.flow.flow_maps.gaussian import draws_of, exact, opposite_pairs


class Output(NamedTuple):
    velocity: torch.Tensor
    log_variance: torch.Tensor


def test_the_loss_is_the_paper_s():
    """log(exp(-L) m + 0.01) + L with the mean squared error m, in both kinds of steps."""
    objective = DecoupledMeanFlow(DecoupledMeanFlowOptions(sigma_min=0.0))
    log_variance = torch.linspace(-2, 1, 12, dtype=torch.float64)

    def network(t, x, condition, until=None, log_variance=False):
        velocity = 1.1 * exact(t, x, condition, until)
        return Output(velocity, variance) if log_variance else velocity

    variance = log_variance.requires_grad_()
    for draws in (draws_of(), MapDraws(draws_of().t)):
        pairs = opposite_pairs(draws)
        losses = training_losses(objective, network, pairs.data, pairs.noise, pairs.draws, None)
        mean_square = losses.logged["loss"]
        expected = (torch.exp(-variance) * mean_square + 0.01).log() + variance
        torch.testing.assert_close(losses.total, expected)
        (slope,) = torch.autograd.grad(losses.total.sum(), variance)
        assert (slope > 0).all()
        assert (slope < 1).all()


def test_without_a_learned_variance_the_network_is_not_asked_for_it():
    objective = DecoupledMeanFlow(DecoupledMeanFlowOptions(sigma_min=0.0, learned_variance=False))
    pairs = opposite_pairs(draws_of())
    losses = training_losses(objective, exact, pairs.data, pairs.noise, pairs.draws, None)
    torch.testing.assert_close(losses.total, (losses.logged["loss"] + 0.01).log())
