"""A plain U-Net for small images in pixel space (Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239).

    input        C -> 32
    encoder      32 -> 64,    64 -> 128 with attention
    middle       128 -> 64 with attention,    64 -> 64
    decoder      64 + 128 -> 64 with attention,    64 + 64 -> 32
    output       32 -> C

After each encoder block, a 4 x 4 convolution halves the sides. Before each decoder block, a transposed 4 x 4 convolution
doubles them. "64 + 128" means 64 channels from the previous layer and 128 from the encoder block with the same sides.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.conditions import Condition, add_augmentation, new_augmentation_embedding
from models.embeddings import LabelEmbedding, TimeEmbedding, batch_times
from models.family import ClassOptions, check_sides
from models.transformer_layers import SelfAttention
from models.unet_layers import GroupNorm

__all__ = ["PlainUNet", "PlainUNetOptions"]

WIDTHS = (32, 64, 128)  # channels before the first level and after each level
MIDDLE = 64
EMBEDDING = 128  # channels of the time embedding, before and after its linear layers
GROUPS = 8
HEADS = 4
LEVELS = len(WIDTHS)


@dataclass(frozen=True)
class PlainUNetOptions(ClassOptions):
    """unet."""


class PlainUNet(nn.Module):
    """Velocity network `unet`, for images whose sides are multiples of 4.

    Args:
        size: the images' side; it is only checked, and no weight depends on it.
        options: channels, classes and label dropout.

    Raises:
        UsageError: `size` is not a multiple of 4.
    """

    def __init__(self, size: int, options: PlainUNetOptions) -> None:
        super().__init__()
        check_sides(size, size, LEVELS, "unet")
        self.options = options
        self.time = TimeEmbedding(
            EMBEDDING // 2, EMBEDDING, options.time_embedding, options.time_scale_factor, sines_first=True
        )
        self.labels = LabelEmbedding(options.label_rows, EMBEDDING) if options.label_rows else None
        self.input = nn.Conv2d(options.num_in_channels, WIDTHS[0], 3, padding=1)
        levels = list(pairwise(WIDTHS))
        attends = [False, True]
        self.encoder = nn.ModuleList(Block(*widths, attend) for widths, attend in zip(levels, attends, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(width, width, 4, stride=2, padding=1) for _, width in levels)
        self.middle = nn.ModuleList([Block(WIDTHS[-1], MIDDLE, attend=True), Block(MIDDLE, MIDDLE)])
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        width = MIDDLE
        for (outputs, skip), attend in zip(reversed(levels), reversed(attends), strict=True):
            self.up.append(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
            self.decoder.append(Block(width + skip, outputs, attend))
            width = outputs
        last = nn.Conv2d(width, options.num_out_channels, 3, padding=1)
        self.output = nn.Sequential(GroupNorm(GROUPS, width), nn.SiLU(), last)
        self.augment_embedder = new_augmentation_embedding(options.augmentations, EMBEDDING)
        self.to(memory_format=torch.channels_last)  # 20% faster on CPUs

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition = Condition()) -> torch.Tensor:  # noqa: B008
        """Velocity [B, C, H, W] at times t ([B] or 0-d, in [0, 1]) and points x [B, C', H, W].

        If there are classes but no labels, every sample uses the last row of the label table, which is the null class if
        there is one.

        Raises:
            UsageError: H or W is not a multiple of 4.
        """
        check_sides(x.shape[2], x.shape[3], LEVELS, "unet")
        embedding = self.time(batch_times(t, x))  # [B, E]
        if self.labels is not None:
            embedding = embedding + self.labels(condition.labels)
        embedding = add_augmentation(embedding, self.augment_embedder, condition)
        x, skips = self.input(x), []
        for block, down in zip(self.encoder, self.down, strict=True):
            x = self._run(block, x, embedding)
            skips.append(x)
            x = down(x)
        for block in self.middle:
            x = self._run(block, x, embedding)
        for block, up in zip(self.decoder, self.up, strict=True):
            x = self._run(block, torch.cat([up(x), skips.pop()], dim=1), embedding)
        return self.output(x)

    def _run(self, block: nn.Module, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if self.options.use_grad_checkpointing and self.training:
            return checkpoint(block, x, embedding, use_reentrant=False)
        return block(x, embedding)


class Block(nn.Module):
    """Two convolutions with the embedding added between them, a 1 x 1 skip convolution, and self-attention if `attend`."""

    def __init__(self, inputs: int, outputs: int, attend: bool = False) -> None:
        super().__init__()
        self.norm1 = GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(EMBEDDING, outputs)
        self.norm2 = GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.attend = Attention(outputs) if attend else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Transform x [B, C, H, W], given the embedding [B, E]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.affine(functional.silu(embedding))[:, :, None, None]
        x = self.skip(x) + self.conv2(functional.silu(self.norm2(h)))
        return x if self.attend is None else self.attend(x)


class Attention(nn.Module):
    """Self-attention over the positions of x [B, C, H, W], added to x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(GROUPS, channels)
        self.attention = SelfAttention(channels, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply self-attention to x [B, C, H, W]."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, L, C]
        attended, _ = self.attention(tokens)
        return x + attended.transpose(1, 2).reshape(x.shape)
