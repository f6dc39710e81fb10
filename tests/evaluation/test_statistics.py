import pickle

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from evaluation.statistics import (
    RunningMoments,
    Statistics,
    dataset_statistics,
    folder_statistics,
    load_statistics,
    save_statistics,
)
from options import UsageError


class Brightness:
    """A feature network of two features: the mean of the first and of the last row."""

    label, name, dims = "FD (brightness)", "brightness", 2

    def __init__(self, sha256: str = "0" * 64) -> None:
        self.sha256, self.calls = sha256, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.stack([images[:, :, 0].float().mean((1, 2)), images[:, :, -1].float().mean((1, 2))], dim=1)


def padded_dataset(images: torch.Tensor, fingerprint: str = "f") -> ImageDataset:
    facts = DatasetFacts("toy", images.shape[3], 1, images.shape[3] - 2, False, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, fingerprint)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_streaming_moments_equal_numpys_despite_a_large_offset():
    rows = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    streamed, first, second = RunningMoments(7), RunningMoments(7), RunningMoments(7)
    for part in rows.split(33):
        streamed.update(part)
    first.update(rows[:1])
    second.update(rows[1:])
    first.merge(second)
    first.merge(RunningMoments(7))
    for moments in (streamed, first):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-7, atol=1e-9)


def test_one_row_has_no_covariance():
    moments = RunningMoments(3)
    moments.update(torch.ones(1, 3))
    with pytest.raises(UsageError, match="at least two images"):
        moments.covariance  # noqa: B018


def test_statistics_round_trip_exactly(tmp_path):
    saved = Statistics(np.array([1.0, np.pi]), np.array([[2.0, 0.1], [0.1, 3.0]]), 42, {"dataset": "toy"})
    save_statistics(tmp_path / "s.npz", saved)
    loaded = load_statistics(tmp_path / "s.npz")
    np.testing.assert_array_equal(loaded.mean, saved.mean)
    np.testing.assert_array_equal(loaded.covariance, saved.covariance)
    assert (loaded.count, loaded.meta) == (42, {"dataset": "toy"})
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_published_files_are_read(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    np.save(tmp_path / "s.npy", {"mu": mu, "sigma": sigma})
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    for name in ("s.npy", "s.npz"):
        loaded = load_statistics(tmp_path / name)
        np.testing.assert_array_equal(loaded.mean, mu)
        np.testing.assert_array_equal(loaded.covariance, sigma)
        assert (loaded.count, loaded.meta) == (None, {})


def test_files_pickled_by_numpy_1_are_read(tmp_path):
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header += b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    content = np.array({"mu": np.zeros(2), "sigma": np.eye(2)}, dtype=object)
    pickled = pickle.dumps(content, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "s.npy").write_bytes(header + pickled)
    np.testing.assert_array_equal(load_statistics(tmp_path / "s.npy").covariance, np.eye(2))


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_nothing_but_arrays_is_unpickled(tmp_path, capsys):
    np.save(tmp_path / "s.npy", {"mu": np.zeros(2), "sigma": Malicious()})
    with pytest.raises(UsageError, match="print is no numpy array"):
        load_statistics(tmp_path / "s.npy")
    np.savez(tmp_path / "s.npz", mu=np.array(Malicious(), dtype=object), sigma=np.eye(2))
    with pytest.raises(UsageError, match="cannot read statistics"):
        load_statistics(tmp_path / "s.npz")
    assert capsys.readouterr().out == ""


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.eye(2))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "shapes.npz").read_bytes()[:-40])
    for name in ("array.npy", "shapes.npz", "text.npz", "cut.npz", "missing.npz"):
        with pytest.raises(UsageError, match=name):
            load_statistics(tmp_path / name)


def test_padding_is_cropped_and_the_result_cached(tmp_path, images):
    features = Brightness()
    expected = images[:, 0, [1, -2], 1:-1].double().mean(2).numpy()
    first = dataset_statistics(padded_dataset(images), features, tmp_path, batch_size=4)
    np.testing.assert_allclose(first.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(first.covariance, np.cov(expected, rowvar=False), rtol=1e-5)
    assert first.count == 11
    calls = features.calls
    second = dataset_statistics(padded_dataset(images), features, tmp_path, batch_size=4)
    assert features.calls == calls
    np.testing.assert_array_equal(second.covariance, first.covariance)


def test_the_cache_distinguishes_weights_and_data(tmp_path, images):
    for weights, fingerprint in (("0" * 64, "f"), ("1" * 64, "f"), ("0" * 64, "g")):
        features = Brightness(weights)
        dataset_statistics(padded_dataset(images, fingerprint), features, tmp_path, batch_size=50)
        assert features.calls == 1
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(name.startswith("toy_train_6_brightness_") for name in names)


def test_a_folder_may_mix_sizes(tmp_path):
    from PIL import Image

    for index, (value, side) in enumerate([(10, 4), (20, 4), (60, 8)]):
        Image.new("L", (side, side), value).save(tmp_path / f"{index}.png")
    statistics = folder_statistics(tmp_path, Brightness(), batch_size=2)
    np.testing.assert_allclose(statistics.mean, [30, 30])
    assert statistics.count == 3
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"3\.png"):
        folder_statistics(tmp_path, Brightness(), batch_size=2)
