"""Inputs and outputs of flow maps: networks that also predict the average velocity over an interval of times.

Given `until` <= t, such a network returns the average velocity u over [until, t], so x_until = x_t - (t - until) u. Without it,
`until` is t, and the result is the velocity. There are two ways to tell the network the interval:

    interval    e = e(t) + e'(t - until)                             MeanFlow (Geng et al. 2025, arXiv:2505.13447)
    decoupled   e(t) in the first blocks, e(until) in the last ones  Decoupled MeanFlow (Lee et al. 2025, arXiv:2510.24474)

Here e and e' are embeddings of times, without the label's. The decoupled network has the weights of a network without `until`,
and the same velocity. The last layer of e' starts at zero, so a network that starts from the weights of a velocity network
returns its velocity for every `until`.

A guidance scale w can be an input too: e''(1 - 1/w), whose last layer also starts at zero, joins every embedding (improved
MeanFlow, Geng et al. 2025, arXiv:2512.02012). w = 1 means no guidance. Training may weight its loss by a learned log-variance,
a linear map of features of t and `until` (Decoupled MeanFlow).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import nn

from models.embeddings import TimeFeatures
from models.taps import TapOptions
from options import UsageError, option

__all__ = ["UNTIL_EMBEDDINGS", "FlowMapOptions", "LogVariance", "VelocityWithVariance", "guidance_share"]

UNTIL_EMBEDDINGS = ("none", "interval", "decoupled")
DECOUPLED_SHARE = 3  # one block of so many sees `until`; in the paper's XL, 8 of 28
VARIANCE_FREQUENCIES = 64  # of each time
VARIANCE_TIME_SCALE = 10.0  # the highest frequency turns by so many radians between t = 0 and 1


class VelocityWithVariance(NamedTuple):
    """A velocity [B, C, h, w], and the log-variance [B] of its error."""

    velocity: torch.Tensor
    log_variance: torch.Tensor


@dataclass(frozen=True)
class FlowMapOptions(TapOptions):
    """Flow maps (DiT)."""

    only_for: ClassVar[str] = "DiT"

    until_embedding: str = option(
        "none",
        "how the network sees the end of an interval of times, for its average velocity: none (it predicts velocities only), "
        "interval (a second embedding, as in MeanFlow) or decoupled (the last blocks see the end, as in Decoupled MeanFlow)",
        choices=UNTIL_EMBEDDINGS,
    )
    decoupled_blocks: int | None = option(
        None,
        "number of last blocks that see the interval's end, with --until_embedding decoupled",
        minimum=1,
        shown="a third of the model's",
    )
    guidance_embedding: bool = option(
        False, "the network takes a guidance scale as an input, which --embedded_guidance sets"
    )
    log_variance_head: bool = option(False, "learn the log-variance of the loss over times, for training only")

    @property
    def takes_until(self) -> bool:
        """Whether the network predicts average velocities."""
        return self.until_embedding != "none"

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes a guidance scale."""
        return self.guidance_embedding

    def until_start(self, depth: int) -> int:
        """Number of the first block (from 0) that sees `until` instead of t; `depth` if all blocks see the same."""
        if self.until_embedding != "decoupled":
            return depth
        return depth - (self.decoupled_blocks or max(1, depth // DECOUPLED_SHARE))

    def check_flow_map(self, depth: int, ddt_blocks: int) -> None:
        """Check the options for a network of `depth` blocks. The last `ddt_blocks` form a DDT head.

        Raises:
            UsageError: they contradict each other or the network.
        """
        if self.decoupled_blocks is not None and self.until_embedding != "decoupled":
            raise UsageError("--decoupled_blocks has no effect without --until_embedding decoupled")
        start = self.until_start(depth)
        if start < 1:
            raise UsageError(
                f"--decoupled_blocks {self.decoupled_blocks}: at least one of the model's {depth} blocks must see the time t, "
                f"so expected at most {depth - 1}"
            )
        if depth - ddt_blocks < start < depth:
            raise UsageError(
                f"--until_embedding decoupled: the {ddt_blocks} blocks of the DDT head share one condition per token, so all "
                f"of them must see the interval's end, but only {depth - start} would: use --decoupled_blocks {ddt_blocks} or "
                "more"
            )

    def check_inputs(self, until: torch.Tensor | None, guidance: torch.Tensor | None, log_variance: bool) -> None:
        """Check that the network takes these inputs of its forward pass.

        Raises:
            UsageError: it does not.
        """
        if until is not None and not self.takes_until:
            raise UsageError(
                "this network predicts velocities, not average velocities over an interval: those need a network trained with "
                "--until_embedding interval or decoupled"
            )
        if guidance is not None and not self.takes_guidance:
            raise UsageError(
                "this network takes no guidance scale as an input: that needs a network trained with --guidance_embedding"
            )
        if log_variance and not self.log_variance_head:
            raise UsageError("this network predicts no log-variance: train it with --log_variance_head")

    def for_sampling(self) -> Self:
        """The options of the network without projectors and log-variance."""
        return replace(super().for_sampling(), log_variance_head=False)


def guidance_share(guidance: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The input 1 - 1/w for guidance scales w ([B] or 0-d; None: 1), in [0, 1) for w >= 1, like the times [B] `like`."""
    if guidance is None:
        return torch.zeros_like(like)
    return 1 - 1 / guidance.to(like.dtype).expand(len(like))


class LogVariance(nn.Module):
    """Log-variance [B] of the loss: a linear map, which starts at zero, of features of t and `until`, in their precision."""

    def __init__(self) -> None:
        super().__init__()
        self.features = TimeFeatures(VARIANCE_FREQUENCIES, factor=VARIANCE_TIME_SCALE)
        self.weight = nn.Parameter(torch.zeros(4 * VARIANCE_FREQUENCIES))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, t: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        """Log-variance at times t [B] and `until` [B]."""
        features = torch.cat([self.features(t), self.features(until)], dim=1)
        return (features * self.weight).sum(1) + self.bias  # no matrix product, which autocast would round
