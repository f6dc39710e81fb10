"""Resuming a run of LFM's code: the next step is the one that its own optimizer would have taken."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch

from models.conditions import DenseConditioned, DenseInput
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.torch_files import save_content
from tests.headers import header_of
from training.optimizers import OptimizerOptions
from training.resume import resume_run
from training.state import TrainingState

MACHINE = Machine(torch.device("cpu"), "fp32")
OPTIONS = DiTOptions(2, 2, num_classes=3, label_dropout=0.1)
HEADER = header_of(OPTIONS)


def new_network(seed, options=OPTIONS):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network("DiT-Mi/2", 4, options)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network


def fill_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def published_run(averaged=True, options=OPTIONS):
    """A network, LFM's AdamW optimizer for all of its parameters, and their content.pth."""
    network = new_network(1, options)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    for seed in range(3):
        fill_gradients(network, seed)
        optimizer.step()
    for number, parameter in enumerate(network.parameters()):
        if averaged and parameter.requires_grad:
            optimizer.state[parameter]["ema"] = torch.full_like(parameter, number)
    content = {
        "epoch": 4,
        "global_step": 40,
        "args": argparse.Namespace(lr=1e-3),
        "model_dict": {f"module.{name}": value for name, value in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 4},
    }
    return network, optimizer, copy.deepcopy(content)


def new_state():
    return TrainingState(new_network(2), MACHINE, 0.99, OptimizerOptions())


def test_weights_ema_optimizer_state_and_epoch_are_taken_over(tmp_path):
    network, optimizer, content = published_run()
    torch.save(content, tmp_path / "content.pth")
    state = new_state()
    line = resume_run(state, tmp_path / "content.pth", per_epoch=10, header=HEADER)
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    assert f"{trained} EMA weights, optimizer state of {trained} of {trained} trained parameters, and epoch 4" in line
    assert state.step == 40
    for name, value in network.state_dict().items():
        assert torch.equal(state.network.state_dict()[name], value), name
    for number, (name, parameter) in enumerate(state.ema.network.named_parameters()):
        expected = network.pos_embed if name == "pos_embed" else torch.full_like(parameter, number)
        assert torch.equal(parameter, expected), name
    fill_gradients(network, 9)
    fill_gradients(state.network, 9)
    before = state.network.blocks[0].attn.qkv.weight.clone()
    for one in (optimizer, *state.optimizers):
        one.param_groups[0]["lr"] = 1e-3
        one.step()
    assert (state.network.blocks[0].attn.qkv.weight - before).abs().max() > 1e-5
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state.network.state_dict()[name], value, atol=1e-7, rtol=1e-6, msg=name)


def test_without_lfms_ema_the_ema_starts_from_the_weights(tmp_path):
    network, _, content = published_run(averaged=False)
    torch.save(content, tmp_path / "content.pth")
    state = new_state()
    assert "no EMA weights" in resume_run(state, tmp_path / "content.pth", 10, HEADER)
    for name, value in network.state_dict().items():
        assert torch.equal(state.ema.weights[name], value), name


def test_the_ema_does_not_warm_up_again_after_a_long_run(tmp_path):
    _, _, content = published_run()
    torch.save(content | {"epoch": 1000}, tmp_path / "content.pth")
    state = new_state()
    resume_run(state, tmp_path / "content.pth", 10, HEADER)
    before, current = (
        state.ema.weights["blocks.0.attn.proj.bias"].clone(),
        state.network.blocks[0].attn.proj.bias.detach(),
    )
    state.ema.update(state.network)
    torch.testing.assert_close(state.ema.weights["blocks.0.attn.proj.bias"], 0.99 * before + 0.01 * current)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999, 0.0])
def test_the_ema_does_not_warm_up_again_after_a_short_run(decay, tmp_path):
    """LFM's EMA has no warmup. Step 9 of a warmup would have the decay 0.55."""
    _, _, content = published_run()
    torch.save(content | {"epoch": 1}, tmp_path / "content.pth")
    state = TrainingState(new_network(2), MACHINE, decay, OptimizerOptions())
    resume_run(state, tmp_path / "content.pth", 9, HEADER)
    assert state.step == 9
    before, current = (
        state.ema.weights["blocks.0.attn.proj.bias"].clone(),
        state.network.blocks[0].attn.proj.bias.detach(),
    )
    state.ema.update(state.network)
    torch.testing.assert_close(state.ema.weights["blocks.0.attn.proj.bias"], decay * before + (1 - decay) * current)


