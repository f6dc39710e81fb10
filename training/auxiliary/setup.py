"""The auxiliary losses that the options ask for, added to an objective, and the image encoder that some of them need."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import MomentSource, open_encoded
from flow.auxiliary.losses import AuxiliaryOptions, dispersion, feature_loss, latent_loss, velocity_loss
from flow.auxiliary.objective import Term, WithAuxiliary
from flow.objectives import Objective
from models.dit import DiT
from models.family import FamilyOptions
from models.taps import TapOptions
from options import UsageError, option
from runtime.distributed import Processes
from runtime.messages import fact, note
from runtime.precision import Machine

if TYPE_CHECKING:
    from models.image_encoder import ImageEncoder

__all__ = [
    "EncoderOptions",
    "add_auxiliary",
    "check_auxiliary",
    "fit_encoder",
    "load_encoder",
    "open_features",
    "uses_auxiliary",
]


@dataclass(frozen=True)
class EncoderOptions:
    """Image encoder, to whose features training aligns the network's or the latents."""

    align_encoder: str = option(
        "",
        "timm model, such as vit_base_patch14_dinov2.lvd142m (REPA's); its weights are downloaded unless a file is given",
    )
    align_encoder_weights: str = option(
        "", "file of the encoder's weights (.safetensors or torch.save)", on_resume="on_request"
    )


def check_auxiliary(
    network: FamilyOptions, auxiliary: AuxiliaryOptions, encoder: EncoderOptions, given: Mapping[str, Any]
) -> None:
    """Check that the options of the tap, its losses and the encoder fit each other and the network's family.

    Args:
        network: the family's options.
        auxiliary: options of the losses.
        encoder: options of the image encoder.
        given: values of the options that the user gave, by name.

    Raises:
        UsageError: they do not.
    """
    if not isinstance(network, TapOptions):
        flags = {field.name for group in (AuxiliaryOptions, EncoderOptions) for field in fields(group)}
        if unusable := sorted(flags & given.keys()):
            raise UsageError(f"--{unusable[0]} needs a transformer: choose a DiT with --model_type, or leave it out")
        return
    if bool(network.align_features) != bool(encoder.align_encoder):
        have, lack = "align_features", "align_encoder"
        if encoder.align_encoder:
            have, lack = lack, have
        raise UsageError(f"--{have} needs --{lack} as well")
    if auxiliary.dispersive and not network.tap_block:
        raise UsageError("--dispersive needs --tap_block K, the block whose tokens it compares")
    terms = _terms(network, auxiliary)
    if network.tap_block and not terms:
        note(
            "--tap_block has no effect without --auxiliary_velocity, --align_latents, --align_features or --dispersive"
        )
    if auxiliary.auxiliary_until and not any(term.ends for term in terms.values()):
        note("--auxiliary_until has no effect without --align_latents, --align_features or --dispersive")


def uses_auxiliary(network: FamilyOptions, auxiliary: AuxiliaryOptions) -> bool:
    """Whether the options ask for auxiliary losses or token routing."""
    return isinstance(network, TapOptions) and (bool(_terms(network, auxiliary)) or network.route_rate > 0)


def add_auxiliary(objective: Objective, network: FamilyOptions, auxiliary: AuxiliaryOptions) -> Objective:
    """The objective with the auxiliary losses and the routing that the options ask for; itself if there are none."""
    if not isinstance(network, TapOptions):
        return objective
    terms, routes = _terms(network, auxiliary), network.route_rate > 0
    return WithAuxiliary(objective, terms, auxiliary.auxiliary_until, routes) if terms or routes else objective


def load_encoder(encoder: EncoderOptions, network: FamilyOptions) -> tuple[nn.Module | None, FamilyOptions]:
    """The timm model that the options name, if any, and the network's options with the width of its features.

    Raises:
        UsageError: it cannot be loaded.
    """
    if not encoder.align_encoder or not isinstance(network, TapOptions):
        return None, network
    from models.image_encoder import feature_width, load_encoder  # timm takes a second to import

    model = load_encoder(encoder.align_encoder, encoder.align_encoder_weights)
    return model, replace(network, align_width=feature_width(model))


def fit_encoder(
    model: nn.Module | None, encoder: EncoderOptions, network: nn.Module, dataset: ImageDataset
) -> "ImageEncoder | None":
    """The encoder with one feature per token of the network; None without a model.

    Raises:
        UsageError: its features have no such grid, or the dataset has no images.
    """
    if model is None:
        return None
    from models.image_encoder import ImageEncoder

    dataset.check_images("--align_features")
    grid = next(module.size // module.tap_patch for module in network.modules() if isinstance(module, DiT))
    fitted = ImageEncoder(encoder.align_encoder, model, grid, dataset.facts.image_size)
    fact(
        "encoder",
        f"{fitted.name}: {fitted.moment_channels} features at {grid} x {grid} positions, from images resized to "
        f"{fitted.side} pixels",
    )
    return fitted


def open_features(
    encoder: "ImageEncoder | None",
    dataset: ImageDataset,
    data: DatasetOptions,
    cache: LatentCacheOptions,
    machine: Machine,
    processes: Processes,
    spare: Path,
) -> MomentSource | None:
    """The encoder's features of the images and of their mirror images, cached next to the latents; None without an encoder.

    Arguments and errors as of `datasets_prep.moments.open_encoded`.
    """
    if encoder is None:
        return None
    moved = encoder.to(machine.device)
    return open_encoded(dataset, moved, data, cache, machine, processes, spare, subfolder="features")


def _terms(network: TapOptions, auxiliary: AuxiliaryOptions) -> dict[str, Term]:
    """The auxiliary losses with a weight above 0, by the name in the metrics log."""
    every = {
        "auxiliary_velocity": Term(network.auxiliary_velocity, velocity_loss, ends=False),
        "align_latents": Term(network.align_latents, latent_loss),
        "align_features": Term(
            network.align_features, partial(feature_loss, normalization=auxiliary.align_normalization)
        ),
        "dispersive": Term(auxiliary.dispersive, partial(dispersion, tau=auxiliary.dispersive_tau)),
    }
    return {name: term for name, term in every.items() if term.weight}
