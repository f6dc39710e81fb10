"""The scale of latents: their mean and standard deviation per channel. A latent is (z - mean) / std for an encoder's z.

diffusers computes latents as (z - latents_mean) * scaling_factor / latents_std, and without these statistics as
(z - shift_factor) * scaling_factor.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from options import UsageError

__all__ = ["Scale", "batch_norm_scale", "config_scale", "has_superseded_scale", "inner_scale", "own_scale"]

DEFAULT_FACTOR = 0.18215  # diffusers'


class Scale(NamedTuple):
    """Mean and standard deviation of the latents' channels: one number each, or one for all. `source` is for messages."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def own_scale(network: Any, read: Callable[[Any], Scale | None], channels: int, name: str) -> Scale | None:
    """The scale of an autoencoder of diffusers, with one number per channel; None if it has none.

    Args:
        network: the autoencoder.
        read: one of the functions below.
        channels: number of channels of the latents.
        name: the autoencoder's hub id, folder or file, for messages.

    Raises:
        UsageError: its numbers are not as many as channels, or not positive and finite.
    """
    try:
        scale = read(network)
        if scale is None:
            return None
        mean, std, source = scale
        valid = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    except TypeError:  # entries that are not numbers
        mean, std, source, valid = (), (), "", False
    if not {len(mean), len(std)} <= {1, channels} or not valid:
        raise UsageError(
            f"the config.json of the autoencoder {name} has unusable latents_mean, latents_std or scaling_factor: expected "
            f"{channels} numbers in both lists, and a positive factor and deviations; correct it, or pass --scale_factor"
        )
    return Scale(_repeated(mean, channels), _repeated(std, channels), source)


def config_scale(network: Any) -> Scale | None:
    """The scale in a configuration; None if it has neither statistics nor a scaling_factor."""
    config = network.config
    factor = 1.0 if has_superseded_scale(config) else getattr(config, "scaling_factor", None)
    if _has_statistics(config):
        also = "" if factor in (None, 1.0) else f" and scaling_factor {factor}"
        std = tuple(value / (factor or 1.0) for value in config.latents_std)
        return Scale(tuple(config.latents_mean), std, f"its latents_mean, latents_std{also}")
    if factor is None:
        return None
    shift = getattr(config, "shift_factor", None) or 0.0
    also = f" and shift_factor {shift}" if shift else ""
    return Scale((shift,), (1 / factor if factor else math.inf,), f"its scaling_factor {factor}{also}")


def batch_norm_scale(network: Any) -> Scale:
    """The scale in the running statistics of a batch normalization `bn` of the latents, as in FLUX.2."""
    mean, variance = (values.double() for values in (network.bn.running_mean, network.bn.running_var))
    std = (variance + network.config.batch_norm_eps).sqrt()
    return Scale(tuple(mean.tolist()), tuple(std.tolist()), "its batch statistics")


def inner_scale(network: Any) -> Scale:
    """The scale of latents that the autoencoder has normalized itself."""
    return Scale((0.0,), (1.0,), "statistics inside the autoencoder")


def has_superseded_scale(config: Any) -> bool:
    """Whether an earlier version of train_autoencoder.py wrote this configuration.

    That version measured statistics, normalized with them alone, and left diffusers' default in scaling_factor. Such a file
    is recognized by its layers, because other autoencoders with statistics are far larger.
    """
    names = ("layers_per_block", "norm_num_groups", "mid_block_add_attention", "scaling_factor")
    found = tuple(getattr(config, name, None) for name in names)
    return _has_statistics(config) and found == (1, 8, False, DEFAULT_FACTOR)


def _has_statistics(config: Any) -> bool:
    return all(getattr(config, name, None) is not None for name in ("latents_mean", "latents_std"))


def _repeated(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    return values if len(values) == count else values * count
