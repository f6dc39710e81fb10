"""Velocity networks by model type: one dictionary from a name to its options and its constructor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from models.dit import DiTOptions, dit_builders
from options import UsageError, option

__all__ = ["NETWORKS", "NetworkOptions", "build_network"]


@dataclass(frozen=True)
class NetworkOptions:
    """Network."""

    model_type: str = option("DiT-L/2", "DiT-{Mi,Ti,S,B,L,XL}/{1,2,4,8}")


class Family(NamedTuple):
    """A model type: the dataclass of its options and its constructor, called with (latent side, options)."""

    options: type
    build: Callable[[int, Any], nn.Module]


NETWORKS: dict[str, Family] = {name: Family(DiTOptions, build) for name, build in dit_builders().items()}


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        UsageError: an unknown model type.
    """
    if model_type not in NETWORKS:
        raise UsageError(f"unknown --model_type {model_type!r}: expected one of {', '.join(NETWORKS)}")
    return NETWORKS[model_type]


def build_network(model_type: str, latent_size: int, options: Any) -> nn.Module:
    """A network with fresh weights for latents of side `latent_size`; `options` is of the family's own dataclass."""
    return family_of(model_type).build(latent_size, options)


def options_from_header(model_type: str, stored: Mapping[str, Any]) -> Any:
    """The family's options from a checkpoint's header (lists become tuples, unknown names are refused)."""
    family = family_of(model_type)
    try:
        return family.options(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except TypeError as error:
        raise UsageError(f"the checkpoint's network options do not fit {model_type}: {error}") from error
