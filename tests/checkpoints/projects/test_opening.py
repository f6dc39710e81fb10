"""Files of SiT, REPA, LightningDiT, MeanFlow and RAE give the golden velocities and start training."""

import argparse

import pytest
import torch

from checkpoints.conversion import from_published
from checkpoints.projects.opening import open_published, read_start
from checkpoints.projects.registry import PROJECTS
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SolverOptions, solve
from models.autoencoders.loading import AutoencoderOptions
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import Architecture, build_network
from options import UsageError
from runtime.precision import MachineOptions
from runtime.torch_files import save_content
from sampling.loading import load_sampler
from sampling.request import SamplerRequest, SourceOptions
from training.network import load_fitting_weights, new_network

NAMES = ["sit_learn_sigma", "repa_one_projector", "lightningdit_qknorm_patch2", "meanflow_sit", "ditdh"]
HEADS = {
    "sit_learn_sigma": {"model_heads": 4},
    "repa_one_projector": {"model_heads": 4},
    "meanflow_sit": {"model_heads": 4},
}
each_case = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def opened(case_of, weights_of, autoencoder_for, tmp_path):
    """`opened(name, change, **flags)` saves a case's file, after `change` to its content, and opens it with these flags."""

    def run(name, change=lambda weights: weights, **flags):
        case = case_of(name)
        path = tmp_path / "0400000.pt"
        torch.save(change(weights_of(case)), path)
        autoencoder = autoencoder_for(case.arguments["num_in_channels"])
        return open_published(path, {"pretrained_autoencoder_ckpt": autoencoder, **HEADS.get(name, {}), **flags}, "cpu")

    return run


def assert_golden(network, case, golden):
    tensors, condition = case.tensors, Condition(case.tensors["in.y"].long())
    velocity = network(tensors["in.t"], tensors["in.x"], condition)
    assert (velocity - tensors["out.velocity"]).abs().max() <= golden.LIMITS["velocity"]
    if "out.velocity_cfg" in tensors:
        null = Condition(torch.full_like(condition.labels, 10))
        guided = GuidedVelocity(network, condition, null, GuidanceOptions(case.cfg_scale))
        found = guided(tensors["in.t_cfg"].flatten()[0], tensors["in.x"])
        assert (found - tensors["out.velocity_cfg"]).abs().max() <= golden.limit("velocity_cfg", case.cfg_scale)


@each_case
def test_a_file_needs_no_flag_but_the_autoencoder_and_heads_that_nothing_shows(name, opened, case_of, golden, capsys):
    case, model = case_of(name), opened(name)
    assert_golden(model.network, case, golden)
    project, header = PROJECTS[case.arguments["model_type"]], model.header
    assert (header.published_form.project, header.network.reversed_time) == (project.name, project.reversed_time)
    assert (header.latent_size, header.dataset.name, header.dataset.image_size) == (8, "imagenet_256", 16)
    assert (header.num_classes, header.drops_labels) == (10, True)
    assert (
        f"{project.name}'s DiT/{case.arguments['patch_size']} with {len(case.weights)} weights"
        in capsys.readouterr().out
    )
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(key.startswith("projectors") for key in model.network.state_dict())


@pytest.mark.parametrize("name", ["sit_learn_sigma", "repa_one_projector", "meanflow_sit"])
def test_the_number_of_heads_is_asked_for_where_nothing_shows_it(name, opened):
    with pytest.raises(
        UsageError, match=r"0400000\.pt: .*width 64, shows the number of attention heads: add --model_heads"
    ):
        opened(name, model_heads=None)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "ema."])
@each_case
def test_wrappers_and_containers(name, prefix, opened, case_of, golden, capsys):
    def training_state(weights):
        averages = {prefix + key: value for key, value in weights.items()}
        raw = {key: value + 1 for key, value in weights.items()}
        run = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
        return {"model": raw, "ema": averages, "opt": {"state": {}, "param_groups": []}, "args": run, "steps": 3}

    model = opened(name, training_state)
    assert_golden(model.network, case_of(name), golden)
    assert (model.header.published_form.entry, model.header.published_form.prefix) == ("ema", prefix)
    assert "the weights in its entry ema are used, not those in model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lightningdit_qknorm_patch2", "ditdh"])
def test_the_sampling_script_draws_from_a_file(name, case_of, weights_of, autoencoder_for, call, tmp_path):
    case = case_of(name)
    torch.save({"ema": weights_of(case)}, tmp_path / "model.pt")
    flags = [
        "--checkpoint",
        tmp_path / "model.pt",
        "--method",
        "euler",
        "--num_steps",
        2,
        "--n_sample",
        2,
        "--precision",
        "fp32",
    ]
    autoencoder = ["--pretrained_autoencoder_ckpt", autoencoder_for(case.arguments["num_in_channels"])]
    code, _, err = call("test_flow_latent.py", [*flags, *autoencoder, "--output_dir", tmp_path / "images"])
    assert code == 0, err
    assert list((tmp_path / "images").glob("*.png"))


