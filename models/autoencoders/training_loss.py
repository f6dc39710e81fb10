"""The loss of a KL autoencoder: squared error of the decoded posterior sample, KL divergence, and optional terms.

For an image x with posterior mean m and standard deviation s, z = m + s n with n ~ N(0, 1), and the decoder D, the loss is

    mean (D(z) - x)^2 + kl_weight KL,

where KL is the Kullback-Leibler divergence of the posterior from the standard normal (Kingma & Welling 2014; Rombach et al.
2022). The options change the decoder's input or add terms. With their defaults they draw no random numbers and cost nothing.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.autoencoders.kl import decode_pixels, encode_moments
from models.autoencoders.pretrained import LOGVAR_RANGE
from options import option
from runtime.randomness import generator_for

__all__ = [
    "AutoencoderLossOptions",
    "AutoencoderLosses",
    "LossStreams",
    "add_latent_noise",
    "autoencoder_losses",
    "rotate_and_reduce",
]


@dataclass(frozen=True)
class AutoencoderLossOptions:
    """Autoencoder's loss."""

    kl_weight: float = option(
        1e-6, "weight of the KL divergence per image; the mean squared error has weight 1", minimum=0
    )
    l1_weight: float = option(0.0, "weight of the mean absolute error", minimum=0)
    edge_weight: float = option(
        0.0, "weight of the mean absolute error of the differences between neighboring pixels", minimum=0
    )
    latent_noise: float = option(
        0.0,
        "TAU: the decoder sees latents with noise of standard deviation |N(0, TAU^2)|, drawn per image, in units of each "
        "channel's standard deviation; 0: no noise",
        minimum=0,
    )
    equivariance: float = option(
        0.0,
        "probability of a step that decodes rotated and reduced latents, and expects images rotated and reduced alike",
        minimum=0,
        maximum=1,
    )
    standardize_weight: float = option(
        0.0, "weight of a penalty that gives each latent channel mean 0 and mean square 1", minimum=0
    )


class LossStreams(NamedTuple):
    """Random generators, one per purpose, so that no option changes the random numbers of another."""

    posterior: torch.Generator
    latent_noise: torch.Generator
    equivariance: torch.Generator

    @classmethod
    def from_seed(cls, seed: int, device: torch.device | str) -> "LossStreams":
        """Streams of `seed`; those of tensors are on `device`."""
        return cls(
            generator_for(seed, "posterior", device=device),
            generator_for(seed, "latent noise", device=device),
            generator_for(seed, "equivariance"),
        )


class AutoencoderLosses(NamedTuple):
    """The loss to minimize, and two of its parts: mean squared error, and mean KL divergence per image. All are 0-d."""

    total: torch.Tensor
    error: torch.Tensor
    divergence: torch.Tensor


def autoencoder_losses(
    network: nn.Module, pixels: torch.Tensor, border: int, options: AutoencoderLossOptions, streams: LossStreams
) -> AutoencoderLosses:
    """Encode a batch, decode a sample of its posterior, and compare.

    Args:
        network: an AutoencoderKL.
        pixels: [B, C, H, W], about in [-1, 1].
        border: width of the images' padding in pixels, which is not compared.
        options: weights and probabilities.
        streams: random generators.
    """
    mean, logvar = encode_moments(network, pixels).float().chunk(2, dim=1)  # [B, c, h, w]
    logvar = logvar.clamp(*LOGVAR_RANGE)
    noise = torch.randn(mean.shape, generator=streams.posterior, device=mean.device)
    z = mean + (0.5 * logvar).exp() * noise
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    penalty = _distance_from_standard(z) if options.standardize_weight else None
    if options.latent_noise:
        z = add_latent_noise(z, options.latent_noise, streams.latent_noise)
    if options.equivariance and torch.rand((), generator=streams.equivariance) < options.equivariance:
        z, pixels, border = rotate_and_reduce(z, pixels, border, streams.equivariance)
    decoded = decode_pixels(network, z).float()
    height, width = pixels.shape[2] - border, pixels.shape[3] - border
    inside = (slice(None), slice(None), slice(border, height), slice(border, width))
    error = functional.mse_loss(decoded[inside], pixels[inside])
    total = error + options.kl_weight * divergence
    if options.l1_weight or options.edge_weight:
        total = total + _absolute_errors(decoded[inside] - pixels[inside], options)
    if penalty is not None:
        total = total + options.standardize_weight * penalty
    return AutoencoderLosses(total, error, divergence)


def _absolute_errors(difference: torch.Tensor, options: AutoencoderLossOptions) -> torch.Tensor:
    """The weighted terms of the images' difference [B, C, H, W] that are not squared, which sharpen edges."""
    edges = torch.stack([difference.diff(dim=axis).abs().mean() for axis in (2, 3)]).mean()
    return options.l1_weight * difference.abs().mean() + options.edge_weight * edges


def add_latent_noise(z: torch.Tensor, tau: float, generator: torch.Generator) -> torch.Tensor:
    """Add noise to latents [B, c, h, w], so that the decoder learns to forgive a sampler's errors.

    The noise of an image has the standard deviation sigma d_c in channel c. sigma = |N(0, tau^2)| as in representation
    autoencoders (arXiv:2510.11690), and d_c is the channel's standard deviation in the batch. It gets no
    gradient, so a larger scale of the latents does not make the noise smaller in proportion.
    """
    sigma = tau * torch.randn((len(z), 1, 1, 1), generator=generator, device=z.device).abs()
    deviation = z.detach().std((0, 2, 3), keepdim=True, correction=0)
    return z + sigma * deviation * torch.randn(z.shape, generator=generator, device=z.device)


def rotate_and_reduce(
    z: torch.Tensor, pixels: torch.Tensor, border: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Apply one random transform to latents and images alike (EQ-VAE, arXiv:2502.09509).

    The transform rotates by a multiple of 90 degrees, and reduces to between a quarter of the side and the whole side by
    bilinear interpolation.

    Args:
        z: latents [B, c, h, w].
        pixels: images [B, C, f h, f w] for the autoencoder's factor f.
        border: width of the images' padding in pixels.
        generator: a generator on the CPU.

    Returns:
        Latents, images and padding after the transform. The images' sides stay f times the latents'.
    """
    side, factor = z.shape[2], pixels.shape[2] // z.shape[2]
    turns = int(torch.randint(4, (), generator=generator))
    reduced = int(torch.randint(max(1, side // 4), side + 1, (), generator=generator))
    sides = (reduced, max(1, round(z.shape[3] * reduced / side)))
    z, pixels = _resize(z, sides), _resize(pixels, (factor * sides[0], factor * sides[1]))
    return z.rot90(turns, (2, 3)), pixels.rot90(turns, (2, 3)), math.ceil(border * reduced / side)


def _resize(tensor: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    if tensor.shape[2:] == sides:
        return tensor
    return functional.interpolate(tensor, size=sides, mode="bilinear", align_corners=False)


def _distance_from_standard(z: torch.Tensor) -> torch.Tensor:
    """Sum over channels of mean^2 + (mean square - 1)^2."""
    square = z.square().mean((0, 2, 3))
    return (z.mean((0, 2, 3)).square() + (square - 1).square()).sum()
