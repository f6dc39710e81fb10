"""Autoencoders of diffusers, in all classes that models/autoencoders/kinds.py lists.

An encoder's z, which is a sample of its normal posterior if it has one (Kingma & Welling 2013, arXiv:1312.6114), becomes the
latent (z - mean) / std, per channel, which has about unit scale (models/autoencoders/scale.py).

Encoding runs in the precision of the surrounding autocast; decoding runs in float32 (see DECODING). Weights and pixels are
in channels-last format, because it makes convolutions faster on CPUs. Compared with channels first, this changes the order
of float32 sums.
"""

from typing import Self

import torch
from torch import nn

from models.autoencoders.coding import decode_latents, encode_pixels
from models.autoencoders.kinds import KINDS
from models.autoencoders.lipschitz import decoder_bound
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.protocol import UNMEASURED, AutoencoderFacts
from models.autoencoders.scale import Scale, own_scale
from options import UsageError
from runtime.torch_files import weights_hash

__all__ = ["LOGVAR_RANGE", "PretrainedAutoencoder"]

# The autoencoder processes images in chunks: two images of 256 x 256 pixels on a CPU, where larger chunks gain nothing, and
# eight on other devices, to fill them.
PIXELS_PER_CHUNK = 1 << 17
OFF_CPU_MULTIPLIER = 4
LOGVAR_RANGE = (-30.0, 20.0)  # the clamping range of diffusers' DiagonalGaussianDistribution


