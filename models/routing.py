"""Token routing in training (TREAD, Krause et al. 2025, arXiv:2501.04765): some tokens skip the middle blocks.

After block I, a random share of each sample's tokens waits, unchanged, until block J has processed the others. Then all are put
back in their places, so the loss covers all tokens. Position-dependent inputs of the blocks travel with their tokens.
"""

from collections.abc import Sequence

import torch

from options import UsageError

__all__ = ["check_route", "choose_tokens", "gather_tokens", "scatter_tokens"]


def check_route(blocks: Sequence[int], rate: float, depth: int, tap_block: int) -> None:
    """Check `--route_blocks` I J and `--route_rate` for a network of `depth` blocks.

    Raises:
        UsageError: a block is missing or out of order, no token would be kept, or the tap would miss the waiting tokens.
    """
    if not rate:
        return
    given = " ".join(map(str, blocks)) or "nothing"
    if len(blocks) != 2 or not 0 <= blocks[0] < blocks[1] <= depth:
        raise UsageError(
            f"--route_rate {rate} needs --route_blocks I J with 0 <= I < J <= {depth}, but {given} was given: tokens skip "
            "the blocks I + 1 to J"
        )
    if rate >= 1:
        raise UsageError("--route_rate must be below 1, so that some tokens are kept")
    if blocks[0] < tap_block < blocks[1]:
        raise UsageError(
            f"--tap_block {tap_block} lies between the --route_blocks {given}, where some tokens are missing: choose a block "
            f"up to {blocks[0]} or from {blocks[1]}"
        )


def choose_tokens(numbers: torch.Tensor, rate: float, context: int = 0) -> torch.Tensor:
    """Indices [B, context + n] of the tokens that are kept: those with the smallest random numbers [B, L].

    n is the share 1 - `rate` of L, rounded, and at least 1. The `context` tokens that precede the L others are always kept.
    """
    count = max(1, round(numbers.shape[1] * (1 - rate)))
    kept = numbers.argsort(dim=1)[:, :count]
    if not context:
        return kept
    first = torch.arange(context, device=kept.device).expand(len(kept), -1)
    return torch.cat([first, kept + context], dim=1)


def gather_tokens(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tokens [B, n, ...] with the indices `kept` [B, n] of tokens [B, L, ...].

    A table [1, L, ...] that all samples share is expanded, so that each token keeps its own row.
    """
    tokens = tokens.expand(len(kept), *tokens.shape[1:])
    index = kept.view(*kept.shape, *[1] * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.gather(1, index)


def scatter_tokens(tokens: torch.Tensor, kept: torch.Tensor, processed: torch.Tensor) -> torch.Tensor:
    """Replace the tokens with the indices `kept` [B, n] in `tokens` [B, L, D] by `processed` [B, n, D]."""
    return tokens.scatter(1, kept[..., None].expand_as(processed), processed.to(tokens.dtype))
