"""The interface of all autoencoders, which map images to latents and back.

`encode` maps uint8 images [B, C, H, W] to `moments`: the posterior's mean and log-variance [B, 2 c, h, w], or the latent
[B, c, h, w] for an autoencoder without a posterior. `sample` turns moments into latents of about unit scale. `decode` maps
latents to pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

__all__ = ["MEASURED", "UNMEASURED", "Autoencoder", "AutoencoderFacts", "Encoder"]

# `AutoencoderFacts.statistics` of a measured scale, and until it is measured.
MEASURED, UNMEASURED = "measured", "unmeasured"


@dataclass(frozen=True)
class AutoencoderFacts:
    """The record of an autoencoder in checkpoints and latent caches.

    Args:
        id: hub id or folder; "none" for pixel space.
        sha256: hash of the weights; "none" for pixel space; None in a checkpoint that was converted without the autoencoder.
        scale_factor: the user's --scale_factor, if given.
        latents_mean, latents_std: per channel; latents are (z - mean) / std. Empty in pixel space, and while unmeasured.
        statistics: where these numbers come from, if neither from the autoencoder's own files nor from --scale_factor: a
            file's name, MEASURED, or UNMEASURED if they will be measured.
    """

    id: str
    sha256: str | None
    scale_factor: float | None = None
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    statistics: str = ""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read the facts from a header's JSON; a field that an older file lacks takes its default."""
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return cls(**values)

    def same_scale(self, other: "AutoencoderFacts") -> bool:
        """Whether both records scale latents alike, except for rounding."""
        ours, theirs = (facts.latents_mean + facts.latents_std for facts in (self, other))
        close = (math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=False))
        return len(ours) == len(theirs) and all(close)

    def to_json(self) -> dict[str, Any]:
        """The entries for headers and results; pixel space has no scale entries."""
        facts: dict[str, Any] = {"id": self.id, "sha256": self.sha256}
        if self.latents_std:
            facts["scale_factor"] = self.scale_factor
            facts |= {"latents_mean": list(self.latents_mean), "latents_std": list(self.latents_std)}
        return facts | ({"statistics": self.statistics} if self.statistics else {})


class Encoder(Protocol):
    """Encodes images. Caches of encoded images need nothing else.

    Attributes:
        factor: downsampling factor H / h.
        moment_channels: number of channels that `encode` returns.
        is_pixel_space: whether the code is the pixels themselves. There is then nothing to cache, and encoding is lossless.
    """

    factor: int
    moment_channels: int
    is_pixel_space: bool

    def describe(self) -> AutoencoderFacts:
        """The record for checkpoints and latent caches."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [B, C, H, W] to float32 [B, moment_channels, h, w]."""
        ...


class Autoencoder(Encoder, Protocol):
    """Encodes images, samples latents and decodes them. `encode` returns the posterior's moments.

    Attributes:
        latent_channels: c.
        moment_channels: 2 c with a posterior, else c.
        has_posterior: whether `encode` returns a mean and a log-variance.
    """

    latent_channels: int
    has_posterior: bool

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and the latents' mean and std, to `device`."""
        ...

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Scale latents by the mean and std in `stored`, even if the autoencoder's configuration has changed since.

        An autoencoder whose scale is fixed ignores it.
        """
        ...

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] from moments and standard normal noise; without noise, the posterior mean."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, c, h, w] to pixels [B, C, H, W], about in [-1, 1]; differentiable in the latents.

        `models.autoencoders.pixels.decode_images` rounds pixels to images.
        """
        ...

    def lipschitz_bound(self, side: int) -> float | None:
        """A certified Lipschitz constant of `decode` for latents with sides `side`; None if none is known."""
        ...
