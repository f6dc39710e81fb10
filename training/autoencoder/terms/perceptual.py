"""The perceptual term: LPIPS between images and their reconstructions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from evaluation.features.weights import download_weights, read_weights_file
from models.autoencoders.losses.perceptual import BACKBONES, PerceptualOptions, build_lpips, perceptual_distance
from options import UsageError
from training.autoencoder.terms.protocol import LossInputs, LossSetup, Term, TermValue, TrainedModule

__all__ = ["make_perceptual"]


@dataclass(frozen=True)
class PerceptualTerm:
    """`weight` times LPIPS, which is 0 for images smaller than `smallest` pixels, as transforms of latents may make them."""

    weight: float
    network: nn.Module
    smallest: int
    modules: Mapping[str, TrainedModule] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """LPIPS."""
        return ("lpips",)

    def __call__(self, inputs: LossInputs) -> TermValue:
        """Compare the reconstructions with their targets."""
        decoded, target = inputs.found.decoded, inputs.found.target
        if min(decoded.shape[2:]) < self.smallest:
            return TermValue(decoded.new_zeros(()), (decoded.new_zeros(()),))
        distance = perceptual_distance(self.network, decoded, target)
        return TermValue(self.weight * distance, (distance,))


def make_perceptual(setup: LossSetup) -> Term | None:
    """The term that --lpips_weight asks for, if any.

    Raises:
        UsageError: the images do not fit, the package lpips is missing, or the weights cannot be read or downloaded.
    """
    options, channels = setup.options, setup.coder.layout.image_channels
    if not options.lpips_weight:
        return None
    backbone = BACKBONES[options.lpips_network]
    if channels not in (1, 3) or setup.side < backbone.smallest:
        raise UsageError(
            f"--lpips_weight with {backbone.title} needs gray or color images of at least {backbone.smallest} x "
            f"{backbone.smallest} pixels, but these have {channels} channels and {setup.side} x {setup.side} pixels: "
            "choose a larger --image_size, or leave --lpips_weight out"
        )
    with setup.processes.main_first():
        network = build_lpips(options.lpips_network, _flag(options), lambda: _read(options))
    return PerceptualTerm(options.lpips_weight, network.to(setup.machine.device), backbone.smallest)


def _flag(options: PerceptualOptions) -> str:
    return f"--lpips_backbone {options.lpips_backbone}" if options.lpips_backbone else "--lpips_weight"


def _read(options: PerceptualOptions) -> dict[str, torch.Tensor]:
    """The backbone's weights, from the user's file or from torch's cache, into which they are downloaded."""
    if options.lpips_backbone:
        return read_weights_file(options.lpips_backbone)
    backbone = BACKBONES[options.lpips_network]
    return download_weights(backbone.url, backbone.title, "--lpips_backbone", check_hash=True)
