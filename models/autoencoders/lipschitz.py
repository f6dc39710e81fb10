"""A certified Lipschitz constant of an AutoencoderKL's decoder: the product of its layers' constants.

It holds for all latents, but it is far too large to be useful as a number, because a group normalization multiplies differences
by up to 1 / sqrt(eps) where its input is nearly constant. Attention has a constant only on bounded inputs, and has it here
because it follows a normalization.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["convolution_norm", "decoder_bound"]

SILU = 1.0999  # the largest slope of x sigmoid(x), 1.09984 at x = 2.3994, rounded up


def decoder_bound(network: Any, side: int, scale: float) -> float | None:
    """A Lipschitz constant of decoding: latents times `scale` to pixels, both with the Euclidean norm.

    Args:
        network: an AutoencoderKL.
        side: h = w of the latents.
        scale: the largest standard deviation that multiplies latents before decoding.

    Returns:
        The constant, or None if the decoder has a layer of an unknown type.
    """
    decoder = network.decoder
    mid, blocks = decoder.mid_block, decoder.up_blocks
    layers: list[Any] = [network.post_quant_conv, decoder.conv_in, mid.resnets[0]]
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        layers += [attention, resnet]
    for block in blocks:
        layers += [*block.resnets, *(block.upsamplers or ())]
    layers += [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    product = scale
    for layer in layers:
        bound = 1.0 if layer is None else _layer_bound(layer, side)
        if bound is None:
            return None
        product *= bound
    return product


def convolution_norm(weight: torch.Tensor) -> float:
    """A bound of the spectral norm of a convolution with stride 1 and zero padding, from its weight [O, I, kh, kw].

    The smaller of two bounds: sqrt(max column sum times max row sum) of the absolute operator, and sqrt(kh kw) times the norm
    of the kernel as a matrix [O, I kh kw], because each input appears in at most kh kw patches.
    """
    weight = weight.detach().double()
    rows, columns = weight.abs().sum((1, 2, 3)).max(), weight.abs().sum((0, 2, 3)).max()
    patches = math.sqrt(weight[0, 0].numel()) * torch.linalg.matrix_norm(weight.flatten(1), 2)
    return min(math.sqrt(float(rows * columns)), float(patches))


def _layer_bound(layer: Any, side: int) -> float | None:
    known: dict[str, Callable[[Any], float | None]] = {  # names of torch's and diffusers' classes
        "Conv2d": _of_convolution,
        "GroupNorm": _of_norm,
        "SiLU": lambda _: SILU,
        "ResnetBlock2D": _of_resnet,
        "Upsample2D": _of_upsampling,
        "Attention": lambda each: _of_attention(each, side),
    }
    name = type(layer).__name__
    return known[name](layer) if name in known else None


def _of_convolution(layer: Any) -> float | None:
    simple = layer.stride == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    return convolution_norm(layer.weight) if simple else None


def _of_norm(layer: Any) -> float:
    return float(layer.weight.detach().abs().max()) / math.sqrt(layer.eps)


def _of_resnet(block: Any) -> float | None:
    branch = 1.0
    for layer in (block.norm1, block.conv1, block.norm2, block.conv2):
        bound = _layer_bound(layer, 0)
        if bound is None:
            return None
        branch *= bound
    shortcut = 1.0 if block.conv_shortcut is None else _of_convolution(block.conv_shortcut)
    return None if shortcut is None else (shortcut + SILU**2 * branch) / block.output_scale_factor


def _of_upsampling(layer: Any) -> float | None:
    convolution = _of_convolution(layer.conv) if layer.use_conv else 1.0
    return None if convolution is None else 2 * convolution  # every pixel is repeated four times


def _of_attention(layer: Any, side: int) -> float:
    """x + attention(norm(x)), whose inputs y = norm(x) have the norm sqrt(numbers) max|weight| + |bias| at most.

    With P = softmax(Q K^T / sqrt(d)), d(P V) = P dV + dP V, where |P| <= sqrt(tokens), |dP| <= |d(Q K^T)| / (2 sqrt(d)) and
    |d(Q K^T)| <= |K| |dQ| + |Q| |dK|.
    """
    norm, tokens = layer.group_norm, side**2
    size = math.sqrt(tokens * norm.num_channels) * float(norm.weight.detach().abs().max())
    size += math.sqrt(tokens) * float(norm.bias.detach().norm())
    q, k, v, out = (_norm_of(each) for each in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]))
    q_size, k_size, v_size = (
        _norm_of(each) * size + math.sqrt(tokens) * (0.0 if each.bias is None else float(each.bias.detach().norm()))
        for each in (layer.to_q, layer.to_k, layer.to_v)
    )
    width = layer.to_q.out_features / layer.heads
    attention = math.sqrt(tokens) * v + v_size * (k_size * q + q_size * k) / (2 * math.sqrt(width))
    return (1 + _of_norm(norm) * out * attention) / layer.rescale_output_factor


def _norm_of(layer: Any) -> float:
    return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
