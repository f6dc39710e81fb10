"""LightningDiT (Yao et al. 2025, arXiv:2501.01423; github.com/hustvl/LightningDiT): DiT with options of its blocks.

Its time is 1 at the data, and its velocity is data - noise. Files hold `ema`, and others next to it.
"""

from checkpoints.projects.project import COMMON_PARTS, Project

__all__ = ["LIGHTNING_DIT"]

LIGHTNING_DIT = Project(
    name="LightningDiT",
    parts={**COMMON_PARTS, "feat_rope": "feat_rope", "blocks": "blocks", "final_layer": "final_layer"},
    options={
        "norm": ("layer", "rms_affine"),
        "mlp": None,
        "qk_norm": None,
        "rope": None,
        "adaln_shift": None,
    },
    reversed_time=True,
)
