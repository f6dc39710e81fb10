"""The adversarial term: the autoencoder fools a discriminator of patches, which the term trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.autoencoders.losses.adaptive import adaptive_weight, gradient_only, last_convolution
from models.autoencoders.losses.adversarial import AdversarialOptions, hinge_loss, new_discriminator
from options import UsageError
from runtime.distributed import Processes
from runtime.messages import warn
from training.autoencoder.terms.protocol import LossInputs, LossSetup, Term, TermValue, TrainedModule, call_fixed

__all__ = ["make_adversarial", "warn_of_late_start"]

BETAS = (0.5, 0.999)  # of Adam (Isola et al. 2017, section 3.3)


@dataclass(frozen=True)
class AdversarialTerm:
    """The gradients of both losses, without their values, so that the reported loss stays that of the reconstructions.

    The discriminator trains from step `adversarial_start` - `discriminator_lead` on, and the autoencoder's loss starts at
    `adversarial_start`. Images smaller than one patch of the discriminator, as transforms of latents may make them, are left
    out, and so are held-out images.

    Args:
        options: weight and first steps.
        discriminator: the discriminator and its optimizer.
        smallest: side of the smallest images that it scores, in pixels.
        last_layer: the kernel of the decoder's last layer.
        processes: the processes of the run.
    """

    options: AdversarialOptions
    discriminator: TrainedModule
    smallest: int
    last_layer: nn.Parameter
    processes: Processes

    @property
    def names(self) -> tuple[str, ...]:
        """Both losses and the weight of the first; 0 before they start."""
        return ("adversarial", "discriminator", "adversarial_weight")

    @property
    def modules(self) -> Mapping[str, TrainedModule]:
        """The discriminator."""
        return {"discriminator": self.discriminator}

    def __call__(self, inputs: LossInputs) -> TermValue:
        """Compute both losses."""
        decoded, first_step = inputs.found.decoded, self.options.adversarial_start
        total = fooling = hinge = weight = decoded.new_zeros(())
        if inputs.held_out or min(decoded.shape[2:]) < self.smallest:
            return TermValue(total, (fooling, hinge, weight))
        module = self.discriminator.module
        if inputs.step >= first_step - self.options.discriminator_lead:
            scores = module(torch.cat([inputs.found.target, decoded.detach()]))
            hinge = hinge_loss(*scores.chunk(2))
            total = total + gradient_only(hinge)
        if inputs.step >= first_step:
            fooling = -call_fixed(module, decoded).mean()
            adaptive = adaptive_weight(inputs.total, fooling, self.last_layer, self.processes)
            weight = self.options.adversarial_weight * adaptive
            total = total + gradient_only(weight * fooling)
        return TermValue(total, (fooling, hinge, weight))


def make_adversarial(setup: LossSetup) -> Term | None:
    """The term that --adversarial_weight asks for, if any.

    Raises:
        UsageError: the images are smaller than one patch of the discriminator, or its width does not fit.
    """
    options, coder = setup.options, setup.coder
    network: Any = coder.network
    if not options.adversarial_weight:
        return None
    module = new_discriminator(coder.layout.image_channels, options, options.seed)
    if setup.side < module.smallest:
        raise UsageError(
            f"--discriminator_layers {options.discriminator_layers} needs images of at least {module.smallest} x "
            f"{module.smallest} pixels, but these have {setup.side} x {setup.side}: use fewer layers"
        )
    module.to(setup.machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    relative = options.discriminator_lr / options.lr if options.lr else 0.0
    group = {"params": [*module.parameters()], "relative_lr": relative}
    optimizer = torch.optim.AdamW([group], options.discriminator_lr, betas=BETAS, weight_decay=0.0, fused=True)
    last_layer = last_convolution(network.decoder)
    trained = TrainedModule(module, optimizer)
    return AdversarialTerm(options, trained, module.smallest, last_layer, setup.processes)


def warn_of_late_start(options: AdversarialOptions, last_step: int) -> None:
    """Warn if the run ends before its adversarial loss starts."""
    if options.adversarial_weight and options.adversarial_start >= last_step:
        warn(
            f"the run has {last_step:,} steps, so the adversarial loss never starts: lower --adversarial_start "
            f"{options.adversarial_start}, or train longer"
        )
