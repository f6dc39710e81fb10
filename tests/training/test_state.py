import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional

from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions, straight_path
from models.conditions import Condition
from models.dit import DiT, DiTOptions, hidden_matrices
from runtime.precision import Machine
from tests.small_networks import SMALL, new_network
from training.data import Batch
from training.optimizers import OptimizerOptions
from training.state import TrainingState

OBJECTIVE = FlowMatching(PathOptions(sigma_min=1e-5))
MACHINE = Machine(torch.device("cpu"), "fp32")


def tiny_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiT(4, 2, 16, 1, 2, DiTOptions(2, 2, num_classes=3, label_dropout=0.1))


def new_state(optimizer="adamw", weight_decay=0.01):
    options = OptimizerOptions(optimizer=optimizer, lr=1e-2, weight_decay=weight_decay)
    return TrainingState(tiny_network(), MACHINE, 0.99, options, hidden_matrices=hidden_matrices)


def batch_of(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 4, 2, 4, 4, generator=generator)
    return Batch(data * scale, noise, Times(torch.rand(4, generator=generator)), Condition(torch.tensor([0, 1, 2, 3])))


def advance(state, batch, grad_clip=0.0, rate=1e-2):
    state.advance(state.network, OBJECTIVE, batch, rate, grad_clip)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


def trained_tensors(state):
    """Copies of the weights, the optimizer state and the EMA."""
    return {
        "network": tensors(state.network.state_dict()),
        "optimizers": [t for optimizer in state.optimizers for t in tensors(optimizer.state_dict()["state"])],
        "ema": tensors(state.ema.weights),
    }


def differing(one, other):
    return {name for name in one if not all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))}


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e25])  # 1e25: finite prediction, infinite square
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(scale, grad_clip, at, optimizer):
    state = new_state(optimizer)
    for seed in range(at):
        advance(state, batch_of(seed), grad_clip)
    before, sums = trained_tensors(state), state.sums.clone()
    advance(state, batch_of(99, scale), grad_clip)
    after = trained_tensors(state)
    if at == 0:  # the optimizer state is newly created and must be all zeros
        assert not any(tensor.any() for tensor in after.pop("optimizers"))
        before.pop("optimizers")
    assert differing(before, after) == set()
    assert state.step == at + 1
    assert torch.equal(state.sums, sums + torch.tensor([0.0, 0.0, 1.0, 1.0]))
    advance(state, batch_of(5), grad_clip)  # training continues
    assert differing(after, {name: trained_tensors(state)[name] for name in after}) == set(after)
    assert torch.isfinite(torch.cat([tensor.flatten().float() for tensor in trained_tensors(state)["network"]])).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_does_not_affect_the_next_step(optimizer):
    state, undisturbed = new_state(optimizer), new_state(optimizer)
    for seed in range(3):
        advance(state, batch_of(seed))
        advance(undisturbed, batch_of(seed))
        if seed == 1:
            advance(state, batch_of(99, float("nan")))
    assert differing(trained_tensors(state), trained_tensors(undisturbed)) == set()
    assert (state.step, undisturbed.step) == (4, 3)


def test_sums_add_up_losses_and_gradient_norms():
    state, batch = new_state(), batch_of(0)
    network = copy.deepcopy(state.network)
    x_t, target = straight_path(batch.draws.t, batch.data, batch.noise, 1e-5)
    loss = functional.mse_loss(network(batch.draws.t, x_t, batch.condition), target)
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    advance(state, batch, grad_clip=norm.item() / 2)
    assert state.sums.tolist() == pytest.approx([loss.item(), norm.item(), 0.0, 1.0], rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in state.parameters if p.grad is not None]).norm()
    assert clipped.item() == pytest.approx(norm.item() / 2, rel=1e-4)


def test_advance_uses_the_given_learning_rate():
    """Without weight decay, Adam's first step has the size of the learning rate for any gradient."""
    for rate in (1e-3, 1e-2):
        state = new_state(weight_decay=0.0)
        before = state.network.final_layer.linear.weight.detach().clone()
        advance(state, batch_of(0), rate=rate)
        moved = (state.network.final_layer.linear.weight - before).abs()
        assert moved.max().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_training_state_continues_bit_for_bit(optimizer):
    state = new_state(optimizer)
    for seed in range(3):
        advance(state, batch_of(seed), 0.5)
    state.seconds, state.best = 12.5, 0.25
    content = copy.deepcopy(state.content())
    other = new_state(optimizer)
    advance(other, batch_of(50))  # must not matter
    other.restore(content)
    assert (other.step, other.seconds, other.best) == (3, 12.5, 0.25)
    for one in (state, other):
        for seed in range(3, 6):
            advance(one, batch_of(seed), 0.5)
    assert differing(trained_tensors(state), trained_tensors(other)) == set()
    assert torch.equal(state.sums, other.sums)


def test_the_fixed_position_table_is_not_trained():
    state = new_state()
    before = state.network.pos_embed.clone()
    advance(state, batch_of(0))
    assert torch.equal(state.network.pos_embed, before)
    assert all(parameter is not state.network.pos_embed for parameter in state.parameters)


