"""Loading a sampler: flags are compared with the header, and solver and guidance can be changed."""

import pytest
import torch

from checkpoints.files import save_weights
from datasets_prep.datasets import DatasetFacts
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError, as_json
from runtime.precision import MachineOptions
from sampling.loading import load_sampler
from sampling.request import SamplerRequest, SourceOptions, note_unused
from tests.headers import header_of

NETWORK = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2)


@pytest.fixture
def request_of(tmp_path):
    """`request_of(flag=value, ...)` returns a request to sample from a small checkpoint with these flags."""
    path = tmp_path / "model_1.safetensors"
    facts = DatasetFacts("folder", 8, 3, None, True, ("cat", "dog"))
    network = build_network("DiT-Mi/4", 8, NETWORK)
    save_weights(path, network.state_dict(), header_of(NETWORK, "DiT-Mi/4", 8, dataset=facts))

    def make(solver="euler", **given):
        machine = MachineOptions(device="cpu", precision="fp32", compile=False)
        return SamplerRequest(SourceOptions(str(path)), SolverOptions(solver, 2), machine=machine, given=given)

    return make


def test_flags_that_agree_with_the_header_are_accepted(request_of):
    loaded = load_sampler(request_of(dataset="folder", image_size=8, f=1, num_classes=2))
    assert loaded.sampler.latent_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("flag", "value", "stored"), [("image_size", 16, 8), ("f", 2, 1), ("dataset", "mnist", "folder")]
)
def test_a_flag_that_contradicts_the_header_names_both_values(request_of, flag, value, stored):
    with pytest.raises(UsageError, match=rf"--{flag} {value} contradicts .*model_1\.safetensors, which has {stored}:"):
        load_sampler(request_of(**{flag: value}))


def test_a_changed_solver_and_guidance_are_recorded(request_of):
    loaded = load_sampler(request_of())
    solver, guidance = SolverOptions("heun", 3), GuidanceOptions(2.0)
    changed = loaded.changed(solver, guidance)
    assert (changed.sampler.solver, changed.sampler.guidance) == (solver, guidance)
    assert changed.settings == {**loaded.settings, "solver": as_json(solver), "guidance": as_json(guidance)}
    assert (loaded.stem, changed.stem) == ("model_1_euler_2steps_cfg1_seed42", "model_1_heun_3steps_cfg2_seed42")
    assert torch.equal(loaded.sampler.noise([0]), changed.sampler.noise([0]))


def test_flags_without_effect_are_named_for_an_adaptive_solver(request_of, capsys):
    load_sampler(request_of("dopri5", time_grid="edm", num_steps=2, atol=1e-3))
    assert "note: --num_steps, --time_grid have no effect with the adaptive solver dopri5" in capsys.readouterr().err
    note_unused({"feather": 1}, ("resamplings",), "here")
    assert capsys.readouterr().err == ""
