"""Autoencoders in files of the latent diffusion code: VA-VAE, Stable Diffusion's original ones, and VQGANs.

Such a file holds weights alone. The configuration of diffusers' AutoencoderKL, or VQModel, follows from their shapes, and
each name has one in diffusers. Of the normalizations' groups, which shapes do not show, there are always 32.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.autoencoders.diffusers_files import new_network, refuse_mismatch
from options import UsageError
from runtime.torch_files import read_tensors
from runtime.weights import AVERAGES, check_finite, find_mismatch

__all__ = ["load_ldm"]

Weights = Mapping[str, torch.Tensor]

FIRST = "encoder.conv_in.weight"
LEVEL = "encoder.down.0.block.0.conv1.weight"  # a name that diffusers does not use
CODEBOOK = "quantize.embedding.weight"  # of a VQGAN
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")  # others serve only training
CONTAINERS = ("state_dict", "ema", "model")  # entries that hold the weights
SCALE = "scale_factor"  # a buffer of a whole latent diffusion model
GROUPS = 32

# Replaced in this order. Levels of the decoder, which diffusers counts backwards, are replaced by `_translate`.
RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
PROJECTION = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")  # 1 x 1 convolutions in the file


def load_ldm(path: Path, name: str) -> tuple[Any, bool]:
    """Load the autoencoder in a file of the latent diffusion code.

    Args:
        path: a safetensors or torch.save file with the autoencoder's state dict, or with a whole latent diffusion model's.
        name: the path as the user gave it.

    Returns:
        An AutoencoderKL or a VQModel of diffusers, and whether the file has its scale.

    Raises:
        UsageError: the file is unreadable, holds something else, or weights are missing, unexpected or not finite.
    """
    stored = _read_weights(path)
    weights = _select(stored)
    if LEVEL not in weights:
        raise UsageError(
            f"--pretrained_autoencoder_ckpt {name}: a file, but expected a folder in diffusers format, or a file with names of "
            f"the latent diffusion code, such as {LEVEL}"
        )
    if CODEBOOK not in weights:
        weights = {key: value for key, value in weights.items() if not key.startswith("quantize.")}
    class_name = "VQModel" if CODEBOOK in weights else "AutoencoderKL"
    try:
        config = _configuration(weights)
    except KeyError as error:
        raise UsageError(f"the weights of the autoencoder {name} are incomplete; missing: {error.args[0]}") from error
    scaled = SCALE in stored and stored[SCALE].numel() == 1
    if scaled:
        config["scaling_factor"] = round(float(stored[SCALE]), 7)
    network = new_network(class_name, config)
    translated = {_translate(key, len(config["block_out_channels"])): key for key in weights}
    named = {new: _as_linear(new, weights[old]) for new, old in translated.items()}
    mismatch = find_mismatch(network.state_dict(), named)
    listed = mismatch._replace(unexpected=[translated[each] for each in mismatch.unexpected])
    refuse_mismatch(listed, name, f"the {class_name} that their shapes describe (missing names are diffusers')")
    check_finite(named, f"the autoencoder {name}")
    network.load_state_dict(named)
    return network, scaled


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file's state dict; none if it has no state dict."""
    content: Any = read_tensors(path)
    while isinstance(content, Mapping):
        inner = [content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if not inner:
            return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        content = inner[0]
    return {}


def _select(stored: Weights) -> dict[str, torch.Tensor]:
    """The autoencoder's weights without their common prefix, from the EMA copy if there is one."""
    prefixes = sorted(
        (key.removesuffix(FIRST) for key in stored if key.endswith(FIRST)),
        key=lambda prefix: (AVERAGES.isdisjoint(prefix.split(".")), len(prefix)),
    )
    prefix = prefixes[0] if prefixes else ""
    own = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key.startswith(PARTS)}


def _configuration(weights: Weights) -> dict[str, Any]:
    """The configuration of the diffusers class, from names and shapes.

    Raises:
        KeyError: a weight is missing.
    """
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    z, into = weights["encoder.conv_out.weight"].shape[0], weights["decoder.conv_in.weight"].shape[1]
    config: dict[str, Any] = {
        "in_channels": weights[FIRST].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if f"encoder.down.{i}.attn.0.q.weight" in weights else "DownEncoderBlock2D"
            for i in range(levels)
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if f"decoder.up.{i}.attn.0.q.weight" in weights else "UpDecoderBlock2D"
            for i in reversed(range(levels))
        ),
        "block_out_channels": tuple(weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
        "layers_per_block": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": into,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }
    if CODEBOOK in weights:
        codes, width = weights[CODEBOOK].shape
        return config | {"latent_channels": z, "num_vq_embeddings": codes, "vq_embed_dim": width}
    quantized = {f"use_{part}": f"{part}.weight" in weights for part in ("quant_conv", "post_quant_conv")}
    return config | quantized


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number at the start of the names."""
    return 1 + max(int(match[1]) for key in weights if (match := re.match(pattern, key)))


def _translate(key: str, levels: int) -> str:
    """The name in diffusers of a weight; unknown ones keep theirs."""
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", key)
    for pattern, replacement in RULES:
        key = re.sub(pattern, replacement, key)
    return key


def _as_linear(key: str, value: torch.Tensor) -> torch.Tensor:
    """The matrix of an attention's 1 x 1 convolution; other weights are unchanged."""
    value = value.float()
    return value[:, :, 0, 0] if PROJECTION.search(key) and value.dim() == 4 else value