def test_muons_learning_rate_follows_the_resumed_runs_options():
    state, other = (
        new_state("muon"),
        TrainingState(
            tiny_network(),
            MACHINE,
            0.99,
            OptimizerOptions(optimizer="muon", lr=2e-2, muon_lr=0.02),
            hidden_matrices=hidden_matrices,
        ),
    )
    advance(state, batch_of(0))
    other.restore(state.content())
    assert [group["relative_lr"] for optimizer in other.optimizers for group in optimizer.param_groups] == [1.0, 1.0]


def half_state():
    return TrainingState(tiny_network(), Machine(torch.device("cpu"), "fp16"), 0.99, OptimizerOptions(lr=1e-2))


def test_loss_scaling_in_half_precision_trains_like_float32():
    half, exact = half_state(), new_state(weight_decay=0.0)
    for seed in range(5):
        for state in (half, exact):
            advance(state, batch_of(seed))
    assert half.scaler.get_scale() == 2.0**16  # so the gradients were unscaled
    torch.testing.assert_close(half.sums, exact.sums, rtol=2e-3, atol=0)
    start, ours, theirs = (
        torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (tiny_network(), half.network, exact.network)
    )
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


def test_an_overflow_in_half_precision_skips_the_step_and_lowers_the_scale():
    state = half_state()
    advance(state, batch_of(0))
    before = trained_tensors(state)
    advance(state, batch_of(1, 1e6))
    assert differing(before, trained_tensors(state)) == set()
    assert state.scaler.get_scale() == 2.0**15
    restored = half_state()
    restored.restore(state.content())
    assert restored.scaler.state_dict() == state.scaler.state_dict()


@pytest.mark.parametrize("model_type", SMALL)
def test_optimizer_state_is_restored_in_the_weights_memory_format(model_type):
    """Optimizer state from --fsdp runs or LFM's code is contiguous, but U-Nets' weights are in channels-last memory format."""

    def state_of_small_network():
        network = new_network(model_type, SMALL[model_type]).requires_grad_(True)
        return TrainingState(network, MACHINE, 0.9, OptimizerOptions())

    torch.manual_seed(0)
    data, noise = torch.randn(2, 4, 3, 8, 8)
    batch = Batch(data, noise, Times(torch.rand(4)), Condition(torch.arange(4) % 2))
    state, other = state_of_small_network(), state_of_small_network()
    advance(state, batch)
    content = copy.deepcopy(state.content())
    for moments in content["optimizers"][0]["state"].values():
        moments.update({name: value.contiguous() for name, value in moments.items()})
    other.restore(content)
    advance(state, batch)
    advance(other, batch)
    assert differing(trained_tensors(state), trained_tensors(other)) == set()


@pytest.mark.parametrize("model_type", SMALL)
def test_power_averages_are_restored_and_skip_bad_steps(model_type):
    def state_of_small_network():
        network = new_network(model_type, SMALL[model_type]).requires_grad_(True)
        return TrainingState(network, MACHINE, 0.9, OptimizerOptions(), posthoc_ema=(0.05, 0.1))

    torch.manual_seed(0)
    data, noise = torch.randn(2, 4, 3, 8, 8)
    batch = Batch(data, noise, Times(torch.rand(4)), Condition(torch.arange(4) % 2))
    state, other = state_of_small_network(), state_of_small_network()
    advance(state, batch)
    assert all(torch.equal(v, state.power_averages[0].weights[n]) for n, v in state.network.state_dict().items())
    advance(state, batch._replace(data=data * float("nan")))
    other.restore(copy.deepcopy(state.content()))
    for each in (state, other):
        advance(each, batch)
        assert [average.updates.item() for average in each.power_averages] == [2, 2]
    for one, same in zip(state.power_averages, other.power_averages, strict=True):
        assert all(torch.equal(value, same.weights[name]) for name, value in one.weights.items())
    wide, narrow = (state.power_averages[index].weights for index in (1, 0))
    assert any(not torch.equal(value, narrow[name]) for name, value in wide.items())


class Valueless(FakeTensorMode):
    """Tensors created in this mode have no values and cannot be read, nor can their copies."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # torch's own code causes this warning
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_synchronize_with_the_host(optimizer, precision):
    with Valueless():
        network, options = tiny_network(), OptimizerOptions(optimizer=optimizer, lr=1e-2)
        state = TrainingState(
            network,
            replace(MACHINE, precision=precision),
            0.99,
            options,
            move=lambda module: module,
            hidden_matrices=hidden_matrices,
            posthoc_ema=(0.05, 0.1),
        )
        labels = torch.zeros(4, dtype=torch.long)
        batch = Batch(*torch.rand(2, 4, 2, 4, 4), Times(torch.rand(4)), Condition(labels))
        state.advance(network, OBJECTIVE, batch, 1e-2, grad_clip=1.0, accumulation=2)
        with pytest.raises(DataDependentOutputException):
            state.sums.tolist()
