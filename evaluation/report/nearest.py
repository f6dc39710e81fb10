"""Searches the training images nearest to a run's samples, to see whether the model copies them.

The samples come from the last sample grid. Distances are root mean squared differences of pixels, from 0 to 255. The
distances of held-out images, which the model has not seen, show what to expect without copying. Meehan et al. 2020,
arXiv:2004.05675, compare the same two.

A sample counts as memorized if its nearest training image is less than a third as far away as its second nearest, so that it is
close to one image in particular (the ratio criterion of Yoon et al. 2023, "Diffusion probabilistic models generalize when they
fail to memorize"). A training image with an exact copy cannot be counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from checkpoints.header import Header
from datasets_prep.datasets import DatasetOptions, ImageDataset, crop_padding, open_dataset
from datasets_prep.image_dataset import shown_side
from evaluation.checks import spread
from evaluation.report.run_record import RunRecord, read_runs
from evaluation.sources import dataset_source, image_batches
from options import UsageError, make_options, option
from runtime.files import write_json
from runtime.messages import fact, note
from runtime.pictures import Sheet, read_sheet, save_sheet, side_by_side

__all__ = [
    "NearestOptions",
    "Neighbors",
    "find_nearest",
    "memorized",
    "nearest_images",
    "note_searched",
    "pair_with_nearest",
]

NEIGHBORS = 3  # per sample
NUMBERS_PER_BATCH = 2**24  # pixels of training images that are compared at once
LARGEST_BATCH = 500
MEMORIZED = 1 / 3  # of the distance to the second nearest image
SEARCHED = 10_000  # training images, evenly spaced, that training compares with the samples of each grid
REDUCED = 32  # side in pixels to which training reduces images before it compares them


@dataclass(frozen=True)
class NearestOptions:
    """Nearest training images."""

    nearest: int = option(
        0, "samples of the last grid whose nearest training images are searched and shown; 0: none", minimum=0
    )
    datadir: str | None = option(None, "directory of the training images, if they have moved since training")


@dataclass
class Neighbors:
    """The nearest images of each query, from the nearest on.

    Args:
        distances: float [Q, k], root mean squared differences of pixels.
        images: uint8 [Q, k, C, H, W].
    """

    distances: torch.Tensor
    images: torch.Tensor


def find_nearest(folder: Path, options: NearestOptions) -> None:
    """Write nearest.png and nearest.json into the run's samples.

    Raises:
        UsageError: the run lacks a checkpoint or a sample grid, its samples have dense conditions, or its data cannot be read.
    """
    run = read_runs([folder])[0]
    header = _usable_header(run)
    grid = run.grids[-1]
    samples = read_sheet(grid.path, shown_side(header.dataset), header.dataset.channels)[: options.nearest]
    train, held_out = (_open_split(run, options.datadir, split) for split in ("train", "validation"))
    compared = torch.stack([held_out[index] for index in spread(len(held_out))])
    queries = torch.cat([samples, crop_padding(compared, header.dataset)])
    found = nearest_images(queries, train, header.dataset.flips)
    own, other = found.distances[: len(samples), 0], found.distances[len(samples) :, 0]
    shown = torch.cat([samples[:, None], found.images[: len(samples)]], dim=1)  # [n, 1 + k, C, H, W]
    save_sheet(shown.transpose(0, 1).flatten(0, 1), folder / "samples" / "nearest.png", len(samples))
    result = {
        "step": grid.step,
        "distance": "root mean squared difference of pixels, 0 to 255",
        "mirror_images": header.dataset.flips,
        "training_images": len(train),
        "samples": own.median().item(),
        "held_out": other.median().item(),
        "memorized": memorized(found.distances[: len(samples)]),
        "memorized_held_out": memorized(found.distances[len(samples) :]),
        "distances": found.distances[: len(samples)].tolist(),
    }
    write_json(folder / "samples" / "nearest.json", result)
    fact(
        "nearest", f"median distance {result['samples']:.1f} for samples, {result['held_out']:.1f} for held-out images"
    )


def memorized(distances: torch.Tensor) -> list[float]:
    """The share of memorized samples and its standard error (binomial), from `Neighbors.distances` [Q, k], k >= 2.

    With fewer than two training images, nothing can be said: an empty list.
    """
    if distances.shape[1] < 2:
        return []
    share = (distances[:, 0] < MEMORIZED * distances[:, 1]).double().mean().item()
    return [share, (share * (1 - share) / len(distances)) ** 0.5]


def note_searched(dataset: ImageDataset) -> None:
    """Print that `pair_with_nearest` compares only a part of a large dataset."""
    if len(dataset) > SEARCHED:
        note(
            f"--show_neighbours compares samples with {SEARCHED:,} of the {len(dataset):,} training images, evenly spaced"
        )


def pair_with_nearest(samples: torch.Tensor, dataset: ImageDataset, flips: bool) -> Sheet:
    """Draw each of the samples uint8 [N, C, H, W] to the left of its nearest training image.

    At most SEARCHED images are compared, with pixels averaged down to REDUCED x REDUCED.
    """
    searched = min(len(dataset), SEARCHED)
    part = dataset.subset(np.arange(searched) * len(dataset) // searched)
    return side_by_side([samples, nearest_images(samples, part, flips, count=1, side=REDUCED).images[:, 0]])


def nearest_images(
    queries: torch.Tensor, dataset: ImageDataset, flips: bool, count: int = NEIGHBORS, side: int | None = None
) -> Neighbors:
    """Search the `count` images of `dataset` nearest to each of the queries uint8 [Q, C, H, W].

    With `flips`, mirror images count too, and are returned as they match. With `side`, larger images are compared after
    their pixels have been averaged down to side x side; the returned images keep their size.
    """
    count = min(count, len(dataset))
    flat = _rows(queries, side)
    best = torch.full((len(queries), count), torch.inf)
    keys = torch.zeros(len(queries), count, dtype=torch.long)  # twice the index, plus one for a mirror image
    source = dataset_source(dataset)
    for batch, indices in image_batches(source, max(1, min(LARGEST_BATCH, NUMBERS_PER_BATCH // queries[0].numel()))):
        distances, numbers = _distances(flat, _rows(batch, side)), 2 * torch.tensor(list(indices))
        if flips:
            mirrored = _distances(flat, _rows(batch.flip(3), side))
            numbers = numbers + (mirrored < distances)
            distances = torch.minimum(distances, mirrored)
        numbers = numbers.expand_as(distances)
        best, chosen = torch.cat([best, distances], dim=1).topk(count, largest=False)
        keys = torch.cat([keys, numbers], dim=1).gather(1, chosen)
    images = torch.stack([_shown(source.read(key // 2), key % 2) for key in keys.flatten().tolist()])
    return Neighbors(best, images.unflatten(0, keys.shape))


def _rows(images: torch.Tensor, side: int | None) -> torch.Tensor:
    """Images uint8 [N, C, H, W] as rows float [N, D], reduced to at most side x side pixels each."""
    pixels = images.float()
    return (functional.adaptive_avg_pool2d(pixels, side) if side and side < pixels.shape[3] else pixels).flatten(1)


def _distances(flat: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Root mean squared differences [Q, B]. Differences are formed first, so that copies have the distance 0."""
    return torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5


def _shown(image: torch.Tensor, mirrored: int) -> torch.Tensor:
    return image.flip(2) if mirrored else image


def _usable_header(run: RunRecord) -> Header:
    """The header of the run's newest checkpoint, if its grids show samples alone."""
    if run.header is None or not run.grids:
        lacking = "sample grid" if run.header else "checkpoint"
        raise UsageError(
            f"--nearest needs a checkpoint and a sample grid, but {run.folder} has no {lacking}: train further"
        )
    if run.header.dense is not None:
        raise UsageError(
            f"--nearest: the grids of {run.folder} also show the samples' conditions, such as masks: leave out --nearest"
        )
    return run.header


def _open_split(run: RunRecord, datadir: str | None, split: str) -> ImageDataset:
    names: Sequence[str] = ("dataset", "datadir", "image_size", "skip_bad_images")
    chosen = {name: run.options[name] for name in names if name in run.options} | (
        {"datadir": datadir} if datadir else {}
    )
    dataset = open_dataset(make_options(DatasetOptions, chosen), split)  # type: ignore[arg-type]
    dataset.check_images("--nearest")
    return dataset
