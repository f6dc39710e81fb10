"""What describes the network in a published file: flags, then the file's own arguments, then defaults."""

import pytest

from checkpoints.lfm_request import published_facts, request_network
from models.guided_unet import GuidedUNetOptions
from options import UsageError

DATA = {"dataset": "celeba_256", "image_size": 256}


def test_facts_that_a_name_tells():
    grey = published_facts("fashion_mnist", 32)
    assert (grey.channels, grey.crop, grey.flips) == (1, 28, False)
    colour = published_facts("celeba_256", 256)
    assert (colour.channels, colour.crop, colour.flips) == (3, None, True)


def test_dataset_and_image_size_have_no_default():
    with pytest.raises(UsageError, match="pass --dataset and --image_size$"):
        request_network({})
    with pytest.raises(UsageError, match="pass --image_size$"):
        request_network({"dataset": "celeba_256"})
    assert request_network({}, DATA).dataset == published_facts("celeba_256", 256)


def test_flags_come_before_arguments_and_arguments_before_defaults():
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


def test_published_spellings_and_lists():
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
def test_downstream_networks_are_guided_diffusions_unless_others_are_named(given, arguments, expected):
    assert request_network(DATA | given, arguments, downstream=True).model_type == expected
    assert request_network(DATA, downstream=False).model_type == "adm"
