import sys

import pytest
import torch
import torchvision

from models.autoencoders.losses.perceptual import BACKBONES, build_lpips, perceptual_distance
from options import UsageError


@pytest.fixture(scope="module")
def weights():
    """AlexNet's features with random weights."""
    torch.manual_seed(0)
    features = torchvision.models.AlexNet().features.state_dict()
    return {f"features.{name}": value for name, value in features.items()}


@pytest.fixture(scope="module")
def network(weights):
    return build_lpips("alex", "--lpips_backbone", lambda: weights)


def pixels_of(channels, seed=0):
    return torch.rand(2, channels, 40, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_network_has_the_files_weights(network, weights):
    own = [parameter for name, parameter in network.net.named_parameters()]
    assert all(map(torch.equal, own, weights.values()))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_distance_is_zero_for_equal_images_and_the_packages_own_otherwise(network):
    a, b = pixels_of(3), pixels_of(3, seed=1)
    assert perceptual_distance(network, a, a) == 0
    torch.testing.assert_close(perceptual_distance(network, a, b), network(a, b).mean())


def test_gray_images_are_repeated(network):
    a, b = pixels_of(1), pixels_of(1, seed=1)
    repeated = [each.expand(-1, 3, -1, -1) for each in (a, b)]
    torch.testing.assert_close(perceptual_distance(network, a, b), perceptual_distance(network, *repeated))


def test_gradients_reach_the_reconstruction_in_float32_under_autocast(network):
    a, b = pixels_of(3).requires_grad_(), pixels_of(3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        distance = perceptual_distance(network, a, b)
    assert torch.equal(distance, perceptual_distance(network, a, b))
    distance.backward()
    assert a.grad.flatten(1).norm(dim=1).min() > 0


def test_the_smallest_images_of_alexnet(network):
    side = BACKBONES["alex"].smallest
    a, b = pixels_of(3)[..., :side, :side], pixels_of(3, seed=1)[..., :side, :side]
    assert perceptual_distance(network, a, b) > 0
    with pytest.raises(RuntimeError):
        perceptual_distance(network, a[..., :-1, :-1], b[..., :-1, :-1])


def test_the_smallest_images_of_vgg_reach_its_last_features():
    """Four poolings before the last features that LPIPS compares."""
    side = BACKBONES["vgg"].smallest
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:30]
    pools = [layer for layer in features if isinstance(layer, torch.nn.MaxPool2d)]
    assert side == 2 ** len(pools)


@pytest.mark.parametrize("network", BACKBONES)
def test_addresses_and_titles_are_torchvisions(network):
    weights = {"vgg": torchvision.models.VGG16_Weights, "alex": torchvision.models.AlexNet_Weights}[network]
    assert BACKBONES[network].url == weights.IMAGENET1K_V1.url


def test_foreign_weights_are_refused():
    with pytest.raises(UsageError, match="--lpips_backbone x.pth: expected torchvision's state dict of AlexNet"):
        build_lpips("alex", "--lpips_backbone x.pth", lambda: {"weight": torch.zeros(2)})


def test_without_the_package_nothing_is_downloaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UsageError, match="--lpips_weight needs the package lpips: pip install lpips"):
        build_lpips("vgg", "--lpips_weight", lambda: pytest.fail("downloaded"))
