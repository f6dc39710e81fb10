"""Precomputed latents as a dataset: a latent cache, or a folder of .npy or .npz files.

Both datasets_prep/build_latents.py and training build latent caches. A cache records its autoencoder, the labels and, if the
dataset has mirror images, their moments.

In a folder, each file holds one image's posterior mean or a posterior sample, [c, h, w], or the mean and log-variance,
[2 c, h, w]. Values are unscaled, as the encoder returns them. Class folders, `train` and `validation` work as for images.
Folders have no mirror images, because an image's latent does not determine its mirror image's latent.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch

from datasets_prep.folder_layout.entries import is_junk
from datasets_prep.folder_layout.survey import Survey
from datasets_prep.folders import list_split, state_of_files
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split, listed_classes
from datasets_prep.latent_cache import open_standalone_cache
from models.autoencoders.pretrained import LOGVAR_RANGE
from models.autoencoders.protocol import Autoencoder
from models.autoencoders.statistics import LatentStatistics, describe_scale
from options import UsageError
from runtime.files import UNREADABLE, read_json
from runtime.messages import fact

__all__ = [
    "READERS",
    "LatentDataset",
    "StoredMoments",
    "open_latents",
    "parse_array",
    "scale_by_statistics",
]

LATENT_SUFFIXES = frozenset({".npy", ".npz"})
CACHE_PATTERNS = ("manifest.json", "*/manifest.json", "latent_cache/*/manifest.json")
READERS = 8  # threads
HEADER_LOCK = Lock()  # numpy parses headers as Python literals, which is not thread-safe in CPython 3.11 (gh-106905)


class LatentDataset(ImageDataset):
    """Stored latents [c, h, w] or [2 c, h, w] by index. Without `image`, reading an image raises UsageError.

    `autoencoder_sha256` is None if the files do not record their autoencoder. `statistics` scale the latents; None if the
    autoencoder's own scale does. `image` reads the image of an index, if the dataset also holds the images.
    """

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        stored: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        fingerprint: str,
        autoencoder_sha256: str | None = None,
        survey: Survey | None = None,
        statistics: LatentStatistics | None = None,
        image: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(facts, split, labels, image or self._refuse, fingerprint, survey)
        self.stored = stored
        self.autoencoder_sha256 = autoencoder_sha256
        self.statistics = statistics
        self.has_images = image is not None
        self._image = image

    def head(self, count: int) -> "LatentDataset":
        """The first `count` latents."""
        labels = self.stored_labels[:count]
        return LatentDataset(
            self.facts,
            self.split,
            labels,
            self.stored,
            f"{self.fingerprint}[:{len(labels)}]",
            self.autoencoder_sha256,
            self.survey,
            self.statistics,
            self._image,
        )

    def subset(self, kept: np.ndarray) -> "LatentDataset":
        """The latents with the indices `kept`, int64 [n]."""
        if np.array_equal(kept, np.arange(len(self))):
            return self
        rows, image = torch.from_numpy(kept), self._image
        return LatentDataset(
            self.facts,
            self.split,
            self.stored_labels[kept],
            lambda indices, mirrored: self.stored(rows[indices], mirrored),
            self.fingerprint_of_rows(kept),
            self.autoencoder_sha256,
            self.survey,
            self.statistics,
            None if image is None else lambda index: image(int(kept[index])),
        )

    def check_images(self, purpose: str) -> None:
        """Check that the dataset also has the images.

        Raises:
            UsageError: it holds latents only.
        """
        if not self.has_images:
            raise UsageError(
                f"{self.facts.name} holds latents but no images, which {purpose} needs. To score samples, write them with "
                "--save_images and compare them with reference statistics of the images (pytorch_fid/fid_score.py)"
            )

    def _refuse(self, index: int) -> torch.Tensor:
        self.check_images("scoring")
        raise AssertionError


class StoredMoments:
    """Posterior moments of a `LatentDataset` for one autoencoder.

    Raises:
        UsageError: the latents are from another autoencoder or have another size.
    """

    def __init__(self, dataset: LatentDataset, autoencoder: Autoencoder) -> None:
        self.labels = dataset.labels
        self._stored = dataset.stored
        self._channels = autoencoder.latent_channels
        self._has_posterior = autoencoder.has_posterior
        if autoencoder.is_pixel_space:
            raise UsageError(
                f"{dataset.facts.name} holds latents, but --pretrained_autoencoder_ckpt none means pixel space: name the "
                "autoencoder of the latents"
                + (", or the folder of the images as --datadir" if dataset.has_images else "")
            )
        sha256 = autoencoder.describe().sha256
        if dataset.autoencoder_sha256 not in (None, sha256):
            raise UsageError(
                f"the latents of {dataset.facts.name} are from the autoencoder {dataset.autoencoder_sha256}, but "
                f"--pretrained_autoencoder_ckpt is {sha256} (SHA-256 of the weights)"
            )
        side = dataset.facts.image_size // autoencoder.factor
        widths = (self._channels, 2 * self._channels) if self._has_posterior else (self._channels,)
        expected = [(channels, side, side) for channels in widths]
        found = tuple(self._stored(torch.tensor([0]), torch.tensor([False])).shape[1:])
        if found not in expected:
            raise UsageError(
                f"the latents of {dataset.facts.name} have the shape {found}, but this autoencoder and --image_size "
                f"{dataset.facts.image_size} need {expected[0]}"
                + (f" (mean) or {expected[1]} (mean and log-variance)" if self._has_posterior else "")
            )

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Read posterior moments. A latent without log-variance gets the minimum, which makes its noise negligible."""
        stored = self._stored(indices, mirrored)
        if stored.shape[1] == 2 * self._channels or not self._has_posterior:
            return stored
        return torch.cat([stored, torch.full_like(stored, LOGVAR_RANGE[0])], dim=1)


