"""Preparing a network for inference keeps its results bit for bit."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from models.conditions import Condition, DenseInput
from models.dit import DiTOptions
from runtime.cpu.kernels import with_cpu_kernels
from runtime.inference import compile_for_batches, hold_weights
from runtime.precision import Machine
from tests.small_networks import SMALL, new_network

BF16, FP32 = (Machine(torch.device("cpu"), precision) for precision in ("bf16", "fp32"))


def evaluate(network, machine, batch_size=4, condition=None):
    generator = torch.Generator().manual_seed(1)
    t, x = torch.rand(batch_size, generator=generator), torch.randn(batch_size, 3, 8, 8, generator=generator)
    with torch.no_grad(), machine.autocast():
        return network(t, x, condition or Condition(torch.arange(batch_size) % 2))


@pytest.mark.parametrize("model_type", SMALL)
def test_precast_weights_change_no_bit(model_type):
    network = new_network(model_type, SMALL[model_type])
    held = hold_weights(copy.deepcopy(network), BF16)
    assert torch.equal(evaluate(held, BF16), evaluate(network, BF16))
    assert not torch.equal(evaluate(network, BF16), evaluate(network, FP32))  # autocast does change the result
    layers = [layer for layer in held.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    others = [layer for layer in held.modules() if isinstance(layer, nn.Embedding | nn.GroupNorm)]
    assert all(layer.weight.dtype == torch.float32 for layer in others)


@pytest.mark.parametrize("model_type", SMALL)
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_low_precision_changes_the_velocity_little(model_type, precision, bound):
    network = new_network(model_type, SMALL[model_type])
    exact, low = evaluate(network, FP32), evaluate(network, Machine(torch.device("cpu"), precision)).float()
    assert 0 < (low - exact).norm() < bound * exact.norm()


def test_precast_weights_with_a_dense_map():
    options = DiTOptions(num_in_channels=5, num_out_channels=3)
    network = new_network("DiT-Mi/2", options, DenseInput(2, classes=4))
    condition = Condition(None, torch.rand(4, 4, 8, 8))
    held = hold_weights(copy.deepcopy(network), BF16)
    assert torch.equal(evaluate(held, BF16, condition=condition), evaluate(network, BF16, condition=condition))


def test_float32_and_trainable_weights_are_not_cast():
    network = new_network("DiT-Mi/2", SMALL["DiT-Mi/2"])
    assert all(parameter.dtype == torch.float32 for parameter in hold_weights(network, FP32).parameters())
    trained = hold_weights(network.requires_grad_(True), BF16)
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


@pytest.mark.parametrize("model_type", SMALL)
def test_one_graph_for_all_batch_sizes(monkeypatch, model_type):
    graphs = []

    def compile_by_counting(network, options):
        return torch._dynamo.optimize(lambda graph, inputs: graphs.append(graph) or graph.forward)(network)

    network = new_network(model_type, SMALL[model_type])
    monkeypatch.setattr(torch, "compile", compile_by_counting)
    compiled = compile_for_batches(network, FP32)
    for batch_size in (4, 8, 3):
        torch.testing.assert_close(
            evaluate(compiled, FP32, batch_size), evaluate(network, FP32, batch_size), rtol=1e-3, atol=1e-4
        )
    assert len(graphs) == 1


def velocity_and_gradients(function, weights, autocast):
    generator = torch.Generator().manual_seed(1)
    t, x, slope = torch.rand(4, generator=generator), *torch.randn(2, 4, 3, 8, 8, generator=generator)
    with autocast:
        velocity = function(t, x, Condition(torch.arange(4) % 2)).float()
    gradients = torch.autograd.grad(velocity, weights, slope, allow_unused=True)
    return velocity.detach(), *(gradient for gradient in gradients if gradient is not None)


def trained_network(model_type, checkpointing):
    options = dataclasses.replace(SMALL[model_type], use_grad_checkpointing=checkpointing)
    network = new_network(model_type, options).requires_grad_(True).train(checkpointing)
    return network, list(network.parameters())


def compiled_network(model_type, checkpointing=False):
    torch._dynamo.reset()
    network, weights = trained_network(model_type, checkpointing)
    compiled = Machine(torch.device("cpu"), "bf16", compile=True).compiled(network)
    return compiled, network, weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", SMALL)
def test_formulas_for_compilers_give_the_same_velocity_and_gradients(model_type, checkpointing):
    torch._dynamo.reset()
    network, weights = trained_network(model_type, checkpointing)
    compiled = torch.compile(with_cpu_kernels(network), backend="eager", fullgraph=True)
    ours, eager = (velocity_and_gradients(function, weights, FP32.autocast()) for function in (compiled, network))
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "checkpointing"), [*((name, False) for name in SMALL), ("DiT-Mi/2", True)])
def test_compiled_bfloat16_is_as_accurate_as_eager_bfloat16(model_type, checkpointing):
    compiled, network, weights = compiled_network(model_type, checkpointing)
    exact = velocity_and_gradients(network, weights, FP32.autocast())
    sides = (velocity_and_gradients(function, weights, BF16.autocast()) for function in (compiled, network))
    for mine, eager, theirs in zip(*sides, exact, strict=True):
        assert (mine - theirs).norm() < 2 * (eager - theirs).norm() + 0.02 * theirs.norm() + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SMALL)
def test_threads_of_a_compiled_network_add_in_one_order(model_type):
    compiled, _, weights = compiled_network(model_type)
    with fresh_cache():
        _, codes = run_and_get_code(velocity_and_gradients, compiled, weights, BF16.autocast())
    assert len(codes) == 2  # both passes
    assert not any("atomic_add" in code for code in codes)
