"""Writes a latent cache in LightningDiT's format (see `lightningdit`), so that its code and ours train on the same latents.

Each image gets one sample of its posterior, from a fixed seed. `latents_stats.pt` holds the mean and standard deviation of each
channel over all latents of the training images, in the folder of each split.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from datasets_prep.formats.lightningdit import LABELS, LATENTS, MIRRORED, SHARD, STATISTICS
from datasets_prep.moments import MomentSource
from models.autoencoders.protocol import Autoencoder
from models.autoencoders.statistics import LatentStatistics
from options import UsageError
from runtime.files import replace_folder
from runtime.outputs import warn_of_space
from runtime.progress import progress_bar
from runtime.randomness import generator_for

__all__ = ["write_latent_shards"]

ROWS_PER_SHARD = 10_000
BYTES_PER_SHARD = 2 << 30  # a shard is in memory as a whole
ROWS_PER_READ = 250


def write_latent_shards(
    folder: Path,
    source: MomentSource,
    autoencoder: Autoencoder,
    split: str,
    flips: bool,
    statistics: LatentStatistics | None = None,
) -> LatentStatistics:
    """Write the latents of a split into `folder`, with statistics.

    Args:
        folder: where the files go.
        source: posterior moments by image index.
        autoencoder: the autoencoder of the moments.
        split: chooses the noise of the posterior samples.
        flips: whether `source` has mirror images. Without them, `latents_flip` repeats `latents`, as LightningDiT needs it.
        statistics: of the training latents, for another split. By default, they are measured on the latents written.

    Returns:
        The statistics.

    Raises:
        UsageError: the folder holds other files.
    """
    others = [path for path in folder.glob("*") if path.name != STATISTICS and not SHARD.fullmatch(path.name)]
    if others:
        raise UsageError(
            f"{folder} holds other files, such as {others[0].name}: name another folder with --latent_shards_dir"
        )
    with replace_folder(folder) as filled:
        moments = source.moments(torch.tensor([0]), torch.tensor([False]))
        row_bytes = 8 * moments[0, : autoencoder.latent_channels].numel()  # both orientations in float32
        warn_of_space(filled, len(source) * row_bytes, "the latents")
        rows_per_shard = min(ROWS_PER_SHARD, max(1, BYTES_PER_SHARD // row_bytes))
        measured = _write_shards(filled, source, autoencoder, split, flips, rows_per_shard)
        _write_statistics(filled / STATISTICS, statistics or measured)
    return statistics or measured


def _write_shards(
    folder: Path, source: MomentSource, autoencoder: Autoencoder, split: str, flips: bool, rows_per_shard: int
) -> LatentStatistics:
    """Write the shards, and measure the statistics of their latents."""
    count = 0
    total, squares = torch.zeros(2, autoencoder.latent_channels, dtype=torch.float64)
    starts = range(0, len(source), rows_per_shard)
    for number, first in enumerate(progress_bar(starts, desc="writing shards", unit="shard")):
        rows = torch.arange(first, min(first + rows_per_shard, len(source)))
        latents = torch.cat(list(_samples(source, autoencoder, rows, split, mirrored=False)))
        mirrored = (
            torch.cat(list(_samples(source, autoencoder, rows, split, mirrored=True))) if flips else latents.clone()
        )
        arrays = {LATENTS: latents, MIRRORED: mirrored, LABELS: source.labels[rows]}
        path = folder / f"latents_rank00_shard{number:03d}.safetensors"
        save_file(arrays, path, {"total_size": str(len(rows)), "dtype": str(latents.dtype), "device": "cpu"})
        for part in latents.split(ROWS_PER_READ):
            values = part.double().transpose(0, 1).flatten(1)
            count, total, squares = count + values.shape[1], total + values.sum(1), squares + values.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()))


def _write_statistics(path: Path, statistics: LatentStatistics) -> None:
    named = {"mean": statistics.mean, "std": statistics.std}
    torch.save({name: torch.tensor(values).view(1, -1, 1, 1) for name, values in named.items()}, path)


def _samples(
    source: MomentSource, autoencoder: Autoencoder, rows: torch.Tensor, split: str, *, mirrored: bool
) -> Iterator[torch.Tensor]:
    """Yield one posterior sample of each row, unscaled, float32 [B, c, h, w]."""
    for part in rows.split(ROWS_PER_READ):
        moments = source.moments(part, torch.full((len(part),), mirrored)).float()
        if not autoencoder.has_posterior:
            yield moments
            continue
        mean, logvar = moments.chunk(2, dim=1)
        generator = generator_for(0, "latent shards", split, int(part[0]), mirrored)
        yield mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
