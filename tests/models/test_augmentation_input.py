"""The input for parameters of augmentation, in every family of networks."""

from dataclasses import replace

import pytest
import torch

from models.conditions import Condition, count_parameters
from models.dit import DiTOptions
from models.registry import Architecture, build_network
from models.taps import weights_for_sampling
from tests.small_networks import DIT_VARIANTS, SMALL

AUGMENTED = ("flip", "color")
AUGMENTABLE = [*SMALL.items(), *(("DiT-Mi/2", options) for options in DIT_VARIANTS)]
AUGMENTABLE += [("ddpm++", SMALL["adm"]), ("DiT-Mi/2", replace(SMALL["DiT-Mi/2"], until_embedding="decoupled"))]


def augmentable(model_type, options):
    """Initial networks without and with the input for augmentation, and arguments of both with four parameters each."""
    networks = []
    for own in (options, replace(options, augment=AUGMENTED)):
        torch.manual_seed(0)
        networks.append(build_network(model_type, 8, own).eval())
    t, x = torch.rand(2), torch.randn(2, 3, 8, 8)
    return *networks, t, x, Condition(torch.tensor([0, 1]), augmentation=torch.rand(2, 4))


@pytest.mark.parametrize(("model_type", "options"), AUGMENTABLE)
def test_a_new_network_for_augmentation_is_the_plain_one(model_type, options):
    plain, network, t, x, condition = augmentable(model_type, options)
    own = network.state_dict()
    assert own.pop("augment_embedder.weight").shape[1] == 4
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    for each in (plain, network):
        with torch.no_grad():
            torch.manual_seed(1)
            for name, parameter in each.named_parameters():
                if parameter.requires_grad and not name.startswith("augment_embedder"):
                    parameter.add_(0.05 * torch.randn_like(parameter))
    expected = plain(t, x, condition._replace(augmentation=None))
    assert expected.abs().max() > 0
    assert torch.equal(network(t, x, condition), expected)


@pytest.mark.parametrize(("model_type", "options"), AUGMENTABLE)
def test_zeros_are_the_network_without_the_input(model_type, options):
    """The network that samples lacks the weights; other parameters change the velocity, each by itself."""
    _, network, t, x, condition = augmentable(model_type, options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    architecture = Architecture(model_type, 8, network.options).for_sampling()
    sampled = build_network(*architecture).eval()
    sampled.load_state_dict(weights_for_sampling(network.state_dict()))
    expected = sampled(t, x, condition._replace(augmentation=None))
    assert torch.equal(network(t, x, condition._replace(augmentation=torch.zeros(2, 4))), expected)
    assert torch.equal(network(t, x, condition._replace(augmentation=None)), expected)
    for number in range(4):
        one = torch.zeros(2, 4)
        one[:, number] = 1
        assert not torch.equal(network(t, x, condition._replace(augmentation=one)), expected)


@pytest.mark.parametrize(("model_type", "options"), AUGMENTABLE)
def test_the_input_for_augmentation_learns_unless_all_parameters_are_zero(model_type, options):
    _, network, t, x, condition = augmentable(model_type, options)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for parameters, learns in ((condition.augmentation, True), (torch.zeros(2, 4), False)):
        network.zero_grad()
        network(t, x, condition._replace(augmentation=parameters)).square().mean().backward()
        gradient = network.augment_embedder.weight.grad
        assert bool(gradient.abs().max() > 0) == learns


def test_kinds_of_augmentation_count_once_and_in_one_order():
    options = DiTOptions(augment=("color", "flip", "color"))
    assert options.augmentations == ("flip", "color")
    assert count_parameters(options.augmentations) == 4
    assert options.for_sampling().augmentations == ()
