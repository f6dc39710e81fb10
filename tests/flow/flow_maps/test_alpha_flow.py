import pytest
import torch

from flow.flow_maps.alpha_flow import AlphaFlow, AlphaFlowOptions, alpha_at
from flow.flow_maps.mean_flow import MeanFlow, MeanFlowOptions
from options import UsageError
from tests.flow.flow_maps.gaussian import Streams, bias, draws_of, exact, gradients, opposite_pairs, wide

SETTINGS = {"sigma_min": 0.0, "flow_share": 0.0}


def new(power=1.0, **changes):
    return AlphaFlow(AlphaFlowOptions(**SETTINGS, adaptive_power=power, **changes))


def curved(t, x, condition=None, until=None):
    """A nonlinear network that is not a flow map."""
    return torch.tanh(x * wide(1 + t)) * wide(torch.cos(until)) + wide(t * until)


def test_alpha_of_one_regresses_to_the_velocity():
    """Trajectory flow matching (arXiv:2510.20771): the target is the velocity of the pair for every interval."""
    pairs = opposite_pairs(draws_of())
    at_one = opposite_pairs(draws_of(1.0))
    x_t = (1 - wide(pairs.draws.t)) * pairs.data + wide(pairs.draws.t) * pairs.noise
    error = curved(pairs.draws.t, x_t, None, pairs.draws.until) - (pairs.noise - pairs.data)
    for each in (pairs, at_one):
        torch.testing.assert_close(gradients(new(power=0.0), each, network=curved), 2 * error)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_gradient_tends_to_mean_flows(power):
    mean_flow = MeanFlow(MeanFlowOptions(**SETTINGS, adaptive_power=power))
    expected = gradients(mean_flow, opposite_pairs(draws_of()), network=curved)
    errors = []
    for alpha in (1e-2, 1e-3, 1e-4):
        found = gradients(new(power), opposite_pairs(draws_of(alpha)), network=curved)
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_the_gradient_at_the_exact_average_velocity_vanishes_with_alpha():
    biases = [bias(gradients(new(power=0.0), opposite_pairs(draws_of(alpha)))) for alpha in (0.1, 0.01, 0.001)]
    assert biases[0] < 0.2
    assert biases[1] == pytest.approx(biases[0] / 10, rel=0.2)
    assert biases[2] == pytest.approx(biases[1] / 10, rel=0.2)
    wrong = gradients(
        new(power=0.0), opposite_pairs(draws_of(0.001)), lambda *args, **named: 1.1 * exact(*args, **named)
    )
    assert bias(wrong) > 100 * biases[2]


def test_alpha_falls_by_a_sigmoid_from_one_to_its_least_value():
    options = AlphaFlowOptions(alpha_min=0.01, alpha_schedule=(0.2, 0.6))
    alphas = [alpha_at(share / 100, options) for share in range(101)]
    assert alphas[:21] == [1.0] * 21
    assert alphas[40] == pytest.approx(0.5)
    assert alphas[60:] == [0.01] * 41
    assert alphas == sorted(alphas, reverse=True)


def test_alpha_depends_on_the_step_and_the_length_of_the_run():
    assert new().draw(Streams(step=0, last_step=100)).fraction is None
    assert new().draw(Streams(step=50, last_step=100)).fraction.tolist() == pytest.approx([0.5] * 6)
    assert new().draw(Streams(step=50, last_step=1000)).fraction is None
    assert new().draw(Streams(step=100, last_step=100)).fraction[0] == pytest.approx(0.005)


@pytest.mark.parametrize("schedule", [(0.5,), (0.6, 0.2), (0.5, 0.5)])
def test_impossible_schedules_are_refused(schedule):
    with pytest.raises(UsageError, match="--alpha_schedule: expected two shares START < END"):
        AlphaFlowOptions(alpha_schedule=schedule)
