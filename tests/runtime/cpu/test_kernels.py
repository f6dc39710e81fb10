"""Kernels for compiled networks compute the same as torch's layers, and replacing layers leaves the state dict unchanged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.conditions import Condition
from models.edm_layers import Norm
from models.unet_layers import Double, GroupNorm
from runtime.cpu.kernels import DERIVATIVE, SHARE, _evaluate, attention, plain_attention, with_cpu_kernels
from tests.small_networks import SMALL, new_network


@pytest.fixture
def traced():
    """`trace(layer)` returns the layer as a compiler sees it, run eagerly, and a list that collects its graphs."""
    torch._dynamo.reset()

    def trace(layer):
        graphs = []
        return torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True), graphs

    return trace


def compiled(layer):
    """The layer traced for compilation, but run eagerly by torch."""
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)


def new_gelu():
    return with_cpu_kernels(nn.GELU(approximate="tanh"))


def _values_and_gradients(layer, weights, x, slope):
    x = x.clone().requires_grad_()
    value = layer(x)
    return [value, *torch.autograd.grad(value, [x, *weights], slope.to(value.dtype))]


@pytest.mark.parametrize("leading", [(6,), (3, 5)])
def test_a_linear_layer_equals_torchs_eager_and_compiled(leading, traced):
    torch.manual_seed(0)
    x, slope, torchs = torch.randn(*leading, 8), torch.randn(*leading, 4), nn.Linear(8, 4)
    ours = with_cpu_kernels(copy.deepcopy(torchs))
    compiled, graphs = traced(ours)
    expected = _values_and_gradients(torchs, list(torchs.parameters()), x, slope)
    for layer in (ours, compiled):
        found = _values_and_gradients(layer, list(ours.parameters()), x, slope)
        torch.testing.assert_close(found, expected)
    assert ("autograd_function_apply" in graphs[0].code) == (len(leading) > 1)


def test_a_compiled_linear_layer_rounds_as_autocast_does_but_not_the_gradient_of_its_bias(traced):
    torch.manual_seed(0)
    x, slope, layer = torch.randn(3, 5, 64), torch.randn(3, 5, 4), with_cpu_kernels(nn.Linear(64, 4))
    expected = _values_and_gradients(layer, list(layer.parameters()), x, slope)
    compiled, graphs = traced(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = _values_and_gradients(compiled, list(layer.parameters()), x, slope)
    assert found[0].dtype == torch.bfloat16
    assert [value.dtype for value in found[1:]] == 3 * [torch.float32]
    for mine, exact in zip(found, expected, strict=True):
        assert 1e-5 < (mine - exact).norm() / exact.norm() < 1e-2
    rounded = slope.bfloat16().float().sum((0, 1))
    torch.testing.assert_close(found[3], rounded, atol=1e-6, rtol=1e-6)
    assert len(graphs) == 1


def test_a_compiled_linear_layer_gives_the_same_bits_for_weights_stored_in_low_precision(traced):
    torch.manual_seed(0)
    x, layer = torch.randn(3, 5, 64), with_cpu_kernels(nn.Linear(64, 4)).requires_grad_(False)
    compiled, graphs = traced(layer)
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            values.append(compiled(x))
    assert torch.equal(*values)
    assert len(graphs) == 2


def test_gelus_polynomials_are_accurate_to_a_third_of_bfloat16s_rounding():
    x = torch.linspace(-12, 12, 24001)
    wide = x.double().requires_grad_()
    exact = functional.gelu(wide, approximate="tanh")
    (slopes,) = torch.autograd.grad(exact.sum(), wide)
    assert (x * _evaluate(SHARE, x) - exact).abs().max() < 1e-4
    assert (_evaluate(DERIVATIVE, x) - slopes).abs().max() < 6e-4


def test_compiled_gelu_uses_the_polynomials(traced):
    x = torch.linspace(-12, 12, 2401).bfloat16().requires_grad_()
    compiled, graphs = traced(new_gelu())
    found = compiled(x)
    (slopes,) = torch.autograd.grad(found.sum(), x)
    wide = x.detach().float()
    assert torch.equal(found, (wide * _evaluate(SHARE, wide)).bfloat16())
    assert torch.equal(slopes, _evaluate(DERIVATIVE, wide).bfloat16())
    assert len(graphs[0].graph.find_nodes(op="placeholder")) == 1  # the coefficients are constants
    assert "amax" in "".join(module.code for module in graphs[0].modules() if isinstance(module, torch.fx.GraphModule))


def test_gelu_is_torchs_in_eager_mode_and_in_float32(traced):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.linspace(-8, 8, 257, dtype=dtype)
        assert torch.equal(new_gelu()(x), functional.gelu(x, approximate="tanh"))
    compiled, graphs = traced(new_gelu())
    assert torch.equal(compiled(x.float()), functional.gelu(x.float(), approximate="tanh"))
    assert "gelu" in graphs[0].code


def test_compiled_gelu_of_extreme_values_and_nan(traced):
    x = torch.tensor([[-1e3, 1e3, 1e30, float("nan")], [-1e3, 0.0, 1.0, 1e3]]).bfloat16().requires_grad_()
    compiled, graphs = traced(new_gelu())
    values = compiled(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    found, x = values[0], x[0]
    assert found[0].abs() < 1e-3
    assert torch.equal(found[1:3], x[1:3])
    assert found[3].isnan()
    assert slopes[0].isnan().all()
    torch.testing.assert_close(slopes[1].float(), torch.tensor([0.0, 0.5, 1.0830, 1.0]), atol=1e-2, rtol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_label_lookup_has_a_deterministic_gradient(dtype):
    table = with_cpu_kernels(nn.Embedding(5, 8).to(dtype))
    labels, graphs = torch.tensor([[0, 4], [3, 0]]), []
    compiled = torch.compile(table, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.autocast("cpu", torch.bfloat16):  # autocast must not round the rows
        ours, torchs = compiled(labels), table(labels)
    assert torch.equal(ours, torchs)
    slope = torch.randn(2, 2, 8, dtype=dtype)
    found, wanted = (torch.autograd.grad(rows, table.weight, slope)[0] for rows in (ours, torchs))
    torch.testing.assert_close(found, wanted)
    assert "one_hot" in graphs[0].code
    assert "embedding(" not in graphs[0].code


@pytest.mark.parametrize(
    ("layer", "torchs"),
    [(nn.GroupNorm(2, 4), "group_norm"), (GroupNorm(2, 4), "group_norm"), (Double(), "interpolate")],
)
def test_compilers_see_our_formulas(layer, torchs, traced):
    for swapped in (False, True):
        compiled, graphs = traced(with_cpu_kernels(layer) if swapped else layer)
        compiled(torch.randn(1, 4, 2, 2))
        assert len(graphs) == 1
        assert (torchs in graphs[0].code) == (not swapped)


def gradients(function, inputs):
    """The value, and the gradients of its sum weighted with random numbers."""
    value = function(*inputs)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value)
    return value, *torch.autograd.grad((value * weights).sum(), inputs)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    ("groups", "shape"), [(8, (3, 32, 5, 6)), (8, (3, 32, 7)), (4, (2, 4, 3, 3)), (1, (2, 6, 4, 4))]
)
def test_a_compiled_norm_equals_torchs(groups, shape, offset):
    torch.manual_seed(0)
    x = offset + torch.randn(shape)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    norm = with_cpu_kernels(GroupNorm(groups, shape[1]))
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
    norm, x = with_cpu_kernels(GroupNorm(4, 16)), torch.randn(2, 16, 8, 8)
    low = compiled(norm)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, norm(x.bfloat16().float()).bfloat16(), rtol=8e-3, atol=1e-6)


def test_compiled_upsampling_repeats_every_value():
    torch.manual_seed(0)
    x, layer = torch.randn(2, 3, 4, 5, requires_grad=True), with_cpu_kernels(Double())
    value, gradient = gradients(compiled(layer), (x,))
    assert torch.equal(value, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(gradient, gradients(lambda x: x.kron(torch.ones(2, 2)), (x,))[1])


def attended(dtype, length, kernel, needs_gradient=True):
    """Whether attention on `length` tokens has the same bits as `kernel`."""
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(1, 2, length, 8, generator=generator).to(dtype) for _ in range(3)]
    with torch.set_grad_enabled(needs_gradient):
        return torch.equal(attention(*inputs), kernel(*inputs))


def test_attention_is_plain_only_on_short_sequences_in_bfloat16():
    fused = functional.scaled_dot_product_attention
    for length, needs_gradient in ((16, False), (256, True)):
        assert attended(torch.bfloat16, length, plain_attention, needs_gradient)
        assert not attended(torch.bfloat16, length, fused, needs_gradient)
        assert attended(torch.bfloat16, length + 1, fused, needs_gradient)
        assert not attended(torch.bfloat16, length + 1, plain_attention, needs_gradient)
        assert attended(torch.float32, length, fused, needs_gradient)


def test_plain_attention_is_the_formula():
    query, key, value = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    expected = functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(plain_attention(query, key, value), expected)


@pytest.mark.parametrize("model_type", SMALL)
def test_replacing_layers_keeps_parameters_names_and_eager_float32_results(model_type):
    torch.manual_seed(0)
    network = new_network(model_type, SMALL[model_type]).requires_grad_(True)
    x, condition = torch.randn(2, 3, 8, 8), Condition(torch.tensor([0, 1]))

    def results(network):
        velocity = network(torch.tensor(0.3), x, condition)
        weights = list(network.parameters())
        gradients = torch.autograd.grad(velocity.square().sum(), weights, allow_unused=True)
        return [tensor for tensor in (velocity, *gradients) if tensor is not None]

    parameters, state, before = dict(network.named_parameters()), network.state_dict(), results(network)
    classes = [type(module) for module in network.modules()]
    assert with_cpu_kernels(network) is network
    after = dict(network.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(network.state_dict()) == list(state)
    for module, before_swap in zip(network.modules(), classes, strict=True):
        assert isinstance(module, before_swap)
    assert [type(module) for module in network.modules()] != classes
    copied = copy.deepcopy(network)
    assert [type(module) for module in copied.modules()] == [type(module) for module in network.modules()]
    for swapped in (network, copied):
        for mine, old in zip(results(swapped), before, strict=True):
            assert torch.equal(mine, old)


def test_replacing_layers_twice_has_no_further_effect():
    network = with_cpu_kernels(new_network("adm", SMALL["adm"]))
    classes = [type(module) for module in network.modules()]
    assert [type(module) for module in with_cpu_kernels(network).modules()] == classes


def test_replaced_layers_are_instances_of_their_original_class():
    norms = nn.ModuleList([Norm(32, 1e-6), Norm(64, 1e-6)])
    first, second = with_cpu_kernels(norms)
    assert type(first) is type(second)
    assert type(first).__name__ == "Norm"
    assert isinstance(first, Norm)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 2, bias=False),
        nn.GELU(),
        nn.GroupNorm(1, 2, affine=False),
        nn.Embedding(3, 2, padding_idx=0),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Upsample(scale_factor=3),
        nn.Upsample(size=4),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(1, 1, 1),
    ],
    ids=str,
)
def test_layers_with_other_settings_are_not_replaced(layer):
    before = type(layer)
    assert type(with_cpu_kernels(layer)) is before


def test_attention_is_replaced_in_modules_with_an_attend_attribute():
    network = with_cpu_kernels(new_network("DiT-Mi/2", SMALL["DiT-Mi/2"]))
    assert {block.attn.attention for block in network.blocks} == {attention}


class ScaledNorm(nn.GroupNorm):
    def forward(self, x, scale):
        return scale * super().forward(x)


class NormalizedLinear(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight / self.weight.norm(), self.bias)


class NamedLinear(nn.Linear):
    """Differs from nn.Linear only in its name."""


def test_layers_that_override_forward_are_not_replaced():
    norm, linear, named = ScaledNorm(2, 4), NormalizedLinear(4, 4), NamedLinear(4, 4)
    with_cpu_kernels(nn.ModuleList([norm, linear, named]))
    assert (type(norm), type(linear)) == (ScaledNorm, NormalizedLinear)
    assert isinstance(named, NamedLinear)
    assert type(named) is not NamedLinear
    assert norm(torch.zeros(1, 4, 3), 2.0).shape == (1, 4, 3)