class PretrainedAutoencoder:
    """An autoencoder of diffusers and the scale of its latents.

    Args:
        network: an instance of one of diffusers' classes in KINDS; it is frozen and set to evaluation mode.
        identity: hub id, folder or file, recorded in checkpoints.
        scale_factor: overrides the latent mean and std of the autoencoder itself.
        scaled: whether the network's own scale applies; otherwise it must be measured.
    """

    is_pixel_space = False

    def __init__(
        self, network: nn.Module, identity: str, scale_factor: float | None = None, scaled: bool = True
    ) -> None:
        self.class_name = type(network).__name__
        self.kind = KINDS[self.class_name]
        self.layout = self.kind.layout(network.config)
        self.network = network.eval().requires_grad_(False)
        if all(weight.dim() < 5 for weight in network.parameters()):  # without convolutions of videos
            self.network.to(memory_format=torch.channels_last)
        self.identity = identity
        self.scale_factor = scale_factor
        self._scaled = scaled
        self.image_channels, self.latent_channels, self.factor = self.layout[:3]
        self.has_posterior = self.kind.has_posterior
        self.moment_channels = (2 if self.has_posterior else 1) * self.latent_channels
        self.sha256 = weights_hash(network.state_dict())
        if scale_factor is not None:
            scale: Scale | None = Scale((0.0,), (1 / scale_factor,), f"--scale_factor {scale_factor:g}")
        else:
            scale = self.own_scale()
        self.source, self.statistics = (scale.source, "") if scale else ("", UNMEASURED)
        self.mean, self.std = self._columns((0.0,), (1.0,)) if scale is None else self._columns(scale.mean, scale.std)

    def own_scale(self) -> Scale | None:
        """The scale in the autoencoder's own files, even if another one is used; None if they have none.

        Raises:
            UsageError: it is unusable.
        """
        return own_scale(self.network, self.kind.scale, self.latent_channels, self.identity) if self._scaled else None

    def describe(self) -> AutoencoderFacts:
        """Hub id, folder or file, hash of the weights, and scale of the latents."""
        facts = AutoencoderFacts(self.identity, self.sha256, self.scale_factor, statistics=self.statistics)
        if self.statistics == UNMEASURED:
            return facts
        mean, std = (tuple(values.flatten().tolist()) for values in (self.mean, self.std))
        return AutoencoderFacts(self.identity, self.sha256, self.scale_factor, mean, std, self.statistics)

    def summary(self) -> str:
        """One line: class, shapes, range of the images, posterior, source of the scale, and memory of the weights."""
        weights = list(self.network.parameters())
        count, size = sum(each.numel() for each in weights), sum(each.nbytes for each in weights)
        side = f" of {self.layout.side} x {self.layout.side}" if self.layout.side else ""
        span = "[0, 1]" if self.kind.unit_range else "[-1, 1]"
        code = "posterior" if self.has_posterior else "deterministic"
        known = {UNMEASURED: "scale to be measured", "": f"scale: {self.source}"}
        scale = known.get(self.statistics, f"scale: {self.statistics}")
        return (
            f"{self.identity}: {self.class_name}, factor {self.factor}, {self.latent_channels} channels, "
            f"images{side} in {span}, {code}, {scale}; {count / 1e6:.3g} million parameters, {size / 1e6:.3g} MB"
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and the latents' mean and std, to `device`."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Scale latents by the mean and std in `stored`, even if the autoencoder's own have changed since.

        If `stored` has none, latents are not scaled until this is called again.
        """
        if not stored.same_scale(self.describe()):
            self.source = "a checkpoint's record"
        mean, std = (stored.latents_mean, stored.latents_std) if stored.latents_std else ((0.0,), (1.0,))
        known = stored.statistics if stored.statistics != UNMEASURED else ""
        self.statistics = known if stored.latents_std else UNMEASURED
        self.mean, self.std = (values.to(self.mean) for values in self._columns(mean, std))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [B, C, H, W] to moments [B, 2 c, h, w] with clamped log-variance, or to latents [B, c, h, w].

        The result is float32. Convolutions run in the precision of the surrounding autocast, or in float32 without one. For
        an autoencoder of color images, a grayscale image is repeated to three channels.

        Raises:
            UsageError: the autoencoder does not support the images' channels or sides.
        """
        if images.shape[1] == 1 and self.image_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        self._check_shape(images)
        chunks = images.split(_chunk(images.shape[2] * images.shape[3], images.device))
        pixels = (images_to_pixels(chunk).contiguous(memory_format=torch.channels_last) for chunk in chunks)
        code = torch.cat([encode_pixels(self.network, part) for part in pixels]).float().contiguous()
        if not self.has_posterior:
            return code
        mean, logvar = code.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] from moments and standard normal noise; without noise, the posterior mean.

        Without a posterior, `noise` is ignored.
        """
        if not self.has_posterior:
            return (moments.float() - self.mean) / self.std
        mean, logvar = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.mean) / self.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, c, h, w] to pixels [B, C, H, W], about in [-1, 1], in chunks to limit memory."""
        chunk = _chunk(latents.shape[2] * latents.shape[3] * self.factor**2, latents.device)
        z = (latents.float() * self.std + self.mean).contiguous(memory_format=torch.channels_last)
        return torch.cat([decode_latents(self.network, part) for part in z.split(chunk)])

    def lipschitz_bound(self, side: int) -> float | None:
        """A certified Lipschitz constant of `decode` for latents with sides `side`; None if a layer is unknown."""
        return (
            decoder_bound(self.network, side * self.layout.patch, float(self.std.max())) if self.kind.bounded else None
        )

    def _columns(self, *values: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
        """Each tuple of one number per channel, or of one for all, as [1, c, 1, 1]."""
        return tuple(torch.tensor(each).expand(self.latent_channels).view(1, -1, 1, 1) for each in values)

    def _check_shape(self, images: torch.Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != self.image_channels:
            raise UsageError(
                f"the autoencoder {self.identity} expects {self.image_channels}-channel images, "
                f"but the dataset has {channels}-channel images"
            )
        if height % self.factor or width % self.factor:
            raise UsageError(
                f"the image size must be a multiple of {self.factor} for the autoencoder {self.identity}, "
                f"but the images have {width} x {height} pixels (--image_size)"
            )
        if self.layout.side not in (None, height) or self.layout.side not in (None, width):
            raise UsageError(
                f"the image size must be {self.layout.side} for the autoencoder {self.identity}, "
                f"but the images have {width} x {height} pixels (--image_size)"
            )


def _chunk(pixels: int, device: torch.device) -> int:
    """Number of images in a chunk, for images with `pixels` pixels each."""
    return max(1, PIXELS_PER_CHUNK * (1 if device.type == "cpu" else OFF_CPU_MULTIPLIER) // pixels)
