"""A tap of a transformer: its tokens after block K, and heads that predict other things from them than the velocity.

    auxiliary velocity   a second final layer, for internal guidance (Zhou et al. 2025, arXiv:2512.24176)
    latents              an MLP that predicts the clean latent (SRA 2, arXiv:2601.17830)
    features             an MLP that predicts an image encoder's features (REPA, Yu et al. 2025, arXiv:2410.06940), or a
                         3 x 3 convolution (iREPA, arXiv:2512.10794)

A network with a tap is called as network(t, x, condition, tapped=True) and then returns `TappedVelocity`. Without `tapped`, it
returns the velocity alone and evaluates no head. Projectors, which predict latents and features, serve only training, so
networks for sampling are built without them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import nn

from models.family import ClassOptions, Weights
from models.routing import check_route
from options import UsageError, option

__all__ = [
    "PROJECTORS",
    "TapOptions",
    "Tapped",
    "TappedVelocity",
    "new_projectors",
    "weights_for_sampling",
    "without_heads",
]

LATENT_LAYERS = 5  # of SRA 2's MLP, whose paper found two layers worse
# Prefixes of names in a state dict: what only training uses, and the auxiliary head.
TRAINING_PREFIXES, HEAD_PREFIX = ("projectors.", "log_variance_head.", "augment_embedder."), "auxiliary_head."


class Tapped(NamedTuple):
    """The tokens [B, L, D] after block K, and what the heads predict from them; None without that head.

    `velocity` and `latents` are [B, C, h, w]. `features` are [B, d, rows, columns], with one position per token.
    """

    tokens: torch.Tensor
    velocity: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    features: torch.Tensor | None = None


class TappedVelocity(NamedTuple):
    """A velocity [B, C, h, w], or what else the network returns without `tapped`, and what the tap gives."""

    velocity: Any
    tapped: Tapped


class MlpProjector(nn.Module):
    """Linear layers with SiLU between them.

    Args:
        widths: of the tokens, of each hidden layer and of the output.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers = (each for before, after in pairwise(widths) for each in (nn.Linear(before, after), nn.SiLU()))
        self.layers = nn.Sequential(*layers)[:-1]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, L, D] to [B, L, d], each independently."""
        return self.layers(tokens)


class FeatureMlp(nn.Module):
    """REPA's projector: an MLP with two hidden layers. Arguments: widths of the tokens, the hidden layers and the features."""

    def __init__(self, width: int, hidden: int, features: int) -> None:
        super().__init__()
        self.mlp = MlpProjector((width, hidden, hidden, features))

    def forward(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Features [B, d, rows, columns] of tokens [B, rows x columns, D]."""
        return self.mlp(tokens).transpose(1, 2).unflatten(2, (rows, columns))


class FeatureConvolution(nn.Module):
    """iREPA's projector: a 3 x 3 convolution on the grid of tokens. `hidden` is not used."""

    def __init__(self, width: int, hidden: int, features: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, features, 3, padding=1)

    def forward(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Features [B, d, rows, columns] of tokens [B, rows x columns, D]."""
        return self.convolution(tokens.transpose(1, 2).unflatten(2, (rows, columns)))


PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {"mlp": FeatureMlp, "conv": FeatureConvolution}


@dataclass(frozen=True)
class TapOptions(ClassOptions):
    """Auxiliary heads and token routing (DiT)."""

    only_for: ClassVar[str] = "DiT"
    removable: ClassVar[bool] = True

    tap_block: int = option(
        0, "number K of the block whose tokens the auxiliary heads and losses read; 0: none", minimum=0
    )
    auxiliary_velocity: float = option(
        0.0,
        "loss weight of a second velocity head after --tap_block, which --internal_guidance needs (0.25 to 0.5 is usual); "
        "0: no head",
        minimum=0,
    )
    align_latents: float = option(
        0.0, "SRA 2: loss weight of the clean latent's prediction from --tap_block (usually 1); 0: none", minimum=0
    )
    align_features: float = option(
        0.0,
        "REPA: loss weight of the prediction of --align_encoder's features from --tap_block (usually 0.5); 0: none",
        minimum=0,
    )
    align_projector: str = option(
        "mlp", "projector of --align_features: mlp as in REPA, conv as in iREPA", choices=PROJECTORS
    )
    align_hidden: int = option(2048, "hidden width of the mlp projector", minimum=1)
    unused_projectors: tuple[int, ...] = option(
        (),
        "feature widths of further mlp projectors that stay as they are, as in REPA's files for several encoders",
        minimum=1,
    )
    align_width: int = option(0, "width of the encoder's features", minimum=0, shown="the encoder's")
    route_blocks: tuple[int, ...] = option(
        (), "TREAD: in training, a share --route_rate of the tokens skips the blocks I + 1 to J", minimum=0
    )
    route_rate: float = option(
        0.0, "TREAD: share of the tokens that skip --route_blocks; 0: none", minimum=0, maximum=1
    )

    @property
    def has_auxiliary_velocity(self) -> bool:
        """Whether the network has the auxiliary velocity head."""
        return self.auxiliary_velocity > 0

    def check_tap(self, depth: int) -> None:
        """Check the options of the tap and of routing for a network of `depth` blocks.

        Raises:
            UsageError: they name blocks that it lacks, or contradict each other.
        """
        heads = {"auxiliary_velocity", "align_latents", "align_features"}
        if not self.tap_block and (missing := sorted(name for name in heads if getattr(self, name))):
            raise UsageError(f"--{missing[0]} needs --tap_block K, a block from 1 to {depth}")
        if self.tap_block > depth:
            raise UsageError(
                f"--tap_block {self.tap_block}: expected a block from 1 to {depth}, the network's last one"
            )
        check_route(self.route_blocks, self.route_rate, depth, self.tap_block)

    def for_sampling(self) -> Self:
        """The options of the network without projectors."""
        return replace(super().for_sampling(), align_latents=0.0, align_features=0.0, unused_projectors=())


def new_projectors(options: TapOptions, width: int, patch_values: int) -> nn.ModuleDict:
    """The projectors that the options ask for, by the name of their field in `Tapped`, and unused ones.

    Args:
        options: the tap's options.
        width: D of the tokens.
        patch_values: number of a token's values in the latents.
    """
    projectors = nn.ModuleDict()
    if options.align_latents:
        projectors["latents"] = MlpProjector((width, *[2 * width] * (LATENT_LAYERS - 1), patch_values))
    if options.align_features:
        project = PROJECTORS[options.align_projector]
        projectors["features"] = project(width, options.align_hidden, max(1, options.align_width))
    if options.unused_projectors:
        hidden = options.align_hidden
        unused = (MlpProjector((width, hidden, hidden, features)) for features in options.unused_projectors)
        projectors["unused"] = nn.ModuleList(unused).requires_grad_(False)
    return projectors


def weights_for_sampling(weights: Weights) -> Weights:
    """The entries of a state dict that sampling needs; `weights` itself if it has no others."""
    return _without(weights, TRAINING_PREFIXES)


def without_heads(weights: Weights) -> Weights:
    """The entries of a state dict that a network without a tap has; `weights` itself if it has no others."""
    return _without(weights, (*TRAINING_PREFIXES, HEAD_PREFIX))


def _without(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    kept = {name: value for name, value in weights.items() if not name.startswith(prefixes)}
    return weights if len(kept) == len(weights) else kept
