"""Fixtures shared by several test modules."""

import gzip
import importlib.util
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.idx import find_idx_folder
from models.dit import DIT_SIZES, DiTOptions, build_dit
from models.registry import NETWORKS, Family

ROOT = Path(__file__).parents[1]
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_number_of_threads() -> None:
    """Restore the number of threads before each test, in case an earlier run in this process changed it."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """A data directory with the Fashion-MNIST files, downloaded once into the repository's `data/` if necessary."""
    find_idx_folder("fashion_mnist", ROOT / "data")
    return ROOT / "data"


@pytest.fixture(scope="session")
def write_idx() -> Callable[[Path, dict[str, int]], None]:
    """`write_idx(folder, counts)` writes Fashion-MNIST's files: bright rectangles on black, shaped according to the class."""

    def write(folder: Path, counts: dict[str, int]) -> None:
        generator = np.random.default_rng(0)
        folder.mkdir(parents=True)
        for prefix, count in counts.items():
            labels = np.arange(count, dtype=np.uint8) % 10
            images = np.zeros((count, 28, 28), np.uint8)
            for image, label in zip(images, labels, strict=True):
                top, left = generator.integers(2, 5, 2)
                image[top : top + 4 + 2 * label, left : left + 22 - 2 * label] = generator.integers(150, 256)
            for name, array in [("images-idx3", images), ("labels-idx1", labels)]:
                head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))

    return write


@pytest.fixture
def photo_dir(tmp_path: Path) -> Path:
    """Two class folders of smooth images in several sizes: `cat` with 14 JPEG files and `dog` with 11 PNG files."""
    folder = tmp_path / "photos"
    for label, (name, suffix, count) in enumerate([("cat", "jpg", 14), ("dog", "png", 11)]):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            width, height = 40 + 5 * index, 60 - 2 * index
            Image.fromarray(smooth_image(width, height, seed=100 * label + index)).save(
                folder / name / f"{index:02d}.{suffix}"
            )
    return folder


@pytest.fixture
def process_restored():
    """Restore signal handlers and the number of threads, which the scripts change."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def call(process_restored, monkeypatch, capsys):
    """`call(script, flags)` runs a script in this process and returns (exit code, stdout, stderr)."""

    def run(script, flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    return run


def smooth_image(width: int, height: int, seed: int) -> np.ndarray:
    """A colorful image uint8 [height, width, 3] composed of a few low frequencies."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [
        np.cos(2 * np.pi * (x * generator.uniform(0, 2) + y * generator.uniform(0, 2) + generator.uniform()))
        for _ in range(3)
    ]
    return (127.5 + 127.5 * np.stack(waves, axis=2)).round().astype(np.uint8)


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module tests/golden_check.py. Its DiT cases' size is registered as DiT-Golden/2."""
    spec = importlib.util.spec_from_file_location("golden_check", ROOT / "tests" / "golden_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(DIT_SIZES, "Golden", (48, 2, 3))
    monkeypatch.setitem(NETWORKS, "DiT-Golden/2", Family(DiTOptions, partial(build_dit, "Golden", 2)))
    return module


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> str:
    """Random weights for the FID's InceptionV3 that give features of about unit variance."""
    from pytorch_fid import inception

    torch.manual_seed(0)
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    noise = torch.rand(8, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # A forward pass in training mode sets the running statistics of the normalization layers.
        network.train()(torch.nn.functional.interpolate(noise, (139, 139)) * 2 - 1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.clamp_(min=1e-2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of 70 PNG images each, 20 x 16 pixels of color noise; the second folder's noise has less contrast."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low, high in (("a", 0, 255), ("b", 60, 200)):
        (root / name).mkdir()
        for index in range(70):
            pixels = generator.integers(low, high, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root / "a", root / "b"
