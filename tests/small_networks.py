"""A small network of every family, for tests that apply to all families."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.conditions import DenseInput
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.family import FamilyOptions
from models.guided_unet import GuidedUNetOptions
from models.plain_unet import PlainUNetOptions
from models.registry import ORIGIN_ADM, build_network

__all__ = ["BLOCKS", "DIT_VARIANTS", "SMALL", "UNET", "new_network"]

CHANNELS = {"num_in_channels": 3, "num_out_channels": 3}
UNET = {**CHANNELS, "nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
SMALL: dict[str, FamilyOptions] = {
    "DiT-Mi/2": DiTOptions(**CHANNELS, num_classes=2, label_dropout=0.1),
    "adm": EdmUNetOptions(**UNET, label_dim=2),
    "ncsn++": EdmUNetOptions(**UNET, label_dim=2),
    ORIGIN_ADM: GuidedUNetOptions(**UNET | {"attn_resolutions": (2,)}, num_classes=2),
    "unet": PlainUNetOptions(**CHANNELS, num_classes=2),
}
# Options of DiT's blocks that go with any other.
BLOCKS: dict[str, Any] = {
    "norm": "rms_affine",
    "mlp": "swiglu",
    "qk_norm": True,
    "rope": True,
    "value_residual": True,
    "shared_adaln": True,
}
# All optional parts of DiT-Mi/2, in two networks.
DIT_VARIANTS = (
    replace(SMALL["DiT-Mi/2"], **BLOCKS, class_tokens=2, time_tokens=1, fine_blocks=2, time_embedding="fourier"),
    replace(SMALL["DiT-Mi/2"], **BLOCKS, class_tokens=2, adaln_labels=False, ddt_blocks=2, ddt_width=64),
)


def new_network(model_type: str, options: FamilyOptions, dense: DenseInput | None = None) -> nn.Module:
    """Build a network for inputs of side 8, in eval mode and without gradients. The weights are fixed and nonzero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(model_type, 8, options, dense).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network
