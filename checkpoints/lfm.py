"""Build networks from LFM's checkpoints, and headers for them; and check weights that go to LFM's format."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.files import LoadedModel
from checkpoints.header import Header
from checkpoints.lfm_files import (
    STAGE_WEIGHT,
    PublishedFile,
    condition_stage_path,
    read_condition_stage,
)
from checkpoints.lfm_request import NetworkRequest, request_network
from checkpoints.state_dicts import TYPICAL_LABEL_DROPOUT, load_weights
from flow.losses.options import prediction_of
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED, Autoencoder, AutoencoderFacts
from models.autoencoders.statistics import read_chosen_scale
from models.conditions import DenseInput
from models.family import Weights, options_beyond_lfm
from models.registry import Architecture, build_network
from models.taps import without_heads
from options import UsageError
from runtime.messages import fact, note
from runtime.weights import list_names, weights_hash

__all__ = [
    "build_published",
    "describe_unseen",
    "open_lfm",
    "refuse_own_state",
    "refuse_training_state",
    "weights_for_lfm",
]

FACTOR, LATENT_CHANNELS = 8, 4  # stabilityai/sd-vae-ft-mse, LFM's autoencoder


def open_lfm(
    file: PublishedFile, path: Path, given: Mapping[str, Any], device: torch.device | str, downstream: bool = False
) -> LoadedModel:
    """Open an LFM checkpoint, as `load_model` opens a checkpoint of this project.

    Args:
        file: contents of the file.
        path: `model_<epoch>.pth` or `content.pth`.
        given: values of the flags that the user gave, by name.
        device: device of the network and the autoencoder.
        downstream: see `request_network`.

    Raises:
        UsageError: the file is unreadable, or its weights do not fit the requested network.
    """
    refuse_training_state(file, path)
    request = request_network(given, file.arguments, downstream)
    autoencoder = load_autoencoder(request.autoencoder, request.dataset.channels)
    network, header = build_published(file, path, request, autoencoder)
    return LoadedModel(network.eval().requires_grad_(False).to(device), autoencoder.to(device), header)


def refuse_own_state(file: PublishedFile, path: str | Path) -> None:
    """Check that a file is LFM's or another project's.

    Raises:
        UsageError: the file is a training state of this project.
    """
    if file.ours:
        raise UsageError(
            f"{path} is a training state for resuming a run: "
            "pass a model_<epoch>.safetensors or best.safetensors from the same folder"
        )


def refuse_training_state(file: PublishedFile, path: str | Path) -> None:
    """Check that a file is LFM's.

    Raises:
        UsageError: the file is a training state of this project, or another project's.
    """
    refuse_own_state(file, path)
    if len(file.entries) > 1:
        raise UsageError(
            f"{path} holds another project's training state, with weights in its entries {list_names(file.entries)}. Its "
            "network may define times or outputs differently: choose the project's network with --model_type "
            "(docs/published.md), start from its weights with --init_from or, if they follow this project's convention, save "
            "one entry alone and pass that file"
        )


def build_published(
    file: PublishedFile, path: str | Path, request: NetworkRequest, autoencoder: Autoencoder | None
) -> tuple[nn.Module, Header]:
    """Build the network of an LFM checkpoint, load its sampling weights, and create a header.

    Args:
        file: contents of the file.
        path: path of the file, for messages and to find the label-map embedding in the same folder.
        request: description of the network from flags and the file's arguments.
        autoencoder: None if it is not available; it is then assumed to have the shapes of LFM's autoencoder.

    Raises:
        UsageError: the weights do not fit the network.
    """
    stage = read_condition_stage(path)
    architecture = _architecture(request, autoencoder, stage)
    _check_condition(architecture, path)
    network = build_network(*architecture)
    sampled = file.sampled | stage
    load_weights(network, sampled, str(path), architecture)
    header = Header(
        model_type=architecture.model_type,
        network=architecture.options,
        latent_size=architecture.latent_size,
        autoencoder=autoencoder.describe() if autoencoder else describe_unseen(request.autoencoder),
        dataset=request.dataset,
        task=_task(architecture.dense),
        dense=architecture.dense,
        step=file.step,
        epoch=file.epoch,
        published_file=Path(path).name,
        weights_sha256=weights_hash(sampled),
    )
    taken = f"EMA values for {len(file.averages)} of its" if file.averages else "its"
    fact("checkpoint", f"{path}: {architecture.model_type} with {taken} {len(sampled)} weights")
    return network, header


def weights_for_lfm(weights: Weights, header: Header, source: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that LFM's networks have, with notes on what LFM's code lacks.

    Args:
        weights: of a checkpoint of this project.
        header: the checkpoint's.
        source: its path, for messages.

    Raises:
        UsageError: the network has options that LFM's networks lack, or does not predict the velocity.
    """
    if beyond := options_beyond_lfm(header.network):
        raise UsageError(
            f"{source} has a network with {' '.join(f'--{name}' for name in beyond)}, which LFM's networks do not have: LFM's "
            "code could not load it, or would draw wrong samples. For another project's format, add --project (SiT, REPA, "
            "LightningDiT, MeanFlow or DiTDH)"
        )
    if (predicted := prediction_of(header.path)) != "velocity":
        raise UsageError(
            f"{source} predicts the {predicted}, but networks in LFM's files predict the velocity: LFM's code "
            "could not draw samples from it"
        )
    if header.contrast_means:
        note("LFM's code does not correct the velocities of contrastive flow matching where guidance acts: guide less")
    if len(plain := without_heads(weights)) < len(weights):
        note(
            "the written file lacks the auxiliary heads and inputs that serve only training, which LFM's networks do not have"
        )
    if header.autoencoder.latents_std and (header.autoencoder.scale_factor is None or header.autoencoder.statistics):
        note(
            "these latents are normalized with the autoencoder's statistics, which LFM's --scale_factor cannot express"
        )
    return dict(plain)


