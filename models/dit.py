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

This is the network without options. The options of blocks are in models/dit_blocks.py. Three options act between blocks:
context tokens precede the image's (models/embeddings.py), one modulation may serve all blocks, and a second stage may change
the tokens before the last blocks (models/token_stages.py). The network can also predict average velocities
(models/flow_maps.py). For training, heads may read the tokens after a block (models/taps.py), and some tokens may skip blocks
(models/routing.py).
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.conditions import Condition, add_augmentation, new_augmentation_embedding
from models.dit_blocks import BlockInputs, Conditioning, DiTBlock, FinalLayer, Modulation, zero_final_layer
from models.dit_options import DIT_SIZES, DiTOptions
from models.embeddings import ContextTokens, LabelEmbedding, TimeEmbedding, batch_times
from models.flow_maps import LogVariance, VelocityWithVariance, guidance_share
from models.positions import PositionTables, sincos_table
from models.rope import RotaryPositions
from models.routing import choose_tokens, scatter_tokens
from models.taps import Tapped, TappedVelocity, new_projectors
from models.token_stages import new_second_stage
from models.transformer_layers import PatchEmbed
from options import UsageError

__all__ = ["DIT_SIZES", "DiT", "DiTOptions", "build_dit", "hidden_matrices"]

TIME_FREQUENCIES = {"sinusoids": 128, "fourier": 256}  # numbers of frequencies in DiT, and in RAE (arXiv:2510.11690)


