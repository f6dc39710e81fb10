"""Latents made beforehand, in place of images: a latent cache, or a folder of .npy or .npz files.

A cache (datasets_prep/build_latents.py makes it, and so does any training) knows its autoencoder, its labels and both
orientations. In a folder every file holds one image's posterior mean, or a sample, [c, h, w], or its mean and log-variance
[2 c, h, w], unscaled as the encoder gives them; class folders, `train` and `validation` are as with images. Mirror images
cannot be made from latents, so a folder does not flip.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NoReturn

import numpy as np
import torch

from datasets_prep.folders import list_split, state_of_files
from datasets_prep.image_dataset import LISTED_CLASSES, DatasetFacts, ImageDataset, Split
from datasets_prep.latent_cache import open_standalone_cache
from models.autoencoders.kl import LOGVAR_RANGE
from models.autoencoders.protocol import Autoencoder
from options import UsageError
from runtime.files import UNREADABLE, read_json

__all__ = ["LatentDataset", "StoredMoments", "open_latents"]

LATENT_SUFFIXES = frozenset({".npy", ".npz"})
CACHE_PLACES = ("manifest.json", "*/manifest.json", "latent_cache/*/manifest.json")
READERS = 8  # threads
HEADERS = Lock()  # numpy parses them as Python, in which threads disturb each other (CPython 3.11, gh-106905)


class LatentDataset(ImageDataset):
    """Stored arrays [c, h, w] or [2 c, h, w] by index; it has no images, and says so where one is asked for.

    `autoencoder_sha256` is None where the files do not tell what made them.
    """

    has_images = False

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        stored: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        fingerprint: str,
        autoencoder_sha256: str | None = None,
    ) -> None:
        super().__init__(facts, split, labels, self._refuse, fingerprint)
        self.stored = stored
        self.autoencoder_sha256 = autoencoder_sha256

    def head(self, count: int) -> "LatentDataset":
        """The first `count` latents."""
        labels = self.stored_labels[:count]
        fingerprint = f"{self.fingerprint}[:{len(labels)}]"
        return LatentDataset(self.facts, self.split, labels, self.stored, fingerprint, self.autoencoder_sha256)

    def check_images(self, purpose: str) -> NoReturn:
        """There are none."""
        raise UsageError(
            f"{self.facts.name} holds latents and no images, which {purpose} needs: leave it out, write the samples with "
            "--save_images, and compare them with statistics of the images (pytorch_fid/fid_score.py)"
        )

    def _refuse(self, index: int) -> NoReturn:
        self.check_images("scoring")


class StoredMoments:
    """The moments of a `LatentDataset` for one autoencoder.

    Raises:
        UsageError: the latents are of another autoencoder or size.
    """

    def __init__(self, dataset: LatentDataset, autoencoder: Autoencoder) -> None:
        self.labels = dataset.labels
        self._stored = dataset.stored
        self._channels = autoencoder.latent_channels
        self._has_posterior = autoencoder.has_posterior
        if autoencoder.is_pixel_space:
            raise UsageError(
                f"{dataset.facts.name} holds latents: --pretrained_autoencoder_ckpt none does not fit them"
            )
        sha256 = autoencoder.describe().sha256
        if dataset.autoencoder_sha256 not in (None, sha256):
            raise UsageError(
                f"the latents of {dataset.facts.name} were made by the autoencoder {dataset.autoencoder_sha256}, but "
                f"--pretrained_autoencoder_ckpt names {sha256} (SHA-256 of the weights)"
            )
        side = dataset.facts.image_size // autoencoder.factor
        widths = (self._channels, 2 * self._channels) if self._has_posterior else (self._channels,)
        admitted = [(channels, side, side) for channels in widths]
        found = tuple(self._stored(torch.tensor([0]), torch.tensor([False])).shape[1:])
        if found not in admitted:
            raise UsageError(
                f"the latents of {dataset.facts.name} have the shape {found}, but this autoencoder and --image_size "
                f"{dataset.facts.image_size} ask for {admitted[0]}"
                + (f" (mean) or {admitted[1]} (mean and log-variance)" if self._has_posterior else "")
            )

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """The autoencoder's moments; a latent without a log-variance gets the least there is, which is as good as none."""
        stored = self._stored(indices, mirrored)
        if stored.shape[1] == 2 * self._channels or not self._has_posterior:
            return stored
        return torch.cat([stored, torch.full_like(stored, LOGVAR_RANGE[0])], dim=1)


def open_latents(name: str, datadir: Path, split: Split, image_size: int) -> LatentDataset:
    """The latents of a split below `datadir`.

    Raises:
        UsageError: there are none, or a cache of another size, or several caches.
    """
    caches = [path.parent for place in CACHE_PLACES for path in sorted(datadir.glob(place))]
    if not caches:
        return _open_folder(name, datadir, split, image_size)
    fitting = [path for path in caches if _describes(path, split, image_size)]
    if len(fitting) != 1:
        raise UsageError(
            f"{name}: expected one latent cache of the {split} images of size {image_size} in {datadir}, but found "
            f"{', '.join(map(str, fitting)) or 'none'}. Make one with python -m datasets_prep.build_latents, or name its "
            "folder with --datadir"
        )
    cache, manifest = open_standalone_cache(fitting[0])
    facts = DatasetFacts(name, image_size, 3, None, manifest["orientations"] == 2, ())
    labels = cache.labels.numpy()
    fingerprint = manifest["dataset_fingerprint"]
    return LatentDataset(facts, split, labels, cache.moments, fingerprint, manifest["autoencoder_sha256"])


def _describes(cache: Path, split: Split, image_size: int) -> bool:
    manifest = read_json(cache / "manifest.json")
    return (manifest.get("split"), manifest.get("image_size")) == (split, image_size)


def _open_folder(name: str, datadir: Path, split: Split, image_size: int) -> LatentDataset:
    files = list_split(datadir, split, LATENT_SUFFIXES, kind="latents")
    readers = ThreadPoolExecutor(READERS)

    def stored(indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        paths = [files.paths[index] for index in indices.tolist()]
        arrays = list(readers.map(_read_latent, paths))
        for path, array in zip(paths, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise UsageError(f"{path} has the shape {array.shape}, but {paths[0]} has {arrays[0].shape}")
        return torch.from_numpy(np.stack(arrays))

    class_names = tuple(files.classes) if len(files.classes) <= LISTED_CLASSES else ()
    facts = DatasetFacts(name, image_size, 3, None, False, class_names)
    return LatentDataset(facts, split, files.labels, stored, state_of_files(files.paths, datadir, times=False))


def _read_latent(path: Path) -> np.ndarray:
    """float32 [c, h, w] or [2 c, h, w]; a leading axis of one is dropped."""
    try:
        file = BytesIO(path.read_bytes())
        with HEADERS:
            array = _only_array(file).astype(np.float32)
    except UNREADABLE as error:
        raise UsageError(f"cannot read the latent {path}: {error}") from error
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not np.isfinite(array).all():
        raise UsageError(f"{path}: expected finite numbers [c, h, w] or [2 c, h, w], but found {array.shape}")
    return array


def _only_array(file: BinaryIO) -> np.ndarray:
    content = np.load(file, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        return content
    if len(content.files) != 1:
        raise ValueError(f"expected one array, but found {', '.join(content.files) or 'none'}")
    return content[content.files[0]]
