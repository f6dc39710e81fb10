"""EDM's U-Nets adm, ddpm++ and ncsn++ (Karras et al. 2022, arXiv:2206.00364, appendix F).

Names, shapes and order of the state dict match LFM's published checkpoints. `attn_resolutions` are sides of feature maps,
unlike for `--use_origin_adm`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.conditions import Condition, add_augmentation, new_augmentation_embedding
from models.edm_layers import SQRT_HALF, STYLES, Block, Convolution, Norm
from models.embeddings import TimeFeatures, batch_times
from models.family import FamilyOptions, check_sides
from options import UsageError, option

__all__ = ["EdmUNet", "EdmUNetOptions", "UNetOptions"]


@dataclass(frozen=True)
class UNetOptions(FamilyOptions):
    """U-Nets (adm, ddpm++, ncsn++ and --use_origin_adm)."""

    nf: int = option(256, "base number of channels", minimum=4)
    ch_mult: tuple[int, ...] = option((1, 1, 2, 2, 4, 4), "channels of each level, as multiples of nf", minimum=1)
    num_res_blocks: int = option(2, "residual blocks per level", minimum=1)
    attn_resolutions: tuple[int, ...] = option(
        (16,),
        "sides of the feature maps with attention; with --use_origin_adm, their downsampling factors",
        flags=("--attn_resolution",),
    )
    dropout: float = option(0.0, "dropout in the residual blocks", minimum=0, maximum=1)

    def levels(self, size: int) -> tuple[str, tuple[int, ...]]:
        """The meaning of the numbers in attn_resolutions, and each level's number, for latents of side `size`."""
        return "sides of the feature maps", tuple(size >> level for level in range(len(self.ch_mult)))

    def unmatched(self, size: int) -> dict[str, str]:
        """Entries of attn_resolutions that match no level."""
        meaning, levels = self.levels(size)
        extra = [number for number in self.attn_resolutions if number not in levels]
        if not extra:
            return {}
        verb = "matches" if len(extra) == 1 else "match"
        alone = ", so only the innermost block has attention" if len(extra) == len(self.attn_resolutions) else ""
        listed = " ".join(map(str, extra))
        return {"attn_resolutions": f"{listed} {verb} no level: the {meaning} are {', '.join(map(str, levels))}{alone}"}


@dataclass(frozen=True)
class EdmUNetOptions(UNetOptions):
    """adm, ddpm++, ncsn++."""

    class_flag: ClassVar[str] = "label_dim"
    null_class_has_weights: ClassVar[bool] = False  # the null class is a zero vector

    label_dim: int = option(0, "number of classes of adm, ddpm++ and ncsn++; 0: unconditional", minimum=0)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.label_dim or 1