class DiT(nn.Module):
    """Velocity network on patches of the latents.

    The state dict stores the position table for latents of side `size`. For other sides, which must be multiples of the
    patch side, the network computes the table by the same formula and prints a note.

    Args:
        size: the latents' side h = w.
        patch_size: side p of a patch; must divide `size`. With --fine_blocks, 2 p must divide it.
        hidden_size: width D.
        depth: number of blocks, including those of a second stage.
        num_heads: attention heads per block.
        options: channels, classes, label dropout, and variants of the network.

    Raises:
        UsageError: the patch side does not divide `size`, or the options contradict each other or the network's size.
    """

    def __init__(
        self, size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, options: DiTOptions
    ) -> None:
        super().__init__()
        options.check(depth)
        first_patch = 2 * patch_size if options.fine_blocks else patch_size
        _check_sides(size, size, first_patch)
        self.options = options
        self.patch_size, self.first_patch = patch_size, first_patch
        self.size, self.grid = size, size // first_patch
        table = sincos_table(self.grid, self.grid, hidden_size) if options.pos_embed else None
        self.pos_embed = None if table is None else nn.Parameter(table, requires_grad=False)
        self._tables = PositionTables(self.grid)
        self.x_embedder = PatchEmbed(first_patch, options.num_in_channels, hidden_size)
        self.t_embedder = _time_embedding(hidden_size, options)
        self.r_embedder = _time_embedding(hidden_size, options) if options.until_embedding == "interval" else None
        self.guidance_embedder = _time_embedding(hidden_size, options) if options.guidance_embedding else None
        self.y_embedder = LabelEmbedding(options.label_rows, hidden_size) if options.adaln_labels else None
        self.feat_rope = RotaryPositions(self.grid, hidden_size // num_heads) if options.rope else None
        self.context = (
            ContextTokens(options.label_rows, options.class_tokens, options.time_tokens, hidden_size)
            if options.context_tokens
            else None
        )
        self.shared_adaLN = Modulation(hidden_size, options.modulation_parts) if options.shared_adaln else None
        self.second_start, self.until_start = options.first_stage(depth), options.until_start(depth)
        self.second_stage, head_width, head_heads = new_second_stage(size, patch_size, hidden_size, num_heads, options)
        head_shares = options.shared_adaln and not options.ddt_blocks
        stages = (
            (self.second_start, hidden_size, num_heads, options.shared_adaln),
            (depth - self.second_start, head_width, head_heads, head_shares),
        )
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, options, first=number == 0, shared=shared)
            for count, width, heads, shared in stages
            for number in range(count)
        )
        outputs = patch_size**2 * options.num_out_channels * (2 if options.learn_sigma else 1)
        self.final_layer = FinalLayer(head_width, outputs, options)
        self._initialize()
        self._add_heads(hidden_size, head_width)  # after the other weights, which are the same with and without heads
        self.augment_embedder = new_augmentation_embedding(options.augmentations, hidden_size)

    def forward(
        self,
        t: torch.Tensor,
        x: torch.Tensor,
        condition: Condition = Condition(),  # noqa: B008
        *,
        until: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        log_variance: bool = False,
        tapped: bool = False,
        routing: torch.Tensor | None = None,
    ) -> torch.Tensor | VelocityWithVariance | TappedVelocity:
        """Velocity [B, C, h, w] at times t ([B] or 0-d, in [0, 1]) and points x [B, C', h, w].

        With --reversed_time, the network embeds 1 - t, and its output is negated. With --learn_sigma, half of it is unused.
        Without labels, every sample uses the last row of the label table, which is the null class if there is one. The random
        numbers `routing` [B, h, w] decide which tokens skip the options' `route_blocks` (the number at a patch's first position
        counts); without them, no token does.

        Args:
            t: times.
            x: points x_t, and a dense map if the network takes one.
            condition: labels [B].
            until: times ([B] or 0-d, at most t); the result is then the average velocity over [until, t].
            guidance: guidance scales ([B] or 0-d, at least 1) for a network that takes them; None: 1, no guidance.
            log_variance: return `VelocityWithVariance`.
            tapped: return `TappedVelocity`, with what the tap gives.
            routing: random numbers.

        Raises:
            UsageError: h or w is not a multiple of the (coarse) patch side, or the network takes no `until` or guidance, or
                has no log-variance.
        """
        _check_sides(x.shape[2], x.shape[3], self.first_patch)
        self.options.check_inputs(until, guidance, log_variance)
        start = batch_times(t, x)  # [B]
        end = start if until is None else batch_times(until, x)
        first = last = self._conditioning(start, end, guidance, condition)
        if until is not None and self.until_start < len(self.blocks):
            last = self._conditioning(end, end, guidance, condition)
        inputs, tap = self._transform(self._first_inputs(first, x, condition.labels), first, last, x, routing)
        patches = self.final_layer(self._image_tokens(inputs, x, self.patch_size), inputs.embedding)  # [B, L, p p C']
        velocity = self._unpatchify(patches, x, self.patch_size)
        velocity = -velocity if self.options.reversed_time else velocity
        result: torch.Tensor | VelocityWithVariance = velocity
        if log_variance:
            result = VelocityWithVariance(velocity, self.log_variance_head(start, end))  # type: ignore[misc]
        return TappedVelocity(result, self._read_tap(tap, x)) if tapped else result

    def _conditioning(
        self, t: torch.Tensor, until: torch.Tensor, guidance: torch.Tensor | None, condition: Condition
    ) -> Conditioning:
        """What blocks get from times t [B] and `until` [B], guidance scales, labels and parameters of augmentation."""
        time = self.t_embedder(1 - t if self.options.reversed_time else t)
        if self.r_embedder is not None:
            time = time + self.r_embedder(t - until)
        if self.guidance_embedder is not None:
            time = time + self.guidance_embedder(guidance_share(guidance, t))
        time = add_augmentation(time, self.augment_embedder, condition)
        embedding = time if self.y_embedder is None else time + self.y_embedder(condition.labels)
        embedding = embedding.expand(len(t), -1)
        if self.options.ddt_blocks:
            embedding = functional.silu(embedding)  # before each modulation's own, as in RAE's published weights
        return Conditioning(time, embedding, None if self.shared_adaLN is None else self.shared_adaLN(embedding))

    def _first_inputs(self, given: Conditioning, x: torch.Tensor, labels: torch.Tensor | None) -> BlockInputs:
        """The first block's inputs."""
        rows, columns = _grid_of(x, self.first_patch)
        tokens = self.x_embedder(x)  # [B, L, D]
        if self.pos_embed is not None:
            tokens = tokens + self._tables.table(self.pos_embed, rows, columns)
        if self.context is not None:
            tokens = torch.cat([self.context(given.time, labels).to(tokens.dtype), tokens], dim=1)
        rotation = None if self.feat_rope is None else self.feat_rope(rows, columns, self.options.context_tokens)
        return BlockInputs(tokens, given.embedding, rotation, None, given.shared)

    def _transform(
        self,
        inputs: BlockInputs,
        given: Conditioning,
        later: Conditioning,
        x: torch.Tensor,
        routing: torch.Tensor | None,
    ) -> tuple[BlockInputs, BlockInputs]:
        """What is left after all blocks, and after the tapped block (block 0: before the first).

        The blocks from `until_start` on get `later` instead of `given`.
        """
        first, last = (-1, -1) if routing is None else self.options.route_blocks
        tap = waiting = inputs
        kept = None
        for number, block in enumerate(self.blocks):
            if number == self.until_start and later is not given:
                given = later
                inputs, waiting = (
                    each._replace(embedding=later.embedding, shared=later.shared) for each in (inputs, waiting)
                )
            if self.second_stage is not None and number == self.second_start:
                inputs = self.second_stage(inputs, given.time, x)
            if routing is not None and number == first:
                waiting, kept = inputs, self._choose_tokens(inputs, routing, number)
                inputs = waiting.of_tokens(kept)
            inputs = self._run(block, inputs)
            if kept is not None and number + 1 == last:
                inputs = waiting._replace(tokens=scatter_tokens(waiting.tokens, kept, inputs.tokens))
            tap = inputs if number + 1 == self.options.tap_block else tap
        return inputs, tap

    def _choose_tokens(self, inputs: BlockInputs, routing: torch.Tensor, number: int) -> torch.Tensor:
        """Indices [B, n] of the tokens that do not skip the blocks from `number` (0: the first) on."""
        patch = self.first_patch if number < self.second_start else self.patch_size
        numbers = routing[:, ::patch, ::patch].flatten(1)  # [B, L]
        return choose_tokens(numbers, self.options.route_rate, inputs.tokens.shape[1] - numbers.shape[1])

    def _read_tap(self, tap: BlockInputs, x: torch.Tensor) -> Tapped:
        """Apply the heads to the tokens after the tapped block."""
        tokens = self._image_tokens(tap, x, self.tap_patch)
        velocity = latents = features = None
        if self.auxiliary_head is not None:
            velocity = self._unpatchify(self.auxiliary_head(tokens, tap.embedding), x, self.tap_patch)
        if "latents" in self.projectors:
            latents = self._unpatchify(self.projectors["latents"](tokens), x, self.tap_patch)
        if "features" in self.projectors:
            features = self.projectors["features"](tokens, *_grid_of(x, self.tap_patch))
        return Tapped(tokens, velocity, latents, features)

    def _run(self, block: nn.Module, inputs: BlockInputs) -> BlockInputs:
        """A block's inputs with the tokens that it returns."""
        if self.options.use_grad_checkpointing and self.training:
            tokens, values = checkpoint(block, *inputs, use_reentrant=False)
        else:
            tokens, values = block(*inputs)
        return inputs._replace(tokens=tokens, first_values=inputs.first_values if values is None else values)

    def _image_tokens(self, inputs: BlockInputs, x: torch.Tensor, patch: int) -> torch.Tensor:
        """The tokens [B, L, D] of patches of this side, without context tokens."""
        return inputs.tokens if self.context is None else inputs.tokens[:, -math.prod(_grid_of(x, patch)) :]

    def _unpatchify(self, patches: torch.Tensor, x: torch.Tensor, patch: int) -> torch.Tensor:
        """Assemble latents [B, C, h, w] with the sides of x from patches [B, L, p p C'] of side `patch`, where C' >= C."""
        rows, columns = _grid_of(x, patch)
        patches = patches.view(len(patches), rows, columns, patch, patch, -1)[..., : self.options.num_out_channels]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch, columns * patch)

    def _add_heads(self, width: int, second_width: int) -> None:
        """The log-variance, and heads on the tokens after the tapped block, given the widths of both stages' tokens."""
        options, tap_block = self.options, self.options.tap_block
        self.tap_patch = self.first_patch if tap_block <= self.second_start else self.patch_size
        width = width if tap_block <= self.second_start else second_width
        patch_values = self.tap_patch**2 * options.num_out_channels
        self.auxiliary_head = zero_final_layer(width, patch_values, options) if options.has_auxiliary_velocity else None
        self.projectors = new_projectors(options, width, patch_values)
        self.log_variance_head = LogVariance() if options.log_variance_head else None

    def _initialize(self) -> None:
        modules = list(self.modules())
        for module in modules:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in modules:
            if isinstance(module, PatchEmbed):
                projection = module.proj
                nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
                nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        tables = [module.embedding_table for module in modules if isinstance(module, LabelEmbedding)]
        for layer in (*tables, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for embedder in (self.r_embedder, self.guidance_embedder):
            if embedder is not None:  # its zeros leave a trained network's velocity as it is
                nn.init.normal_(embedder.mlp[0].weight, std=0.02)  # type: ignore[arg-type]
                nn.init.zeros_(embedder.mlp[2].weight)  # type: ignore[arg-type]
        if self.context is not None:
            nn.init.normal_(self.context.positions, std=0.02)
        for module in modules:
            if isinstance(module, Modulation):
                nn.init.zeros_(module[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)


def _time_embedding(width: int, options: DiTOptions) -> TimeEmbedding:
    kind = options.time_embedding
    return TimeEmbedding(TIME_FREQUENCIES[kind], width, kind, options.time_scale_factor)


def _grid_of(x: torch.Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of the patches of x [B, C, h, w]."""
    return x.shape[2] // patch, x.shape[3] // patch


def _check_sides(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        side = height if height % patch else width
        raise UsageError(
            f"latents of side {side} cannot be divided into patches of side {patch}: choose another --image_size, "
            "or a DiT with another patch size"
        )


# Names of modules with maps between hidden tokens, or from the embedding to modulations.
HIDDEN = {"blocks", "shared_adaLN", "upsampler", "projector"}


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weight matrices between a DiT's hidden layers, which Muon may train. The DiT may be inside a wrapper.

    These are all matrices of the blocks and of what lies between blocks, and the shared modulation. Embeddings of patches,
    times and labels, context tokens and the output are not among them.
    """
    named = network.named_parameters()
    return [parameter for name, parameter in named if HIDDEN.intersection(name.split(".")) and parameter.ndim == 2]


def build_dit(name: str, patch: int, size: int, options: DiTOptions) -> DiT:
    """DiT-{name}/{patch} for latents of side `size`; DiT/{patch}, of the size in the options, if `name` is ""."""
    return DiT(size, patch, *options.size_of(name), options)
