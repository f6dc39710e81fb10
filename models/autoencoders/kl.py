"""diffusers' AutoencoderKL, which encodes an image to a normal posterior (Kingma & Welling 2013, arXiv:1312.6114).

A posterior sample z becomes the latent (z - mean) / std, per channel, which has about unit scale. Mean and std come from
the first of these that is set: `--scale_factor` s (mean 0, std 1 / s), the autoencoder's `latents_mean` and `latents_std`,
or its `scaling_factor` and `shift_factor`.

Encoding runs in the precision of the surrounding autocast; decoding runs in float32 (see DECODING). Weights and pixels are
in channels-last format, because it makes convolutions faster on CPUs. Compared with channels first, this changes the order
of float32 sums.
"""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from torch import nn

from models.autoencoders.pixels import images_to_pixels, pixels_to_images
from models.autoencoders.protocol import AutoencoderFacts
from options import UsageError
from runtime.torch_files import weights_hash

__all__ = ["LOGVAR_RANGE", "KLAutoencoder", "decode_pixels", "encode_moments", "load_kl", "new_autoencoder_kl"]

# The autoencoder processes images in chunks: two images of 256 x 256 pixels on a CPU, where larger chunks gain nothing, and
# eight on other devices, to fill them.
PIXELS_PER_CHUNK = 1 << 17
OFF_CPU_MULTIPLIER = 4
LOGVAR_RANGE = (-30.0, 20.0)  # the clamping range of diffusers' DiagonalGaussianDistribution


class KLAutoencoder:
    """A diffusers AutoencoderKL and the scale of its latents.

    Args:
        network: the autoencoder; it is frozen and set to evaluation mode.
        identity: hub id or folder, recorded in checkpoints.
        scale_factor: overrides the latent mean and std in the autoencoder's configuration.
    """

    has_posterior = True
    is_pixel_space = False

    def __init__(self, network: nn.Module, identity: str, scale_factor: float | None = None) -> None:
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config: Any = network.config
        self.identity = identity
        self.scale_factor = scale_factor
        self.image_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.moment_channels = 2 * self.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        mean, std = _latent_scale(config, scale_factor)
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.sha256 = weights_hash(network.state_dict())

    def describe(self) -> AutoencoderFacts:
        """Hub id or folder, hash of the weights, and scale of the latents."""
        return AutoencoderFacts(
            id=self.identity,
            sha256=self.sha256,
            scale_factor=self.scale_factor,
            latents_mean=tuple(self.mean.flatten().tolist()),
            latents_std=tuple(self.std.flatten().tolist()),
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and the latents' mean and std, to `device`."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Scale latents by the mean and std in `stored`, even if the autoencoder's configuration has changed since."""
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1).to(self.mean) for values in (stored.latents_mean, stored.latents_std)
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [B, C, H, W] to posterior moments [B, 2 c, h, w], float32, with clamped log-variance.

        Convolutions run in the precision of the surrounding autocast, or in float32 without one. For an autoencoder of color
        images, a grayscale image is repeated to three channels.

        Raises:
            UsageError: the autoencoder does not support the images' channels or sides.
        """
        if images.shape[1] == 1 and self.image_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.image_channels:
            raise UsageError(
                f"the autoencoder {self.identity} expects {self.image_channels}-channel images, "
                f"but the dataset has {images.shape[1]}-channel images"
            )
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UsageError(
                f"the image size must be a multiple of {self.factor} for the autoencoder {self.identity}, "
                f"but it is {images.shape[3]} (--image_size)"
            )
        chunks = images.split(_chunk(images.shape[2] * images.shape[3], images.device))
        pixels = (images_to_pixels(chunk).contiguous(memory_format=torch.channels_last) for chunk in chunks)
        moments = torch.cat([encode_moments(self.network, part) for part in pixels])
        mean, logvar = moments.float().contiguous().chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] from posterior moments and standard normal noise; without noise, the posterior mean."""
        mean, logvar = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, c, h, w] to uint8 images [B, C, H, W], in chunks to limit memory."""
        z = (latents.float() * self.std + self.mean).contiguous(memory_format=torch.channels_last)
        chunk = _chunk(latents.shape[2] * latents.shape[3] * self.factor**2, latents.device)
        return torch.cat([pixels_to_images(decode_pixels(self.network, part)) for part in z.split(chunk)])


def encode_moments(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments [B, 2 c, h, w] from an AutoencoderKL for pixels in [-1, 1]."""
    hidden = network.encoder(pixels)  # type: ignore[operator]
    return network.quant_conv(hidden) if network.quant_conv is not None else hidden  # type: ignore[operator]


def decode_pixels(network: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Pixels, about in [-1, 1], that an AutoencoderKL decodes from unscaled latents z."""
    hidden = network.post_quant_conv(z) if network.post_quant_conv is not None else z  # type: ignore[operator]
    return network.decoder(hidden)  # type: ignore[operator]


def new_autoencoder_kl(
    channels: int, widths: tuple[int, ...], latent_channels: int, image_size: int, statistics: Mapping[str, Any]
) -> Any:
    """Build an untrained AutoencoderKL that halves the image len(widths) - 1 times.

    Args:
        channels: channels of the image, 1 or 3.
        widths: channels of each level; multiples of 8.
        latent_channels: c.
        image_size: recorded in the configuration.
        statistics: further configuration entries, such as latents_mean.
    """
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
        **statistics,
    )


def load_kl(folder: Path | None, name: str, scale_factor: float | None) -> KLAutoencoder:
    """Load an AutoencoderKL from a local `folder` in diffusers format or, if that is None, from the hub by `name`.

    The weights must be in safetensors format.

    Raises:
        UsageError: diffusers cannot load the autoencoder.
    """
    local = folder is not None
    try:
        with contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext():
            network = diffusers.AutoencoderKL.from_pretrained(
                folder or name,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                local_files_only=local,
            )
    except Exception as error:  # diffusers raises many types of error when loading fails
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot load the autoencoder {name}: {reason}") from error
    return KLAutoencoder(network, name, scale_factor)


def _latent_scale(config: Any, scale_factor: float | None) -> tuple[list[float], list[float]]:
    channels = config.latent_channels
    if scale_factor is None and config.latents_mean is not None and config.latents_std is not None:
        return list(config.latents_mean), list(config.latents_std)
    shift = 0.0 if scale_factor is not None else (config.shift_factor or 0.0)
    return [shift] * channels, [1 / (scale_factor or config.scaling_factor)] * channels


def _chunk(pixels: int, device: torch.device) -> int:
    """Number of images in a chunk, for images with `pixels` pixels each."""
    return max(1, PIXELS_PER_CHUNK * (1 if device.type == "cpu" else OFF_CPU_MULTIPLIER) // pixels)
