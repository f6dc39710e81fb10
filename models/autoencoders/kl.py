"""New networks of diffusers' class AutoencoderKL."""

from collections.abc import Mapping
from typing import Any

from models.autoencoders.diffusers_files import new_network

__all__ = ["new_autoencoder_kl"]


def new_autoencoder_kl(
    channels: int, widths: tuple[int, ...], latent_channels: int, image_size: int, statistics: Mapping[str, Any]
) -> Any:
    """Build an untrained AutoencoderKL that halves the image len(widths) - 1 times.

    Args:
        channels: channels of the image, 1 or 3.
        widths: channels of each level; multiples of 8.
        latent_channels: c.
        image_size: recorded in the configuration.
        statistics: further configuration entries. With latents_mean and latents_std, scaling_factor is 1 by default.
    """
    if "latents_std" in statistics:
        statistics = {"scaling_factor": 1.0, **statistics}
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 8,
        "sample_size": image_size,
        "mid_block_add_attention": False,
        **statistics,
    }
    return new_network("AutoencoderKL", config)
