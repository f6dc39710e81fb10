"""Guidance inside targets, and distances."""

import pytest
import torch

from flow.flow_maps.losses import adaptive_loss, pseudo_huber, squared_error
from flow.flow_maps.mean_flow import MeanFlow, MeanFlowOptions
from options import UsageError
from tests.flow.flow_maps.gaussian import Condition, draws_of, exact, opposite_pairs, velocity, wide

NULL_MEAN = -0.4


def guided_network(scale):
    """The flow at a guidance scale: scale v + (1 - scale) v_null. Label 9 is the null class."""

    def network(t, x, condition, until=None):
        null = exact(t, x, condition, t, mean=NULL_MEAN)
        return null if condition.labels[0] == 9 else null + scale * (exact(t, x, condition, t) - null)

    return network


def flow_gradient(options, network, kept=None):
    pairs = opposite_pairs(draws_of()._replace(until=None))
    count = len(pairs.data)
    kept = torch.ones(count, dtype=torch.bool) if kept is None else kept
    draws = pairs.draws._replace(kept=kept, null=Condition(torch.full((count,), 9)))
    offset = torch.zeros_like(pairs.data, requires_grad=True)

    def shifted(t, x, condition, **inputs):
        output = network(t, x, condition, **inputs)
        return output + offset if torch.is_grad_enabled() else output

    losses = MeanFlow(options).loss(shifted, pairs.data, pairs.noise, draws, Condition(torch.zeros(count)))
    return torch.autograd.grad(losses.sum(), offset)[0], pairs


def options(**changes):
    return MeanFlowOptions(sigma_min=0.0, adaptive_power=0.0, **changes)


@pytest.mark.parametrize(("omega", "kappa"), [(2.0, 0.0), (1.0, 0.5), (0.2, 0.9), (3.0, 0.0)])
def test_the_guided_flow_has_no_gradient(omega, kappa):
    """The network learns the scale omega / (1 - kappa) (arXiv:2505.13447, section 4.2)."""
    scale = omega / (1 - kappa)
    gradient, _ = flow_gradient(options(target_omega=omega, target_kappa=kappa), guided_network(scale))
    first, second = gradient.chunk(2)
    assert (first + second).abs().max() < 1e-9
    gradient, _ = flow_gradient(options(target_omega=omega, target_kappa=kappa), guided_network(scale + 0.5))
    first, second = gradient.chunk(2)
    assert (first + second).abs().max() > 1e-2


def test_neutral_weights_leave_the_target_unchanged():
    network = guided_network(1.7)
    gradient, pairs = flow_gradient(options(), network)
    x_t = (1 - wide(pairs.draws.t)) * pairs.data + wide(pairs.draws.t) * pairs.noise
    error = network(pairs.draws.t, x_t, Condition(torch.zeros(1))) - (pairs.noise - pairs.data)
    assert torch.equal(gradient, 2 * error)
    assert not options().guides


def test_only_kept_labels_within_the_interval_are_guided():
    network, chosen = guided_network(1.7), options(target_omega=2.0, target_interval=(0.5, 0.75))
    kept = torch.arange(12) % 2 == 0
    gradient, pairs = flow_gradient(chosen, network, kept)
    plain, _ = flow_gradient(options(), network)
    differs = (gradient != plain).flatten(1).any(1)
    times = pairs.draws.t
    assert torch.equal(differs, kept & (times >= 0.5) & (times <= 0.75))
    x_t = (1 - wide(times)) * pairs.data + wide(times) * pairs.noise
    expected = pairs.noise - pairs.data
    expected = expected + (expected - velocity(times, x_t, mean=NULL_MEAN))
    error = network(times, x_t, Condition(torch.zeros(1))) - expected
    torch.testing.assert_close(gradient[differs], 2 * error[differs])


def test_wrong_intervals_are_refused():
    for interval in [(0.5,), (0.7, 0.2), (0.0, 1.5)]:
        with pytest.raises(UsageError, match="--target_interval: expected two times"):
            MeanFlowOptions(target_interval=interval)
    with pytest.raises(UsageError, match="--interval_locations: expected two numbers"):
        MeanFlowOptions(interval_locations=(0.4,))


def test_adaptive_weights_have_no_gradient():
    difference = torch.full((1, 2, 2, 1), 3.0, requires_grad=True)
    loss = adaptive_loss(difference, 1.0, 4.0)
    assert loss.item() == pytest.approx(36 / 40)
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    assert gradient.flatten().tolist() == pytest.approx([6 / 40] * 4)
    assert adaptive_loss(difference, 0.0, 4.0).item() == 36


def test_the_pseudo_huber_distance_is_squared_near_zero_and_linear_far_away():
    near, far = (torch.full((1, 1, 1, 1), value) for value in (1e-3, 1e3))
    assert pseudo_huber(near, 1.0).item() == pytest.approx(5e-7, rel=0.2)
    assert pseudo_huber(far, 1.0).item() == pytest.approx(999, rel=1e-3)
    assert squared_error(far).item() == 1e6
