"""guided-diffusion's U-Net, ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), for `--use_origin_adm`.

Names, shapes and order of the state dict match LFM's published checkpoints. Unlike in EDM's U-Nets, `attn_resolutions` are
downsampling factors (1, 2, 4, ...), because LFM's published checkpoints depend on this.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.conditions import Condition, add_augmentation, new_augmentation_embedding
from models.edm_unet import UNetOptions
from models.embeddings import TimeFeatures, batch_times
from models.family import ClassOptions, check_sides
from models.unet_layers import Double, GroupNorm
from options import UsageError, option

__all__ = ["GuidedUNet", "GuidedUNetOptions"]


@dataclass(frozen=True)
class GuidedUNetOptions(UNetOptions, ClassOptions):
    """U-Net of --use_origin_adm."""

    use_scale_shift_norm: bool = option(True, "let the embedding scale and shift the features; off: add it to them")
    resblock_updown: bool = option(
        False, "use residual blocks to resample between levels; off: resample as resamp_with_conv selects"
    )
    resamp_with_conv: bool = option(
        True, "use convolutions to resample between levels; off: average pooling and nearest-neighbor upsampling"
    )
    use_new_attention_order: bool = option(False, "split channels into queries, keys and values first, then into heads")
    num_heads: int = option(4, "number of attention heads", minimum=1)
    num_head_upsample: int = option(-1, "number of attention heads in the decoder; -1: num_heads")
    num_head_channels: int = option(
        -1, "channels per attention head, instead of a fixed number of heads; -1: use num_heads"
    )

    def levels(self, size: int) -> tuple[str, tuple[int, ...]]:
        """The meaning of the numbers in attn_resolutions, and each level's number."""
        return "downsampling factors", tuple(2**level for level in range(len(self.ch_mult)))


