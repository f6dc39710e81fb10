"""A project whose checkpoints hold a DiT under other names.

A state dict consists of parts, such as `x_embedder` or `blocks`. `Project.parts` lists a project's parts in the order of its
files, and where DiT has the same weights. Values are never changed: the option --reversed_time makes the network translate
the time and the velocity of projects with the other convention (models/dit.py).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.recognition import latent_side, recognise
from checkpoints.state_dicts import TYPICAL_LABEL_DROPOUT
from models.dit_options import DiTOptions
from models.family import Weights, own_options
from models.registry import build_network
from models.taps import TapOptions
from options import UsageError
from runtime.weights import find_mismatch

__all__ = ["COMMON_PARTS", "Project", "split_description"]

# The first parts of all projects' files, under DiT's names.
COMMON_PARTS = {name: name for name in ("pos_embed", "x_embedder", "t_embedder", "y_embedder")}
# Options, besides the tap's, that fit any project because the files do not record them.
SIZES = (
    "num_in_channels",
    "num_out_channels",
    "num_classes",
    "label_dropout",
    "model_width",
    "model_depth",
    "model_heads",
)
TRAINING = ("use_grad_checkpointing", "log_variance_head", "augment")
FREE = {*SIZES, *TRAINING, *(field.name for field in own_options(TapOptions))}


def _no_options(weights: Weights, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _unchanged(weights: Weights) -> Weights:
    return weights


@dataclass(frozen=True)
class Project:
    """A project's files.

    Args:
        name: key of PROJECTS and of models.registry.PUBLISHED_TYPES.
        parts: parts of the state dict in the project's order, and DiT's prefix for each.
        options: by option that may differ from a plain DiT, the allowed values; None: any value.
        reversed_time: whether its networks get the time 1 - t and predict data - noise.
        entry: entry of its files that holds the weights to sample with; "": the file itself.
        describe_training: takes (weights under DiT's names, the run's arguments), returns options of weights for training.
        modernize: gives a state dict of an older version the current names.
        named_arguments: takes a state dict of the project, returns the run's arguments that its names show.
    """

    name: str
    parts: Mapping[str, str]
    options: Mapping[str, tuple[Any, ...] | None]
    reversed_time: bool = False
    entry: str = "ema"
    describe_training: Callable[[Weights, Mapping[str, Any]], dict[str, Any]] = _no_options
    modernize: Callable[[Weights], Weights] = _unchanged
    named_arguments: Callable[[Weights], dict[str, Any]] = lambda weights: {}

    def read(self, weights: Weights) -> dict[str, Any]:
        """A state dict of the project under DiT's names. Names outside all parts stay unchanged."""
        return {_renamed(name, self.parts): value for name, value in self.modernize(weights).items()}

    def describe(self, weights: Weights, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the network with these weights, under DiT's names, as `recognise` returns them; {} if they are incomplete.

        Args:
            weights: what `read` returns.
            arguments: the arguments of the run that wrote them, if they are known.
        """
        found = recognise(weights)
        if not found:
            return {}
        return found | {"reversed_time": self.reversed_time} | self.describe_training(weights, arguments)

    def lacks(self, options: DiTOptions) -> list[str]:
        """Names of the options of a network that the project's networks cannot have, or need with other values."""
        plain = DiTOptions(reversed_time=self.reversed_time)
        allowed = {
            field.name: (getattr(plain, field.name),)
            for field in dataclasses.fields(DiTOptions)
            if field.name not in FREE
        } | dict(self.options)
        return [name for name, values in allowed.items() if values is not None and getattr(options, name) not in values]

    def fits(self, weights: Weights) -> bool:
        """Whether a state dict has the names and shapes of one of the project's networks."""
        weights = self.modernize(weights)
        if any(_part_of(name, self.parts) is None for name in weights):
            return False
        own = self.read(weights)
        found = self.describe(own, {})
        if not found or found["num_in_channels"] != found["num_out_channels"]:
            return False
        model_type, values = split_description(found)
        if model_type.startswith("DiT/"):
            values.setdefault(
                "model_heads", 1
            )  # where nothing shows the number of heads, names and shapes do not depend on it
        options = DiTOptions(**values)
        return not self.lacks(options) and _has_network(own, model_type, options)

    def names(self, own: Iterable[str]) -> dict[str, str]:
        """The project's names, in its order, for DiT's names `own`, which are the values."""
        own = list(own)
        return {
            part + name.removeprefix(prefix): name
            for part, prefix in self.parts.items()
            for name in own
            if _starts_with(name, prefix)
        }


def split_description(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type, and options of DiT, in what `Project.describe` returned. Label tables have a row for the null class."""
    values = dict(found)
    model_type, rows = values.pop("model_type"), values.pop("label_rows")
    return model_type, values | {"num_classes": max(1, rows - 1), "label_dropout": TYPICAL_LABEL_DROPOUT}


def _has_network(weights: Weights, model_type: str, options: DiTOptions) -> bool:
    """Whether a network with these options has the names and shapes of `weights`."""
    try:
        with torch.device("meta"):
            own = build_network(model_type, latent_side(weights) or 1, options).state_dict()
    except (KeyError, UsageError):  # no such patch side, or options that do not fit each other
        return False
    return not any(find_mismatch(own, weights))


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    part = _part_of(name, parts)
    return name if part is None else parts[part] + name.removeprefix(part)


def _part_of(name: str, parts: Iterable[str]) -> str | None:
    return next((part for part in parts if _starts_with(name, part)), None)


def _starts_with(name: str, part: str) -> bool:
    """Whether a name's first components are `part`."""
    return name == part or name.startswith(f"{part}.")