@each_case
def test_the_scripts_sampler_integrates_the_golden_velocity(
    name, case_of, weights_of, autoencoder_for, golden, tmp_path
):
    case, path = case_of(name), tmp_path / "model.pt"
    torch.save({"ema": weights_of(case)}, path)
    given = {"pretrained_autoencoder_ckpt": autoencoder_for(case.arguments["num_in_channels"]), **HEADS.get(name, {})}
    solvers = {"sample_1": SolverOptions("flow_map", 1), "sample_dopri5": SolverOptions("torchdiffeq_dopri5")}
    expected = next((each for each in solvers if f"out.{each}" in case.tensors), "velocity")
    solver = solvers.get(expected, SolverOptions())
    loaded = load_sampler(
        SamplerRequest(
            SourceOptions(str(path)),
            solver,
            machine=MachineOptions(device="cpu", precision="fp32", compile=False),
            autoencoder=AutoencoderOptions(given["pretrained_autoencoder_ckpt"]),
            given=given,
        )
    )
    velocity = loaded.sampler.velocity(case.tensors["in.y"].long())
    x, times = case.tensors["in.x"], case.tensors["in.t"]
    each = torch.stack([velocity(t, x)[number] for number, t in enumerate(times)])
    assert (each - case.tensors["out.velocity"]).abs().max() <= golden.LIMITS["velocity"]
    if expected in solvers:
        assert (solve(velocity, x, solver).x - case.tensors[f"out.{expected}"]).abs().max() <= golden.LIMITS[expected]


def test_a_file_that_several_projects_may_have_written_is_asked_about(opened, case_of, golden):
    """Without projectors, REPA's networks have the names of SiT's and of a LightningDiT without options."""

    def plain(weights):
        return {key: value for key, value in weights.items() if not key.startswith("projectors.")}

    with pytest.raises(
        UsageError,
        match=r"can be SiT, REPA, LightningDiT or LFM's DiT.*--model_type SiT/2, REPA/2, LightningDiT/2, or DiT/2 with",
    ):
        opened("repa_one_projector", plain)
    case = case_of("repa_one_projector")
    assert_golden(opened("repa_one_projector", plain, model_type="REPA/2").network, case, golden)
    other = opened("repa_one_projector", plain, model_type="SiT/2")
    assert (other.header.network.reversed_time, other.header.network.learn_sigma) == (True, False)
    t, x, condition = case.tensors["in.t"], case.tensors["in.x"], Condition(case.tensors["in.y"].long())
    assert (other.network(1 - t, x, condition) + case.tensors["out.velocity"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (
            "sit_learn_sigma",
            {"model_type": "SiT-XL/4"},
            r"--model_type SiT-XL/4 contradicts .*: expected patch side 4, width 1152",
        ),
        (
            "ditdh",
            {"model_type": "DiTDH-S"},
            r"expected width 384, depth 14, heads 6, but found width 64, depth 5, heads 4",
        ),
        ("ditdh", {"model_type": "DiTDH/2"}, r"DiTDH/2 contradicts .*expected patch side 2, but found patch side 1;"),
        (
            "lightningdit_qknorm_patch2",
            {"model_type": "LightningDiT/1"},
            r"expected patch side 1, but found patch side 2",
        ),
        ("sit_learn_sigma", {"model_type": "REPA/2"}, r"is no file of REPA .* another value of --learn_sigma"),
        ("ditdh", {"image_size": 15}, r"--image_size 15 is not a multiple of 2"),
        ("ditdh", {"pretrained_autoencoder_ckpt": "none"}, r"needs latents of 24 channels, but .* none have 3: give"),
    ],
)
def test_flags_that_contradict_the_file_are_refused(name, flags, message, opened):
    with pytest.raises(UsageError, match=message):
        opened(name, **flags)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("", "the autoencoder .* has none"), ("measured", "--latent_statistics measured needs the training images")],
)
def test_a_file_without_the_scale_of_its_latents_is_refused(source, reason, opened, monkeypatch):
    if not source:  # latent diffusion files have no scale
        monkeypatch.setattr("models.autoencoders.pretrained.own_scale", lambda *arguments: None)
    with pytest.raises(UsageError, match=f"0400000.pt does not record the scale of its latents, and {reason}"):
        opened("lightningdit_qknorm_patch2", latent_statistics=source)


def test_statistics_of_a_file_scale_the_latents(opened, tmp_path):
    torch.save({"mean": torch.zeros(8), "std": torch.full((8,), 3.0)}, tmp_path / "stats.pt")
    model = opened("lightningdit_qknorm_patch2", latent_statistics=str(tmp_path / "stats.pt"))
    assert model.header.autoencoder.latents_std == (3.0,) * 8


