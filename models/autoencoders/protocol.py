"""What every autoencoder offers: images to latents and back.

An image uint8 [B, C, H, W] becomes `moments`: the posterior's mean and log-variance [B, 2 c, h, w], or the latent itself
[B, c, h, w] for an autoencoder without a posterior. `sample` turns moments into latents of about unit scale, `decode` turns
latents into images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

__all__ = ["Autoencoder", "AutoencoderFacts"]


@dataclass(frozen=True)
class AutoencoderFacts:
    """What a checkpoint and a latent cache record about their autoencoder.

    Args:
        id: hub id or folder; "none" for pixel space.
        sha256: hash of the weights; None where the file was converted without them.
        scale_factor: the factor that the user gave, if any.
        latents_mean, latents_std: per channel; latents are (z - mean) / std. Empty in pixel space.
    """

    id: str
    sha256: str | None
    scale_factor: float | None = None
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The facts in a header's JSON; files from before a field existed get its default."""
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The entries that a header and a result store: pixel space has no scale."""
        facts: dict[str, Any] = {"id": self.id, "sha256": self.sha256}
        if not self.latents_std:
            return facts
        scale = {"latents_mean": list(self.latents_mean), "latents_std": list(self.latents_std)}
        return {**facts, "scale_factor": self.scale_factor, **scale}


class Autoencoder(Protocol):
    """Encodes images, samples latents and decodes them.

    Attributes:
        factor: H / h, how many times smaller latents are than images.
        latent_channels: c.
        moment_channels: channels of what `encode` returns: 2 c with a posterior, else c.
        has_posterior: whether `encode` returns a mean and a log-variance.
        is_pixel_space: whether latents are the pixels themselves, so that there is nothing to cache and nothing is lost.
    """

    factor: int
    latent_channels: int
    moment_channels: int
    has_posterior: bool
    is_pixel_space: bool

    def describe(self) -> AutoencoderFacts:
        """What a checkpoint and a latent cache record."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move weights and statistics to `device`."""
        ...

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Scale latents as `stored` says, even if the autoencoder's own configuration has changed since."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, C, H, W] to float32 moments [B, moment_channels, h, w]."""
        ...

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] of moments and standard normal noise like them; the posterior mean without noise."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, c, h, w] to uint8 images [B, C, H, W]."""
        ...
