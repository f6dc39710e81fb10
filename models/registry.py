"""The registry of velocity networks: NETWORKS maps a model type to its options and constructor."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from models.conditions import DenseConditioned, DenseInput
from models.dit import DIT_SIZES, DiTOptions, build_dit, hidden_matrices
from models.edm_layers import STYLES
from models.edm_unet import EdmUNet, EdmUNetOptions
from models.family import Family, FamilyOptions
from models.guided_unet import GuidedUNet, GuidedUNetOptions
from models.plain_unet import PlainUNet, PlainUNetOptions
from models.positions import with_own_positions
from options import Options, UsageError, make_options, option

__all__ = [
    "IGNORED_NETWORK_FLAGS",
    "NETWORKS",
    "ORIGIN_ADM",
    "PUBLISHED_TYPES",
    "Architecture",
    "NetworkOptions",
    "build_network",
    "complete_network",
    "network_groups",
    "options_from_header",
    "published_options",
]

# Network flags of LFM's published code that have no effect, with the reason.
IGNORED_NETWORK_FLAGS = {
    "augment_dim": "LFM always sets it to 0",
    "centered": "pixels always lie in [-1, 1]",
    "layout": "LFM's code for it never ran",
    "num_timesteps": "flow matching uses continuous time",
}
ORIGIN_ADM = "origin_adm"  # the model type that --use_origin_adm selects

DIT_TYPES = "DiT-{Mi,Ti,S,B,L,XL}/{1,2,4,8}"
PATCHES = (1, 2, 4, 8)

# Networks that other projects publish (docs/published.md): a DiT with these options, and any size and patch side of DiT.
_LIGHTNING = {"norm": "rms_affine", "mlp": "swiglu", "rope": True}
PUBLISHED_TYPES: dict[str, dict[str, Any]] = {
    "SiT": {"label_dropout": 0.1, "learn_sigma": True, "reversed_time": True},
    "REPA": {"label_dropout": 0.1},
    "LightningDiT": {"label_dropout": 0.1, "reversed_time": True, **_LIGHTNING},
    "MeanFlow": {"label_dropout": 0.1, "until_embedding": "interval"},
    "DiTDH": {
        "label_dropout": 0.1,
        "time_embedding": "fourier",
        "ddt_blocks": 2,
        "ddt_width": 2048,
        "ddt_heads": 16,
        **_LIGHTNING,
    },
}
# DiT-DH's sizes (RAE, arXiv:2510.11690, section 5): the blocks of both stages count, and the patch side is 1 by default.
DITDH_SIZES: dict[str, dict[str, Any]] = {
    "S": {"model_width": 384, "model_depth": 14, "model_heads": 6},
    "B": {"model_width": 768, "model_depth": 14, "model_heads": 12},
    "XL": {"model_width": 1152, "model_depth": 30, "model_heads": 16},
}


@dataclass(frozen=True)
class NetworkOptions:
    """Network."""

    model_type: str = option(
        "adm",
        f"{DIT_TYPES}, adm, ddpm++, ncsn++, or unet (small, for pixels); {', '.join(PUBLISHED_TYPES)} instead of DiT for the "
        "networks of other projects (docs/published.md)",
        common=True,
    )
    use_origin_adm: bool = option(False, "use guided-diffusion's U-Net; takes precedence over --model_type")

    def resolve(self) -> str:
        """The model type's key in NETWORKS.

        Raises:
            UsageError: an unknown model type.
        """
        name = ORIGIN_ADM if self.use_origin_adm else _as_dit(self.model_type)
        if name not in NETWORKS:
            typed = self.model_type
            for known in [*NETWORKS, *_published_names()]:
                if known.lower() == typed.lower():
                    raise UsageError(f"unknown --model_type {typed!r}: did you mean {known}?")
            others = [*(f"{kind}-..." for kind in PUBLISHED_TYPES), *(known for known in NETWORKS if "/" not in known)]
            raise UsageError(f"unknown --model_type {typed!r}: expected one of {', '.join([DIT_TYPES, *others])}")
        return name


def complete_network(options: Options, *, guided_diffusion: bool = False) -> Options:
    """Add the options of another project's network, if --model_type names one and they were not given.

    With `guided_diffusion`, --use_origin_adm is added unless --model_type names a network, as in LFM's downstream scripts.
    """
    model_type = options.values["model_type"]
    if guided_diffusion and model_type == NetworkOptions.model_type:
        return options.completed({"use_origin_adm": True})
    return options.completed(published_options(model_type))


def published_options(model_type: str) -> dict[str, Any]:
    """The options of DiT that a model type such as SiT-XL/2 stands for; none for other model types."""
    kind, size, _ = _parse(model_type)
    sizes = DITDH_SIZES.get(size, {}) if kind == "DiTDH" else {}
    return PUBLISHED_TYPES.get(kind, {}) | sizes


def _as_dit(model_type: str) -> str:
    """The DiT that a network of another project is, such as DiT-XL/2 for SiT-XL/2; other names are unchanged."""
    kind, size, patch = _parse(model_type)
    if kind == "DiTDH" and size in {"", *DITDH_SIZES}:
        return f"DiT/{patch or 1}"
    return f"DiT-{size}/{patch}".replace("-/", "/") if kind in PUBLISHED_TYPES and kind != "DiTDH" else model_type


def _published_names() -> list[str]:
    """All model types of other projects' networks, such as SiT-XL/2."""
    sizes = {kind: DITDH_SIZES if kind == "DiTDH" else DIT_SIZES for kind in PUBLISHED_TYPES}
    names = [name for kind in sizes for name in (kind, *(f"{kind}-{size}" for size in sizes[kind]))]
    return [name for name in names if name.startswith("DiTDH")] + [f"{name}/{p}" for name in names for p in PATCHES]


