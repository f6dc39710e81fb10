"""DiT, the diffusion transformer with adaptive layer norm (Peebles & Xie 2022, arXiv:2212.09748, section 3.2).

    embedding e      e(t) + e(label)
    patchify         tokens = linear(patches of x_t) + positions
    each block       tokens += gate1(e) attention(modulate1(norm(tokens), e))
                     tokens += gate2(e) MLP(modulate2(norm(tokens), e))
    decoder          velocity = unpatchify(linear(modulate(norm(tokens), e)))

    modulate(x, e)   x (1 + scale(e)) + shift(e)

Shifts, scales and gates are linear maps of SiLU(e) that start at zero, so each block starts as the identity (adaLN-Zero).
The decoder's linear map also starts at zero, so the initial velocity is zero. Names and shapes in the state dict match
LFM's published checkpoints.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.conditions import Condition
from models.embeddings import LabelEmbedding, TimeEmbedding, batch_times, sinusoids
from models.family import Weights
from models.routing import choose_tokens, gather_tokens, scatter_tokens
from models.taps import TapOptions, Tapped, TappedVelocity, new_projectors
from models.transformer_layers import Mlp, PatchEmbed, SelfAttention
from options import UsageError
from runtime.messages import note

__all__ = ["DIT_SIZES", "DiT", "DiTOptions", "build_dit", "hidden_matrices", "with_own_positions"]

# Hidden width, depth, heads. Ti and Mi are not in the paper; they suit small images and small machines.
DIT_SIZES = {
    "Mi": (128, 6, 4),
    "Ti": (192, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
TIME_FREQUENCIES = 128


@dataclass(frozen=True)
class DiTOptions(TapOptions):
    """DiT."""

    @property
    def label_rows(self) -> int:
        """Rows of the label table: one per class (at least one), and one for the null class if labels are dropped."""
        return self.classes + (self.label_dropout > 0)


class DiT(nn.Module):
    """Velocity network on patches of the latents.

    The state dict stores the position table for latents of side `size`. For other sides, which must be multiples of the
    patch side, the network computes the table by the same formula and prints a note.

    Args:
        size: the latents' side h = w.
        patch_size: side p of a patch; must divide `size`.
        hidden_size: width D.
        depth: number of blocks.
        num_heads: attention heads per block.
        options: channels, classes and label dropout.

    Raises:
        UsageError: `size` is not a multiple of `patch_size`, or the options name a block that the network lacks.
    """

    def __init__(
        self, size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, options: DiTOptions
    ) -> None:
        super().__init__()
        _check_sides(size, size, patch_size)
        options.check_blocks(depth)
        self.options = options
        self.patch_size = patch_size
        self.grid = size // patch_size
        self.pos_embed = nn.Parameter(_sincos_table(self.grid, self.grid, hidden_size), requires_grad=False)
        self._other_grids: dict[tuple[int, int], torch.Tensor] = {}
        self.x_embedder = PatchEmbed(patch_size, options.num_in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(TIME_FREQUENCIES, hidden_size)
        self.y_embedder = LabelEmbedding(options.label_rows, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * options.num_out_channels)
        self._initialize()
        # After the other weights, which are therefore the same with and without heads.
        self.auxiliary_head = _zero_layer(hidden_size, self.final_layer) if options.has_auxiliary_velocity else None
        self.projectors = new_projectors(options, hidden_size, self.final_layer.linear.out_features)

    def forward(
        self,
        t: torch.Tensor,
        x: torch.Tensor,
        condition: Condition = Condition(),  # noqa: B008
        *,
        tapped: bool = False,
        routing: torch.Tensor | None = None,
    ) -> torch.Tensor | TappedVelocity:
        """Velocity [B, C, h, w] at times t ([B] or 0-d, in [0, 1]) and points x [B, C', h, w].

        Without labels, every sample uses the last row of the label table, which is the null class if there is one. With
        `tapped`, the result also has what the tap gives. The random numbers `routing` [B, h, w] decide which tokens skip the
        options' `route_blocks` (the number at a patch's first position counts); without them, no token does.

        Raises:
            UsageError: h or w is not a multiple of the patch side.
        """
        height, width = x.shape[2:]
        _check_sides(height, width, self.patch_size)
        rows, columns = height // self.patch_size, width // self.patch_size
        embedding = self.t_embedder(batch_times(t, x)) + self.y_embedder(condition.labels)  # [B, D]
        embedding = embedding.expand(x.shape[0], -1)
        tokens = self.x_embedder(x) + self._positions(rows, columns)  # [B, L, D]
        kept = None
        if routing is not None:
            first = routing[:, :: self.patch_size, :: self.patch_size].flatten(1)  # [B, L]
            kept = choose_tokens(first, self.options.route_rate)
        tokens, tap = self._transform(tokens, embedding, kept)
        velocity = self._unpatchify(self.final_layer(tokens, embedding), rows, columns)
        return TappedVelocity(velocity, self._read_tap(tap, embedding, rows, columns)) if tapped else velocity

    def _transform(
        self, tokens: torch.Tensor, embedding: torch.Tensor, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens [B, L, D] after all blocks, and those after the tapped block (block 0: before the first).

        Only the tokens `kept` [B, n] pass the routed blocks; None: all. An input of the blocks that depends on positions must
        be gathered with the tokens.
        """
        first, last = (self.options.route_blocks[0] + 1, self.options.route_blocks[1]) if kept is not None else (0, 0)
        tap = waiting = tokens
        for number, block in enumerate(self.blocks, start=1):
            if kept is not None and number == first:
                waiting, tokens = tokens, gather_tokens(tokens, kept)
            tokens = self._run(block, tokens, embedding)
            if kept is not None and number == last:
                tokens = scatter_tokens(waiting, kept, tokens)
            tap = tokens if number == self.options.tap_block else tap
        return tokens, tap

    def _read_tap(self, tokens: torch.Tensor, embedding: torch.Tensor, rows: int, columns: int) -> Tapped:
        """Apply the heads to the tokens [B, L, D] after the tapped block."""
        velocity = latents = features = None
        if self.auxiliary_head is not None:
            velocity = self._unpatchify(self.auxiliary_head(tokens, embedding), rows, columns)
        if "latents" in self.projectors:
            latents = self._unpatchify(self.projectors["latents"](tokens), rows, columns)
        if "features" in self.projectors:
            features = self.projectors["features"](tokens, rows, columns)
        return Tapped(tokens, velocity, latents, features)

    def _run(self, block: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
        """Apply a block, and recompute its activations in the backward pass if the options ask for it."""
        if self.options.use_grad_checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position table [1, rows x columns, D]: the stored table, or for another grid, one by the same formula."""
        if rows == columns == self.grid:
            return self.pos_embed
        if (rows, columns) not in self._other_grids:
            note(f"position table recomputed for {rows} x {columns} patches (stored: {self.grid} x {self.grid})")
            self._other_grids[rows, columns] = _sincos_table(rows, columns, self.pos_embed.shape[-1])
        table = self._other_grids[rows, columns] = self._other_grids[rows, columns].to(self.pos_embed.device)
        return table

    def _unpatchify(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Assemble latents [B, C, h, w] from patches [B, L, p p C]."""
        p = self.patch_size
        patches = patches.view(len(patches), rows, columns, p, p, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * p, columns * p)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)  # type: ignore[arg-type]
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the embedding (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = _modulation(hidden_size, 6)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Transform tokens [B, L, D], given the embedding [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(embedding)[:, None].chunk(6, dim=-1)
        tokens = tokens + gate1 * self.attn(_modulate(self.norm1(tokens), shift1, scale1))
        return tokens + gate2 * self.mlp(_modulate(self.norm2(tokens), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated layer norm, then a linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Patches [B, L, p p C] from tokens [B, L, D], given the embedding [B, D]."""
        shift, scale = self.adaLN_modulation(embedding)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(tokens), shift, scale))


def _zero_layer(hidden_size: int, like: FinalLayer) -> FinalLayer:
    """A layer like the decoder, whose output is zero at first."""
    layer = FinalLayer(hidden_size, like.linear.out_features)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _modulation(hidden_size: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def _check_sides(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        side = height if height % patch else width
        raise UsageError(
            f"latents of side {side} cannot be divided into patches of side {patch}: choose another --image_size, "
            "or a DiT with another patch size"
        )


def _sincos_table(rows: int, columns: int, hidden_size: int) -> torch.Tensor:
    """2-D sine-cosine table [1, rows x columns, D]: the first half of the channels encodes columns, the second rows."""

    def waves(count: int) -> torch.Tensor:  # [count, D / 2]
        return sinusoids(torch.arange(count, dtype=torch.float64), hidden_size // 4, sines_first=True)

    across, down = waves(columns)[None].expand(rows, -1, -1), waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).reshape(1, rows * columns, hidden_size).float()


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weight matrices of a DiT's blocks, which Muon may train. The DiT may be inside a wrapper."""
    named = network.named_parameters()
    return [parameter for name, parameter in named if "blocks" in name.split(".") and parameter.ndim == 2]


def with_own_positions(own: Weights, weights: Weights) -> Weights:
    """Fit `weights` to a DiT with the state dict `own`, whose position table replaces one for another grid.

    All other entries are unchanged. If there is nothing to replace, the result is `weights` itself, not a copy.
    """
    mine, stored = own.get("pos_embed"), weights.get("pos_embed")
    if mine is None or stored is None or mine.shape == stored.shape or mine.shape[2:] != stored.shape[2:]:
        return weights
    return {**weights, "pos_embed": mine}


def build_dit(name: str, patch: int, size: int, options: DiTOptions) -> DiT:
    """DiT-{name}/{patch} for latents of side `size`."""
    return DiT(size, patch, *DIT_SIZES[name], options)
