import pytest
import torch
from torch import nn

from models.autoencoders.architectures import Shape, new_autoencoder
from models.autoencoders.losses.adaptive import LARGEST_WEIGHT, adaptive_weight, gradient_only, last_convolution


def test_the_weight_of_an_example_computed_by_hand():
    """R = |W|^2 / 2 has the gradient W = (3, 4), and L = 2 (w1 + w2) the gradient (2, 2): 5 / sqrt(8)."""
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(weights.square().sum() / 2, 2 * weights.sum(), weights)
    assert weight.item() == pytest.approx(5 / 8**0.5, rel=1e-6)
    assert not weight.requires_grad


def test_the_weighted_loss_has_the_reconstructions_gradient_norm_at_the_layer():
    torch.manual_seed(0)
    hidden, layer = torch.randn(4, 3, 5, 5), nn.Conv2d(3, 2, 3, padding=1)
    decoded = layer(hidden)
    reconstruction, loss = decoded.square().mean(), decoded.sin().mean()
    weight = adaptive_weight(reconstruction, loss, layer.weight)
    norms = [torch.autograd.grad(each, layer.weight, retain_graph=True)[0].norm() for each in (reconstruction, loss)]
    assert (weight * norms[1]).item() == pytest.approx(norms[0].item(), rel=1e-4)
    scaled = adaptive_weight(reconstruction, 1000 * loss, layer.weight)
    assert scaled.item() == pytest.approx(weight.item() / 1000, rel=1e-3)


def test_the_weight_of_a_loss_without_a_gradient_is_limited():
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert adaptive_weight(weights.square().sum(), 0 * weights.sum(), weights) == LARGEST_WEIGHT


def test_gradients_are_averaged_over_processes_before_their_norms():
    """Two processes whose gradients of L cancel: the norm of the mean is 0, while the mean of norms would be 1."""

    class Opposed:
        def mean(self, value):
            other = value.clone()
            other[1] *= -1
            return (value + other) / 2

    weights = nn.Parameter(torch.tensor([1.0, 0.0]))
    assert adaptive_weight(weights[0], weights[0], weights, Opposed()) == LARGEST_WEIGHT


@pytest.mark.parametrize("architecture", ["kl", "dc"])
def test_the_last_convolutions_are_those_next_to_images_and_latents(architecture):
    shape = Shape(
        3, 16, 2, 4, (8, 16, 16) if architecture == "kl" else (8, 16), (1, 1, 1) if architecture == "kl" else (1, 1)
    )
    network = new_autoencoder(architecture, shape)
    last = network.decoder.conv_out
    assert last_convolution(network.decoder) is (last if architecture == "kl" else last.conv).weight  # before a shuffle
    assert last_convolution(network.encoder, None) is network.encoder.conv_out.weight
    extra = getattr(network, "quant_conv", None)
    assert last_convolution(network.encoder, extra) is (network.encoder.conv_out if extra is None else extra).weight
    decoded = network.decode(torch.ones(1, 2, 4, 4)).sample
    weight = adaptive_weight(decoded.square().mean(), decoded.mean(), last_convolution(network.decoder))
    assert 0 < weight < LARGEST_WEIGHT


def test_a_gradient_without_its_value():
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    loss = gradient_only(weights.square().sum())
    assert loss == 0
    loss.backward()
    assert weights.grad.tolist() == [6.0, 8.0]
