"""diffusers' autoencoders for single images: what each class of them says about images and latents, by its name.

`models.autoencoders.pretrained.PretrainedAutoencoder` reads everything that differs between classes from this table. A class
that encodes videos is used with one frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.autoencoders.scale import Scale, batch_norm_scale, config_scale, inner_scale
from options import UsageError

__all__ = ["KINDS", "Kind", "Layout"]


class Layout(NamedTuple):
    """Shapes of images and latents.

    Args:
        image_channels: C of the images [B, C, H, W].
        latent_channels: c of the latents [B, c, h, w].
        factor: H / h.
        patch: side of the squares of encoder outputs whose channels become one latent position's; included in c and factor.
        side: the only H = W that the autoencoder takes; None: all multiples of the factor.
    """

    image_channels: int
    latent_channels: int
    factor: int
    patch: int = 1
    side: int | None = None


@dataclass(frozen=True)
class Kind:
    """A class of diffusers.

    Args:
        layout: the shapes, from an autoencoder's configuration.
        scale: the latents' mean and deviation, from an autoencoder; None if it has none and they must be measured.
        has_posterior: whether it encodes to a mean and a log-variance, and not to a latent.
        unit_range: whether it takes and returns images in [0, 1], and not in [-1, 1].
        has_frames: whether it takes and returns videos [B, C, 1, H, W].
        decoding: further arguments of its `decode`.
        bounded: whether its decoder has the layers that models/autoencoders/lipschitz.py knows.
        needs: package that it needs in addition to diffusers.
    """

    layout: Callable[[Any], Layout]
    scale: Callable[[Any], Scale | None] = config_scale
    has_posterior: bool = True
    unit_range: bool = False
    has_frames: bool = False
    decoding: Mapping[str, Any] = field(default_factory=dict)
    bounded: bool = False
    needs: str = ""


def _halvings(levels: Any) -> int:
    """The factor of an encoder that halves the image between its levels."""
    return 2 ** (len(levels) - 1)


def _kl_layout(config: Any) -> Layout:
    return Layout(config.in_channels, config.latent_channels, _halvings(config.block_out_channels))


def _flux2_layout(config: Any) -> Layout:
    patch, width = config.patch_size
    if patch != width:
        raise UsageError(f"expected an AutoencoderKLFlux2 with square patches, but its patch_size is {patch} x {width}")
    channels, factor = config.latent_channels * patch**2, _halvings(config.block_out_channels) * patch
    return Layout(config.in_channels, channels, factor, patch)


def _rae_layout(config: Any) -> Layout:
    grid = config.encoder_input_size // config.encoder_patch_size
    return Layout(config.num_channels, config.encoder_hidden_size, config.patch_size, side=config.patch_size * grid)


def _wan_layout(config: Any) -> Layout:
    channels = config.in_channels // (config.patch_size or 1) ** 2
    return Layout(channels, config.z_dim, config.scale_factor_spatial)


KINDS: dict[str, Kind] = {
    # Stable Diffusion 1 to 3, SDXL, FLUX.1
    "AutoencoderKL": Kind(_kl_layout, bounded=True),
    # Zhu et al. 2023, arXiv:2306.04632; without its optional mask
    "AsymmetricAutoencoderKL": Kind(
        lambda config: Layout(config.in_channels, config.latent_channels, _halvings(config.down_block_out_channels))
    ),
    # FLUX.2
    "AutoencoderKLFlux2": Kind(_flux2_layout, batch_norm_scale, bounded=True),
    # Stable Video Diffusion
    "AutoencoderKLTemporalDecoder": Kind(_kl_layout, decoding={"num_frames": 1}),
    "AutoencoderKLQwenImage": Kind(
        lambda config: Layout(config.input_channels, config.z_dim, 2 ** len(config.temperal_downsample)),
        has_frames=True,
    ),
    "AutoencoderKLWan": Kind(_wan_layout, has_frames=True),
    "AutoencoderKLHunyuanImage": Kind(
        lambda config: Layout(config.in_channels, config.latent_channels, config.spatial_compression_ratio)
    ),
    # Kandinsky 5
    "AutoencoderKLKVAE": Kind(lambda config: Layout(config.in_channels, config.z_channels, _halvings(config.ch_mult))),
    # DC-AE (Chen et al. 2024, arXiv:2410.10733), as in Sana
    "AutoencoderDC": Kind(
        lambda config: Layout(config.in_channels, config.latent_channels, _halvings(config.encoder_block_out_channels)),
        has_posterior=False,
    ),
    # Zheng et al. 2025, arXiv:2510.11690
    "AutoencoderRAE": Kind(_rae_layout, inner_scale, has_posterior=False, unit_range=True, needs="transformers"),
    # TAESD and its family
    "AutoencoderTiny": Kind(
        lambda config: Layout(config.in_channels, config.latent_channels, _halvings(config.encoder_block_out_channels)),
        has_posterior=False,
    ),
    # VQGAN (Esser et al. 2021, arXiv:2012.09841); its latents are the vectors before quantization, which decoding does
    "VQModel": Kind(
        lambda config: Layout(
            config.in_channels, config.vq_embed_dim or config.latent_channels, _halvings(config.block_out_channels)
        ),
        has_posterior=False,
    ),
}
