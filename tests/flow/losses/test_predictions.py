import pytest
import torch

from flow.likelihood import log_likelihood
from flow.losses.options import FlowMatchingOptions
from flow.losses.predictions import LEAST_NOISE
from flow.objectives import FlowMatching
from flow.ode import SolverOptions
from flow.paths import straight_path

SHAPE = (6, 2, 3, 3)
T = torch.tensor([0.0, 0.01, 0.05, 0.3, 0.9, 1.0])


@pytest.fixture
def pairs():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.2])
def test_a_network_that_returns_the_data_has_the_paths_velocity_away_from_data(pairs, sigma_min):
    data, noise = pairs
    path = FlowMatchingOptions(sigma_min=sigma_min, prediction="data")
    x_t, velocity = straight_path(T, data, noise, sigma_min)
    found = FlowMatching(path, path).velocity(lambda t, x, condition: data)(T, x_t, None)
    away = sigma_min + (1 - sigma_min) * T >= LEAST_NOISE
    torch.testing.assert_close(found[away], velocity[away], rtol=0, atol=2e-5)
    assert found.isfinite().all()


def test_every_velocity_has_one_output_also_next_to_data(pairs):
    """The loss is zero for the output x_t - max(t, 0.05) v at every time, so the best velocity is the plain objective's."""
    data, noise = pairs
    path = FlowMatchingOptions(sigma_min=0.0, prediction="data")
    objective = FlowMatching(path, path)

    def network(t, x, condition):
        return x - t.clamp(min=LEAST_NOISE).view(-1, 1, 1, 1) * (noise - data)

    assert objective.loss(network, data, noise, objective.at(T), None).max() < 1e-10


def test_the_loss_is_the_error_of_the_data_divided_by_the_squared_time(pairs):
    data, noise = pairs
    path = FlowMatchingOptions(sigma_min=0.0, prediction="data")
    objective = FlowMatching(path, path)
    t = torch.tensor([0.05, 0.1, 0.2, 0.5, 0.8, 1.0])
    losses = objective.loss(lambda t, x, condition: data + 0.5, data, noise, objective.at(t), None)
    torch.testing.assert_close(losses, 0.25 / t**2, rtol=1e-4, atol=0)


def test_solvers_may_pass_one_time_for_the_whole_batch(pairs):
    data, noise = pairs
    path = FlowMatchingOptions(prediction="data")
    velocity = FlowMatching(path, path).velocity(lambda t, x, condition: data)
    torch.testing.assert_close(velocity(torch.tensor(0.5), noise, None), velocity(torch.full((6,), 0.5), noise, None))


def test_a_velocity_prediction_is_the_network_itself():
    def network(t, x, condition):
        raise AssertionError

    path = FlowMatchingOptions()
    assert FlowMatching(path, path).velocity(network) is network


def test_likelihoods_of_normal_data_from_a_data_prediction_are_exact():
    """For data N(m, s^2), the velocity is (d log sigma / dt) (x - (1 - t) m) - m with sigma^2 = (1 - t)^2 s^2 + t^2."""
    mean, spread = 0.7, 0.4
    path = FlowMatchingOptions(sigma_min=0.0, prediction="data")

    def network(t, x, condition):
        t = t.view(-1, 1, 1, 1)
        growth = (t - (1 - t) * spread**2) / ((1 - t).square() * spread**2 + t.square())
        velocity = growth * (x - (1 - t) * mean) - mean
        return x - t.clamp(min=LEAST_NOISE) * velocity

    network_velocity = FlowMatching(path, path).velocity(network)
    data = mean + spread * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def velocity(t, x):
        return network_velocity(t.expand(len(x)), x, None)

    found = log_likelihood(velocity, data, SolverOptions("rk4", 40))
    expected = torch.distributions.Normal(mean, spread).log_prob(data).flatten(1).sum(1)
    torch.testing.assert_close(found.log_density, expected, rtol=0, atol=1e-3)
