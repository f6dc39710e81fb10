"""Describe the network in an LFM checkpoint, from flags, then the file's own arguments, then defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from datasets_prep.image_dataset import DatasetFacts
from models.autoencoders.loading import AutoencoderOptions
from models.family import FamilyOptions
from models.registry import NETWORKS, NetworkOptions, network_groups
from options import UsageError, make_options

__all__ = ["SCALE_FACTOR", "NetworkRequest", "described_by", "published_facts", "request_network", "select_options"]

T = TypeVar("T")

SCALE_FACTOR = 0.18215  # stabilityai/sd-vae-ft-mse, LFM's autoencoder
OTHER_SPELLINGS = {"attn_resolution": "attn_resolutions"}
# The only grayscale datasets, with the side of their images before padding.
GRAYSCALE_SIDES = {"mnist": 28, "fashion_mnist": 28}


@dataclass(frozen=True)
class NetworkRequest:
    """Description of the network in an LFM checkpoint.

    Args:
        model_type: key of models.registry.NETWORKS.
        options: options of the network family; `build_published` sets the channels.
        in_channels: input channels of the network; None for the sum of the latents' and the condition's channels.
        out_channels: channels of the velocity; None for the latents' channels.
        autoencoder: options of the autoencoder, with a scale factor.
        dataset: facts about the training data.
    """

    model_type: str
    options: FamilyOptions
    in_channels: int | None
    out_channels: int | None
    autoencoder: AutoencoderOptions
    dataset: DatasetFacts


def request_network(
    given: Mapping[str, Any], arguments: Mapping[str, Any] | None = None, downstream: bool = False
) -> NetworkRequest:
    """Describe the network in an LFM checkpoint.

    Args:
        given: values of the flags that the user gave, by name; flags of other components are ignored.
        arguments: arguments in the file (`PublishedFile.arguments`); flags take precedence.
        downstream: whether --use_origin_adm is on by default, as in LFM's scripts for inpainting and semantic synthesis.
            Any other --model_type turns it off.

    Raises:
        UsageError: the model type is unknown, or neither flags nor arguments name the dataset and the image size. (With
            wrong defaults, a good network would silently produce bad samples.)
    """
    values = {**_own_arguments(arguments or {}), **given}
    if downstream and select_options(NetworkOptions, values).model_type == NetworkOptions.model_type:
        values = {"use_origin_adm": True} | values
    if missing := [f"--{name}" for name in ("dataset", "image_size") if name not in values]:
        raise UsageError(
            "this file does not describe its network and data: if it is LFM's, pass "
            f"{' and '.join(missing)} (docs/checkpoints.md)"
        )
    model_type = select_options(NetworkOptions, values).resolve()
    autoencoder = select_options(AutoencoderOptions, values)
    factor = given.get("scale_factor") if autoencoder.latent_statistics else autoencoder.scale_factor or SCALE_FACTOR
    return NetworkRequest(
        model_type=model_type,
        options=select_options(NETWORKS[model_type].options, values),
        in_channels=values.get("num_in_channels"),
        out_channels=values.get("num_out_channels"),
        autoencoder=replace(autoencoder, scale_factor=factor),
        dataset=published_facts(values["dataset"], values["image_size"]),
    )


def published_facts(dataset: str, image_size: int) -> DatasetFacts:
    """Derive the facts about a dataset from its name and image side in pixels, without its files."""
    side = GRAYSCALE_SIDES.get(dataset)
    crop = side if side and side < image_size else None
    return DatasetFacts(dataset, image_size, 1 if side else 3, crop, not side, ())


def described_by() -> frozenset[str]:
    """Names of the options that describe an LFM network, its data and its latents."""
    groups = (NetworkOptions, AutoencoderOptions, *network_groups())
    return frozenset({field.name for group in groups for field in fields(group)} | {"dataset", "image_size"})


def _own_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An LFM run's arguments about network, latents and data, in this project's spelling; unset (None) ones are left out."""
    named = {OTHER_SPELLINGS.get(name, name): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name in described_by() and value is not None}


def select_options(group: type[T], values: Mapping[str, Any]) -> T:
    """An instance of an option dataclass, with the fields found in `values`; other fields keep their defaults."""
    names = [field.name for field in fields(group)]  # type: ignore[arg-type]
    return make_options(group, {name: values[name] for name in names if name in values})