class GuidedUNet(nn.Module):
    """Velocity network of --use_origin_adm for latents of side `size`, or of any other sides that its levels can halve."""

    def __init__(self, size: int, options: GuidedUNetOptions) -> None:
        super().__init__()
        check_sides(size, size, len(options.ch_mult), "--ch_mult")
        self.options = options
        width, embedding = options.nf, 4 * options.nf
        self.time_features = TimeFeatures(width // 2, options.time_embedding, options.time_scale_factor)
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if options.label_rows:
            self.label_emb = nn.Embedding(options.label_rows, embedding)
        channels = width * options.ch_mult[0]
        self.input_blocks = nn.ModuleList([Entry(nn.Conv2d(options.num_in_channels, channels, 3, padding=1))])
        skips, factor, deepest = [channels], 1, len(options.ch_mult) - 1
        for level, multiple in enumerate(options.ch_mult):
            for _ in range(options.num_res_blocks):
                self.input_blocks.append(self._entry(channels, width * multiple, factor, encoder=True))
                channels = width * multiple
                skips.append(channels)
            if level != deepest:
                self.input_blocks.append(Entry(self._resample(channels, "down")))
                skips.append(channels)
                factor *= 2
        film = options.use_scale_shift_norm
        self.middle_block = Entry(
            ResBlock(channels, channels, embedding, options.dropout, film),
            AttentionBlock(channels, self._heads(channels, True), options.use_new_attention_order),
            ResBlock(channels, channels, embedding, options.dropout, film),
        )
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(options.ch_mult))):
            for index in range(options.num_res_blocks + 1):
                entry = self._entry(channels + skips.pop(), width * multiple, factor, encoder=False)
                channels = width * multiple
                if level and index == options.num_res_blocks:
                    entry.append(self._resample(channels, "up"))
                    factor //= 2
                self.output_blocks.append(entry)
        last = nn.Conv2d(channels, options.num_out_channels, 3, padding=1)
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), _zeroed(last))
        self.augment_embedder = new_augmentation_embedding(options.augmentations, embedding)
        self.to(memory_format=torch.channels_last)  # faster on CPUs, and in low precision on GPUs

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition = Condition()) -> torch.Tensor:  # noqa: B008
        """Velocity [B, C, h, w] at times t ([B] or 0-d, in [0, 1]) and points x [B, C', h, w].

        Without labels, every sample uses the null class.

        Raises:
            UsageError: h or w is not a multiple of 2^(levels - 1), or labels are missing and the network lacks a null class.
        """
        check_sides(x.shape[2], x.shape[3], len(self.options.ch_mult), "--ch_mult")
        embedding = self.time_embed(self.time_features(batch_times(t, x)))
        if self.options.label_rows:
            embedding = embedding + self._embed_labels(condition.labels)
        embedding = add_augmentation(embedding, self.augment_embedder, condition)
        skips = []
        for entry in self.input_blocks:
            x = self._run(entry, x, embedding)
            skips.append(x)
        x = self._run(self.middle_block, x, embedding)
        for entry in self.output_blocks:
            x = self._run(entry, torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(x)

    def _embed_labels(self, labels: torch.Tensor | None) -> torch.Tensor:
        if labels is not None:
            return self.label_emb(labels)
        if not self.options.label_dropout:
            raise UsageError("this network needs labels: it has no null class, because its --label_dropout is 0")
        return self.label_emb.weight[-1]

    def _run(self, entry: nn.Module, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if self.options.use_grad_checkpointing and self.training:
            return checkpoint(entry, x, embedding, use_reentrant=False)
        return entry(x, embedding)

    def _entry(self, inputs: int, outputs: int, factor: int, encoder: bool) -> "Entry":
        options = self.options
        entry = Entry(ResBlock(inputs, outputs, 4 * options.nf, options.dropout, options.use_scale_shift_norm))
        if factor in options.attn_resolutions:
            heads = self._heads(outputs, encoder)
            entry.append(AttentionBlock(outputs, heads, options.use_new_attention_order))
        return entry

    def _heads(self, channels: int, encoder: bool) -> int:
        options = self.options
        if options.num_head_channels != -1:
            return channels // options.num_head_channels
        return options.num_heads if encoder or options.num_head_upsample == -1 else options.num_head_upsample

    def _resample(self, channels: int, way: str) -> nn.Module:
        options = self.options
        if options.resblock_updown:
            film = options.use_scale_shift_norm
            return ResBlock(channels, channels, 4 * options.nf, options.dropout, film, way=way)
        return (Upsample if way == "up" else Downsample)(channels, options.resamp_with_conv)


class Norm(GroupNorm):
    """Group norm with 32 groups, computed in float32.

    Raises:
        UsageError: the number of channels is not a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        if channels % 32:
            raise UsageError(
                f"group norm cannot divide a layer of {channels} channels into 32 groups: choose an --nf that is a "
                "multiple of 32, or another --ch_mult"
            )
        super().__init__(32, channels)


class Entry(nn.Sequential):
    """Sequence of modules; residual blocks also receive the embedding."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Transform x [B, C, H, W], given the embedding [B, E]."""
        for module in self:
            x = module(x, embedding) if isinstance(module, ResBlock) else module(x)
        return x


class ResBlock(nn.Module):
    """Residual block that takes an embedding. With `way` "up" or "down", it resamples both the main path and the skip."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, film: bool, way: str | None = None
    ) -> None:
        super().__init__()
        self.film = film
        self.in_layers = nn.Sequential(Norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.resample = {"up": Double(), "down": nn.AvgPool2d(2), None: nn.Identity()}[way]
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if film else 1) * outputs))
        last = _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.out_layers = nn.Sequential(Norm(outputs), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Transform x [B, C, H, W], given the embedding [B, E]."""
        norm, silu, convolution = self.in_layers
        h, x = self.resample(silu(norm(x))), self.resample(x)
        h = convolution(h)
        affine = self.emb_layers(embedding)[:, :, None, None]
        if self.film:
            scale, shift = affine.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + affine)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the positions of x [B, C, H, W], added to x.

    Raises:
        UsageError: the number of channels is not a multiple of the number of heads.
    """

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise UsageError(
                f"{channels} channels cannot be divided among {heads} attention heads: choose another --num_heads, "
                "--num_head_upsample or --num_head_channels"
            )
        self.heads, self.new_order = heads, new_order
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = functional.scaled_dot_product_attention
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply self-attention to x [B, C, H, W]."""
        batch, channels, height, width = x.shape
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        order = (3, self.heads) if self.new_order else (self.heads, 3)
        parts = qkv.view(batch, *order, channels // self.heads, height * width)
        if self.new_order:
            parts = parts.transpose(1, 2)
        query, key, value = parts.permute(2, 0, 1, 4, 3)  # each [B, heads, L, head width]
        mixed = self.attention(query, key, value).transpose(2, 3).reshape(batch, channels, -1)
        return (flat + self.proj_out(mixed)).view_as(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a convolution if `convolve`."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.upsample = Double()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample x [B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(self.upsample(x))


class Downsample(nn.Module):
    """Convolution with stride 2 if `convolve`, else 2 x 2 average pooling."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Downsample x [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.op(x)


def _zeroed(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
