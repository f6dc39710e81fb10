"""DiT's own properties. Its golden cases are in test_golden.py."""

import pytest
import torch

from models.conditions import Condition, drop_labels
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError


def _random_network(**options):
    torch.manual_seed(0)
    network = build_network("DiT-Mi/2", 8, DiTOptions(num_classes=3, label_dropout=0.1, **options)).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


def test_an_untrained_network_returns_zero():
    network = build_network("DiT-Mi/2", 8, DiTOptions(num_classes=3, label_dropout=0.1))
    velocity = network(torch.rand(2), torch.randn(2, 4, 8, 8), Condition(torch.tensor([0, 3])))
    assert torch.equal(velocity, torch.zeros(2, 4, 8, 8))


@torch.no_grad()
def test_scalar_times_and_missing_labels_are_expanded():
    network, x = _random_network(), torch.randn(4, 4, 8, 8)
    scalar = network(torch.tensor(0.3), x)
    vector = network(torch.full((4,), 0.3), x, Condition(torch.full((4,), 3)))
    torch.testing.assert_close(scalar, vector, atol=1e-6, rtol=0)
    other = network(torch.full((4,), 0.3), x, Condition(torch.zeros(4, dtype=torch.long)))
    assert (scalar - other).abs().max() > 0.01


def test_gradient_checkpointing_changes_nothing():
    network, gradients = _random_network().train(), []
    for use in (False, True):
        network.options = DiTOptions(use_grad_checkpointing=use)
        network.zero_grad()
        network(torch.tensor(0.5), torch.ones(2, 4, 8, 8)).square().mean().backward()
        gradients.append(network.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_patch_that_does_not_divide_the_latents_is_refused():
    with pytest.raises(UsageError, match="latents of side 6"):
        build_network("DiT-Mi/4", 6, DiTOptions())


def test_labels_are_dropped_if_the_uniform_number_is_small():
    labels = drop_labels(torch.tensor([0, 1, 2]), torch.tensor([0.05, 0.5, 0.0999]), 0.1, 3)
    assert labels.tolist() == [3, 1, 3]
