import pytest
import torch

from flow.losses.options import FlowMatchingOptions, LossOptions, check_losses
from flow.losses.terms import TrainingDraws, direction_error
from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions
from options import UsageError, make_options

SHAPE = (5, 4, 3, 3)


@pytest.fixture
def pairs():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


class Streams:
    def uniform(self, purpose):
        return torch.linspace(0.1, 0.9, SHAPE[0])


def training_loss(path, network, data, noise, draws=None):
    objective = FlowMatching(path, path)
    return objective.loss(network, data, noise, draws or objective.draw(Streams()), None)


def test_the_direction_error_is_zero_along_the_velocity_two_against_it_and_ignores_the_length(pairs):
    velocity, other = pairs
    assert direction_error(velocity, velocity).abs().max() < 1e-6
    assert (direction_error(3 * velocity, 0.5 * velocity) < 1e-6).all()
    torch.testing.assert_close(direction_error(-velocity, velocity), torch.full((5,), 2.0))
    torch.testing.assert_close(direction_error(2 * other, velocity), direction_error(other, velocity))


def test_the_cosine_is_over_channels_at_every_position(pairs):
    one, other = pairs
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1, eps=1e-8)
    torch.testing.assert_close(direction_error(one, other), (1 - cosine).mean((1, 2)).float())


def test_the_gradient_at_a_velocity_of_zero_is_moderate(pairs):
    """A new DiT predicts zero. An eps of 1e-8 in the norm gives gradients of about 1e8 there, which Adam remembers."""
    _, velocity = pairs
    predicted = torch.zeros(SHAPE, requires_grad=True)
    direction_error(predicted, velocity).sum().backward()
    squared = torch.zeros(SHAPE, requires_grad=True)
    (squared - velocity).square().flatten(1).mean(1).sum().backward()
    assert 0 < predicted.grad.norm() < 20 * squared.grad.norm()


def test_the_training_loss_adds_the_weighted_direction_error(pairs):
    data, noise = pairs
    path = FlowMatchingOptions(sigma_min=0.0, velocity_direction=0.7)

    def network(t, x, condition):
        return 0.3 * x

    objective = FlowMatching(path, path)
    t = Streams().uniform("time")
    wide = t.view(-1, 1, 1, 1)
    predicted = 0.3 * ((1 - wide) * data + wide * noise)
    expected = objective.loss(network, data, noise, objective.at(t), None) + 0.7 * direction_error(
        predicted, noise - data
    )
    torch.testing.assert_close(training_loss(path, network, data, noise), expected)


def test_the_training_loss_subtracts_the_distance_from_the_other_velocity(pairs):
    data, noise = pairs
    path = FlowMatchingOptions(contrastive_weight=0.2)
    t, other = Streams().uniform("time"), torch.full(SHAPE, 2.0)
    contrast = torch.tensor([0.2, 0.2, 0.0, 0.2, 0.2])
    draws = TrainingDraws(t, torch.ones(5), other, contrast)
    objective = FlowMatching(path, path)
    plain = objective.loss(lambda t, x, c: 0 * x, data, noise, objective.at(t), None)
    found = training_loss(path, lambda t, x, c: 0 * x, data, noise, draws)
    torch.testing.assert_close(found, plain - contrast * 4)


def test_switches_compose(pairs):
    """All terms act on the velocity that a data prediction stands for, and the weight multiplies their sum."""
    data, noise = pairs
    options = {"velocity_direction": 0.5, "contrastive_weight": 0.1, "loss_weighting": "data", "sigma_min": 0.0}
    by_data, by_velocity = (FlowMatchingOptions(**options, prediction=name) for name in ("data", "velocity"))
    t = Streams().uniform("time")
    draws = TrainingDraws(t, 3 * t**2, noise.roll(1, 0) - data.roll(1, 0), torch.full((5,), 0.1))
    wide = t.view(-1, 1, 1, 1)
    losses = [
        training_loss(by_data, lambda t, x, c: 0.4 * x, data, noise, draws),
        training_loss(by_velocity, lambda t, x, c: 0.6 * x / wide, data, noise, draws),
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_without_switches_draws_and_losses_are_plain_flow_matching_bit_for_bit(pairs):
    data, noise = pairs
    off = make_options(FlowMatchingOptions, {"velocity_direction": 0.0, "contrastive_weight": 0.0})
    objective, plain = FlowMatching(off, off), FlowMatching(PathOptions())
    draws = objective.draw(Streams())
    assert type(draws) is Times
    assert torch.equal(draws.t, plain.draw(Streams()).t)
    wide = draws.t.view(-1, 1, 1, 1)
    x_t = (1 - wide) * data + (1e-5 + (1 - 1e-5) * wide) * noise
    expected = (0.3 * x_t - ((1 - 1e-5) * noise - data)).square().flatten(1).mean(1)
    assert torch.equal(objective.loss(lambda t, x, c: 0.3 * x, data, noise, draws, None), expected)


def test_data_that_an_option_does_not_fit_are_refused_before_the_work():
    with pytest.raises(UsageError, match="at least two channels"):
        check_losses(FlowMatchingOptions(velocity_direction=1.0), 1, 8, dense=False)
    with pytest.raises(UsageError, match="--batch_size of at least 2"):
        check_losses(FlowMatchingOptions(contrastive_weight=0.1), 4, 1, dense=False)
    with pytest.raises(UsageError, match="would make the noise depend on the mask"):
        check_losses(FlowMatchingOptions(coupling="optimal_transport"), 4, 8, dense=True)
    check_losses(FlowMatchingOptions(coupling="optimal_transport", velocity_direction=1.0), 4, 8, dense=False)
    with pytest.raises(UsageError, match="at most 0.9"):
        make_options(LossOptions, {"contrastive_weight": 1.0})