def _architecture(
    request: NetworkRequest, autoencoder: Autoencoder | None, stage: Mapping[str, torch.Tensor]
) -> Architecture:
    """Determine the arguments of `build_network`; `stage` holds the weight of the label-map embedding, if there is one.

    Raises:
        UsageError: the image size is not a multiple of the autoencoder's factor.
    """
    channels = autoencoder.latent_channels if autoencoder else LATENT_CHANNELS
    weight = stage.get(STAGE_WEIGHT)  # [c, K, 1, 1]
    embedded = 0 if weight is None else weight.shape[0]
    network = replace(
        request.options,
        num_in_channels=channels + embedded if request.in_channels is None else request.in_channels,
        num_out_channels=channels if request.out_channels is None else request.out_channels,
    )
    if not network.null_class_has_weights and network.classes > 1:  # labels may have been dropped, so allow guidance
        network = replace(network, label_dropout=network.label_dropout or TYPICAL_LABEL_DROPOUT)
    factor = autoencoder.factor if autoencoder else request.autoencoder.f or FACTOR
    size, remainder = divmod(request.dataset.image_size, factor)
    if remainder or not size:
        raise UsageError(
            f"--image_size {request.dataset.image_size} is not a multiple of {factor}, the autoencoder's downsampling factor"
        )
    extra = network.num_in_channels - network.num_out_channels
    dense = DenseInput(extra, None if weight is None else weight.shape[1]) if extra > 0 else None
    return Architecture(request.model_type, size, network, dense)


def _check_condition(architecture: Architecture, path: str | Path) -> None:
    """Check that the condition is a masked image with its mask, or a label map with its embedding.

    Raises:
        UsageError: it is neither.
    """
    dense, latents = architecture.dense, architecture.options.num_out_channels
    if dense is not None and dense.classes is None and dense.channels != latents + 1:
        raise UsageError(
            f"{path}: a network with {latents + dense.channels} input channels for {latents} latent channels is for semantic "
            f"synthesis, which needs {condition_stage_path(path).name} in the same folder (inpainting has "
            f"{2 * latents + 1} input channels)"
        )


def _task(dense: DenseInput | None) -> str:
    """The task of an LFM network, which follows from its dense condition."""
    if dense is None:
        return "generate"
    return "inpaint" if dense.classes is None else "semantic"


def describe_unseen(autoencoder: AutoencoderOptions, channels: int = LATENT_CHANNELS) -> AutoencoderFacts:
    """The facts that `Autoencoder.describe` returns, without the hash, and without a scale if no option gives one.

    Raises:
        UsageError: the file of statistics does not fit.
    """
    name, factor = autoencoder.pretrained_autoencoder_ckpt, autoencoder.scale_factor
    if autoencoder.latent_statistics:
        mean, std, path = read_chosen_scale(autoencoder.latent_statistics, channels, factor)
        return AutoencoderFacts(name, None, factor, mean, std, Path(path).name)
    if factor is None:
        return AutoencoderFacts(name, None, statistics=UNMEASURED)
    return AutoencoderFacts(name, None, factor, (0.0,) * channels, (1 / factor,) * channels)
