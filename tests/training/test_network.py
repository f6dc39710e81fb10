"""Options that ask for attention where the network has no level, and initial weights for latents of another scale."""

from dataclasses import replace

import pytest

from checkpoints.files import save_weights
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.protocol import AutoencoderFacts
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import Architecture, build_network
from options import UsageError
from tests.headers import header_of
from training.network import choose_architecture, load_fitting_weights, new_network

SMALL = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1}


def note_about(model_type, kind, attention, given, capsys):
    options = kind(attn_resolutions=attention, **SMALL)
    choose_architecture(model_type, options, {"attn_resolutions": attention} if given else {}, 16, PixelSpace(3), None)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "kind", "attention", "expected"),
    [
        ("adm", EdmUNetOptions, (64,), "64 matches no level: the sides of the feature maps are 16, 8, so only"),
        ("ddpm++", EdmUNetOptions, (4, 2), "4 2 match no level: the sides of the feature maps are 16, 8, so only"),
        ("adm", EdmUNetOptions, (16, 4), "4 matches no level: the sides of the feature maps are 16, 8\n"),
        ("origin_adm", GuidedUNetOptions, (16, 8), "16 8 match no level: the downsampling factors are 1, 2, so only"),
        ("origin_adm", GuidedUNetOptions, (2, 4), "4 matches no level: the downsampling factors are 1, 2\n"),
    ],
)
def test_attention_that_matches_no_level_is_a_note(model_type, kind, attention, expected, capsys):
    found = note_about(model_type, kind, attention, True, capsys)
    assert found.startswith(f"note: --attn_resolutions {expected}")
    assert note_about(model_type, kind, attention, False, capsys) == ""  # a default that fits other sizes


@pytest.mark.parametrize(
    ("model_type", "kind", "attention"),
    [("adm", EdmUNetOptions, (8,)), ("adm", EdmUNetOptions, ()), ("origin_adm", GuidedUNetOptions, (1, 2))],
)
def test_attention_that_matches_is_silent(model_type, kind, attention, capsys):
    assert note_about(model_type, kind, attention, True, capsys) == ""


def test_options_of_dit_are_refused_for_other_networks():
    options = EdmUNetOptions(**SMALL)
    for given in ({"rope": True}, {"norm": "rms"}, {"ddt_width": 64}):
        with pytest.raises(UsageError, match=f"--{next(iter(given))} is an option of DiT and has no effect on adm"):
            choose_architecture("adm", options, given, 16, PixelSpace(3), None)
    lfms = {"rope": False, "nf": 64, "num_classes": 1, "time_scale_factor": 10.0}
    choose_architecture("adm", options, lfms, 16, PixelSpace(3), None)
    choose_architecture("DiT-Mi/2", DiTOptions(rope=True), {"rope": True, "nf": 64}, 16, PixelSpace(3), None)


@pytest.mark.parametrize(("std", "noted"), [(2.0, True), (1.0 + 1e-7, False)])
def test_initial_weights_for_another_scale_are_a_note(std, noted, tmp_path, capsys):
    facts = AutoencoderFacts("some/ae", "abc", None, (0.0,) * 3, (1.0,) * 3)
    options = DiTOptions(num_in_channels=3, num_out_channels=3)
    architecture = Architecture("DiT-Mi/4", 16, options)
    path = tmp_path / "model_1.safetensors"
    save_weights(path, build_network(*architecture).state_dict(), header_of(options, "DiT-Mi/4", 16, autoencoder=facts))
    new_network(architecture, 0, path, replace(facts, latents_std=(std,) * 3))
    assert ("learned latents with the mean (0.0, 0.0, 0.0)" in capsys.readouterr().err) == noted


@pytest.mark.parametrize(("prediction", "noted"), [("data", True), ("velocity", False)])
def test_initial_weights_of_another_target_are_a_note(prediction, noted, tmp_path, capsys):
    options = DiTOptions(num_in_channels=3, num_out_channels=3)
    architecture, header = Architecture("DiT-Mi/4", 16, options), header_of(options, "DiT-Mi/4", 16)
    path = tmp_path / "model_1.safetensors"
    save_weights(path, build_network(*architecture).state_dict(), header)
    new_network(architecture, 0, path, header.autoencoder, prediction)
    assert (
        "learned to predict the velocity, but this run starts to predict the data" in capsys.readouterr().err
    ) == noted


@pytest.mark.parametrize(("width", "warned"), [(32, True), (64, False)])
def test_an_initial_checkpoint_of_another_size_is_a_warning(width, warned, capsys):
    def network(hidden):
        return build_network("DiT/2", 8, DiTOptions(model_width=hidden, model_depth=1, model_heads=2))

    load_fitting_weights(network(64), network(width).state_dict())
    assert ("the rest starts at random: check --model_type" in capsys.readouterr().err) == warned
