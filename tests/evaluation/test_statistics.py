import pickle

import numpy as np
import pytest
import torch

from evaluation.statistics import RunningMoments, Statistics, load_statistics, save_statistics
from options import UsageError


def test_streaming_statistics_equal_numpys_despite_a_large_offset():
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


def test_statistics_do_not_depend_on_batches_and_processes(monkeypatch):
    rows = torch.randn(500, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9) + 7
    whole = RunningMoments(9)
    whole.update(rows)
    for buffered, batch, processes in ((1024, 1, 1), (64, 50, 1), (10, 7, 3), (1, 33, 8)):
        monkeypatch.setattr("evaluation.statistics.BUFFERED", buffered)
        shares = [RunningMoments(9) for _ in range(processes)]
        for number, part in enumerate(rows.split(batch)):
            shares[number % processes].update(part)
        total = RunningMoments(9)
        for share in shares:
            total.merge(RunningMoments.of(*share.triple()))
        assert total.count == 500
        np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-10)
        scale = np.sqrt(np.outer(np.diag(whole.covariance), np.diag(whole.covariance)))
        np.testing.assert_allclose(total.covariance / scale, whole.covariance / scale, rtol=1e-10, atol=1e-10)


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


def test_statistics_files_of_pytorch_fid_are_read(tmp_path):
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
    with pytest.raises(UsageError, match="print is not a numpy array"):
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
