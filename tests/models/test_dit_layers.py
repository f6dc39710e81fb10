"""The layers of transformers compute what torch's and timm's do, compiled or not."""

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional

from models.dit_layers import Gelu, Linear, PatchEmbed


def _traced(layer):
    """The layer as a compiler sees it, and the list of the graphs that will come of it, run as they are."""
    graphs = []
    return torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph), graphs


def _values_and_gradients(layer, weights, x, slope):
    x = x.clone().requires_grad_()
    value = layer(x)
    return [value, *torch.autograd.grad(value, [x, *weights], slope.to(value.dtype))]


@pytest.mark.parametrize("leading", [(6,), (3, 5)])
def test_a_linear_layer_is_torchs_compiled_and_not(leading):
    torch.manual_seed(0)
    x, slope, torchs, ours = torch.randn(*leading, 8), torch.randn(*leading, 4), nn.Linear(8, 4), Linear(8, 4)
    ours.load_state_dict(torchs.state_dict())
    compiled, graphs = _traced(ours)
    expected = _values_and_gradients(torchs, list(torchs.parameters()), x, slope)
    for layer in (ours, compiled):
        found = _values_and_gradients(layer, list(ours.parameters()), x, slope)
        torch.testing.assert_close(found, expected)
    assert "autograd_function_apply" in graphs[0].code


def test_a_compiled_linear_layer_computes_in_autocasts_precision_and_keeps_its_bias_in_float32():
    torch.manual_seed(0)
    x, slope, layer = torch.randn(3, 5, 64), torch.randn(3, 5, 4), Linear(64, 4)
    expected = _values_and_gradients(layer, list(layer.parameters()), x, slope)
    compiled, _ = _traced(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = _values_and_gradients(compiled, list(layer.parameters()), x, slope)
    assert found[0].dtype == torch.bfloat16
    assert [value.dtype for value in found[1:]] == 3 * [torch.float32]
    for mine, exact in zip(found, expected, strict=True):
        assert 1e-5 < (mine - exact).norm() / exact.norm() < 1e-2
    rounded = slope.bfloat16().float().sum((0, 1))
    torch.testing.assert_close(found[3], rounded, atol=1e-6, rtol=1e-6)  # not rounded again


def test_compiled_gelu_is_torchs_within_a_third_of_bfloat16s_rounding_near_one():
    x = torch.linspace(-12, 12, 24001).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = functional.gelu(wide, approximate="tanh")
    (slopes,) = torch.autograd.grad(exact.sum(), wide)
    compiled, graphs = _traced(Gelu())
    found = compiled(x)
    (found_slopes,) = torch.autograd.grad(found.sum(), x)
    half_a_unit = 2**-8
    assert ((found - exact).abs() < 1e-4 + half_a_unit * exact.abs()).all()
    assert ((found_slopes - slopes).abs() < 6e-4 + half_a_unit * slopes.abs()).all()
    assert "gelu" not in graphs[0].code
    assert len(graphs[0].graph.find_nodes(op="placeholder")) == 1  # the coefficients are constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_torchs_own_where_nothing_is_compiled_and_in_float32(dtype):
    x = torch.linspace(-8, 8, 257, dtype=dtype)
    assert torch.equal(Gelu()(x), functional.gelu(x, approximate="tanh"))
    if dtype == torch.float32:
        assert torch.equal(_traced(Gelu())[0](x), functional.gelu(x, approximate="tanh"))


def test_compiled_gelu_is_zero_or_the_identity_far_out_and_spreads_what_is_not_a_number():
    x = torch.tensor([-1e30, -1e3, 1e3, 1e30, float("nan")]).bfloat16()
    found = _traced(Gelu())[0](x)
    assert torch.equal(found[:2], torch.zeros(2).bfloat16())
    assert torch.equal(found[2:4], x[2:4])
    assert found[4].isnan()


@pytest.mark.parametrize(("patch", "sides"), [(1, (3, 3)), (2, (4, 6)), (4, (8, 4))])
def test_tokens_of_patches_are_timms_convolution(patch, sides):
    torch.manual_seed(0)
    timms = timm.layers.PatchEmbed(None, patch, 3, 16, strict_img_size=False)
    ours = PatchEmbed(None, patch, 3, 16, strict_img_size=False)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 3, *sides)
    tokens = ours(x)
    torch.testing.assert_close(tokens, timms(x))
    assert tokens.is_contiguous()
    assert torch.equal(tokens, ours.requires_grad_(False)(x))
