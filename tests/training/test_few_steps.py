"""Few-step objectives in the training loop: exact resume, gradient accumulation, and what a step evaluates."""

from dataclasses import replace

import pytest
import torch

from flow.objectives import OBJECTIVES
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from runtime.precision import Machine
from tests.training.test_loop import (
    STEPS,
    assert_same_metrics_up_to_rounding,
    assert_same_run,
    new_run,
    send_signal,
)
from training.data import batches
from training.loop import train
from training.optimizers import OptimizerOptions
from training.state import TrainingState

NETWORKS = {
    "mean_flow": DiTOptions(1, 1, num_classes=2, label_dropout=0.2, until_embedding="interval"),
    "decoupled_mean_flow": DiTOptions(
        1, 1, num_classes=2, label_dropout=0.2, until_embedding="decoupled", log_variance_head=True
    ),
    "alpha_flow": DiTOptions(1, 1, num_classes=2, label_dropout=0.2, until_embedding="decoupled"),
    "consistency": DiTOptions(1, 1, num_classes=2, label_dropout=0.2, until_embedding="interval"),
}


def run_of(folder, name, options=None, **changes):
    """A run of test_loop.py with a few-step objective."""
    run, family, network = new_run(folder, **changes), OBJECTIVES[name], NETWORKS[name]
    path = family.options(**{"flow_share": 0.5} | (options or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run.network = DiT(4, 2, 16, 3, 2, network)
    run.header = replace(run.header, network=network, objective=name, path=path)
    run.objective = family.build(path)
    run.validation = replace(run.validation, header=run.header, objective=run.objective)
    return run


@pytest.mark.parametrize("name", ["decoupled_mean_flow", "alpha_flow"])
def test_an_interrupted_run_resumes_bit_for_bit(name, tmp_path):
    """Also where the objective depends on the step and the length of the run."""
    options = {"target_kappa": 0.5}
    assert train(run_of(tmp_path / "whole", name, options), resume=False)
    event = (STEPS // 2, send_signal(2))
    assert not train(run_of(tmp_path / "parts", name, options, event=event), resume=False)
    assert train(run_of(tmp_path / "parts", name, options), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_gradient_accumulation_gives_the_same_run_up_to_rounding(tmp_path):
    options = {"target_kappa": 0.5}
    for parts in (1, 2):
        train(run_of(tmp_path / str(parts), "mean_flow", options, grad_accumulation=parts, max_steps=4), resume=False)
    assert_same_metrics_up_to_rounding(tmp_path / "1", tmp_path / "2", rel=1e-3)


def batch_of(run, step=0, last_step=STEPS):
    """A step's batch."""
    keywords = {"batch_size": 8, "first_step": step, "last_step": last_step, "seed": 3, "flips": False}
    keywords |= {"num_classes": 2, "label_dropout": 0.5, "device": torch.device("cpu"), "processes": run.processes}
    return next(batches(run.source, run.autoencoder, run.objective, **keywords, path=run.header.path))


def test_guided_targets_get_the_null_condition_of_the_batch(tmp_path):
    run = run_of(tmp_path, "mean_flow", {"target_kappa": 0.5})
    batch = batch_of(run)
    assert torch.equal(batch.draws.kept, batch.condition.labels != 2)
    assert 0 < batch.draws.kept.sum() < 8
    assert batch.draws.null == Condition(batch.draws.null.labels)
    assert batch.draws.null.labels.tolist() == [2] * 8
    first, second = batch.split(2)
    assert len(first.draws.null.labels) == len(second.draws.kept) == 4
    plain = batch_of(run_of(tmp_path, "mean_flow"))
    assert plain.draws.null is plain.draws.kept is None
    assert torch.equal(plain.draws.t, batch.draws.t)
    assert torch.equal(plain.noise, batch.noise)


def test_the_schedule_knows_the_length_of_the_run(tmp_path):
    run = run_of(tmp_path, "alpha_flow", {"flow_share": 0.0})
    assert batch_of(run, step=7, last_step=14).draws.fraction[0].item() == pytest.approx(0.5)
    assert batch_of(run, step=7, last_step=1400).draws.fraction is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_derivative_runs_in_float32_on_the_bare_network(precision, tmp_path):
    """The wrapped network is evaluated once with gradients, in the run's precision."""
    run = run_of(tmp_path, "mean_flow", {"flow_share": 0.0})
    state = TrainingState(run.network, Machine(torch.device("cpu"), precision), 0.9, OptimizerOptions())
    seen = []
    state.network.final_layer.linear.register_forward_hook(
        lambda module, inputs, output: seen.append((output.dtype, torch.is_grad_enabled()))
    )
    calls = []

    def wrapped(*arguments, **inputs):
        calls.append(inputs)
        return state.network(*arguments, **inputs)

    state.advance(wrapped, run.objective, batch_of(run), 1e-3, 0.0)
    assert len(calls) == 1
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == [(torch.float32, False), (dtype, True)]
    assert state.sums[3] == 1
    assert state.sums[2] == 0


def test_a_plain_step_is_unchanged_by_an_embedding_of_the_interval():
    """Loss and gradients of flow matching are the same bits for a network with the decoupled `until`."""
    data, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    family, losses = OBJECTIVES["flow_matching"], []
    for until in ("none", "decoupled"):
        torch.manual_seed(0)
        network = DiT(4, 2, 16, 3, 2, replace(NETWORKS["alpha_flow"], until_embedding=until))
        objective = family.build(family.options())
        loss = objective.loss(network, data, noise, objective.at(torch.rand(4)), Condition(torch.tensor([0, 1, 2, 0])))
        loss.sum().backward()
        losses.append([loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


def test_validation_compares_with_flow_matching(tmp_path):
    run = run_of(tmp_path / "run", "consistency")
    plain = replace(run.validation, objective=OBJECTIVES["flow_matching"].build(OBJECTIVES["flow_matching"].options()))
    assert run.validation.evaluate(run.network) == plain.evaluate(run.network)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "decoupled_mean_flow"])
def test_a_compiled_network_gives_the_same_gradients(name, tmp_path):
    """The prediction is compiled; the derivative runs uncompiled."""
    gradients = []
    for compiled in (False, True):
        run = run_of(tmp_path, name, {"flow_share": 0.0})
        machine = Machine(torch.device("cpu"), "fp32", compile=compiled)
        state = TrainingState(run.network, machine, 0.9, OptimizerOptions())
        state.advance(machine.compiled(state.network), run.objective, batch_of(run), 1e-3, 0.0)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in state.parameters]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
