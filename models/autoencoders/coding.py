"""Encoding and decoding with a network of one of diffusers' classes, without the scale of its latents; differentiable."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from models.autoencoders.kinds import KINDS, Kind, Layout

__all__ = ["Coder", "Decoding", "Encoding", "decode_latents", "encode_pixels"]


def encode_pixels(network: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments [B, 2 c, h, w], or latents [B, c, h, w], of pixels [B, C, H, W] in [-1, 1]."""
    kind, patch = _kind(network), _layout(network).patch
    x = (pixels + 1) / 2 if kind.unit_range else pixels
    code = network.encode(x[:, :, None] if kind.has_frames else x, return_dict=False)[0]
    code = code.parameters if kind.has_posterior else code
    code = code[:, :, 0] if kind.has_frames else code
    return functional.pixel_unshuffle(code, patch) if patch > 1 else code


def decode_latents(network: Any, z: torch.Tensor) -> torch.Tensor:
    """Pixels [B, C, H, W], about in [-1, 1], of z [B, c, h, w]."""
    kind, patch = _kind(network), _layout(network).patch
    if patch > 1:
        z = functional.pixel_shuffle(z, patch).contiguous(memory_format=torch.channels_last)
    decoded = network.decode(z[:, :, None] if kind.has_frames else z, return_dict=False, **kind.decoding)[0]
    pixels = decoded[:, :, 0] if kind.has_frames else decoded
    return 2 * pixels - 1 if kind.unit_range else pixels


class Encoding(nn.Module):
    """The encoder of a network as a module, which can be compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels: see `encode_pixels`."""
        return encode_pixels(self.network, pixels)


class Decoding(nn.Module):
    """The decoder of a network as a module, which can be compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Decode latents: see `decode_latents`."""
        return decode_latents(self.network, z)


class Coder:
    """An autoencoder's network, with its encoder and decoder, which may be compiled.

    Args:
        network: an instance of one of diffusers' classes in KINDS.
        encode: maps pixels to moments or latents; None: `encode_pixels`.
        decode: maps latents to pixels; None: `decode_latents`.
    """

    def __init__(self, network: nn.Module, encode: nn.Module | None = None, decode: nn.Module | None = None) -> None:
        self.network = network
        self.encode = encode or Encoding(network)
        self.decode = decode or Decoding(network)
        self.layout = _layout(network)
        self.has_posterior = _kind(network).has_posterior


def _kind(network: nn.Module) -> Kind:
    return KINDS[type(network).__name__]


def _layout(network: Any) -> Layout:
    return _kind(network).layout(network.config)
