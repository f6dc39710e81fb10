"""Networks whose optional features are off have the weights, outputs and gradients that they had before these existed."""

import pytest
import torch

from models.conditions import Condition
from models.registry import build_network
from tests.small_networks import SMALL

# Recorded before the first optional feature: entries of the state dict, and sums of absolute values of the initial weights,
# of a velocity, and of its gradients.
RECORDED = {
    "DiT-Mi/2": (72, 63603.3263, 152.967536, 605.280156),
    "adm": (149, 19269.327, 157.144798, 1490.76966),
    "ncsn++": (152, 25344.1842, 147.049468, 1224.18021),
    "origin_adm": (129, 17960.0861, 150.575297, 951.111307),
    "unet": (109, 29708.1536, 199.143738, 1968.42559),
}


def total(tensors):
    return sum(tensor.detach().double().abs().sum().item() for tensor in tensors)


@pytest.mark.parametrize("model_type", RECORDED)
def test_plain_networks_are_unchanged(model_type):
    torch.manual_seed(0)
    network = build_network(model_type, 8, SMALL[model_type])
    found = [len(network.state_dict()), total(network.state_dict().values())]
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    velocity = network(t, x, Condition(torch.tensor([0, 1])))
    velocity.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert [*found, total([velocity]), total(gradients)] == pytest.approx(RECORDED[model_type], rel=1e-6)
