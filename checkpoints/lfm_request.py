"""The description of a published network, which its file lacks: flags, then the file's own arguments, then defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from datasets_prep.image_dataset import DatasetFacts
from models.autoencoders.loading import AutoencoderOptions
from models.family import FamilyOptions
from models.registry import NETWORKS, NetworkOptions, network_groups
from options import UsageError, make_options

__all__ = ["NetworkRequest", "described_by", "published_facts", "request_network"]

T = TypeVar("T")

SCALE_FACTOR = 0.18215  # of stabilityai/sd-vae-ft-mse, the published autoencoder
OTHER_SPELLINGS = {"attn_resolution": "attn_resolutions"}
# The only grey datasets, with the side of their images before padding.
GREY_SIDES = {"mnist": 28, "fashion_mnist": 28}


@dataclass(frozen=True)
class NetworkRequest:
    """The network that a published file is said to hold.

    Args:
        model_type: key of models.registry.NETWORKS.
        options: the family's options; `build_published` sets its channels.
        in_channels: channels of the network's input; None: the latents' and the condition's.
        out_channels: channels of the velocity; None: the latents'.
        autoencoder: the autoencoder of its latents, with a scale factor.
        dataset: the data that it was trained on.
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
    """Describe the network in a published file.

    Args:
        given: values of the flags that the user gave, by name; flags of other components are ignored.
        arguments: arguments in the file (`PublishedFile.arguments`), which count where the user gave no flag.
        downstream: whether --use_origin_adm is the default, as in the published scripts for inpainting and semantic
            synthesis. Naming another --model_type turns it off.

    Raises:
        UsageError: the model type is unknown, or neither flags nor arguments name the dataset and the image size. (Their
            defaults would make a good network draw wrong samples.)
    """
    values = {**_own_arguments(arguments or {}), **given}
    if downstream and _select(NetworkOptions, values).model_type == NetworkOptions.model_type:
        values = {"use_origin_adm": True} | values
    if missing := [f"--{name}" for name in ("dataset", "image_size") if name not in values]:
        raise UsageError(f"a published file does not say what it was trained on: give {' and '.join(missing)}")
    model_type = _select(NetworkOptions, values).resolve()
    autoencoder = _select(AutoencoderOptions, values)
    return NetworkRequest(
        model_type=model_type,
        options=_select(NETWORKS[model_type].options, values),
        in_channels=values.get("num_in_channels"),
        out_channels=values.get("num_out_channels"),
        autoencoder=replace(autoencoder, scale_factor=autoencoder.scale_factor or SCALE_FACTOR),
        dataset=published_facts(values["dataset"], values["image_size"]),
    )


def published_facts(dataset: str, image_size: int) -> DatasetFacts:
    """The facts about a dataset that follow from its name and the images' side in pixels; its files are not needed."""
    side = GREY_SIDES.get(dataset)
    crop = side if side and side < image_size else None
    return DatasetFacts(dataset, image_size, 1 if side else 3, crop, not side, ())


def described_by() -> frozenset[str]:
    """The names of the options that describe a published network, its data and its latents."""
    groups = (NetworkOptions, AutoencoderOptions, *network_groups())
    return frozenset({field.name for group in groups for field in fields(group)} | {"dataset", "image_size"})


def _own_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a published run about network, latents and data, as this project spells them; None: not given."""
    named = {OTHER_SPELLINGS.get(name, name): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name in described_by() and value is not None}


def _select(group: type[T], values: Mapping[str, Any]) -> T:
    """The instance of an option dataclass with those of its fields that `values` holds; the others keep their defaults."""
    names = [field.name for field in fields(group)]  # type: ignore[arg-type]
    return make_options(group, {name: values[name] for name in names if name in values})
