"""The network before training, and the optimizers of its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_prep.datasets import DatasetFacts
from models.autoencoders.architectures import new_autoencoder, settle_shape
from models.autoencoders.coding import Coder
from models.autoencoders.diffusers_files import load_network
from models.autoencoders.kinds import KINDS
from options import UsageError
from runtime.messages import fact
from training.autoencoder.data import choose_channels
from training.autoencoder.options import AutoencoderTrainingOptions
from training.optimizers import Muon

__all__ = ["check_fit", "initial_network", "make_optimizers"]

ADAM_BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
OUTER_LAYERS = ("conv_in", "conv_out", "quant_conv")  # next to images or latents; never trained by Muon
DECODER = ("decoder", "post_quant_conv")  # parts of a network that --freeze_encoder leaves trainable


def initial_network(facts: DatasetFacts, options: AutoencoderTrainingOptions) -> Any:
    """The network before training, on the CPU: random, or with the architecture and weights of --initial_weights.

    Raises:
        UsageError: the options contradict each other, the images or the autoencoder of --initial_weights.
    """
    options.check()
    channels = choose_channels(facts, options.image_channels)
    if options.initial_weights is None:
        shape = settle_shape(options, channels, facts.image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = new_autoencoder(options.architecture, shape)
    else:
        network = _load_initial(options.initial_weights)
    network.float().train()
    check_fit(network, channels, facts.image_size)
    coder = Coder(network)
    if not coder.has_posterior and options.kl_weight not in (0, type(options).kl_weight):
        raise UsageError(
            f"--kl_weight {options.kl_weight:g}: the latents of {type(network).__name__} have no posterior, and so no KL "
            "divergence: omit the flag, and regularize them with --standardize_weight and --latent_noise"
        )
    if options.freeze_encoder:
        for name, weights in network.named_parameters():
            weights.requires_grad_(name.startswith(DECODER))
    count = sum(weights.numel() for weights in network.parameters())
    fact(
        "autoencoder",
        f"{type(network).__name__}, factor {coder.layout.factor}, {coder.layout.latent_channels} channels, "
        f"{count / 1e6:.3g} million parameters",
    )
    return network


def check_fit(network: Any, channels: int, image_size: int) -> None:
    """Check that a network takes the images.

    Raises:
        UsageError: it takes images with other channels or another size.
    """
    layout, name = KINDS[type(network).__name__].layout(network.config), type(network).__name__
    if layout.image_channels != channels:
        raise UsageError(
            f"the {name} takes images with {layout.image_channels} channels, but the images have {channels}: pass "
            f"--image_channels {layout.image_channels}, or another autoencoder"
        )
    if image_size % layout.factor or layout.side not in (None, image_size):
        expected = layout.side or f"a multiple of {layout.factor}"
        raise UsageError(f"--image_size {image_size} does not fit the {name}: expected {expected}")


def make_optimizers(network: nn.Module, options: AutoencoderTrainingOptions) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; or Muon for the kernels between hidden layers, and AdamW for the rest.

    A parameter group's learning rate is `lr` times its entry "relative_lr".
    """
    others: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    for name, weights in network.named_parameters():
        if weights.requires_grad:
            hidden = weights.dim() == 4 and not any(layer in name for layer in OUTER_LAYERS)
            (kernels if hidden and options.optimizer == "muon" else others).append(weights)
    adamw = torch.optim.AdamW(
        [{"params": others, "relative_lr": 1.0}], options.lr, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    if not kernels:
        return [adamw]
    relative = options.muon_lr / options.lr if options.lr else 0.0
    muon = Muon([{"params": kernels, "relative_lr": relative}], options.muon_lr, weight_decay=WEIGHT_DECAY)
    return [adamw, muon]


def _load_initial(name: str) -> Any:
    """The network in a folder, of any class in KINDS."""
    if not Path(name).is_dir():
        raise UsageError(f"--initial_weights {name}: expected the folder of an autoencoder in diffusers format")
    return load_network(Path(name), name)
