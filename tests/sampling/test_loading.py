"""Loading a sampler: flags are compared with the header, and solver and guidance can be changed."""

from dataclasses import replace

import pytest
import torch

from checkpoints.files import load_model, save_weights
from datasets_prep.datasets import DatasetFacts
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import AutoencoderFacts
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError, as_json
from runtime.precision import MachineOptions
from sampling import loading
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


@pytest.fixture
def scaled(tmp_path):
    """`scaled(facts, flag=value, ...)` loads a sampler of a checkpoint with this scale of its latents."""
    torch.manual_seed(0)
    new_autoencoder_kl(3, (8, 16), 3, 8, {"scaling_factor": 0.5}).save_pretrained(tmp_path / "ae")
    sha256 = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3).describe().sha256
    weights = build_network("DiT-Mi/4", 8, NETWORK).state_dict()

    def load(scale_factor, mean, std, statistics, /, **given):
        facts = AutoencoderFacts(str(tmp_path / "ae"), sha256, scale_factor, mean, std, statistics)
        data, path = DatasetFacts("folder", 16, 3, None, True, ("cat", "dog")), tmp_path / "scaled.safetensors"
        save_weights(path, weights, header_of(NETWORK, "DiT-Mi/4", 8, dataset=data, autoencoder=facts))
        machine = MachineOptions(device="cpu", precision="fp32", compile=False)
        options = AutoencoderOptions(
            **{key: value for key, value in given.items() if key in vars(AutoencoderOptions())}
        )
        return load_sampler(
            SamplerRequest(
                SourceOptions(str(path)), SolverOptions("euler", 2), machine=machine, autoencoder=options, given=given
            )
        )

    return load


@pytest.mark.parametrize("moved", [False, True])
def test_statistics_are_compared_with_the_header(scaled, tmp_path, moved):
    torch.save({"mean": torch.full((3,), 0.5), "std": torch.full((3,), 2.0)}, tmp_path / "mine.pt")
    mine = {"latent_statistics": str(tmp_path / "mine.pt")}
    more = {"pretrained_autoencoder_ckpt": str(tmp_path / "ae")} if moved else {}
    own, file = (None, (0.0,) * 3, (2.0,) * 3, ""), (None, (0.5,) * 3, (2.0,) * 3, "latents_stats.pt")
    with pytest.raises(
        UsageError,
        match=r"mine.pt \(mean 0.5 .* 2 2 2\) contradicts .*scaled.safetensors, whose latents have mean 0 0 0 ",
    ):
        scaled(*own, **mine, **more)
    with pytest.raises(UsageError, match=r"measured contradicts .* mean 0.5 0.5 0.5 .* \(latents_stats.pt\)"):
        scaled(*file, latent_statistics="measured", **more)
    scaled(*file[:3], "measured", latent_statistics="measured", **more)
    scaled(*file, **mine, **more)
    times_half = (0.5, (0.5,) * 3, (4.0,) * 3, "latents_stats.pt")  # training combined the file with --scale_factor 0.5
    scaled(*times_half, **mine, **more)
    scaled(*times_half, **mine, scale_factor=0.5, **more)
    with pytest.raises(UsageError, match=r"--scale_factor 0.25 contradicts .* which has 0.5"):
        scaled(*times_half, **mine, scale_factor=0.25, **more)


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


def test_a_guide_of_latents_with_another_scale_is_refused(tmp_path):
    torch.manual_seed(0)
    new_autoencoder_kl(3, (8, 16), 3, 8, {}).save_pretrained(tmp_path / "ae")
    facts = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3).describe()
    half = replace(facts, latents_std=tuple(value / 2 for value in facts.latents_std))
    data = DatasetFacts("folder", 16, 3, None, True, ("cat", "dog"))
    weights = build_network("DiT-Mi/4", 8, NETWORK).state_dict()
    for name, autoencoder in (("model", facts), ("same", facts), ("half", half)):
        header = header_of(NETWORK, "DiT-Mi/4", 8, dataset=data, autoencoder=autoencoder)
        save_weights(tmp_path / f"{name}.safetensors", weights, header)

    def load(guide):
        source = SourceOptions(
            str(tmp_path / "model.safetensors"), guide_checkpoint=str(tmp_path / f"{guide}.safetensors")
        )
        machine = MachineOptions(device="cpu", precision="fp32", compile=False)
        guidance = GuidanceOptions(cfg_scale=2.0)
        return load_sampler(SamplerRequest(source, SolverOptions("euler", 2), guidance, machine=machine))

    load("same")
    with pytest.raises(UsageError, match=r"--guide_checkpoint .*half.safetensors: .* standard deviations \(2.7"):
        load("half")


def test_a_guide_may_be_another_projects_file_that_flags_of_the_guided_network_do_not_describe(
    request_of, tmp_path, monkeypatch
):
    request, seen = request_of(dataset="folder", image_size=8, num_classes=2), []
    guide = load_model(request.source.checkpoint)

    def opened(path, given, device):
        seen.append((path.name, dict(given)))
        return guide

    monkeypatch.setattr(loading, "open_published", opened)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "guide.pt")
    source = replace(request.source, guide_checkpoint=str(tmp_path / "guide.pt"))
    loaded = load_sampler(replace(request, source=source, guidance=GuidanceOptions(cfg_scale=2.0)))
    assert loaded.sampler.guide is not None
    assert seen == [("guide.pt", {"dataset": "folder", "image_size": 8})]


def test_a_guide_that_cannot_be_opened_is_named(request_of, tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "guide.pt")
    request = request_of(dataset="folder", image_size=8)
    source = replace(request.source, guide_checkpoint=str(tmp_path / "guide.pt"))
    with pytest.raises(UsageError, match=r"--guide_checkpoint .*guide\.pt: .*convert the file first"):
        load_sampler(replace(request, source=source, guidance=GuidanceOptions(cfg_scale=2.0)))
