"""Model types: names of other projects' networks stand for DiT with options, which flags may change."""

from functools import partial

import pytest

from command_line import parse_options
from models.dit import DiTOptions
from models.registry import (
    NETWORKS,
    NetworkOptions,
    complete_network,
    network_groups,
    published_options,
)
from options import UsageError


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("SiT-XL/2", "DiT-XL/2"),
        ("SiT-Mi/8", "DiT-Mi/8"),
        ("REPA-B/4", "DiT-B/4"),
        ("LightningDiT-1p6B/1", "DiT-1p6B/1"),
        ("MeanFlow-L/2", "DiT-L/2"),
        ("LightningDiT/2", "DiT/2"),
        ("DiTDH-XL", "DiT/1"),
        ("DiTDH-S/2", "DiT/2"),
        ("DiTDH/1", "DiT/1"),
        ("DiT-XL/2", "DiT-XL/2"),
        ("adm", "adm"),
    ],
)
def test_a_name_stands_for_a_network(name, resolved):
    assert NetworkOptions(name).resolve() == resolved
    assert resolved in NETWORKS


@pytest.mark.parametrize("name", ["SiT-XL", "SiT-XXL/2", "DiTDH-L", "LightningDiT-XL/3", "RAE-XL/2"])
def test_other_names_are_refused(name):
    with pytest.raises(UsageError, match=f"unknown --model_type '.*{name.split('-')[-1]}.*SiT-..., REPA-..., Light"):
        NetworkOptions(name).resolve()


def test_messages_name_the_typed_model_type():
    with pytest.raises(UsageError, match="unknown --model_type 'SiT-XXL/2': expected"):
        NetworkOptions("SiT-XXL/2").resolve()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sit-xl/2", "SiT-XL/2"),
        ("lightningdit-1P0b/1", "LightningDiT-1p0B/1"),
        ("ditdh-s", "DiTDH-S"),
        ("repa/2", "REPA/2"),
        ("SiT-xl/2", "SiT-XL/2"),
        ("dit-xl/2", "DiT-XL/2"),
        ("ADM", "adm"),
    ],
)
def test_other_cases_of_letters_get_a_suggestion(typed, meant):
    with pytest.raises(UsageError, match=f"unknown --model_type '{typed}': did you mean {meant}\\?"):
        NetworkOptions(typed).resolve()


def options_of(*flags, guided=False):
    adjust = partial(complete_network, guided_diffusion=guided)
    return parse_options("", [NetworkOptions, *network_groups()], [*map(str, flags)], adjust=adjust)[DiTOptions]


@pytest.mark.parametrize("guided", [False, True])
def test_a_name_sets_the_options_that_were_not_given(guided):
    options = options_of("--model_type", "LightningDiT-B/1", "--mlp", "gelu", "--num_classes", 10, guided=guided)
    assert (options.norm, options.mlp, options.rope, options.reversed_time) == ("rms_affine", "gelu", True, True)
    assert (options.label_dropout, options.num_classes, options.label_rows) == (0.1, 10, 11)
    options = options_of("--model_type", "DiTDH-XL", guided=guided)
    assert (options.model_width, options.model_depth, options.model_heads) == (1152, 30, 16)
    assert (options.ddt_blocks, options.ddt_width, options.ddt_heads) == (2, 2048, 16)
    assert options_of("--model_type", "DiT-XL/2", guided=guided) == DiTOptions()


def test_plain_model_types_set_nothing():
    assert published_options("DiT-XL/2") == published_options("adm") == published_options("unet") == {}
