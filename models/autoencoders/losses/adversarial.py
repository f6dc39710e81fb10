"""The adversarial loss: a discriminator of patches (PatchGAN, Isola et al. 2017, arXiv:1611.07004) with the hinge loss.

For the discriminator's scores s of images x and of reconstructions y (Lim & Ye 2017, arXiv:1705.02894, eq. 9 and 10),

    discriminator:  (mean max(0, 1 - s(x)) + mean max(0, 1 + s(y))) / 2,
    autoencoder:    -mean s(y).

Both are computed in float32 even under autocast, because the autoencoder learns from small differences of scores.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from options import UsageError, option
from runtime.randomness import seed_for

__all__ = ["AdversarialOptions", "PatchDiscriminator", "hinge_loss", "new_discriminator"]

CHANNELS_PER_GROUP = 16  # of the normalization
MOST_WIDENING = 8  # the widest layer has this many times --discriminator_width channels
INITIAL_DEVIATION = 0.02  # of the kernels, as in the paper's appendix 6.2


@dataclass(frozen=True)
class AdversarialOptions:
    """Adversarial loss."""

    adversarial_weight: float = option(
        0.0, "weight of the adversarial loss, times the adaptive weight (usually 0.5 to 0.75); 0: none", minimum=0
    )
    adversarial_start: int = option(5000, "step from which the autoencoder has an adversarial loss", minimum=0)
    discriminator_lead: int = option(
        500, "steps for which the discriminator trains before --adversarial_start", minimum=0
    )
    discriminator_lr: float = option(
        2e-4, "learning rate of the discriminator; follows the schedule of --lr", minimum=0, on_resume="on_request"
    )
    discriminator_width: int = option(64, "channels of the discriminator's first layer, a multiple of 16", minimum=16)
    discriminator_layers: int = option(
        3, "layers of the discriminator that halve the image; 3: a score per patch of 70 x 70 pixels", minimum=1
    )


class PatchDiscriminator(nn.Module):
    """Convolutions with one score per patch: of 16, 34, 70, ... pixels for 1, 2, 3, ... layers that halve the image.

    Kernels are 4 x 4. Groups of channels are normalized within each image instead of over a batch as in the paper, so that
    scores depend neither on the other images nor on the number of processes.

    Args:
        channels: of the images.
        width: channels of the first layer, a multiple of 16; they double with each layer, up to 8 times the width.
        halvings: number of layers that halve the image.

    Raises:
        UsageError: `width` is not a multiple of 16.
    """

    def __init__(self, channels: int, width: int = 64, halvings: int = 3) -> None:
        super().__init__()
        if width % CHANNELS_PER_GROUP:
            raise UsageError(f"--discriminator_width {width}: expected a multiple of {CHANNELS_PER_GROUP}")
        widths = [width * min(2**level, MOST_WIDENING) for level in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, halvings + 1):
            layers += [
                nn.Conv2d(
                    widths[level - 1], widths[level], 4, stride=2 if level < halvings else 1, padding=1, bias=False
                ),
                nn.GroupNorm(widths[level] // CHANNELS_PER_GROUP, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest = 3 * 2**halvings  # side of the smallest images with a score, in pixels
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores [B, 1, rows, columns] of images [B, C, H, W] in [-1, 1]; higher means more real."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.layers(pixels.float())


def new_discriminator(channels: int, options: AdversarialOptions, seed: int) -> PatchDiscriminator:
    """A discriminator whose initial weights depend only on the seed. Raises the errors of `PatchDiscriminator`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "discriminator"))
        return PatchDiscriminator(channels, options.discriminator_width, options.discriminator_layers)


def hinge_loss(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, 0-d, for the scores of images and of reconstructions."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + generated).mean()) / 2
