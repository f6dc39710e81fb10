"""LightningDiT's latent shards (Yao et al. 2025, arXiv:2501.01423): latents of images and of their mirror images.

A folder holds `latents_rank<r>_shard<s>.safetensors`, each with `latents` and `latents_flip` [n, c, h, w] and `labels` [n], and
`latents_stats.pt` with the mean and standard deviation of each channel, [1, c, 1, 1]. Latents are as the encoder returns them,
usually samples of the posterior. The network's latents are (z - mean) / std. The files are memory-mapped.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import Shards, find_shards, fingerprint_of
from datasets_prep.image_dataset import ImageDataset, Split
from models.autoencoders.statistics import LatentStatistics, read_statistics
from options import UsageError
from runtime.files import UNREADABLE

__all__ = ["LABELS", "LATENTS", "MIRRORED", "SHARD", "STATISTICS", "find_latent_shards", "open_latent_shards"]

SHARD = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
STATISTICS = "latents_stats.pt"
LATENTS, MIRRORED, LABELS = "latents", "latents_flip", "labels"
LAYOUT = "`latents` and `latents_flip` [n, c, h, w] and `labels` [n]"


def find_latent_shards(datadir: Path) -> Shards | None:
    """The shards in `datadir`, or in its folders `train` and `validation`; None if there are none."""
    return find_shards(datadir, (".safetensors",), lambda path: SHARD.fullmatch(path.name) is not None)


def open_latent_shards(name: str, shards: Shards, split: Split, image_size: int) -> ImageDataset:
    """Open the latents of a split.

    Raises:
        UsageError: a shard or the statistics are missing or damaged, or shapes differ.
    """
    train = _read_content(shards.train, shards.root)
    own = train if shards.of_split(split) is shards.train else _read_content(shards.held_out, shards.root, train)
    return as_dataset(name, shards, split, image_size, train, own)


class _Rows:
    """The rows of several shards, numbered through."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._files = [_open_shard(path) for path in paths]
        shapes = [_shapes(path, file) for path, file in zip(paths, self._files, strict=True)]
        self.has_mirror_images = MIRRORED in shapes[0]
        for path, shape in zip(paths, shapes, strict=True):
            if (set(shape), shape[LATENTS][1:]) != (set(shapes[0]), shapes[0][LATENTS][1:]):
                raise UsageError(f"{path} has {_describe(shape)}, but {paths[0]} has {_describe(shapes[0])}")
        self.channels = shapes[0][LATENTS][1]
        self._starts = np.cumsum([0, *(shape[LATENTS][0] for shape in shapes)])

    def labels(self) -> list[int]:
        """The class ids of all rows."""
        return [
            label
            for path, file in zip(self._paths, self._files, strict=True)
            for label in _class_ids(path, file.get_tensor(LABELS))
        ]

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """The latents float32 [B, c, h, w] of rows `indices` [B], or of their mirror images where `mirrored` [B].

        Raises:
            UsageError: a value is not finite.
        """
        shard_of = np.searchsorted(self._starts, indices.numpy(), side="right") - 1
        rows = (indices.numpy() - self._starts[shard_of]).tolist()
        latents = torch.stack(
            [
                self._files[shard].get_slice(MIRRORED if flip and self.has_mirror_images else LATENTS)[row].float()
                for shard, row, flip in zip(shard_of.tolist(), rows, mirrored.tolist(), strict=True)
            ]
        )
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise UsageError(
                f"row {rows[first]} of {self._paths[shard_of[first]]} has latents that are not finite: encode the image again"
            )
        return latents


def _read_content(paths: list[Path], root: Path, training: Content | None = None) -> Content:
    """Read a split. If `training` is given, its statistics scale the latents."""
    rows = _Rows(paths)
    file = paths[0].parent / STATISTICS
    statistics = _statistics(file, rows.channels) if training is None else training.statistics
    return Content(
        labels=rows.labels(),
        fingerprint=fingerprint_of([*paths, *([file] if training is None else [])], root),
        source=f"from the shards' {LABELS}",
        latents=rows.read,
        flips=rows.has_mirror_images,
        statistics=statistics,
        warnings=() if rows.has_mirror_images else (f"the shards in {root} have no {MIRRORED}: no mirror images",),
    )


def _statistics(path: Path, channels: int) -> LatentStatistics:
    """Read the mean and standard deviation of each channel.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UsageError(
            f"expected {path} with the latents' mean and std [1, {channels}, 1, 1], but there is none: copy it from where the "
            "shards are from, because a network's latents are (z - mean) / std"
        )
    return read_statistics(path, channels)


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, *UNREADABLE) as error:
        raise UsageError(f"cannot read the latents in {path}: {error}; download or encode them again") from error


def _shapes(path: Path, file: Any) -> dict[str, list[int]]:
    """The shapes of a shard's arrays; `labels` must have a row for each latent, and the mirror images the same shape."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    rows = shapes.get(LATENTS, [])
    known = {name: shapes[name] for name in (LATENTS, MIRRORED, LABELS) if name in shapes}
    if len(rows) != 4 or shapes.get(LABELS) != rows[:1] or shapes.get(MIRRORED, rows) != rows:
        raise UsageError(f"{path}: expected {LAYOUT}, but found {_describe(shapes) or 'no arrays'}")
    return known


def _describe(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _class_ids(path: Path, labels: torch.Tensor) -> list[int]:
    if labels.is_floating_point() or labels.is_complex() or (len(labels) and int(labels.min()) < 0):
        raise UsageError(
            f"{path}: expected class ids of at least 0 in `{LABELS}`, but found {labels.dtype} {labels[:3]}"
        )
    return labels.tolist()
