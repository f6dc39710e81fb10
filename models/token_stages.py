"""Second stages of DiT: after some of the blocks, the tokens become finer, or turn into the condition of other tokens.

    coarse then fine  (MPDiT, 2026, arXiv:2603.26357)    first blocks: patches of side 2 p; last blocks: patches of side p
        tokens <- W2 norm(GELU(shuffle(W1 tokens))) + linear(patches of x_t) + positions
    DDT head          (Wang et al. 2025, arXiv:2504.05741, section 3; with another width, RAE, arXiv:2510.11690)
        condition of each token <- W SiLU(e(t) + tokens),      tokens <- linear(patches of x_t)

`shuffle` splits every token's 4 D channels among the four tokens of half its side.
"""

import torch
from torch import nn
from torch.nn import functional

from models.dit_blocks import BlockInputs
from models.dit_options import DiTOptions
from models.positions import PositionTables, sincos_table
from models.rope import RotaryPositions
from models.transformer_layers import NORMS, PatchEmbed

__all__ = ["DdtHead", "FineTokens", "TokenUpsampler", "new_second_stage"]


class TokenUpsampler(nn.Module):
    """Four tokens for each token, at half its side."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.norm = NORMS[norm](width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, columns: int) -> torch.Tensor:
        """Tokens [B, 4 L, D] from tokens [B, L, D] of a grid with this number of columns, both in row-major order."""
        batch, _, width = tokens.shape
        cells = self.expand(tokens).view(batch, -1, columns, 2, 2, width)  # [B, rows, columns, 2, 2, D]
        finer = cells.transpose(2, 3).reshape(batch, -1, width)
        return self.project(self.norm(self.act(finer)))


class FineTokens(nn.Module):
    """Turns tokens of patches of side 2 p into tokens of patches of side p. Context tokens do not change.

    Args:
        size: the latents' side.
        patch_size: p.
        width: D.
        num_heads: attention heads of the blocks that follow.
        options: the network's.
    """

    def __init__(self, size: int, patch_size: int, width: int, num_heads: int, options: DiTOptions) -> None:
        super().__init__()
        self.patch_size, self.context = patch_size, options.context_tokens
        side = size // patch_size
        self.pos_embed = nn.Parameter(sincos_table(side, side, width), requires_grad=False)
        self._tables = PositionTables(side)
        self.x_embedder = PatchEmbed(patch_size, options.num_in_channels, width)
        self.upsampler = TokenUpsampler(width, options.norm)
        self.feat_rope = RotaryPositions(side, width // num_heads) if options.rope else None

    def forward(self, inputs: BlockInputs, time: torch.Tensor, x: torch.Tensor) -> BlockInputs:
        """The inputs of the fine blocks. `x` is [B, C, h, w]; the time embedding [B, D] is not used."""
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        tokens = self.upsampler(inputs.tokens[:, self.context :], columns // 2) + self.x_embedder(x)
        tokens = tokens + self._tables.table(self.pos_embed, rows, columns)
        if self.context:
            tokens = torch.cat([inputs.tokens[:, : self.context].to(tokens.dtype), tokens], dim=1)
        rotation = self.feat_rope(rows, columns, self.context) if self.feat_rope is not None else None
        return inputs._replace(tokens=tokens, rotation=rotation, first_values=None)


class DdtHead(nn.Module):
    """Turns the tokens into the conditions of a DDT head's tokens, and drops context tokens.

    Args:
        size: the latents' side.
        patch_size: p.
        width: D of the tokens.
        head_width: D' of the head.
        num_heads: attention heads of the head's blocks.
        options: the network's.
    """

    def __init__(
        self, size: int, patch_size: int, width: int, head_width: int, num_heads: int, options: DiTOptions
    ) -> None:
        super().__init__()
        self.patch_size, self.context = patch_size, options.context_tokens
        self.x_embedder = PatchEmbed(patch_size, options.num_in_channels, head_width)
        self.projector = nn.Linear(width, head_width) if width != head_width else None
        self.feat_rope = RotaryPositions(size // patch_size, head_width // num_heads) if options.rope else None

    def forward(self, inputs: BlockInputs, time: torch.Tensor, x: torch.Tensor) -> BlockInputs:
        """The inputs of the head's blocks, given the time embedding [B, D] and x [B, C, h, w]."""
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        condition = functional.silu(time[:, None] + inputs.tokens[:, self.context :])  # [B, L, D]
        if self.projector is not None:
            condition = self.projector(condition)
        rotation = self.feat_rope(rows, columns) if self.feat_rope is not None else None
        return BlockInputs(self.x_embedder(x), condition, rotation)


def new_second_stage(
    size: int, patch_size: int, width: int, num_heads: int, options: DiTOptions
) -> tuple[FineTokens | DdtHead | None, int, int]:
    """What precedes the last blocks, if anything, and these blocks' width and number of heads."""
    if options.fine_blocks:
        return FineTokens(size, patch_size, width, num_heads, options), width, num_heads
    if options.ddt_blocks:
        head_width, heads = options.ddt_size(width, num_heads)
        return DdtHead(size, patch_size, width, head_width, heads, options), head_width, heads
    return None, width, num_heads