def test_a_model_type_without_patch_side_fits_any(opened, case_of, golden):
    assert_golden(opened("ditdh", model_type="DiTDH").network, case_of("ditdh"), golden)


def test_another_image_size_and_dataset_are_allowed(opened, capsys):
    model = opened("ditdh", image_size=24, dataset="folder")
    assert (model.header.latent_size, model.header.dataset.name) == (12, "folder")
    assert "position table recomputed" in capsys.readouterr().err
    assert model.network(torch.tensor(0.5), torch.randn(1, 24, 12, 12)).shape == (1, 24, 12, 12)


def old_repa(weights, first=1):
    """The names of older versions, where the blocks after the first ones are called `decoder_blocks`."""
    renamed = {}
    for name, value in weights.items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        renamed[name if number < first else f"decoder_blocks.{number - first}." + name.split(".", 2)[2]] = value
    return renamed


def test_repas_old_names_are_read(opened, case_of, golden):
    model = opened("repa_one_projector", old_repa)
    assert_golden(model.network, case_of("repa_one_projector"), golden)
    assert (model.header.published_form.project, model.header.network.tap_block) == ("REPA", 1)
    assert opened("repa_one_projector", lambda weights: old_repa(weights, 2)).header.network.tap_block == 2


def test_the_runs_arguments_tell_repas_block(opened):
    def with_arguments(weights):
        return {"ema": weights, "args": argparse.Namespace(encoder_depth=2, proj_coeff=0.25)}

    network = opened("repa_one_projector", with_arguments).header.network
    assert (network.tap_block, network.align_features, network.align_width, network.align_hidden) == (2, 0.25, 96, 128)
    network = opened("repa_one_projector").header.network
    assert (network.tap_block, network.align_features) == (3, 0.5)  # the network has only three blocks


def started(name, case_of, weights_of, path, golden, **changes):
    """A network for training that starts from a case's file, and its options."""
    case = case_of(name)
    torch.save(weights_of(case), path)
    options = DiTOptions(**{**vars(golden.project_options(case.arguments)), **changes})
    architecture = Architecture(f"DiT/{case.arguments['patch_size']}", 8, options)
    return new_network(architecture, 0, path, None), case


@each_case
def test_all_weights_start_a_network_for_training(name, case_of, weights_of, golden, tmp_path, capsys):
    network, case = started(name, case_of, weights_of, tmp_path / "model.pt", golden)
    assert f"loaded {len(case.weights)} of {len(case.weights)} weights\n" in capsys.readouterr().out
    assert_golden(network.eval(), case, golden)


@pytest.mark.parametrize(("name", "flag"), [("sit_learn_sigma", "add"), ("ditdh", "leave out")])
def test_a_run_with_the_other_direction_of_time_is_refused(name, flag, case_of, weights_of, golden, tmp_path):
    reverses = flag == "leave out"
    with pytest.raises(UsageError, match=rf"the network in .*model\.pt, a file of .*{flag} --reversed_time"):
        started(name, case_of, weights_of, tmp_path / "model.pt", golden, reversed_time=reverses)


def test_a_start_from_names_that_several_projects_have_takes_the_runs_direction(case_of, weights_of, tmp_path):
    weights = weights_of(case_of("repa_one_projector"))
    plain = {name: value for name, value in weights.items() if not name.startswith("projectors")}
    torch.save(plain, tmp_path / "model.pt")
    for reverses in (False, True):
        assert read_start(tmp_path / "model.pt", DiTOptions(reversed_time=reverses)).keys() == plain.keys()


@pytest.mark.parametrize("model_type", ["SiT-Mi/4", "REPA-Mi/4"])
def test_no_model_type_opens_a_training_state_of_this_project(model_type, autoencoder_for, tmp_path):
    weights = build_network("DiT-Mi/4", 8, DiTOptions(label_dropout=0.1)).state_dict()
    path = tmp_path / "content.pth"
    save_content(path, {"network": weights, "ema": {"weights": weights}, "step": 1})
    given = {"model_type": model_type, "pretrained_autoencoder_ckpt": autoencoder_for(4)}
    message = r"content\.pth is a training state for resuming a run"
    with pytest.raises(UsageError, match=message):
        open_published(path, given, "cpu")
    with pytest.raises(UsageError, match=message):
        from_published(path, tmp_path / "model.safetensors", given)


def test_a_training_state_of_this_project_is_no_file_of_another(tmp_path):
    options = DiTOptions(norm="rms_affine", mlp="swiglu", rope=True)
    weights = build_network("DiT-Mi/4", 8, options).state_dict()
    save_content(tmp_path / "content.pth", {"network": weights, "ema": {"weights": weights}, "step": 1})
    found = read_start(tmp_path / "content.pth", options)
    target = build_network("DiT-Mi/4", 8, options)
    load_fitting_weights(target, found)
    assert found.keys() == weights.keys()
