"""Pairs of noise and samples, in the latent cache's format, for reflow.

A folder holds the files of a latent cache (datasets_prep/latent_cache.py). A row has 2 c channels: the sample's latents, scaled
as the network sees them, and the noise. The manifest also records the autoencoder with its scale, and `teacher`: the
checkpoint, solver and guidance that made the samples. An interrupted build resumes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_prep.cached_moments import finish_cache, is_finished, save_shard, shard_path
from datasets_prep.latent_cache import FORMAT, LOCK, open_standalone_cache
from models.autoencoders.protocol import AutoencoderFacts
from options import UsageError, as_json
from runtime.distributed import Processes
from runtime.files import read_json, write_json
from runtime.locks import locked
from runtime.outputs import warn_of_space
from runtime.progress import progress_bar

__all__ = ["PairCache", "build_pair_cache", "open_pairs", "pair_identity", "teachers_autoencoder"]

PAIRS_PER_SHARD = 1000  # what an interrupted build loses at most, in each process
SPLIT = "pairs"

# draw(indices) gives the samples' latents and their noise, both [n, c, h, w].
DrawPairs = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


class PairCache:
    """Pairs by index; as a source of training data, their rows are moments [B, 2 c, h, w], which `split` separates.

    Args:
        rows: reads the rows float16 [B, 2 c, h, w] of indices [B].
        labels: class ids [N].
        fingerprint: changes with the pairs.
    """

    def __init__(
        self, rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], labels: torch.Tensor, fingerprint: str = ""
    ) -> None:
        self.labels, self.fingerprint = labels, fingerprint
        self._rows = rows

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Rows [B, 2 c, h, w] of pairs `indices` [B]. Pairs have no mirror images."""
        return self._rows(indices, torch.zeros_like(mirrored))

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Data and noise [B, c, h, w] of rows."""
        data, noise = rows.float().chunk(2, dim=1)
        return data, noise


def pair_identity(
    teacher: dict[str, Any],
    autoencoder: AutoencoderFacts,
    dataset: str,
    image_size: int,
    shape: Sequence[int],
    count: int,
) -> dict[str, Any]:
    """The entries of a manifest that identify `count` pairs of latents of this shape (c, h, w)."""
    channels, *sides = shape
    return {
        "format": FORMAT,
        "dataset": dataset,
        "split": SPLIT,
        "count": count,
        "image_size": image_size,
        "autoencoder_sha256": autoencoder.sha256,
        "autoencoder": as_json(autoencoder),
        "orientations": 1,
        "moment_shape": [2 * channels, *sides],
        "shard_size": PAIRS_PER_SHARD,
        "teacher": teacher,
    }


def build_pair_cache(
    folder: Path,
    identity: dict[str, Any],
    labels: torch.Tensor,
    draw: DrawPairs,
    precision: str,
    processes: Processes = Processes(),  # noqa: B008
) -> None:
    """Draw the pairs that are missing in `folder`. The processes share the shards. A finished cache is not changed.

    Args:
        folder: the cache's.
        identity: as `pair_identity` gives it.
        labels: class ids [N] of the pairs.
        draw: draws the pairs of indices, at most PAIRS_PER_SHARD at a time.
        precision: of the network.
        processes: every process must call this.

    Raises:
        UsageError: the folder holds other pairs, or a pair is not finite.
    """
    lock = locked(folder / LOCK, "is building these pairs", wait=True) if processes.is_main else nullcontext()
    with lock:
        processes.barrier()
        path = folder / "manifest.json"
        if path.exists():
            _check_identity(folder, read_json(path), identity)
        if processes.any(not is_finished(folder)):
            if processes.is_main and not path.exists():
                write_json(path, identity)
                warn_of_space(folder, 2 * len(labels) * int(np.prod(identity["moment_shape"])), "the pairs")
            processes.barrier()
            shards = _draw_shards(folder, len(labels), draw, precision, processes)
            processes.barrier()
            if processes.is_main:
                finish_cache(folder, identity, shards, labels.numpy())
            processes.barrier()


def _draw_shards(folder: Path, count: int, draw: DrawPairs, precision: str, processes: Processes) -> int:
    """Draw the missing shards; returns the number of all shards."""
    starts = range(0, count, PAIRS_PER_SHARD)
    with progress_bar(total=count // processes.count, desc="drawing pairs", unit="pair") as progress:
        for number in processes.share(range(len(starts))):
            path = shard_path(folder, number)
            indices = range(starts[number], min(starts[number] + PAIRS_PER_SHARD, count))
            if not path.with_suffix(".json").exists():
                rows = torch.cat([each.cpu() for each in draw(indices)], dim=1).half()
                if not rows.isfinite().all():
                    raise UsageError(
                        f"the teacher gives samples that float16 cannot hold for some of the pairs {indices.start} to "
                        f"{indices.stop - 1}: check its samples with test_flow_latent.py"
                    )
                save_shard(path, rows[:, None].numpy(), precision)
            progress.update(len(indices))
    return len(starts)


def teachers_autoencoder(folder: Path) -> AutoencoderFacts | None:
    """The autoencoder whose latents the pairs in `folder` are; None if it holds no pairs."""
    path = folder / "manifest.json"
    stored = read_json(path).get("autoencoder") if path.exists() else None
    return AutoencoderFacts.from_json(stored) if stored else None


def open_pairs(folder: Path, autoencoder: AutoencoderFacts, shape: Sequence[int], classes: int) -> PairCache:
    """Open finished pairs for a network.

    Args:
        folder: the cache's.
        autoencoder: the run's.
        shape: (c, h, w) of the run's latents.
        classes: number of classes of the network; with 1, labels are 0.

    Raises:
        UsageError: the folder holds something else or unfinished pairs, or they do not fit the run.
    """
    if not (folder / "manifest.json").exists():
        raise UsageError(f"--pairs {folder}: found no pairs; build them with python -m datasets_prep.build_pairs")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("split") != SPLIT:
        raise UsageError(f"--pairs {folder} holds latents of images, but no pairs of noise and samples")
    if not is_finished(folder):
        raise UsageError(
            f"--pairs {folder} is unfinished: repeat the command of datasets_prep.build_pairs to complete it"
        )
    cache, manifest = open_standalone_cache(folder)
    made = AutoencoderFacts.from_json(manifest["autoencoder"])
    if made.sha256 != autoencoder.sha256 or not made.same_scale(autoencoder):
        raise UsageError(
            f"--pairs {folder} holds latents of the autoencoder {made.id} with the standard deviations {made.latents_std}, but "
            f"this run uses {autoencoder.id} with {autoencoder.latents_std}"
        )
    channels, *sides = manifest["moment_shape"]
    if (found := (channels // 2, *sides)) != tuple(shape):
        raise UsageError(f"--pairs {folder} holds latents of the shape {found}, but this run's have {tuple(shape)}")
    labels = cache.labels if classes > 1 else torch.zeros_like(cache.labels)
    found_classes, expected = int(labels.max()) + 1, min(classes, len(labels))
    if found_classes != expected:
        raise UsageError(
            f"--pairs {folder} has samples of {found_classes} classes, but the network has {classes}: build the pairs with a "
            "checkpoint that has as many classes, or set --num_classes"
        )
    files = json.dumps([manifest["labels"], manifest["shards"]], sort_keys=True)
    return PairCache(cache.moments, labels, hashlib.sha256(files.encode()).hexdigest()[:12])


def _check_identity(folder: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a finished or unfinished cache holds these pairs."""
    for key, expected in as_json(identity).items():
        if manifest.get(key) != expected:
            raise UsageError(
                f"--pairs {folder} holds other pairs: expected the {key} {expected}, but found {manifest.get(key)}. Choose "
                "another folder, or delete this one"
            )
