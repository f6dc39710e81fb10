"""The U-Nets' layers: compiled, two of them are other formulas for the same values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.unet_layers import GroupNorm, double, halve


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def compiled(layer):
    """As traced for compilation, and run by torch itself."""
    return torch.compile(layer, backend="eager", fullgraph=True)


@pytest.mark.parametrize(("layer", "torchs"), [(GroupNorm(2, 4), "group_norm"), (double, "interpolate")])
def test_compilers_see_other_formulas(layer, torchs):
    calls = []
    torch.compile(layer, backend=lambda graph, inputs: calls.append(graph.code) or graph.forward)(
        torch.randn(1, 4, 2, 2)
    )
    assert calls
    assert torchs not in calls[0]


def gradients(function, inputs):
    """The value, and gradients of a sum of it weighed at random by all inputs."""
    value = function(*inputs)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value)
    return value, *torch.autograd.grad((value * weights).sum(), inputs)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    ("groups", "shape"), [(8, (3, 32, 5, 6)), (8, (3, 32, 7)), (4, (2, 4, 3, 3)), (1, (2, 6, 4, 4))]
)
def test_a_compiled_norm_is_torchs(groups, shape, offset):
    torch.manual_seed(0)
    x = offset + torch.randn(shape)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    norm = GroupNorm(groups, shape[1])
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    ours = gradients(lambda x, *_: compiled(norm)(x), (x.requires_grad_(), norm.weight, norm.bias))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight, norm.bias)]
    exact = gradients(lambda x, weight, bias: functional.group_norm(x, groups, weight, bias, norm.eps), wide)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5 + 1e-5 * offset)


def test_a_compiled_norm_keeps_bfloat16_and_computes_in_float32():
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 8, 8)
    low = compiled(norm)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, norm(x.bfloat16().float()).bfloat16(), rtol=8e-3, atol=1e-6)


def test_run_as_it_is_a_norm_is_torchs_to_the_bit():
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 8, 8)
    assert torch.equal(norm(x), nn.GroupNorm(4, 16)(x))


def test_doubling_repeats_every_value_compiled_or_not():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for function in (double, compiled(double)):
        value, gradient = gradients(function, (x,))
        assert torch.equal(value, expected)
        torch.testing.assert_close(gradient, gradients(lambda x: x.kron(torch.ones(2, 2)), (x,))[1])


def test_halving_averages_squares():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert halve(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