@pytest.mark.parametrize("part", ["network", "ema"])
def test_a_training_state_that_is_not_finite_gives_way_to_the_previous_one(part, tmp_path, capsys):
    state, other = new_state(), new_state()
    state.step = 7
    save_content(tmp_path / "content.previous.pth", state.content())
    broken = state.network if part == "network" else state.ema.network
    with torch.no_grad():
        broken.final_layer.linear.bias[:2] = torch.inf
    save_content(tmp_path / "content.pth", state.content())
    assert resume_run(other, tmp_path / "content.pth", 10, HEADER) == "content.previous.pth"
    assert other.step == 7
    assert "not finite (NaN or infinity): final_layer.linear.bias (2 of " in capsys.readouterr().err


def test_our_own_content_pth_is_restored_completely(tmp_path):
    state, other = new_state(), new_state()
    fill_gradients(state.network, 1)
    state.optimizers[0].step()
    state.step = 17
    save_content(tmp_path / "content.pth", state.content())
    assert resume_run(other, tmp_path / "content.pth", 10, HEADER) == "content.pth"
    assert other.step == 17
    assert all(
        torch.equal(value, other.network.state_dict()[name]) for name, value in state.network.state_dict().items()
    )


def test_another_networks_content_pth_is_refused_with_a_suggestion(tmp_path):
    _, _, content = published_run()
    torch.save(content, tmp_path / "content.pth")
    options = DiTOptions(2, 2, num_classes=5, label_dropout=0.1)
    network = build_network("DiT-Mi/2", 4, options)
    state = TrainingState(network, MACHINE, 0.99, OptimizerOptions())
    header = replace(HEADER, network=options)
    with pytest.raises(UsageError, match=r"embedding_table.* the file would fit with --num_classes 3$"):
        resume_run(state, tmp_path / "content.pth", 10, header)
    torch.save({name: value for name, value in content.items() if name != "epoch"}, tmp_path / "content.pth")
    with pytest.raises(UsageError, match="does not record its epoch"):
        resume_run(new_state(), tmp_path / "content.pth", 10, HEADER)


def test_lfms_inpainting_run_resumes_inside_the_wrapper(tmp_path):
    """The wrapper adds `network.` to parameter names, but each parameter still receives its own optimizer state."""
    options = DiTOptions(5, 2, num_classes=3, label_dropout=0.1)
    network, optimizer, content = published_run(options=options)
    torch.save(content, tmp_path / "content.pth")
    wrapped = DenseConditioned(new_network(2, options), DenseInput(3))
    state = TrainingState(wrapped, MACHINE, 0.99, OptimizerOptions())
    header = replace(HEADER, network=options, dense=DenseInput(3))
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    line = resume_run(state, tmp_path / "content.pth", per_epoch=10, header=header)
    assert f"{trained} EMA weights, optimizer state of {trained} of {trained} trained parameters" in line
    for name, value in network.state_dict().items():
        assert torch.equal(wrapped.network.state_dict()[name], value), name
    inner = dict(wrapped.network.named_parameters())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            for moment in ("exp_avg", "exp_avg_sq"):
                found = state.optimizers[0].state[inner[name]][moment]
                assert torch.equal(found, optimizer.state[parameter][moment]), name
            assert torch.equal(state.ema.weights[name], optimizer.state[parameter]["ema"]), name


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["ema"].pop("updates"),
        lambda content: content["ema"].pop("weights"),
        lambda content: content.update(ema=3),
        lambda content: content.update(sums="x"),
        lambda content: content["optimizers"].append(content["optimizers"][0]),
        lambda content: content["optimizers"][0].pop("state"),
    ],
)
def test_a_training_state_that_lacks_inner_entries_is_one_line(change, tmp_path):
    state = new_state()
    content = state.content(Processes())
    change(content)
    save_content(tmp_path / "content.pth", content)
    with pytest.raises(UsageError, match=r"content\.pth is not a complete training state .* --overwrite"):
        resume_run(new_state(), tmp_path / "content.pth", 10, HEADER)
