"""Conversion of other projects' files, and back: names, order, values, precision, entry and prefix are the same."""

import runpy
import sys

import pytest
import torch

from checkpoints.conversion import FORMATS, from_published, to_published
from checkpoints.files import load_model, read_weights, save_weights
from checkpoints.header import PublishedForm
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED, AutoencoderFacts
from models.conditions import Condition, DenseInput
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from tests.headers import header_of

NAMES = ["sit_learn_sigma", "repa_one_projector", "lightningdit_qknorm_patch2", "meanflow_sit", "ditdh"]
FORMS = {
    "bare": ("", ""),
    "ema": ("ema", ""),
    "wrapped": ("ema", "module._orig_mod."),
}


def in_form(weights, entry, prefix):
    named = {prefix + name: value for name, value in weights.items()}
    return {entry: named} if entry else named


def assert_same(path, expected):
    found = torch.load(path, weights_only=True)
    pairs = [(found, expected)]
    if all(isinstance(value, dict) for value in expected.values()):
        assert list(found) == list(expected)
        pairs = list(zip(found.values(), expected.values(), strict=True))
    for ours, theirs in pairs:
        assert list(ours) == list(theirs)
        assert all(ours[name].dtype == value.dtype and torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture
def converted(case_of, weights_of, autoencoder_for, tmp_path):
    """`converted(name, entry, prefix, change)` converts a case's file and back; gives (checkpoint, way back, content)."""

    def run(name, entry="", prefix="", change=lambda weights: weights, **flags):
        case = case_of(name)
        content = in_form(change(weights_of(case)), entry, prefix)
        torch.save(content, tmp_path / "in.pt")
        given = {
            "pretrained_autoencoder_ckpt": autoencoder_for(case.arguments["num_in_channels"]),
            "model_heads": 4,
            **flags,
        }
        from_published(tmp_path / "in.pt", tmp_path / "model.safetensors", given)
        to_published(tmp_path / "model.safetensors", tmp_path / "out.pt")
        return tmp_path / "model.safetensors", tmp_path / "out.pt", content

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_comes_back_as_it_was(name, form, converted, case_of, golden):
    checkpoint, back, content = converted(name, *FORMS[form])
    assert_same(back, content)
    case, model = case_of(name), load_model(checkpoint)
    velocity = model.network(case.tensors["in.t"], case.tensors["in.x"], Condition(case.tensors["in.y"].long()))
    assert (velocity - case.tensors["out.velocity"]).abs().max() <= golden.LIMITS["velocity"]
    assert model.header.published_form == PublishedForm(case.arguments["model_type"], *FORMS[form])


def test_weights_keep_their_precision(converted):
    def half(weights):
        return {name: value.bfloat16() if name.startswith("blocks") else value for name, value in weights.items()}

    checkpoint, back, content = converted("ditdh", change=half)
    assert_same(back, content)
    assert load_model(checkpoint).network.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_projectors_of_several_encoders_are_kept(converted):
    def three(weights):
        ordered = {}
        for name, value in weights.items():
            if name == "final_layer.linear.weight":
                for number, width in ((1, 5), (2, 7)):
                    shapes = {"0": (128, 64), "2": (128, 128), "4": (width, 128)}
                    for layer, shape in shapes.items():
                        ordered[f"projectors.{number}.{layer}.weight"] = torch.randn(shape)
                        ordered[f"projectors.{number}.{layer}.bias"] = torch.randn(shape[0])
            ordered[name] = value
        return ordered

    checkpoint, back, content = converted("repa_one_projector", change=three)
    assert_same(back, content)
    weights, header = read_weights(checkpoint)
    assert (header.network.align_width, header.network.unused_projectors) == (96, (5, 7))
    network = build_network(*header.architecture)
    network.load_state_dict(weights)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", *(name for name in weights if name.startswith("projectors.unused."))}
    assert len(frozen) == 13


def test_the_command_converts_in_both_directions(case_of, weights_of, autoencoder_for, tmp_path, monkeypatch, capsys):
    content = {"ema": weights_of(case_of("lightningdit_qknorm_patch2"))}
    torch.save(content, tmp_path / "in.pt")

    def convert(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("checkpoints.convert", run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    own = ["--pretrained_autoencoder_ckpt", autoencoder_for(8)]
    assert convert(tmp_path / "in.pt", tmp_path / "a.safetensors", *own) == (0, "")
    assert convert(tmp_path / "a.safetensors", tmp_path / "back.pt") == (0, "")
    assert_same(tmp_path / "back.pt", content)
    code, error = convert(tmp_path / "a.safetensors", tmp_path / "other.pt", "--project", "RAE")
    assert code == 2
    assert "invalid choice: 'RAE'" in error


def test_an_autoencoder_on_the_hub_is_not_downloaded(case_of, weights_of, tmp_path, capsys):
    torch.save(weights_of(case_of("sit_learn_sigma")), tmp_path / "in.pt")
    from_published(tmp_path / "in.pt", tmp_path / "model.safetensors", {"model_heads": 4})
    facts = read_weights(tmp_path / "model.safetensors")[1].autoencoder
    assert (facts.id, facts.sha256, facts.scale_factor) == ("stabilityai/sd-vae-ft-mse", None, 0.18215)
    notes = capsys.readouterr().err
    assert "is not downloaded" in notes
    assert "assuming that latents are scaled by 0.18215" in notes
    torch.save(weights_of(case_of("ditdh")), tmp_path / "in.pt")
    with pytest.raises(
        UsageError, match="needs latents of 24 channels, but the latents of .*sd-vae-ft-mse have 4: give"
    ):
        from_published(tmp_path / "in.pt", tmp_path / "model.safetensors", {})


@pytest.mark.parametrize(("name", "channels"), [("sit_learn_sigma", 4), ("ditdh", 24)])
def test_nothing_is_assumed_about_an_unknown_autoencoder_on_the_hub(
    name, channels, case_of, weights_of, tmp_path, capsys
):
    source, target = tmp_path / "in.pt", tmp_path / "model.safetensors"
    torch.save(weights_of(case_of(name)), source)
    given = {"model_heads": 4, "pretrained_autoencoder_ckpt": "owner/unknown-vae"}
    with pytest.raises(UsageError, match=r"owner/unknown-vae is unknown, because it was not downloaded: add --f"):
        from_published(source, target, given)
    with pytest.raises(UsageError, match=r"--latent_statistics needs the autoencoder owner/unknown-vae"):
        from_published(source, target, {**given, "f": 16, "latent_statistics": "stats.pt"})
    capsys.readouterr()
    from_published(source, target, {**given, "f": 16})
    header = read_weights(target)[1]
    assert header.autoencoder == AutoencoderFacts("owner/unknown-vae", None, statistics=UNMEASURED)
    assert (header.latent_size, header.dataset.image_size) == (8, 128)
    assert "the scale of the autoencoder owner/unknown-vae is unknown" in capsys.readouterr().err
    from_published(source, target, {**given, "f": 16, "scale_factor": 0.5})
    assert read_weights(target)[1].autoencoder.latents_std == (2.0,) * channels


def test_a_checkpoint_with_an_unseen_autoencoder_takes_its_scale(case_of, weights_of, autoencoder_for, tmp_path):
    torch.save(weights_of(case_of("sit_learn_sigma")), tmp_path / "in.pt")
    given = {"model_heads": 4, "pretrained_autoencoder_ckpt": "owner/unknown-vae", "f": 2}
    from_published(tmp_path / "in.pt", tmp_path / "model.safetensors", given)
    folder = autoencoder_for(4)
    loaded = load_model(tmp_path / "model.safetensors", autoencoder=AutoencoderOptions(folder)).autoencoder
    assert loaded.describe() == load_autoencoder(AutoencoderOptions(folder), 3).describe()


PLAIN = {"num_classes": 3, "label_dropout": 0.1}


@pytest.fixture
def saved(tmp_path):
    """`saved(dense, **options)` saves a checkpoint of this project's own network."""

    def save(dense=None, **options):
        options = DiTOptions(**PLAIN, num_in_channels=4 + (dense.channels if dense else 0), **options)
        network = build_network("DiT-Mi/2", 8, options, dense)
        save_weights(tmp_path / "own.safetensors", network.state_dict(), header_of(options, latent_size=8, dense=dense))
        return tmp_path / "own.safetensors", network.state_dict()

    return save


def test_own_networks_are_written_for_the_projects_whose_code_can_read_them(saved, tmp_path, capsys):
    path, weights = saved()
    to_published(path, tmp_path / "lfm.pth")
    found = torch.load(tmp_path / "lfm.pth", weights_only=True)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    to_published(path, tmp_path / "repa.pt", "REPA")
    assert_same(tmp_path / "repa.pt", {"ema": weights})
    path, weights = saved(tap_block=2, auxiliary_velocity=0.5, until_embedding="interval")
    to_published(path, tmp_path / "meanflow.pt", "MeanFlow", module_prefix=True)
    plain = {f"module.{name}": value for name, value in weights.items() if not name.startswith("auxiliary")}
    found = torch.load(tmp_path / "meanflow.pt", weights_only=True)["ema"]
    assert found.keys() == plain.keys()
    assert [name.split(".")[1] for name in found][7:12] == [*4 * ["r_embedder"], "y_embedder"]
    assert "lacks 4 weights of auxiliary heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "project", "message"),
    [
        ({}, "SiT", "holds no network of SiT.*the options reversed_time differ"),
        ({"reversed_time": True, "rope": True}, "SiT", "the options rope differ"),
        ({"rope": True}, "REPA", "the options rope differ"),
        ({}, "MeanFlow", "the options until_embedding differ"),
        ({"value_residual": True, "reversed_time": True}, "LightningDiT", "the options value_residual differ"),
        ({"dense": DenseInput(5)}, "REPA", "whose networks are DiT without dense conditions: its code"),
        ({"reversed_time": True}, "LFM", "--reversed_time, which LFM's networks do not have"),
    ],
)
def test_networks_that_a_project_lacks_are_refused(options, project, message, saved, tmp_path):
    path, _ = saved(**options)
    with pytest.raises(UsageError, match=message):
        to_published(path, tmp_path / "out.pt", project)


def test_every_project_can_be_named():
    assert FORMATS == ("LFM", "SiT", "REPA", "LightningDiT", "MeanFlow", "DiTDH")
