"""A network made ready for evaluation gives the same bits as before."""

import copy

import pytest
import torch
from torch import nn

from models.conditions import Condition, DenseInput
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.plain_unet import PlainUNetOptions
from models.registry import ORIGIN_ADM, build_network
from runtime.inference import compile_for_batches, hold_weights
from runtime.precision import Machine

BF16, FP32 = (Machine(torch.device("cpu"), precision) for precision in ("bf16", "fp32"))
UNET = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "num_in_channels": 3}
CASES = {
    "DiT-Mi/2": DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1),
    "adm": EdmUNetOptions(**UNET, num_out_channels=3, label_dim=2),
    "ncsn++": EdmUNetOptions(**UNET, num_out_channels=3, label_dim=2),
    ORIGIN_ADM: GuidedUNetOptions(**UNET | {"attn_resolutions": (2,)}, num_out_channels=3, num_classes=2),
    "unet": PlainUNetOptions(num_in_channels=3, num_out_channels=3, num_classes=2),
}


def new_network(model_type, options, dense=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(model_type, 8, options, dense).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def evaluate(network, machine, batch_size=4, condition=None):
    generator = torch.Generator().manual_seed(1)
    t, x = torch.rand(batch_size, generator=generator), torch.randn(batch_size, 3, 8, 8, generator=generator)
    with torch.no_grad(), machine.autocast():
        return network(t, x, condition or Condition(torch.arange(batch_size) % 2))


@pytest.mark.parametrize("model_type", CASES)
def test_held_weights_change_no_bit(model_type):
    network = new_network(model_type, CASES[model_type])
    held = hold_weights(copy.deepcopy(network), BF16)
    assert torch.equal(evaluate(held, BF16), evaluate(network, BF16))
    assert not torch.equal(evaluate(network, BF16), evaluate(network, FP32))  # that is, autocast did cast
    layers = [layer for layer in held.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    others = [layer for layer in held.modules() if isinstance(layer, nn.Embedding | nn.GroupNorm)]
    assert all(layer.weight.dtype == torch.float32 for layer in others)


@pytest.mark.parametrize("model_type", CASES)
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_low_precision_moves_the_velocity_little(model_type, precision, bound):
    network = new_network(model_type, CASES[model_type])
    exact, low = evaluate(network, FP32), evaluate(network, Machine(torch.device("cpu"), precision)).float()
    assert 0 < (low - exact).norm() < bound * exact.norm()


def test_held_weights_with_a_dense_map():
    options = DiTOptions(num_in_channels=5, num_out_channels=3)
    network = new_network("DiT-Mi/2", options, DenseInput(2, classes=4))
    condition = Condition(None, torch.rand(4, 4, 8, 8))
    held = hold_weights(copy.deepcopy(network), BF16)
    assert torch.equal(evaluate(held, BF16, condition=condition), evaluate(network, BF16, condition=condition))


def test_float32_and_trained_weights_are_left_alone():
    network = new_network("DiT-Mi/2", CASES["DiT-Mi/2"])
    assert all(parameter.dtype == torch.float32 for parameter in hold_weights(network, FP32).parameters())
    trained = hold_weights(network.requires_grad_(True), BF16)
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_one_graph_for_all_batch_sizes(monkeypatch):
    graphs = []

    def compile_by_counting(network, options):
        return torch._dynamo.optimize(lambda graph, inputs: graphs.append(graph) or graph.forward)(network)

    network = new_network("DiT-Mi/2", CASES["DiT-Mi/2"])
    monkeypatch.setattr(torch, "compile", compile_by_counting)
    compiled = compile_for_batches(network)
    for batch_size in (4, 8, 3):
        torch.testing.assert_close(evaluate(compiled, FP32, batch_size), evaluate(network, FP32, batch_size))
    assert len(graphs) == 1


@pytest.mark.parametrize("model_type", CASES)
def test_forms_for_compilers_have_the_same_velocity_and_gradients(model_type):
    network = new_network(model_type, CASES[model_type]).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    t, x, slope = torch.rand(4, generator=generator), *torch.randn(2, 4, 3, 8, 8, generator=generator)
    weights = [parameter for parameter in network.parameters() if parameter.is_floating_point()]

    def all_of(function):
        velocity = function(t, x, Condition(torch.arange(4) % 2))
        return velocity.detach(), *torch.autograd.grad(velocity, weights, slope, allow_unused=True)

    for mine, theirs in zip(all_of(torch.compile(network, backend="eager")), all_of(network), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
