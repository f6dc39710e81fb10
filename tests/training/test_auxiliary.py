"""Auxiliary losses in training: what the options build, what they refuse, and that a plain run is unchanged."""

import json
from dataclasses import fields, replace

import pytest
import torch

from flow.auxiliary.losses import AuxiliaryOptions
from flow.auxiliary.objective import WithAuxiliary, auxiliary_names
from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.edm_unet import EdmUNetOptions
from options import UsageError
from runtime.precision import Machine
from tests.training.test_loop import CONTRASTED, EVERY_SWITCH, assert_same_run, new_run, send_signal
from training.auxiliary.setup import EncoderOptions, add_auxiliary, check_auxiliary, load_encoder
from training.data import Batch
from training.loop import train
from training.optimizers import OptimizerOptions
from training.state import TrainingState

OBJECTIVE = FlowMatching(PathOptions())
NETWORK = DiTOptions(1, 1, num_classes=2, label_dropout=0.2)
HEADS = replace(NETWORK, tap_block=1, auxiliary_velocity=0.5, align_latents=1.0)
NONE = AuxiliaryOptions()
EVERYTHING = AuxiliaryOptions(dispersive=0.25, auxiliary_until=5)


def run_of(folder, network=HEADS, auxiliary=EVERYTHING, **changes):
    """A run of test_loop.py with auxiliary losses."""
    run = new_run(folder, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run.network = DiT(4, 2, 16, 1, 2, network)
    run.header = replace(run.header, network=network, auxiliary=auxiliary)
    run.objective = add_auxiliary(run.objective, network, auxiliary)
    return run


def test_without_weights_the_objective_is_itself():
    assert add_auxiliary(OBJECTIVE, NETWORK, NONE) is OBJECTIVE
    off = replace(NETWORK, tap_block=3, route_blocks=(1, 2), route_rate=0.0)
    assert add_auxiliary(OBJECTIVE, off, AuxiliaryOptions(dispersive=0.0, auxiliary_until=9)) is OBJECTIVE
    assert add_auxiliary(OBJECTIVE, EdmUNetOptions(), NONE) is OBJECTIVE


def test_terms_have_the_options_weights():
    network = replace(HEADS, align_features=0.7)
    objective = add_auxiliary(OBJECTIVE, network, EVERYTHING)
    found = {name: (term.weight, term.ends) for name, term in objective.terms.items()}
    assert found == {
        "auxiliary_velocity": (0.5, False),
        "align_latents": (1.0, True),
        "align_features": (0.7, True),
        "dispersive": (0.25, True),
    }
    assert objective.until == 5
    assert not objective.routes
    assert add_auxiliary(OBJECTIVE, replace(NETWORK, route_blocks=(0, 1), route_rate=0.5), NONE).routes


@pytest.mark.parametrize(
    ("network", "auxiliary", "encoder", "given", "message"),
    [
        (
            EdmUNetOptions(),
            NONE,
            "",
            {"dispersive": 2},
            "--dispersive needs a transformer: choose a DiT with --model_type",
        ),
        (EdmUNetOptions(), NONE, "", {"align_encoder": "x"}, "--align_encoder needs a transformer"),
        (NETWORK, AuxiliaryOptions(dispersive=1.0), "", {}, "--dispersive needs --tap_block K"),
        (replace(HEADS, align_features=0.5), NONE, "", {}, "--align_features needs --align_encoder as well"),
        (HEADS, NONE, "test_vit", {}, "--align_encoder needs --align_features as well"),
    ],
)
def test_options_that_do_not_fit_are_refused(network, auxiliary, encoder, given, message):
    with pytest.raises(UsageError, match=message):
        check_auxiliary(network, auxiliary, EncoderOptions(encoder), given)


def test_options_without_effect_are_noted(capsys):
    check_auxiliary(HEADS, EVERYTHING, EncoderOptions(), {})
    assert capsys.readouterr().err == ""
    check_auxiliary(replace(NETWORK, tap_block=1), NONE, EncoderOptions(), {})
    assert "--tap_block has no effect" in capsys.readouterr().err
    only_velocity = replace(NETWORK, tap_block=1, auxiliary_velocity=0.5)
    check_auxiliary(only_velocity, AuxiliaryOptions(auxiliary_until=3), EncoderOptions(), {})
    assert "--auxiliary_until has no effect" in capsys.readouterr().err


def test_without_an_encoder_nothing_is_loaded():
    assert load_encoder(EncoderOptions(), HEADS) == (None, HEADS)


def test_a_step_without_auxiliary_losses_is_unchanged():
    """The heads exist but have no weight: loss, gradients and weights equal those of a network without them, bit for bit."""
    data, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = Batch(data, noise, Times(torch.rand(4)), Condition(torch.tensor([0, 1, 2, 0])))
    states = []
    for network in (NETWORK, HEADS):
        torch.manual_seed(0)
        state = TrainingState(
            DiT(4, 2, 16, 1, 2, network), Machine(torch.device("cpu"), "fp32"), 0.9, OptimizerOptions()
        )
        for _ in range(3):
            state.advance(state.network, OBJECTIVE, batch, 1e-2, 1.0)
        states.append(state)
    one, other = (state.network.state_dict() for state in states)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(states[0].sums, states[1].sums)


def test_auxiliary_losses_train_their_heads_and_are_logged(tmp_path):
    run = run_of(tmp_path / "run")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    assert auxiliary_names(run.objective) == ("auxiliary_velocity", "align_latents", "dispersive")
    assert train(run, resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert all(line["align_latents"] > 0 > line["dispersive"] for line in logged)
    assert logged[-1]["align_latents"] < logged[0]["align_latents"]
    assert all("align_latents" not in line for line in lines if line["kind"] == "validation")
    after = run.network.state_dict()
    heads = [name for name in after if name.startswith(("auxiliary_head", "projectors"))]
    assert len(heads) == 14
    assert not any(torch.equal(before[name], after[name]) for name in heads)


def test_a_run_with_auxiliary_losses_resumes_bit_for_bit(tmp_path):
    assert train(run_of(tmp_path / "whole", grad_accumulation=2), resume=False)
    folder = tmp_path / "interrupted"
    assert not train(run_of(folder, grad_accumulation=2, event=(3, send_signal(15))), resume=False)
    assert train(run_of(folder, grad_accumulation=2), resume=True)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("path", [CONTRASTED, EVERY_SWITCH])
def test_with_other_losses_and_blocks_a_run_resumes_bit_for_bit(tmp_path, path):
    blocks = replace(HEADS, class_tokens=1, rope=True, norm="rms_affine", shared_adaln=True)
    routed = replace(blocks, route_blocks=(0, 1), route_rate=0.5)
    settings = {"network": routed, "path": path, "posthoc_ema": (0.05, 0.1)}
    assert train(run_of(tmp_path / "whole", **settings), resume=False)
    folder = tmp_path / "interrupted"
    assert not train(run_of(folder, event=(3, send_signal(15)), **settings), resume=False)
    assert train(run_of(folder, **settings), resume=True)
    assert_same_run(folder, tmp_path / "whole")


def test_losses_that_have_ended_leave_the_weights_to_the_others(tmp_path):
    """A run whose alignment ends at step 0 gives the weights of a run without it; its projector keeps its first values."""
    only_velocity = replace(HEADS, align_latents=0.0)
    ended, never = run_of(tmp_path / "a", HEADS), run_of(tmp_path / "b", only_velocity, AuxiliaryOptions())
    ended.objective.until = -1
    projector = {name: value.clone() for name, value in ended.network.state_dict().items() if "projectors" in name}
    assert train(ended, resume=False)
    assert train(never, resume=False)
    found = ended.network.state_dict()
    for name, value in never.network.state_dict().items():
        # Adam moves weights whose gradient is only rounding error, too, but far less than a hundredth of its total way.
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)
    assert all(torch.equal(found[name], value) for name, value in projector.items())


def test_every_option_of_the_losses_is_recorded():
    stored = {field.name for field in fields(AuxiliaryOptions)}
    assert stored == {"dispersive", "dispersive_tau", "align_normalization", "auxiliary_until"}
    assert isinstance(add_auxiliary(OBJECTIVE, HEADS, EVERYTHING), WithAuxiliary)
