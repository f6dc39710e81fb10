import pytest
import torch

from datasets_prep.datasets import DatasetOptions, crop_padding, open_dataset
from evaluation.features.classifier import FashionClassifier, load_classifier, save_classifier
from evaluation.features.fashion import FASHION_WEIGHTS
from evaluation.features.protocol import predict_classes
from evaluation.features.registry import FeatureOptions, load_features
from options import UsageError


@pytest.mark.parametrize(("architecture", "widths"), [("residual", (8, 16, 64)), ("patches", (64, 64))])
def test_the_classifiers_file_describes_itself(tmp_path, architecture, widths):
    torch.manual_seed(0)
    network = FashionClassifier(widths, ("a", "b", "c"), architecture).half().float().eval()
    save_classifier(network, tmp_path / "c.safetensors", {"test_accuracy": 0.5})
    loaded = load_classifier(tmp_path / "c.safetensors")
    pixels = torch.randn(2, 1, 28, 28)
    network.requires_grad_(False)  # PyTorch's transformer computes otherwise in other last bits
    assert (loaded.classes, loaded.architecture) == (("a", "b", "c"), architecture)
    assert torch.equal(loaded(pixels), network(pixels))
    assert loaded.features(pixels).shape == (2, 64)
    assert torch.equal(loaded.head(loaded.features(pixels)), loaded(pixels))


def test_a_classifier_of_patches_needs_equal_widths():
    with pytest.raises(
        UsageError, match="the same multiple of 16 for every block, such as 64 64 64 64, but 32 64 was given"
    ):
        FashionClassifier((32, 64), ("a", "b"), "patches")


def test_the_bundled_file_which_names_no_architecture_is_residual():
    assert load_classifier(FASHION_WEIGHTS).architecture == "residual"


def test_a_damaged_classifier_is_refused(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\0" * 20)
    for name in ("c.safetensors", "missing.safetensors"):
        with pytest.raises(UsageError, match=name):
            load_features("fashion_mnist", FeatureOptions(feature_weights=str(tmp_path / name)), "cpu")


def test_fashion_features_average_color_channels():
    images = torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    color = torch.cat([images, images, images], dim=1)
    assert features.label == "FD (fashion-mnist features)"
    assert features.outputs["features"] >= 64
    found, of_color = (features(batch, features.outputs) for batch in (images, color))
    torch.testing.assert_close(of_color, found)
    torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(4))


def test_fashion_features_refuse_other_sizes():
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    with pytest.raises(UsageError, match="28 x 28 images, but these are 32 x 32"):
        features(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), {"features"})


def test_the_bundled_classifier_is_small_and_accurate(fashion_mnist_dir):
    assert FASHION_WEIGHTS.stat().st_size < 2_000_000
    dataset = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir)), "validation")
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    images = crop_padding(torch.stack([dataset[i] for i in range(1000)]), dataset.facts)
    assert (predict_classes(features, images) == dataset.labels[:1000]).double().mean() >= 0.93
    assert features.classes == dataset.facts.class_names
