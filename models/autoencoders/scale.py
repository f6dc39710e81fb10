"""The scale of latents: their mean and standard deviation per channel, from an autoencoder's configuration.

diffusers computes latents as (z - latents_mean) * scaling_factor / latents_std, and without these statistics as
(z - shift_factor) * scaling_factor. Here, a latent is (z - mean) / std.
"""

import math
from typing import Any

from options import UsageError

__all__ = ["has_superseded_scale", "latent_scale"]

DEFAULT_FACTOR = 0.18215  # diffusers'


def latent_scale(config: Any, scale_factor: float | None, name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel.

    Args:
        config: configuration of a diffusers AutoencoderKL.
        scale_factor: the user's --scale_factor, which takes precedence over the configuration.
        name: the autoencoder's hub id or folder, for messages.

    Raises:
        UsageError: the configuration's entries are not one number per channel, or not positive and finite.
    """
    channels = config.latent_channels
    if scale_factor is not None:
        return [0.0] * channels, [1 / scale_factor] * channels
    try:
        mean, std = _mean_and_std(config)
        valid = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    except TypeError:  # entries that are not numbers
        mean, std, valid = [], [], False
    if not {len(mean), len(std)} <= {1, channels} or not valid:
        raise UsageError(
            f"the config.json of the autoencoder {name} has unusable latents_mean, latents_std or scaling_factor: expected "
            f"{channels} numbers in both lists, and a positive factor and deviations; correct it, or pass --scale_factor"
        )
    return mean, std


def _mean_and_std(config: Any) -> tuple[list[float], list[float]]:
    factor = 1.0 if has_superseded_scale(config) else config.scaling_factor
    if _has_statistics(config):
        return list(config.latents_mean), [value / (factor or 1.0) for value in config.latents_std]
    channels = config.latent_channels
    return [config.shift_factor or 0.0] * channels, [1 / factor if factor else math.inf] * channels


def has_superseded_scale(config: Any) -> bool:
    """Whether an earlier version of train_autoencoder.py wrote this configuration.

    That version measured statistics, normalized with them alone, and left diffusers' default in scaling_factor. Such a file
    is recognized by its layers, because other autoencoders with statistics are far larger.
    """
    ours = (config.layers_per_block, config.norm_num_groups, config.mid_block_add_attention) == (1, 8, False)
    return ours and _has_statistics(config) and config.scaling_factor == DEFAULT_FACTOR


def _has_statistics(config: Any) -> bool:
    return config.latents_mean is not None and config.latents_std is not None
