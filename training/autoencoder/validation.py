"""Validation on held-out images: PSNR and loss of the EMA network, and grids of originals next to their reconstructions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from datasets_prep.datasets import ImageDataset
from evaluation.metrics import psnr
from evaluation.reconstruction import compare_images
from models.autoencoders.coding import Coder
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
from runtime.distributed import Processes
from runtime.pictures import Sheet, side_by_side
from runtime.precision import Machine
from runtime.randomness import StepDraws, seed_for
from training.autoencoder.losses import AutoencoderLoss

__all__ = ["HeldOut", "spread_images"]

VALIDATED, PICTURED = 512, 40  # images at most
IMAGES_PER_BATCH = 64


def spread_images(dataset: ImageDataset, count: int) -> torch.Tensor:
    """At most `count` images uint8 [N, C, H, W], evenly spaced in the dataset."""
    count = min(count, len(dataset))
    return torch.stack([dataset[number * len(dataset) // count] for number in range(count)])


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and their measures. Every process must call `measure`, and gets the result.

    Args:
        dataset: the held-out images' facts.
        images: uint8 [N, C, H, W], on the CPU.
        channels: image channels of the network.
        loss: the training loss.
        machine: device and precision of the loss; reconstructions are float32.
        processes: share the images.
    """

    dataset: ImageDataset
    images: torch.Tensor
    channels: int
    loss: AutoencoderLoss
    machine: Machine
    processes: Processes

    @torch.no_grad()
    def measure(self, network: nn.Module, step: int) -> dict[str, float]:
        """PSNR in dB over all pixels of reconstructions in 8 bits, and the mean loss with its terms."""
        autoencoder, coder = _autoencoder(network), Coder(network)
        # Images, pixel values, squared error, loss, terms.
        sums = torch.zeros(4 + len(self.loss.names), dtype=torch.float64)
        batches = self.images.split(IMAGES_PER_BATCH)
        for number in self.processes.share(range(len(batches))):
            images = batches[number].to(self.machine.device)
            compared = compare_images(autoencoder, images, self.dataset.facts)
            draws = StepDraws(seed_for("validation"), number, slice(0, len(images)), len(images), self.machine.device)
            pixels = images_to_pixels(images).expand(-1, self.channels, -1, -1)
            with self.machine.autocast():
                losses = self.loss(coder, pixels, draws, step, held_out=True)
            mean = torch.cat([losses.total.float().view(1), losses.logged]).double().cpu()
            counted = [len(images), compared.original.numel(), compared.squared_error]
            sums += torch.cat([torch.tensor(counted, dtype=torch.float64), len(images) * mean])
        images_seen, values, squared_error, loss, *terms = self.processes.sum(sums).tolist()
        named = {name: value / images_seen for name, value in zip(self.loss.names, terms, strict=True)}
        return {"psnr_db": psnr(squared_error / values), "loss": loss / images_seen, **named}

    @torch.no_grad()
    def sheet(self, network: nn.Module) -> Sheet:
        """Originals, each to the left of its reconstruction."""
        images = self.images[:PICTURED].to(self.machine.device)
        compared = compare_images(_autoencoder(network), images, self.dataset.facts)
        return side_by_side([compared.original, compared.decoded])


def _autoencoder(network: Any) -> PretrainedAutoencoder:
    return PretrainedAutoencoder(network, "unsaved", scale_factor=1.0)
