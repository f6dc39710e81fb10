"""Few-step objectives on the device: a step that trains an interval, compared with the CPU, and compiled."""

from dataclasses import replace

import pytest
import torch

from flow.objectives import OBJECTIVES
from models.conditions import Condition
from runtime.precision import Machine
from tests.small_networks import SMALL, new_network
from training.data import Batch, StepStreams
from training.optimizers import OptimizerOptions
from training.state import TrainingState

CPU = torch.device("cpu")
NAMES = [name for name, family in OBJECTIVES.items() if family.trains_averages]
SHAPE = (4, 3, 8, 8)
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 5e-2}  # of the gradients' norm, relative to float32 on a CPU


def gradient_after_a_step(name, machine):
    """The norm of the gradients [1] of a step that trains intervals, which the state logs."""
    variance = name == "decoupled_mean_flow"
    options = replace(SMALL["DiT-Mi/2"], until_embedding="decoupled", log_variance_head=variance)
    network = new_network("DiT-Mi/2", options).requires_grad_(True).train()
    network.pos_embed.requires_grad_(False)
    state = TrainingState(network, machine, 0.9, OptimizerOptions(lr=1e-3))
    family = OBJECTIVES[name]
    objective = family.build(family.options() if name == "consistency" else replace(family.options(), flow_share=0.0))
    generator = torch.Generator().manual_seed(3)
    data, noise = torch.randn(2, *SHAPE, generator=generator).to(machine.device)
    draws = objective.draw(StepStreams(7, 0, SHAPE[0], SHAPE[1:], CPU))
    draws = type(draws)(*(value.to(machine.device) if torch.is_tensor(value) else value for value in draws))
    batch = Batch(data, noise, draws, Condition(torch.arange(4, device=machine.device) % 2))
    state.advance(machine.compiled(network, always_alike=False), objective, batch, 1e-3, grad_clip=0.0)
    assert not state.take_skipped()
    return state.sums[1].item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_the_gradient_of_float32_on_a_cpu(name, precision, device, report):
    expected = gradient_after_a_step(name, Machine(CPU, "fp32"))
    found = gradient_after_a_step(name, Machine(device, precision))
    error = abs(found / expected - 1)
    report(f"a step of {name} in {precision}: norm of the gradient {error:.1e}")
    assert error < LARGEST_ERROR[precision]


@pytest.mark.parametrize("name", ["decoupled_mean_flow", "alpha_flow"])
def test_a_compiled_step_has_the_same_gradient(name, device):
    expected = gradient_after_a_step(name, Machine(device, "fp32"))
    assert gradient_after_a_step(name, Machine(device, "fp32", compile=True)) == pytest.approx(expected, rel=1e-3)
