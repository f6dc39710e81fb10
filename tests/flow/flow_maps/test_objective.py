"""Facts that hold for every few-step objective."""

import pytest
import torch

from flow.auxiliary.objective import training_losses
from flow.flow_maps.networks import StepNetwork
from flow.flow_maps.objective import MapDraws
from flow.objectives import OBJECTIVES, FlowMatching
from flow.paths import PathOptions
from tests.flow.flow_maps.gaussian import (
    SHAPE,
    Condition,
    Streams,
    bias,
    draws_of,
    exact,
    gradients,
    opposite_pairs,
    velocity,
    wide,
)

MAPS = [name for name, family in OBJECTIVES.items() if family.trains_averages]
# The others' targets have the right mean only in the limit of short intervals; see their own tests.
EXACT = ["mean_flow", "improved_mean_flow", "decoupled_mean_flow", "shortcut", "split_mean_flow"]
EXTRA = {"decoupled_mean_flow": {"learned_variance": False}}
FRACTION = {"split_mean_flow": 0.3, "alpha_flow": 0.3, "consistency": 0.5}
SQUARED = {"adaptive_power": 0.0}


def new_objective(name, **changes):
    family = OBJECTIVES[name]
    return family.build(family.options(**{"sigma_min": 0.0} | EXTRA.get(name, {}) | changes))


def draws_for(name):
    draws = draws_of(FRACTION.get(name))
    return draws._replace(until=torch.zeros_like(draws.t)) if name == "consistency" else draws


def linear(t, x, condition, until=None):
    """A network that is not a flow map."""
    return x * wide(torch.sin(3 * t)) + wide(t if until is None else until) ** 2


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_gradient_is_zero_at_the_exact_average_velocity(name, power):
    changes = {} if name == "shortcut" else {"adaptive_power": power}
    objective, pairs = new_objective(name, **changes), opposite_pairs(draws_for(name))
    wrong = bias(gradients(objective, pairs, network=lambda *args, **inputs: 1.02 * exact(*args, **inputs)))
    assert wrong > 1e-4
    assert bias(gradients(objective, pairs)) < 1e-9 * wrong


@pytest.mark.parametrize("name", MAPS)
def test_a_flow_step_is_flow_matching(name):
    """Its gradient is parallel to the squared error's, and vanishes at the exact velocity."""
    objective, pairs = new_objective(name), opposite_pairs(MapDraws(draws_of().t))
    assert bias(gradients(objective, pairs)) < 1e-9
    gradient = gradients(objective, pairs, network=linear)
    x_t = (1 - wide(pairs.draws.t)) * pairs.data + wide(pairs.draws.t) * pairs.noise
    error = linear(pairs.draws.t, x_t, None, until=pairs.draws.t) - (pairs.noise - pairs.data)
    ratio = gradient / error
    assert (ratio.flatten(1).amax(1) / ratio.flatten(1).amin(1) - 1).abs().max() < 1e-9
    assert ratio.min() > 0


@pytest.mark.parametrize("name", ["mean_flow", "improved_mean_flow", "decoupled_mean_flow", "alpha_flow"])
def test_an_empty_interval_has_the_gradient_of_a_flow_step(name):
    objective, t = new_objective(name, **SQUARED), draws_of().t
    fraction = torch.full_like(t, 0.3) if name in FRACTION else None
    empty, flow = opposite_pairs(MapDraws(t, t, fraction)), opposite_pairs(MapDraws(t))
    one, other = (gradients(objective, pairs, network=linear) for pairs in (empty, flow))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["shortcut", "split_mean_flow"])
def test_an_empty_interval_has_no_gradient_where_the_target_is_the_network(name):
    t = draws_of().t
    pairs = opposite_pairs(MapDraws(t, t, torch.full_like(t, 0.3)))
    assert gradients(new_objective(name), pairs, network=linear).abs().max() < 1e-12


@pytest.mark.parametrize("name", MAPS)
def test_validation_is_the_loss_of_flow_matching_bit_for_bit(name):
    data, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    objective, plain = new_objective(name, sigma_min=1e-5), FlowMatching(PathOptions())
    t = torch.rand(len(data), generator=torch.Generator().manual_seed(2))

    def network(t, x, condition):  # takes no `until`
        return x * wide(t)

    one, other = (each.loss(network, data, noise, each.at(t), None) for each in (objective, plain))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", MAPS)
def test_only_the_prediction_has_gradients(name):
    """Targets are evaluated without gradients: on the network itself, on the bare network or on the average."""
    weights = {part: torch.ones((), dtype=torch.float64, requires_grad=True) for part in ("network", "bare", "ema")}
    modes = []

    def part(name):
        def network(t, x, condition, until=None):
            modes.append(torch.is_grad_enabled())
            return weights[name] * exact(t, x, condition, until)

        return network

    objective, pairs = new_objective(name), opposite_pairs(draws_for(name))
    network = StepNetwork(*map(part, ("network", "bare", "ema")))
    losses = training_losses(objective, network, pairs.data, pairs.noise, pairs.draws, Condition())
    losses.total.mean().backward()
    assert weights["network"].grad is not None
    assert weights["bare"].grad is weights["ema"].grad is None
    assert sum(modes) == 1
    expected = {"mean_flow": 1, "improved_mean_flow": 2, "decoupled_mean_flow": 1, "shortcut": 2, "split_mean_flow": 2}
    assert len(modes) == 1 + expected.get(name, 1)
    assert not losses.logged["loss"].requires_grad


@pytest.mark.parametrize("name", MAPS)
def test_one_number_decides_whether_a_step_trains_the_velocity(name):
    share = OBJECTIVES[name].build(OBJECTIVES[name].options()).flow_share
    objective = new_objective(name)
    assert objective.draw(Streams(number=share)).until is not None
    if share:
        assert objective.draw(Streams(number=share - 1e-9)).until is None
    assert new_objective(name, flow_share=1.0).draw(Streams(number=0.999)).until is None
    assert new_objective(name, flow_share=0.0).draw(Streams(number=0.0)).until is not None


@pytest.mark.parametrize("name", MAPS)
def test_drawn_intervals_are_ordered_and_within_the_path(name):
    draws = new_objective(name, flow_share=0.0).draw(Streams(count=1000))
    assert (draws.until <= draws.t).all()
    assert draws.until.min() >= 0
    assert draws.t.max() <= 1
    assert (draws.t - draws.until).mean() > 0.1


def test_times_of_intervals_follow_the_options():
    later = new_objective("mean_flow", flow_share=0.0, interval_locations=(3.0, -3.0)).draw(Streams(count=1000))
    assert later.t.median() > 0.9
    assert later.until.median() < 0.1
    own = new_objective("decoupled_mean_flow", flow_share=0.0).draw(Streams(count=1000))
    assert own.until.median() < new_objective("mean_flow", flow_share=0.0).draw(Streams(count=1000)).until.median()


def test_the_logged_loss_is_the_squared_error_of_the_target():
    objective, pairs = new_objective("mean_flow"), opposite_pairs(MapDraws(draws_of().t))
    losses = training_losses(objective, exact, pairs.data, pairs.noise, pairs.draws, Condition())
    x_t = (1 - wide(pairs.draws.t)) * pairs.data + wide(pairs.draws.t) * pairs.noise
    errors = velocity(pairs.draws.t, x_t) - (pairs.noise - pairs.data)
    torch.testing.assert_close(losses.logged["loss"], errors.square().mean((1, 2, 3)))
    summed = errors.square().sum((1, 2, 3))
    torch.testing.assert_close(losses.total.detach(), summed / (summed + 0.01))
