import pytest
import torch

from command_line import parse_options
from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.features.registry import FEATURES, FeatureOptions, choose_features, default_features, load_features
from options import UsageError
from runtime.precision import Machine
from tests.fake_features import MeanColors


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_default_features():
    assert default_features("fashion_mnist") == "fashion_mnist"
    assert {default_features(name) for name in ("mnist", "folder", "celeba_256")} == {"inception"}


def test_unknown_features_are_refused():
    with pytest.raises(UsageError, match="inception, dinov2, fashion_mnist"):
        load_features("vgg", FeatureOptions(), "cpu")


@pytest.fixture(params=["fashion_mnist", "inception", "inception_64", "dinov2"])
def network(request, inception_weights, dinov2_weights) -> FeatureNetwork:
    weights = {"fashion_mnist": None, "dinov2": dinov2_weights}.get(request.param, inception_weights)
    dims = 64 if request.param == "inception_64" else 2048
    return load_features(
        request.param.removesuffix("_64"), FeatureOptions(feature_weights=weights, dims=dims), torch.device("cpu")
    )


def test_every_network_implements_the_protocol(network, images):
    assert set(FeatureNetwork.__annotations__) <= {name for name in dir(network) if not name.startswith("_")}
    assert network.outputs["features"] > 0
    assert network.outputs.get("probabilities", 0) == len(network.classes)
    assert network.precision == "fp32"
    assert network.exact() is network
    assert describe_features(network) == {key: getattr(network, key) for key in ("name", "label", "sha256")}
    found = network(images, network.outputs)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (len(images), width) for name, width in network.outputs.items()
    }
    for name, value in found.items():
        assert value.dtype == torch.float32
        alone = network(images, {name})
        assert set(alone) == {name}
        assert torch.equal(alone[name], value)


def test_a_network_is_registered_with_one_entry(monkeypatch, images):
    monkeypatch.setitem(FEATURES, "mean_colors", MeanColors)
    options = parse_options("", [FeatureOptions], ["--features", "mean_colors"])[FeatureOptions]
    network = choose_features(options, "fashion_mnist", Machine(torch.device("cpu"), "fp32"))
    assert isinstance(network, MeanColors)
    assert network(images.expand(-1, 3, -1, -1), {"features"})["features"].shape == (4, 3)
