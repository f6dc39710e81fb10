"""Precedence of what describes the network in an LFM file: flags, then the file's arguments, then defaults."""

import pytest

from checkpoints.lfm_request import published_facts, request_network
from models.guided_unet import GuidedUNetOptions
from options import UsageError

DATA = {"dataset": "celeba_256", "image_size": 256}


def test_facts_implied_by_a_dataset_name():
    gray = published_facts("fashion_mnist", 32)
    assert (gray.channels, gray.crop, gray.flips) == (1, 28, False)
    color = published_facts("celeba_256", 256)
    assert (color.channels, color.crop, color.flips) == (3, None, True)


def test_dataset_and_image_size_have_no_default():
    with pytest.raises(UsageError, match="pass --dataset and --image_size "):
        request_network({})
    with pytest.raises(UsageError, match="pass --image_size "):
        request_network({"dataset": "celeba_256"})
    assert request_network({}, DATA).dataset == published_facts("celeba_256", 256)


def test_flags_override_arguments_and_arguments_override_defaults():
    arguments = DATA | {
        "model_type": "DiT-B/2",
        "num_classes": 10,
        "label_dropout": 0.2,
        "scale_factor": None,
        "lr": 1e-4,
    }
    request = request_network({"num_classes": 3, "seed": 5}, arguments)
    assert (request.model_type, request.options.num_classes, request.options.label_dropout) == ("DiT-B/2", 3, 0.2)
    assert request.autoencoder.scale_factor == 0.18215
    assert (request.in_channels, request.out_channels) == (None, None)


def test_lfms_spellings_and_lists():
    options = request_network({"use_origin_adm": True}, DATA | {"attn_resolution": [16, 8], "ch_mult": [1, 2]}).options
    assert isinstance(options, GuidedUNetOptions)
    assert (options.attn_resolutions, options.ch_mult) == ((16, 8), (1, 2))


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, {}, "origin_adm"),
        ({"model_type": "adm"}, {}, "origin_adm"),
        ({"model_type": "DiT-B/2"}, {}, "DiT-B/2"),
        ({}, {"model_type": "DiT-B/2"}, "DiT-B/2"),
        ({"use_origin_adm": False}, {}, "adm"),
        ({}, {"use_origin_adm": False}, "adm"),
    ],
)
def test_downstream_tasks_default_to_guided_diffusions_network(given, arguments, expected):
    assert request_network(DATA | given, arguments, downstream=True).model_type == expected
    assert request_network(DATA, downstream=False).model_type == "adm"


def test_statistics_replace_lfms_factor():
    """Otherwise the file's or LFM's factor would multiply them."""
    arguments, given = {"scale_factor": 0.18215}, DATA | {"latent_statistics": "stats.pt"}
    assert request_network(given).autoencoder.scale_factor is None
    assert request_network(given, arguments).autoencoder.scale_factor is None
    assert request_network(given | {"scale_factor": 0.5}, arguments).autoencoder.scale_factor == 0.5
