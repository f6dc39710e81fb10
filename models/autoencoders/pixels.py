"""Conversion between images and pixels in [-1, 1], and pixel space: the autoencoder whose latents are pixels."""

from typing import Self

import torch

from models.autoencoders.protocol import Autoencoder, AutoencoderFacts
from runtime.finite import finite_rows

__all__ = ["DECODING", "PixelSpace", "decode_images", "images_to_pixels", "pixels_to_images"]

DECODING = {"precision": "fp32", "rounding": "round(127.5 x + 127.5), clamped to 0..255"}  # recorded in every result


def images_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def pixels_to_images(pixels: torch.Tensor) -> torch.Tensor:
    """Convert float pixels to uint8 images with the rounding in DECODING.

    No other step quantizes images. NaN becomes black, and infinity black or white; `decode_images` reports both.
    """
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def decode_images(autoencoder: Autoencoder, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode scaled latents [B, c, h, w].

    Returns:
        Images uint8 [B, C, H, W], and which of them come from finite latents and finite pixels, bool [B].
    """
    pixels = autoencoder.decode(latents)
    return pixels_to_images(pixels), finite_rows(latents) & finite_rows(pixels)


class PixelSpace:
    """The autoencoder `none`, where moments and latents are the pixels themselves."""

    factor = 1

    has_posterior = False
    is_pixel_space = True

    def __init__(self, channels: int) -> None:
        self.latent_channels = self.moment_channels = channels

    def describe(self) -> AutoencoderFacts:
        """The id `none`, without weights or scale."""
        return AutoencoderFacts(id="none", sha256="none")

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Do nothing, because pixels are not scaled."""

    def to(self, device: torch.device | str) -> Self:
        """Return `self`; there is nothing to move."""
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images [B, C, H, W] to pixels [B, C, H, W]."""
        return images_to_pixels(images)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The pixels, unchanged; `noise` is ignored, because there is nothing to sample."""
        return moments

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The pixels, unchanged."""
        return latents

    def lipschitz_bound(self, side: int) -> float | None:
        """1, because nothing changes."""
        return 1.0
