"""The alignment term: latents resemble the features of a frozen image encoder, by a projection that the term trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.autoencoders.losses.adaptive import adaptive_weight, gradient_only, last_convolution
from models.autoencoders.losses.alignment import new_alignment
from models.autoencoders.pixels import pixels_to_images
from runtime.distributed import Processes
from runtime.messages import fact
from training.autoencoder.terms.protocol import LossInputs, LossSetup, Term, TermValue, TrainedModule

if TYPE_CHECKING:
    from models.image_encoder import ImageEncoder

__all__ = ["make_alignment"]

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class AlignmentTerm:
    """The gradient of the alignment, without its value, so that the reported loss stays that of the reconstructions.

    Args:
        weight: the factor of the adaptive weight.
        alignment: the loss with its projection, and the projection's optimizer.
        encoder: the frozen image encoder.
        last_layer: the kernel of the autoencoder's layer next to the latents.
        processes: the processes of the run.
    """

    weight: float
    alignment: TrainedModule
    encoder: "ImageEncoder"
    last_layer: nn.Parameter
    processes: Processes

    @property
    def names(self) -> tuple[str, ...]:
        """The loss and its weight; the weight is 0 for held-out images."""
        return ("alignment", "alignment_weight")

    @property
    def modules(self) -> Mapping[str, TrainedModule]:
        """The loss with its projection."""
        return {"alignment": self.alignment}

    def __call__(self, inputs: LossInputs) -> TermValue:
        """Compare the latents with the features of the images without transforms."""
        features = self.encoder.encode(pixels_to_images(inputs.pixels))
        value = self.alignment.module(inputs.found.z, features)
        if inputs.held_out:
            return TermValue(value.new_zeros(()), (value, value.new_zeros(())))
        weight = self.weight * adaptive_weight(inputs.total, value, self.last_layer, self.processes)
        return TermValue(gradient_only(weight * value), (value, weight))


def make_alignment(setup: LossSetup) -> Term | None:
    """The term that --align_weight asks for, if any.

    Raises:
        UsageError: the encoder cannot be loaded, or its features have no grid like the latents.
    """
    options, coder = setup.options, setup.coder
    network: Any = coder.network
    if not options.align_weight:
        return None
    from models.image_encoder import ImageEncoder, load_encoder  # timm takes a second to import

    with setup.processes.main_first():
        model = load_encoder(options.align_encoder, options.align_encoder_weights)
    size = setup.side + 2 * setup.border
    encoder = ImageEncoder(options.align_encoder, model, size // coder.layout.factor, size).to(setup.machine.device)
    fact(
        "encoder",
        f"{encoder.name}: {encoder.moment_channels} features at {encoder.grid} x {encoder.grid} positions, from images resized "
        f"to {encoder.side} pixels",
    )
    module = new_alignment(coder.layout.latent_channels, encoder.moment_channels, options, options.seed)
    module.to(setup.machine.device)
    group = {"params": [*module.parameters()], "relative_lr": 1.0}
    optimizer = torch.optim.AdamW([group], options.lr, betas=BETAS, weight_decay=0.0, fused=True)
    last_layer = last_convolution(network.encoder, getattr(network, "quant_conv", None))
    return AlignmentTerm(options.align_weight, TrainedModule(module, optimizer), encoder, last_layer, setup.processes)
