import torch
from torch import nn
from torch.nn import functional

from flow.flow_maps.networks import StepNetwork, bind, total_derivative
from tests.flow.flow_maps.gaussian import Condition, exact, transport, wide


class Attention(nn.Module):
    """Fused attention over positions, and dropout; forward-mode derivatives need plain products."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.linear = nn.Linear(2, 6)
        self.dropout = nn.Dropout(rate)

    def forward(self, t, x, condition=None, until=None):
        tokens = x.flatten(2).transpose(1, 2) * (1 + t.view(-1, 1, 1)) + until.view(-1, 1, 1)
        parts = self.linear(tokens).view(len(x), -1, 3, 1, 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts)
        return self.dropout(mixed.squeeze(1)).transpose(1, 2).view_as(x)


def inputs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, velocity = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=dtype)
    t = torch.tensor([0.3, 0.6, 0.9], dtype=dtype)
    return t, x, t / 2, velocity


def test_the_derivative_is_the_finite_difference():
    torch.manual_seed(0)
    network = Attention().double()
    t, x, until, velocity = inputs()
    for average in (bind(network, None), bind(exact, Condition())):
        found = total_derivative(average, t, x, until, velocity)
        ends = [average(t + step, x + step * velocity, until) for step in (1e-5, -1e-5)]
        torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-8)
        assert not found.requires_grad


def test_the_derivative_leaves_no_trace_on_the_weights():
    network = Attention().double()
    result = total_derivative(bind(network, None), *inputs())
    assert not result.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_exact_average_velocity_satisfies_mean_flows_identity():
    """u = v - (t - until) du/dt along the flow (arXiv:2505.13447, section 4.1)."""
    t, x, until, _ = inputs()
    velocity = exact(t, x)
    derivative = total_derivative(bind(exact, Condition()), t, x, until, velocity)
    average = exact(t, x, until=until)
    torch.testing.assert_close(average, velocity - wide(t - until) * derivative)
    torch.testing.assert_close(x - wide(t - until) * average, transport(x, wide(t), wide(until)))


def test_autocast_does_not_reach_the_derivative():
    torch.manual_seed(0)
    network = Attention()
    arguments = inputs(dtype=torch.float32)
    expected = total_derivative(bind(network, None), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(total_derivative(bind(network, None), *arguments), expected)


def test_targets_use_the_random_numbers_of_the_prediction():
    network = Attention(rate=0.5)
    t, x, until, velocity = inputs(dtype=torch.float32)
    torch.manual_seed(3)
    target = bind(network, None)(t, x, until)
    total_derivative(bind(network, None), t, x, until, velocity)
    prediction = network(t, x, None, until=until)
    assert torch.equal(target, prediction)
    assert not torch.equal(network(t, x, None, until=until), prediction)


def test_a_plain_network_serves_for_all_three():
    network = StepNetwork.of(exact)
    assert network.network is network.bare is network.ema is exact
    assert StepNetwork.of(network) is network
