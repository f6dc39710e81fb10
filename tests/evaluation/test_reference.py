import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from evaluation import reference
from evaluation.reference import holds_statistics, statistics_summary, summarise
from evaluation.sources import dataset_source
from options import UsageError
from tests.fake_features import FakeFeatures


class Brightness(FakeFeatures):
    """Two features: the mean brightness of the first and of the last row."""

    label, name, outputs = "FD (brightness)", "brightness", {"features": 2}

    def __init__(self, sha256: str = "0" * 64) -> None:
        self.sha256, self.calls = sha256, 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.stack([images[:, :, 0].float().mean((1, 2)), images[:, :, -1].float().mean((1, 2))], dim=1)


def padded_dataset(images: torch.Tensor, fingerprint: str = "f") -> ImageDataset:
    facts = DatasetFacts("toy", images.shape[3], 1, images.shape[3] - 2, False, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, fingerprint)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_padding_is_cropped_and_the_result_cached(tmp_path, images):
    features, source = Brightness(), dataset_source(padded_dataset(images))
    expected = images[:, 0, [1, -2], 1:-1].double().mean(2).numpy()
    first = summarise(source, features, ["moments", "rows"], tmp_path, batch_size=4)
    np.testing.assert_allclose(first.statistics.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(first.statistics.covariance, np.cov(expected, rowvar=False), rtol=1e-5)
    np.testing.assert_allclose(first.rows, expected, rtol=1e-6)
    assert (first.count, first.meta["resolution"]) == (11, [4, 4])
    calls = features.calls
    second = summarise(source, features, ["moments", "rows"], tmp_path, batch_size=4)
    assert features.calls == calls
    assert second.meta == first.meta
    assert second.sha256() == first.sha256()
    assert summarise(source, features, ["rows"], tmp_path).meta["resolution"] == [4, 4]


def test_the_cache_distinguishes_weights_and_data(tmp_path, images):
    for weights, fingerprint in (("0" * 64, "f"), ("1" * 64, "f"), ("0" * 64, "g")):
        features = Brightness(weights)
        summarise(dataset_source(padded_dataset(images, fingerprint)), features, ["moments"], tmp_path, batch_size=50)
        assert features.calls == 1
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(name.startswith("toy_train_6_brightness_") for name in names)


def test_a_random_subset_of_rows_is_kept_for_many_images(monkeypatch, images):
    monkeypatch.setattr(reference, "REFERENCE_ROWS", 5)
    source = dataset_source(padded_dataset(images))
    kept = [summarise(source, Brightness(), ["moments", "rows"], None, batch_size) for batch_size in (3, 11)]
    assert kept[0].rows.shape == (5, 2)
    assert torch.equal(kept[0].rows, kept[1].rows)
    everything = [tuple(row) for row in Brightness().features(images[..., 1:-1, 1:-1]).tolist()]
    places = [everything.index(tuple(row)) for row in kept[0].rows.tolist()]
    assert len(set(places)) == 5
    assert places != [0, 1, 2, 3, 4]
    assert kept[0].statistics.count == 11


def test_a_damaged_cache_is_named(tmp_path, images):
    source = dataset_source(padded_dataset(images))
    summarise(source, Brightness(), ["rows"], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match=path.name):
        summarise(source, Brightness(), ["rows"], tmp_path)


def test_a_statistics_file_provides_only_moments(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    assert [holds_statistics(tmp_path / name) for name in ("s.npz", "images.npz", "x.npy")] == [True, False, True]
    assert statistics_summary(tmp_path / "s.npz", ["moments"]).statistics.mean.tolist() == [0, 0]
    with pytest.raises(UsageError, match=r"s\.npz.*rows.*pass the images"):
        statistics_summary(tmp_path / "s.npz", ["moments", "rows"])
