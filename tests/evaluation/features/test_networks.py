import pytest
import torch

from datasets_prep.datasets import DatasetOptions, crop_padding, open_dataset
from evaluation.features.classifier import FashionClassifier, load_classifier, save_classifier
from evaluation.features.networks import FASHION_WEIGHTS, FeatureOptions, default_features, load_features
from options import UsageError


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_default_features():
    assert default_features("fashion_mnist") == "fashion_mnist"
    assert {default_features(name) for name in ("mnist", "folder", "celeba_256")} == {"inception"}


def test_the_classifiers_file_describes_itself(tmp_path):
    torch.manual_seed(0)
    network = FashionClassifier((8, 16, 64), ("a", "b", "c")).half().float().eval()
    save_classifier(network, tmp_path / "c.safetensors", {"test_accuracy": 0.5})
    loaded = load_classifier(tmp_path / "c.safetensors")
    pixels = torch.randn(2, 1, 28, 28)
    assert loaded.classes == ("a", "b", "c")
    assert torch.equal(loaded(pixels), network(pixels))
    assert loaded.features(pixels).shape == (2, 64)
    assert torch.equal(loaded.head(loaded.features(pixels)), loaded(pixels))


def test_a_damaged_classifier_is_refused(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\0" * 20)
    for name in ("c.safetensors", "missing.safetensors"):
        with pytest.raises(UsageError, match=name):
            load_features("fashion_mnist", FeatureOptions(feature_weights=str(tmp_path / name)), "cpu")


def test_fashion_features_average_colours(images):
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    colour = torch.cat([images, images, images], dim=1)
    assert features.label == "FD (fashion-mnist features)"
    assert features(images).shape == (4, features.dims)
    assert features.dims >= 64
    assert features(images).dtype == torch.float32
    torch.testing.assert_close(features(colour), features(images))
    torch.testing.assert_close(features.probabilities(images).sum(1), torch.ones(4))


def test_fashion_features_refuse_other_sizes():
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    with pytest.raises(UsageError, match="28 x 28 images, but these are 32 x 32"):
        features(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_unknown_features_are_refused():
    with pytest.raises(UsageError, match="inception, dinov2, fashion_mnist"):
        load_features("vgg", FeatureOptions(), "cpu")


def test_the_bundled_classifier_is_small_and_right(fashion_mnist_dir):
    assert FASHION_WEIGHTS.stat().st_size < 2_000_000
    dataset = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir)), "validation")
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    images = crop_padding(torch.stack([dataset[i] for i in range(1000)]), dataset.facts)
    predicted = features.probabilities(images).argmax(1)
    assert (predicted == dataset.labels[:1000]).double().mean() >= 0.93
    assert features.classes == dataset.facts.class_names


def test_inception_takes_grey_and_colour_from_a_local_file(inception_weights, images):
    from pytorch_fid import inception

    download = inception.load_state_dict_from_url
    features = load_features("inception", FeatureOptions(feature_weights=inception_weights), "cpu")
    assert inception.load_state_dict_from_url is download
    assert features.label == "FID"
    grey, colour = features(images[:2]), features(images[:2].expand(-1, 3, -1, -1))
    assert grey.shape == (2, 2048)
    torch.testing.assert_close(grey, colour, rtol=1e-3, atol=1e-3)
    assert (
        features.sha256 == load_features("inception", FeatureOptions(feature_weights=inception_weights), "cpu").sha256
    )


def test_foreign_inception_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("foreign.pth", "text.pth", "missing.pth"):
        with pytest.raises(UsageError, match=name):
            load_features("inception", FeatureOptions(feature_weights=str(tmp_path / name)), "cpu")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UsageError, match=r"no route to host.*--feature_weights FILE"):
        load_features("inception", FeatureOptions(), "cpu")
