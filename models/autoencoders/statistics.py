"""Mean and deviation of latents, measured or from a file, for autoencoders whose files do not record a scale."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from models.autoencoders.protocol import MEASURED, UNMEASURED, Autoencoder, AutoencoderFacts
from options import UsageError
from runtime.torch_files import read_tensors

__all__ = [
    "LatentStatistics",
    "describe_scale",
    "inherit_scale",
    "measure_statistics",
    "read_chosen_scale",
    "read_statistics",
]

LISTED_CHANNELS = 8

NEGLIGIBLE = 1e-12  # variance, relative to the mean square if that is above 1; far above double's rounding errors


class LatentStatistics(NamedTuple):
    """Mean and standard deviation per channel of an encoder's z, without a scale, and the file that they come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    path: str = ""


def measure_statistics(parts: Iterable[torch.Tensor], has_posterior: bool) -> LatentStatistics:
    """Measure the mean and standard deviation of posterior *samples* per channel.

    The variance of samples is the variance of the posterior means plus the mean of the posterior variances. A channel that
    the autoencoder does not use (mean 0, variance 1) is therefore not amplified. A constant channel has the deviation 0.

    Args:
        parts: posterior moments [B, 2 c, h, w], or latents [B, c, h, w] without a posterior.
        has_posterior: which of them.
    """
    count, total, square, variance = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for part in parts:
        z = part.cpu().double()
        mean, logvar = z.chunk(2, dim=1) if has_posterior else (z, None)
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        total = total + mean.sum((0, 2, 3))
        square = square + mean.square().sum((0, 2, 3))
        variance = variance + (0.0 if logvar is None else logvar.exp().sum((0, 2, 3)))
    center = total / count
    spread = square / count - center.square() + variance / count
    # The difference of a constant channel's squares is rounding error of either sign.
    spread = spread.where(spread > NEGLIGIBLE * (square / count).clamp_min(1), 0.0)
    return LatentStatistics(tuple(center.tolist()), tuple(spread.sqrt().tolist()))


def inherit_scale(autoencoder: Autoencoder, recorded: AutoencoderFacts) -> None:
    """Take over the scale in another record of the same autoencoder, unless the scale is known already."""
    facts = autoencoder.describe()
    if facts.statistics == UNMEASURED and recorded.sha256 == facts.sha256 and recorded.latents_std:
        autoencoder.restore_scale(recorded)


def read_statistics(path: str | Path, channels: int) -> LatentStatistics:
    """Read {mean, std} [1, c, 1, 1] from a torch.save or safetensors file, as in LightningDiT's latents_stats.pt.

    Raises:
        UsageError: the file is unreadable or has something else.
    """
    content = read_tensors(path)
    entries = [content.get(key) for key in ("mean", "std")] if isinstance(content, Mapping) else [None]
    tensors = [each.double().flatten() for each in entries if isinstance(each, torch.Tensor)]
    finite = all(bool(each.isfinite().all()) for each in tensors)
    if [len(each) for each in tensors] != [channels] * 2 or not finite or not bool((tensors[1] > 0).all()):
        raise UsageError(
            f"{path}: expected a finite mean and a positive std, each [1, {channels}, 1, 1] as the latents have {channels} "
            f"channels; found {[list(each.shape) for each in entries if isinstance(each, torch.Tensor)] or 'none'}"
        )
    return LatentStatistics(tuple(tensors[0].tolist()), tuple(tensors[1].tolist()), str(path))


def read_chosen_scale(file: str, channels: int, factor: float | None = None) -> LatentStatistics:
    """Read the scale that the flags `--latent_statistics FILE` and `--scale_factor` set: (z - mean) / std times the factor.

    Returns:
        The statistics, whose deviations are divided by the factor.

    Raises:
        UsageError: there is no such file, or it has something else.
    """
    if not Path(file).is_file():
        raise UsageError(
            f"--latent_statistics {file}: no such file; expected `{MEASURED}`, or a file such as latents_stats.pt"
        )
    found = read_statistics(file, channels)
    return found._replace(std=tuple(value / (factor or 1.0) for value in found.std))


def describe_scale(mean: Sequence[float], std: Sequence[float]) -> str:
    """The first channels' means and deviations, for messages, and how many there are in all."""
    return f"mean {_listed(mean)} and standard deviation {_listed(std)}" if std else "no scale"


def _listed(values: Sequence[float]) -> str:
    listed = " ".join(f"{value:.4g}" for value in values[:LISTED_CHANNELS])
    return listed if len(values) <= LISTED_CHANNELS else f"{listed} ... ({len(values)} numbers)"
