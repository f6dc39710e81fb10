"""The loss of an autoencoder: squared error of the decoded latent, KL divergence, and optional terms.

For an image x with posterior mean m and standard deviation s, z = m + s n with n ~ N(0, 1), and the decoder D, the loss is

    mean (D(z) - x)^2 + kl_weight KL,

where KL is the Kullback-Leibler divergence of the posterior from the standard normal (Kingma & Welling 2014; Rombach et al.
2022). Without a posterior, z is the code, and there is no divergence. The options change the decoder's input or add terms. With
their defaults they draw no random numbers and cost nothing. `training.autoencoder.losses` adds the terms up.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from models.autoencoders.coding import Coder
from models.autoencoders.losses.adversarial import AdversarialOptions
from models.autoencoders.losses.alignment import AlignmentOptions
from models.autoencoders.losses.perceptual import PerceptualOptions
from models.autoencoders.pretrained import LOGVAR_RANGE
from options import option
from runtime.randomness import StepDraws

__all__ = [
    "AutoencoderLossOptions",
    "Reconstruction",
    "absolute_error",
    "add_latent_noise",
    "divergence",
    "edge_error",
    "imbalance",
    "reconstruct",
    "rotate_and_reduce",
    "squared_error",
]


@dataclass(frozen=True)
class AutoencoderLossOptions(PerceptualOptions, AdversarialOptions, AlignmentOptions):
    """Autoencoder's loss."""

    kl_weight: float = option(1e-6, "weight of the KL divergence per image", minimum=0)
    l2_weight: float = option(1.0, "weight of the mean squared error", minimum=0)
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


class Reconstruction(NamedTuple):
    """A batch, encoded and decoded.

    Args:
        target: the pixels [B, C, H, W] to reconstruct, without padding; transformed as the latents are.
        decoded: the decoder's pixels, alike.
        mean: posterior mean, or the code without a posterior [B, c, h, w].
        logvar: log-variance of the posterior [B, c, h, w]; None without one.
        z: posterior sample, or the code, before noise and transforms [B, c, h, w].
    """

    target: torch.Tensor
    decoded: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor | None
    z: torch.Tensor


def reconstruct(
    coder: Coder, pixels: torch.Tensor, border: int, options: AutoencoderLossOptions, draws: StepDraws
) -> Reconstruction:
    """Encode a batch, and decode a sample of its posterior.

    Args:
        coder: the network.
        pixels: [B, C, H, W], about in [-1, 1].
        border: width of the images' padding in pixels, which is not compared.
        options: noise and probabilities.
        draws: the step's random numbers.
    """
    code = coder.encode(pixels).float()
    mean, logvar = code.chunk(2, dim=1) if coder.has_posterior else (code, None)  # [B, c, h, w]
    z = mean
    if logvar is not None:
        logvar = logvar.clamp(*LOGVAR_RANGE)
        z = mean + (0.5 * logvar).exp() * draws.normal("posterior", mean.shape[1:])
    seen = z
    if options.latent_noise:
        seen = add_latent_noise(seen, options.latent_noise, draws)
    if options.equivariance:
        generator = draws.shared("equivariance")
        if torch.rand((), generator=generator) < options.equivariance:
            seen, pixels, border = rotate_and_reduce(seen, pixels, border, generator)
    decoded = coder.decode(seen).float()
    height, width = pixels.shape[2] - border, pixels.shape[3] - border
    inside = (slice(None), slice(None), slice(border, height), slice(border, width))
    return Reconstruction(pixels[inside], decoded[inside], mean, logvar, z)


def squared_error(found: Reconstruction) -> torch.Tensor:
    """The mean squared error of pixels, 0-d."""
    return functional.mse_loss(found.decoded, found.target)


def absolute_error(found: Reconstruction) -> torch.Tensor:
    """The mean absolute error of pixels, 0-d."""
    return (found.decoded - found.target).abs().mean()


def edge_error(found: Reconstruction) -> torch.Tensor:
    """The mean absolute error of the differences between neighboring pixels, 0-d. It sharpens edges."""
    difference = found.decoded - found.target
    return torch.stack([difference.diff(dim=axis).abs().mean() for axis in (2, 3)]).mean()


def divergence(found: Reconstruction) -> torch.Tensor:
    """The mean KL divergence of an image's posterior from the standard normal in nats, 0-d.

    Raises:
        ValueError: there is no posterior.
    """
    if found.logvar is None:
        raise ValueError("the autoencoder has no posterior")
    mean, logvar = found.mean, found.logvar
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def imbalance(found: Reconstruction) -> torch.Tensor:
    """Sum over latent channels of mean^2 + (mean square - 1)^2, 0-d."""
    square = found.z.square().mean((0, 2, 3))
    return (found.z.mean((0, 2, 3)).square() + (square - 1).square()).sum()


def add_latent_noise(z: torch.Tensor, tau: float, draws: StepDraws) -> torch.Tensor:
    """Add noise to latents [B, c, h, w], so that the decoder learns to forgive a sampler's errors.

    The noise of an image has the standard deviation sigma d_c in channel c. sigma = |N(0, tau^2)| as in representation
    autoencoders (arXiv:2510.11690), and d_c is the channel's standard deviation in the batch. It gets no
    gradient, so a larger scale of the latents does not make the noise smaller in proportion.
    """
    sigma = tau * draws.normal("level of latent noise", (1, 1, 1)).abs()
    deviation = z.detach().std((0, 2, 3), keepdim=True, correction=0)
    return z + sigma * deviation * draws.normal("latent noise", z.shape[1:])


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
