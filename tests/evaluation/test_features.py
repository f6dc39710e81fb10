import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetOptions, crop_padding, open_dataset
from evaluation.classifier import FashionClassifier, load_classifier, save_classifier
from evaluation.features import FASHION_WEIGHTS, default_features, load_features
from options import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    """A state dict of the published architecture with random weights, small enough to keep activations finite."""
    from unittest import mock

    from pytorch_fid import inception

    torch.manual_seed(0)
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        network = inception.fid_inception_v3()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


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
            load_features("fashion_mnist", str(tmp_path / name), "cpu")


def test_fashion_features_average_colours(images):
    features = load_features("fashion_mnist", None, "cpu")
    colour = torch.cat([images, images, images], dim=1)
    assert features.label == "FD (fashion-mnist features)"
    assert features(images).shape == (4, features.dims)
    assert features.dims >= 64
    assert features(images).dtype == torch.float32
    torch.testing.assert_close(features(colour), features(images))
    torch.testing.assert_close(features.probabilities(images).sum(1), torch.ones(4))


def test_fashion_features_refuse_other_sizes():
    features = load_features("fashion_mnist", None, "cpu")
    with pytest.raises(UsageError, match="28 x 28 images, but these are 32 x 32"):
        features(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_unknown_features_are_refused():
    with pytest.raises(UsageError, match="inception, fashion_mnist"):
        load_features("vgg", None, "cpu")


def test_the_bundled_classifier_is_small_and_right(fashion_mnist_dir):
    assert FASHION_WEIGHTS.stat().st_size < 2_000_000
    dataset = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir)), "validation")
    features = load_features("fashion_mnist", None, "cpu")
    images = crop_padding(torch.stack([dataset[i] for i in range(1000)]), dataset.facts)
    predicted = features.probabilities(images).argmax(1)
    assert (predicted == dataset.labels[:1000]).double().mean() >= 0.93
    assert features.classes == dataset.facts.class_names


def test_inception_takes_grey_and_colour_from_a_local_file(inception_weights, images):
    from pytorch_fid import inception

    download = inception.load_state_dict_from_url
    features = load_features("inception", inception_weights, "cpu")
    assert inception.load_state_dict_from_url is download
    assert features.label == "FID"
    grey, colour = features(images[:2]), features(images[:2].expand(-1, 3, -1, -1))
    assert grey.shape == (2, 2048)
    assert torch.equal(grey, colour)
    assert features.sha256 == load_features("inception", inception_weights, "cpu").sha256


def test_foreign_inception_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("foreign.pth", "text.pth", "missing.pth"):
        with pytest.raises(UsageError, match=name):
            load_features("inception", str(tmp_path / name), "cpu")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UsageError, match=r"no route to host.*--feature_weights FILE"):
        load_features("inception", None, "cpu")


def run_fid_score(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pytorch_fid/fid_score.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_fid_score_of_a_folder_and_of_statistics(inception_weights, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    done = run_fid_score(str(folder), str(folder), "--feature_weights", inception_weights, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    label, value = done.stdout.split(": ")
    assert label == "FID"
    assert float(value) == pytest.approx(0, abs=1e-6)


def test_fid_score_of_two_files_needs_no_network(tmp_path):
    for name, offset in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, offset), sigma=np.eye(4))
    done = run_fid_score("--batch_size", "3", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    assert (done.returncode, done.stdout) == (0, "Frechet distance: 16\n"), done.stderr
    failed = run_fid_score(str(tmp_path / "a.npz"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: expected two paths")
