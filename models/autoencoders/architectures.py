"""Architectures of new autoencoders, by name: each builds one of diffusers' classes from the same few options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.autoencoders.diffusers_files import new_network
from models.autoencoders.kl import new_autoencoder_kl
from options import UsageError, option

__all__ = ["ARCHITECTURES", "Architecture", "ArchitectureOptions", "Shape", "new_autoencoder", "settle_shape"]

WIDTH_UNIT = 8  # kl's group norms and dc's pixel shuffles need multiples of it
FACTORS = (4, 8, 16)
# Checked by `settle_shape`: widths of each level, by factor, if neither --widths nor --depths is given.
KL_WIDTHS = {4: (16, 32, 64), 8: (16, 32, 64, 64), 16: (16, 32, 64, 64, 64)}
DC_WIDTHS = {4: (32, 64), 8: (32, 64, 128), 16: (32, 64, 128, 128)}


class Shape(NamedTuple):
    """The shape of an autoencoder, with all defaults filled in.

    Args:
        image_channels: C.
        image_size: side of the images, which a configuration may record.
        latent_channels: c.
        factor: H / h.
        widths: channels of each level.
        depths: residual blocks of each level.
    """

    image_channels: int
    image_size: int
    latent_channels: int
    factor: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Args:
        build: makes an untrained network of a shape.
        widths: default widths by factor.
        levels: number of levels, as a function of log2(factor).
        check: raises UsageError if the shape is impossible.
        defaults: other options' defaults that suit it, by name.
    """

    build: Callable[[Shape], Any]
    widths: dict[int, tuple[int, ...]]
    levels: Callable[[int], int]
    check: Callable[[Shape], None]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _build_kl(shape: Shape) -> Any:
    return new_autoencoder_kl(
        shape.image_channels,
        shape.widths,
        shape.latent_channels,
        shape.image_size,
        {"layers_per_block": shape.depths[0]},
    )


def _check_kl(shape: Shape) -> None:
    if len(set(shape.depths)) > 1:
        raise UsageError(
            f"--depths {_written(shape.depths)}: the architecture kl has the same depth at every level; give one number"
        )


def _build_dc(shape: Shape) -> Any:
    """An AutoencoderDC whose first level has no layers: a convolution with pixel unshuffle leads to half the resolution.

    No residual block runs at full resolution, where most of a small autoencoder's time would be spent (Chen et al. 2024,
    arXiv:2410.10733, begins with one).
    """
    widths, depths = (shape.widths[0], *shape.widths), (0, *shape.depths)
    shortcut = shape.widths[-1] % shape.latent_channels == 0  # it repeats latents to the width of the last level
    config = {
        "in_channels": shape.image_channels,
        "latent_channels": shape.latent_channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": depths,
        "decoder_layers_per_block": depths,
        "encoder_qkv_multiscales": ((),) * len(widths),
        "decoder_qkv_multiscales": ((),) * len(widths),
        "encoder_out_shortcut": shortcut,
        "decoder_in_shortcut": shortcut,
    }
    return new_network("AutoencoderDC", config)


def _check_dc(shape: Shape) -> None:
    for wide, narrow in zip(shape.widths[1:], shape.widths, strict=False):
        if 4 * narrow % wide:
            raise UsageError(
                f"--widths {_written(shape.widths)}: in the architecture dc, each width must divide four times the width "
                f"before it, because shortcuts average groups of channels, but {wide} does not divide 4 x {narrow}"
            )


# Registered architectures.
ARCHITECTURES: dict[str, Architecture] = {
    "kl": Architecture(_build_kl, KL_WIDTHS, lambda halvings: halvings + 1, _check_kl),
    "dc": Architecture(
        _build_dc,
        DC_WIDTHS,
        lambda halvings: halvings,
        _check_dc,
        {"optimizer": "muon", "muon_lr": 0.02, "batch_size": 16},
    ),
}


@dataclass(frozen=True)
class ArchitectureOptions:
    """Autoencoder's architecture."""

    architecture: str = option(
        "kl",
        "kl: diffusers' AutoencoderKL; dc: AutoencoderDC without layers at full resolution, which is faster and has no "
        "posterior",
        choices=ARCHITECTURES,
    )
    factor: int | None = option(None, "downsampling factor from images to latents; default: as --widths say, else 4")
    widths: tuple[int, ...] = option(
        (),
        "channels of each level (multiples of 8). kl: each level after the first halves the resolution; dc: every level does",
        shown="16 32 64 for kl with factor 4",
    )
    depths: tuple[int, ...] = option((), "residual blocks of each level, or one number for all", minimum=1, shown="1")
    latent_channels: int = option(4, "channels of the latents", minimum=1)


def settle_shape(options: ArchitectureOptions, image_channels: int, image_size: int) -> Shape:
    """Fill in the defaults of an autoencoder's shape.

    Raises:
        UsageError: the options contradict each other or the images.
    """
    architecture = ARCHITECTURES[options.architecture]
    factor = options.factor or _factor_of(architecture, options.widths) or FACTORS[0]
    if options.factor is not None and options.factor not in FACTORS:
        raise UsageError(f"--factor {options.factor}: expected one of {', '.join(map(str, FACTORS))}")
    widths = options.widths or architecture.widths[factor]
    halvings = factor.bit_length() - 1
    if len(widths) != architecture.levels(halvings):
        raise UsageError(
            f"--widths {_written(widths)} contradict --factor {factor}: the architecture {options.architecture} needs "
            f"{architecture.levels(halvings)} widths for this factor"
        )
    if image_size % factor:
        raise UsageError(
            f"--image_size {image_size} cannot be halved {halvings} times, as the {len(widths)} --widths require: choose "
            "another size, or fewer widths"
        )
    if any(width < WIDTH_UNIT or width % WIDTH_UNIT for width in widths):
        raise UsageError(f"--widths {_written(widths)}: expected multiples of {WIDTH_UNIT}")
    depths = options.depths or (1,)
    depths = depths * len(widths) if len(depths) == 1 else depths
    if len(depths) != len(widths):
        raise UsageError(
            f"--depths {_written(depths)}: expected one number, or as many as --widths {_written(widths)} has"
        )
    shape = Shape(image_channels, image_size, options.latent_channels, factor, widths, depths)
    architecture.check(shape)
    return shape


def new_autoencoder(architecture: str, shape: Shape) -> Any:
    """Build an untrained autoencoder; its random weights come from torch's global generator."""
    return ARCHITECTURES[architecture].build(shape)


def _factor_of(architecture: Architecture, widths: tuple[int, ...]) -> int | None:
    """The factor that a number of widths implies; None without widths."""
    return 2 ** (len(widths) - architecture.levels(0)) if widths else None


def _written(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
