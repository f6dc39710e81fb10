"""The layers of transformers compute what torch's and timm's do, compiled or not."""

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional

from models.transformer_layers import DERIVATIVE, SHARE, Gelu, Linear, PatchEmbed, _evaluate


@pytest.fixture
def traced():
    """Turns a layer into what a compiler sees, and the list of the graphs that will come of it, run as they are."""
    torch._dynamo.reset()

    def trace(layer):
        graphs = []
        return torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True), graphs

    return trace


def _values_and_gradients(layer, weights, x, slope):
    x = x.clone().requires_grad_()
    value = layer(x)
    return [value, *torch.autograd.grad(value, [x, *weights], slope.to(value.dtype))]


@pytest.mark.parametrize("leading", [(6,), (3, 5)])
def test_a_linear_layer_is_torchs_compiled_and_not(leading, traced):
    torch.manual_seed(0)
    x, slope, torchs, ours = torch.randn(*leading, 8), torch.randn(*leading, 4), nn.Linear(8, 4), Linear(8, 4)
    ours.load_state_dict(torchs.state_dict())
    compiled, graphs = traced(ours)
    expected = _values_and_gradients(torchs, list(torchs.parameters()), x, slope)
    for layer in (ours, compiled):
        found = _values_and_gradients(layer, list(ours.parameters()), x, slope)
        torch.testing.assert_close(found, expected)
    assert "autograd_function_apply" in graphs[0].code


def test_a_compiled_linear_layer_rounds_as_autocast_does_but_not_the_gradient_of_its_bias(traced):
    torch.manual_seed(0)
    x, slope, layer = torch.randn(3, 5, 64), torch.randn(3, 5, 4), Linear(64, 4)
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


def test_a_compiled_linear_layer_gives_the_same_bits_if_its_weights_are_held_in_low_precision(traced):
    torch.manual_seed(0)
    x, layer = torch.randn(3, 5, 64), Linear(64, 4).requires_grad_(False)
    compiled, graphs = traced(layer)
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            values.append(compiled(x))
    assert torch.equal(*values)
    assert len(graphs) == 2


def test_gelus_polynomials_are_its_formula_within_a_third_of_bfloat16s_rounding_near_one():
    x = torch.linspace(-12, 12, 24001)
    wide = x.double().requires_grad_()
    exact = functional.gelu(wide, approximate="tanh")
    (slopes,) = torch.autograd.grad(exact.sum(), wide)
    assert (x * _evaluate(SHARE, x) - exact).abs().max() < 1e-4
    assert (_evaluate(DERIVATIVE, x) - slopes).abs().max() < 6e-4


def test_compiled_gelu_is_made_of_the_polynomials(traced):
    x = torch.linspace(-12, 12, 2401).bfloat16().requires_grad_()
    compiled, graphs = traced(Gelu())
    found = compiled(x)
    (slopes,) = torch.autograd.grad(found.sum(), x)
    wide = x.detach().float()
    assert torch.equal(found, (wide * _evaluate(SHARE, wide)).bfloat16())
    assert torch.equal(slopes, _evaluate(DERIVATIVE, wide).bfloat16())
    assert len(graphs[0].graph.find_nodes(op="placeholder")) == 1  # the coefficients are constants
    assert "amax" in "".join(module.code for module in graphs[0].modules() if isinstance(module, torch.fx.GraphModule))


def test_gelu_is_torchs_own_where_nothing_is_compiled_and_in_float32(traced):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.linspace(-8, 8, 257, dtype=dtype)
        assert torch.equal(Gelu()(x), functional.gelu(x, approximate="tanh"))
    compiled, graphs = traced(Gelu())
    assert torch.equal(compiled(x.float()), functional.gelu(x.float(), approximate="tanh"))
    assert "gelu" in graphs[0].code


def test_compiled_gelu_is_zero_or_the_identity_far_out_and_spreads_what_is_not_a_number(traced):
    x = torch.tensor([[-1e3, 1e3, 1e30, float("nan")], [-1e3, 0.0, 1.0, 1e3]]).bfloat16().requires_grad_()
    compiled, graphs = traced(Gelu())
    values = compiled(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    found, x = values[0], x[0]
    assert found[0].abs() < 1e-3
    assert torch.equal(found[1:3], x[1:3])
    assert found[3].isnan()
    assert slopes[0].isnan().all()
    torch.testing.assert_close(slopes[1].float(), torch.tensor([0.0, 0.5, 1.0830, 1.0]), atol=1e-2, rtol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize(("patch", "sides"), [(1, (3, 3)), (2, (4, 6)), (4, (8, 4))])
def test_tokens_of_patches_are_timms_convolution(patch, sides):
    torch.manual_seed(0)
    timms = timm.layers.PatchEmbed(None, patch, 3, 16, strict_img_size=False)
    ours = PatchEmbed(patch, 3, 16)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 3, *sides)
    tokens = ours(x)
    torch.testing.assert_close(tokens, timms(x))
    assert tokens.is_contiguous()
    assert torch.equal(tokens, ours.requires_grad_(False)(x))