class EdmUNet(nn.Module):
    """Velocity network adm, ddpm++ or ncsn++ for latents of side `size`.

    It accepts latents of any other sides that its levels can halve. Attention stays on the levels that have it at `size`.
    """

    def __init__(self, size: int, kind: str, options: EdmUNetOptions) -> None:
        super().__init__()
        check_sides(size, size, len(options.ch_mult), "--ch_mult")
        self.options, self.kind, self.style = options, kind, STYLES[kind]
        if options.nf % 2 and kind != "ncsn++":
            raise UsageError(
                f"--nf {options.nf}: {kind} embeds times in pairs of sines and cosines, so --nf must be even"
            )
        if kind == "ncsn++" and options.time_embedding != "sinusoids":
            raise UsageError(
                f"--time_embedding {options.time_embedding} has no effect on ncsn++, which always embeds times by random "
                "frequencies: leave the flag out, or choose another --model_type"
            )
        width, embedding = options.nf, 4 * options.nf
        noise_width = 2 * width if kind == "ncsn++" else width
        endpoint = kind == "ddpm++"
        self.time_features = TimeFeatures(
            width // 2, options.time_embedding, options.time_scale_factor, sines_first=endpoint, endpoint=endpoint
        )
        if kind == "adm":
            self.map_layer0, self.map_layer1 = nn.Linear(noise_width, embedding), nn.Linear(embedding, embedding)
            self.map_label = nn.Linear(options.label_dim, embedding, bias=False) if options.label_dim else None
        else:
            self.map_noise = RandomFrequencies(width, options.time_scale_factor) if kind == "ncsn++" else None
            self.map_label = nn.Linear(options.label_dim, noise_width) if options.label_dim else None
            self.map_layer0, self.map_layer1 = nn.Linear(noise_width, embedding), nn.Linear(embedding, embedding)
        self.enc, skips = self._encoder(size)
        self.dec = self._decoder(size, skips)
        if kind == "adm":
            self.out_norm = Norm(width * options.ch_mult[0], self.style.eps)
            self.out_conv = Convolution(width * options.ch_mult[0], options.num_out_channels, 3)
        self._initialize()
        self.augment_embedder = new_augmentation_embedding(options.augmentations, embedding)
        self.to(memory_format=torch.channels_last)  # faster on CPUs, and in low precision on GPUs

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition = Condition()) -> torch.Tensor:  # noqa: B008
        """Velocity [B, C, h, w] at times t ([B] or 0-d, in [0, 1]) and points x [B, C', h, w].

        Without labels, every sample uses the null class, a zero vector.

        Raises:
            UsageError: h or w is not a multiple of 2^(levels - 1).
        """
        check_sides(x.shape[2], x.shape[3], len(self.options.ch_mult), "--ch_mult")
        embedding = self._embed(batch_times(t, x), condition)
        skips: list[torch.Tensor] = []
        pyramid = x
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):
                pyramid = (x + module(pyramid)) * SQRT_HALF
                x = skips[-1] = pyramid
                continue
            x = self._run(module, x, embedding)
            skips.append(x)
        for name, module in self.dec.items():
            if name.endswith("aux_norm"):
                x = functional.silu(module(x))
            elif name.endswith("aux_conv"):
                return module(x)
            else:
                if x.shape[1] != module.inputs:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(module, x, embedding)
        return self.out_conv(functional.silu(self.out_norm(x)))

    def _run(self, module: nn.Module, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if not isinstance(module, Block):
            return module(x)
        if self.options.use_grad_checkpointing and self.training:
            return checkpoint(module, x, embedding, use_reentrant=False)
        return module(x, embedding)

    def _block(self, inputs: int, outputs: int, **arguments: bool) -> Block:
        return Block(inputs, outputs, 4 * self.options.nf, self.style, self.options.dropout, **arguments)

    def _encoder(self, size: int) -> tuple[nn.ModuleDict, list[int]]:
        options, modules, skips = self.options, nn.ModuleDict(), []
        channels = options.nf * (options.ch_mult[0] if self.kind == "adm" else 1)
        pyramid = options.num_in_channels
        for level, multiple in enumerate(options.ch_mult):
            side = size >> level
            if level == 0:
                modules[f"{side}x{side}_conv"] = Convolution(options.num_in_channels, channels, 3)
            else:
                modules[f"{side}x{side}_down"] = self._block(channels, channels, down=True)
                if self.style.pyramid:
                    modules[f"{side}x{side}_aux_residual"] = Convolution(
                        pyramid, channels, 3, down=True, filter=self.style.filter, fused=True
                    )
                    pyramid = channels
            skips.append(channels)
            for index in range(options.num_res_blocks):
                attend = side in options.attn_resolutions
                modules[f"{side}x{side}_block{index}"] = self._block(channels, options.nf * multiple, attend=attend)
                channels = options.nf * multiple
                skips.append(channels)
        return modules, skips

    def _decoder(self, size: int, skips: list[int]) -> nn.ModuleDict:
        options, modules = self.options, nn.ModuleDict()
        channels = skips[-1]
        deepest = len(options.ch_mult) - 1
        for level, multiple in reversed(list(enumerate(options.ch_mult))):
            side = size >> level
            if level == deepest:
                modules[f"{side}x{side}_in0"] = self._block(channels, channels, attend=True)
                modules[f"{side}x{side}_in1"] = self._block(channels, channels)
            else:
                modules[f"{side}x{side}_up"] = self._block(channels, channels, up=True)
            for index in range(options.num_res_blocks + 1):
                last = self.kind == "adm" or index == options.num_res_blocks
                attend = last and side in options.attn_resolutions
                inputs = channels + skips.pop()
                channels = options.nf * multiple
                modules[f"{side}x{side}_block{index}"] = self._block(inputs, channels, attend=attend)
        if self.kind != "adm":
            modules[f"{size}x{size}_aux_norm"] = Norm(channels, self.style.eps)
            modules[f"{size}x{size}_aux_conv"] = Convolution(channels, options.num_out_channels, 3)
        return modules

    def _embed(self, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        labels = condition.labels
        if self.kind == "adm":
            embedding = self.time_features(t)
            embedding = self.map_layer1(functional.silu(self.map_layer0(embedding)))
            if self.map_label is not None and labels is not None:
                embedding = embedding + self.map_label(self._one_hot(labels).to(embedding))
            return functional.silu(add_augmentation(embedding, self.augment_embedder, condition))
        embedding = (self.map_noise or self.time_features)(t)
        if self.map_label is not None:
            classes = self.options.label_dim
            hot = embedding.new_zeros(len(t), classes) if labels is None else self._one_hot(labels).to(embedding)
            embedding = embedding + self.map_label(hot * math.sqrt(classes))
        embedding = self.map_layer1(functional.silu(self.map_layer0(embedding)))
        return functional.silu(add_augmentation(embedding, self.augment_embedder, condition))

    def _one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot rows [B, K] for labels [B]; the null class K is a row of zeros."""
        return functional.one_hot(labels, self.options.label_dim + 1)[:, :-1]

    def _initialize(self) -> None:
        draw = _kaiming if self.style.init == "kaiming" else _xavier
        for module in self.modules():
            if isinstance(module, nn.Linear | Convolution) and module.weight is not None:
                draw(module)
        small = 0.0 if self.kind == "adm" else 1e-5
        for module in self.modules():
            if isinstance(module, Block):
                rescaled = [(module.conv1, small)]
                if module.heads:
                    rescaled += [(module.proj, small)] + ([] if self.kind == "adm" else [(module.qkv, math.sqrt(0.2))])
                for convolution, factor in rescaled:
                    _scale(convolution, factor)
        output = self.out_conv if self.kind == "adm" else list(self.dec.values())[-1]
        _scale(output, small)
        if self.kind == "adm" and self.map_label is not None:
            nn.init.normal_(self.map_label.weight)


class RandomFrequencies(nn.Module):
    """Random Fourier features of time times `factor`, with frequencies fixed at initialization."""

    freqs: torch.Tensor

    def __init__(self, count: int, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("freqs", 16 * torch.randn(count))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Features [B, 2 count] of times t [B]: sin(2 pi t f), then cos(2 pi t f)."""
        t = t if self.factor == 1 else self.factor * t
        angles = 2 * math.pi * t[:, None] * self.freqs
        return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def _kaiming(module: Any) -> None:
    fan_in = module.weight[0].numel()
    bound = math.sqrt(3 / fan_in) * math.sqrt(1 / 3)
    nn.init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        nn.init.uniform_(module.bias, -bound, bound)


@torch.no_grad()
def _xavier(module: Any) -> None:
    nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _scale(convolution: Any, factor: float) -> None:
    convolution.weight.mul_(factor)
    convolution.bias.mul_(factor)
