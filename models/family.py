"""Families of velocity networks: options, constructors, and the facts that training and loading need."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import nn

from models.conditions import AUGMENTATIONS
from models.embeddings import TIME_EMBEDDINGS
from options import UsageError, option

__all__ = ["ClassOptions", "Family", "FamilyOptions", "Weights", "check_sides", "options_beyond_lfm", "own_options"]

Weights = Mapping[str, torch.Tensor]

LATENT_CHANNELS = "the latents' channels"
TIME_OPTIONS = ("time_embedding", "time_scale_factor")


@dataclass(frozen=True)
class FamilyOptions:
    """All networks."""

    class_flag: ClassVar[str] = "num_classes"  # name of the option with the number of classes
    null_class_has_weights: ClassVar[bool] = True  # if so, a state dict shows whether labels were dropped
    # The networks for which alone this class's own options may be given. If "", other networks ignore them, because LFM's
    # arguments files give the options of U-Nets to DiT too.
    only_for: ClassVar[str] = ""
    removable: ClassVar[bool] = False  # whether the velocity stays the same without this class's own options

    num_in_channels: int = option(4, "input channels of the network", minimum=1, shown=LATENT_CHANNELS)
    num_out_channels: int = option(4, "channels of the velocity", minimum=1, shown=LATENT_CHANNELS)
    label_dropout: float = option(
        0.0,
        "probability of dropping a label in training; above 0, the network has a null class",
        minimum=0,
        maximum=1,
        common=True,
    )
    use_grad_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", common=True
    )
    time_embedding: str = option(
        "sinusoids",
        "features of the time: sinusoids made for numbers up to 1000, or fourier (fixed Gaussian frequencies)",
        choices=TIME_EMBEDDINGS,
    )
    time_scale_factor: float = option(
        1.0, "multiplies the time, which lies in [0, 1], before its features", minimum=1e-3, maximum=1e6
    )
    augment: tuple[str, ...] = option(
        (),
        "also train on changed images, whose changes the network gets as a condition, so that samples do not show them: flip, "
        "crop, color, or several (docs/training.md)",
        choices=AUGMENTATIONS,
        common=True,
    )

    @property
    def classes(self) -> int:
        """Number of classes K, which is also the null class's id; 1 for an unconditional network."""
        return 1

    @property
    def has_auxiliary_velocity(self) -> bool:
        """Whether the network has a second velocity head, for internal guidance."""
        return False

    @property
    def takes_until(self) -> bool:
        """Whether the network predicts average velocities, given the end `until` of an interval of times."""
        return False

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes a guidance scale as an input."""
        return False

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The kinds of augmentation in `augment`, each once, in the order of their parameters."""
        return tuple(kind for kind in AUGMENTATIONS if kind in self.augment)

    def for_sampling(self) -> Self:
        """The options of the network without weights that serve only training."""
        return replace(self, augment=())

    def unmatched(self, size: int) -> dict[str, str]:
        """Options that ask for something that a network for latents of side `size` does not have: name to explanation."""
        return {}


@dataclass(frozen=True)
class ClassOptions(FamilyOptions):
    """Classes (DiT, unet and --use_origin_adm)."""

    num_classes: int | None = option(None, "number of classes; default: unconditional", minimum=1, common=True)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.num_classes or 1

    @property
    def label_rows(self) -> int:
        """Rows of the label table: one per class, and one for the null class if labels are dropped; 0 without classes."""
        return self.num_classes + (self.label_dropout > 0) if self.num_classes else 0


def own_options(group: type[FamilyOptions]) -> list[Field]:
    """The options that a class of options defines itself and does not inherit."""
    inherited = {field.name for base in group.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    return [field for field in fields(group) if field.name not in inherited]


def options_beyond_lfm(options: FamilyOptions) -> list[str]:
    """Names of the options that LFM's published networks do not have, and that change this network."""
    groups = [
        group for group in type(options).__mro__ if getattr(group, "only_for", "") and not vars(group).get("removable")
    ]
    names = [*TIME_OPTIONS, *(field.name for group in groups for field in own_options(group))]
    plain = type(options)()
    return [name for name in names if getattr(options, name) != getattr(plain, name)]


def _no_matrices(network: nn.Module) -> list[nn.Parameter]:
    return []


def _as_stored(own: Weights, stored: Weights) -> Weights:
    return stored


class Family(NamedTuple):
    """The entry of a model type in models.registry.NETWORKS.

    Args:
        options: the dataclass of its options.
        build: takes (latent side, options), returns the network with fresh weights.
        hidden_matrices: takes the network, returns the parameters [rows, columns] that Muon may train; if there are none,
            the family does not support Muon.
        fit_grid: takes (the network's state dict, a stored state dict), returns the stored one adapted to the network's grid
            of positions.
    """

    options: type[FamilyOptions]
    build: Callable[[int, Any], nn.Module]
    hidden_matrices: Callable[[nn.Module], list[nn.Parameter]] = _no_matrices
    fit_grid: Callable[[Weights, Weights], Weights] = _as_stored


def check_sides(height: int, width: int, levels: int, owner: str) -> None:
    """Check that latents of these sides can be halved between `levels` levels.

    Raises:
        UsageError: a side is not a multiple of 2^(levels - 1). The message attributes the levels to `owner`.
    """
    for side in (height, width):
        if side % 2 ** (levels - 1):
            raise UsageError(
                f"latents of side {side} cannot be halved {levels - 1} times, as the {levels} levels of {owner} require: "
                "choose another --image_size, or a network with fewer levels"
            )