def _parse(model_type: str) -> tuple[str, str, str]:
    """Kind, size and patch side in a name such as SiT-XL/2; empty if absent."""
    name, _, patch = model_type.partition("/")
    kind, _, size = name.partition("-")
    return kind, size, patch


class Architecture(NamedTuple):
    """The arguments of `build_network`, which determine the names and shapes in a network's state dict."""

    model_type: str
    latent_size: int
    options: FamilyOptions
    dense: DenseInput | None = None

    def for_sampling(self) -> "Architecture":
        """The architecture without weights that serve only training."""
        return self._replace(options=self.options.for_sampling())


def _edm_unet(kind: str, size: int, options: EdmUNetOptions) -> EdmUNet:
    return EdmUNet(size, kind, options)


NETWORKS: dict[str, Family] = {
    **{
        f"DiT-{name}/{patch}": Family(DiTOptions, partial(build_dit, name, patch), hidden_matrices, with_own_positions)
        for name in DIT_SIZES
        for patch in PATCHES
    },
    **{
        f"DiT/{patch}": Family(DiTOptions, partial(build_dit, "", patch), hidden_matrices, with_own_positions)
        for patch in PATCHES
    },
    **{kind: Family(EdmUNetOptions, partial(_edm_unet, kind)) for kind in STYLES},
    ORIGIN_ADM: Family(GuidedUNetOptions, GuidedUNet),
    "unet": Family(PlainUNetOptions, PlainUNet),
}


def network_groups() -> tuple[type[FamilyOptions], ...]:
    """The option dataclasses of all registered families, each base class before its subclasses."""
    bases = (base for family in NETWORKS.values() for base in reversed(family.options.__mro__))
    return tuple(dict.fromkeys(base for base in bases if issubclass(base, FamilyOptions)))


def build_network(
    model_type: str, latent_size: int, options: FamilyOptions, dense: DenseInput | None = None
) -> nn.Module:
    """Build a network with fresh weights for latents of side `latent_size`, with the dense map `dense` in its input if given.

    `options` must be an instance of the family's dataclass, and its `num_in_channels` must include the map's channels.
    """
    network = NETWORKS[model_type].build(latent_size, options)
    return network if dense is None else DenseConditioned(network, dense)


def options_from_header(model_type: str, stored: Mapping[str, Any]) -> FamilyOptions:
    """Read the family's options from a checkpoint's header; lists become tuples.

    Raises:
        UsageError: this version does not know the model type or an option.
    """
    try:
        return make_options(NETWORKS[model_type].options, stored)
    except (KeyError, TypeError, UsageError) as error:
        raise UsageError(f"this version cannot build the checkpoint's network {model_type}: {error}") from error