def scale_by_statistics(dataset: ImageDataset, autoencoder: Autoencoder, given: str = "") -> None:
    """Scale latents by the statistics that are stored with them: (z - mean) / std, times --scale_factor if it is given.

    Without such statistics, the autoencoder keeps its own scale.

    Args:
        dataset: may hold latents and their statistics.
        autoencoder: encoded the latents.
        given: the user's --latent_statistics, which have set the autoencoder's scale; "": none.

    Raises:
        UsageError: the statistics are of another number of channels, or differ from the given ones.
    """
    statistics = dataset.statistics if isinstance(dataset, LatentDataset) else None
    if statistics is None or autoencoder.is_pixel_space:
        return
    if len(statistics.mean) != autoencoder.latent_channels:
        raise UsageError(
            f"{statistics.path} holds statistics of {len(statistics.mean)} channels, but the latents of "
            f"--pretrained_autoencoder_ckpt have {autoencoder.latent_channels}: name the autoencoder of these latents"
        )
    facts = autoencoder.describe()
    std = tuple(value / (facts.scale_factor or 1.0) for value in statistics.std)
    source = Path(statistics.path).name
    stored = replace(facts, latents_mean=statistics.mean, latents_std=std, statistics=source)
    if given and not stored.same_scale(facts):
        asked = f" ({describe_scale(facts.latents_mean, facts.latents_std)})" if facts.latents_std else ""
        raise UsageError(
            f"--latent_statistics {given}{asked} contradicts {statistics.path}, which is stored with the latents of "
            f"{dataset.facts.name} ({describe_scale(statistics.mean, std)}): omit the flag, or replace that file"
        )
    autoencoder.restore_scale(stored)
    factor = f", times {facts.scale_factor:g}" if facts.scale_factor else ""
    fact("latents", f"(z - mean) / std with the statistics in {statistics.path}{factor}")


def open_latents(name: str, datadir: Path, split: Split, image_size: int) -> LatentDataset:
    """Open the latents of a split below `datadir`.

    Raises:
        UsageError: there are none, only caches of another size or split, or several matching caches.
    """
    found = [path.parent for pattern in CACHE_PATTERNS for path in sorted(datadir.glob(pattern))]
    caches = [path for path in found if not is_junk(path.name)]
    if not caches:
        return _open_folder(name, datadir, split, image_size)
    matching = [path for path in caches if _matches(path, split, image_size)]
    if len(matching) != 1:
        raise UsageError(
            f"{name}: expected one latent cache of the {split} images of size {image_size} in {datadir}, but found "
            f"{', '.join(map(str, matching)) or 'none'}. Build one with python -m datasets_prep.build_latents, or name its "
            "folder with --datadir"
        )
    cache, manifest = open_standalone_cache(matching[0])
    facts = DatasetFacts(name, image_size, 3, None, manifest["orientations"] == 2, ())
    labels = cache.labels.numpy()
    fingerprint = manifest["dataset_fingerprint"]
    return LatentDataset(facts, split, labels, cache.moments, fingerprint, manifest["autoencoder_sha256"])


def _matches(cache: Path, split: Split, image_size: int) -> bool:
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

    facts = DatasetFacts(name, image_size, 3, None, False, listed_classes(files.classes))
    fingerprint = state_of_files(files.paths, datadir, times=False)
    return LatentDataset(facts, split, files.labels, stored, fingerprint, survey=files.survey)


def _read_latent(path: Path) -> np.ndarray:
    """Read float32 [c, h, w] or [2 c, h, w]. A leading axis of length one is dropped."""
    try:
        array = parse_array(path.read_bytes())
    except UNREADABLE as error:
        raise UsageError(f"cannot read the latent {path}: {error}") from error
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not np.isfinite(array).all():
        raise UsageError(f"{path}: expected finite numbers [c, h, w] or [2 c, h, w], but found {array.shape}")
    return array


def parse_array(data: bytes) -> np.ndarray:
    """The only array, as float32, in the bytes of an .npy or .npz file. One of UNREADABLE is raised if it cannot be read."""
    with HEADER_LOCK:
        return _only_array(BytesIO(data)).astype(np.float32)


def _only_array(file: BinaryIO) -> np.ndarray:
    content = np.load(file, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        return content
    if len(content.files) != 1:
        raise ValueError(f"expected one array, but found {', '.join(content.files) or 'none'}")
    return content[content.files[0]]
