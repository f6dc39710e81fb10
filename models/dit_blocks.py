"""The blocks of DiT: attention and MLP, each modulated and gated (adaLN-Zero), in the variants that DiTOptions offers."""

from typing import NamedTuple

import torch
from torch import nn

from models.dit_options import DiTOptions
from models.rope import Rotation
from models.routing import gather_tokens
from models.transformer_layers import MLPS, NORMS, QK_NORMS, SelfAttention

__all__ = ["BlockInputs", "Conditioning", "DiTBlock", "FinalLayer", "Modulation", "zero_final_layer"]


class BlockInputs(NamedTuple):
    """The inputs of a block.

    Args:
        tokens: [B, L, D], any context tokens first.
        embedding: of time and label, one for all tokens [B, D] or one per token [B, L, D].
        rotation: rotations of queries and keys, with --rope.
        first_values: the first block's values [B, heads, L, D / heads], with --value_residual and after that block.
        shared: the modulation [B, 6 D] that all blocks share, with --shared_adaln; [B, 4 D] without shifts.
    """

    tokens: torch.Tensor
    embedding: torch.Tensor
    rotation: Rotation | None = None
    first_values: torch.Tensor | None = None
    shared: torch.Tensor | None = None

    def of_tokens(self, kept: torch.Tensor) -> "BlockInputs":
        """The inputs for the tokens with the indices `kept` [B, n] alone."""
        embedding, rotation, values = self.embedding, self.rotation, self.first_values
        if embedding.ndim == 3:
            embedding = gather_tokens(embedding, kept)
        if rotation is not None:
            rotation = Rotation(*(gather_tokens(table[None], kept)[:, None] for table in rotation))
        if values is not None:
            values = gather_tokens(values.transpose(1, 2), kept).transpose(1, 2)
        return BlockInputs(gather_tokens(self.tokens, kept), embedding, rotation, values, self.shared)


class Conditioning(NamedTuple):
    """What blocks get from times and labels: embeddings of the time and of both [B, D], and the modulation that they share."""

    time: torch.Tensor
    embedding: torch.Tensor
    shared: torch.Tensor | None


class Modulation(nn.Sequential):
    """Linear map of SiLU(embedding) to shifts, scales and gates; it starts at zero."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the embedding (adaLN-Zero).

    With --shared_adaln, the block only adds `adaLN_offset` to the shared modulation (adaLN-single, Chen et al. 2023,
    arXiv:2310.00426, section 2.3).

    Args:
        hidden_size: D.
        num_heads: attention heads.
        options: the variants of norms, MLP and attention.
        first: the block's values are those that later blocks mix into theirs.
        shared: the modulation is shared.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, options: DiTOptions, *, first: bool = True, shared: bool = False
    ) -> None:
        super().__init__()
        self.keeps_values, self.shifts = options.value_residual, options.adaln_shift
        self.norm1 = NORMS[options.norm](hidden_size)
        self.norm2 = NORMS[options.norm](hidden_size)
        qk_norm = QK_NORMS[options.norm] if options.qk_norm else None
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm, mixes_values=options.value_residual and not first)
        self.mlp = MLPS[options.mlp](hidden_size)
        parts = options.modulation_parts
        self.adaLN_modulation = None if shared else Modulation(hidden_size, parts)
        self.adaLN_offset = nn.Parameter(torch.zeros(parts * hidden_size)) if shared else None

    def forward(
        self,
        tokens: torch.Tensor,
        embedding: torch.Tensor,
        rotation: Rotation | None = None,
        first_values: torch.Tensor | None = None,
        shared: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transform tokens [B, L, D]; the arguments are the fields of BlockInputs.

        Returns:
            The new tokens, and this block's values if it is the first one and later blocks need them.
        """
        own = self.adaLN_modulation
        modulation = shared + self.adaLN_offset if own is None else own(embedding)  # type: ignore[operator]
        shift1 = shift2 = None
        if self.shifts:
            shift1, scale1, gate1, shift2, scale2, gate2 = _parts(modulation, 6)
        else:
            scale1, gate1, scale2, gate2 = _parts(modulation, 4)
        attended, values = self.attn(_modulate(self.norm1(tokens), shift1, scale1), rotation, first_values)
        tokens = tokens + gate1 * attended
        # A copy, because FSDP2 warns about blocks that return views.
        kept = values.contiguous() if self.keeps_values and first_values is None else None
        return tokens + gate2 * self.mlp(_modulate(self.norm2(tokens), shift2, scale2)), kept


class FinalLayer(nn.Module):
    """Modulated norm, then a linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_values: int, options: DiTOptions) -> None:
        super().__init__()
        self.norm_final = NORMS[options.norm](hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = Modulation(hidden_size, 2)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Patches [B, L, p p C] from tokens [B, L, D], given the embedding [B, D] or [B, L, D]."""
        shift, scale = _parts(self.adaLN_modulation(embedding), 2)
        return self.linear(_modulate(self.norm_final(tokens), shift, scale))


def zero_final_layer(width: int, patch_values: int, options: DiTOptions) -> FinalLayer:
    """A decoder whose linear maps are zero at first, and therefore its output."""
    layer = FinalLayer(width, patch_values, options)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return layer


def _parts(modulation: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Split a modulation [B, parts D] of all tokens, or [B, L, parts D] of each, into parts that broadcast over tokens."""
    per_token = modulation if modulation.ndim == 3 else modulation[:, None]
    return per_token.chunk(count, dim=-1)


def _modulate(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    scaled = x * (1 + scale)
    return scaled if shift is None else scaled + shift
