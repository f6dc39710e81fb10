"""SiT (Ma et al. 2024, arXiv:2401.08740; github.com/willisma/SiT): DiT, with or without a learned variance.

Its time is 1 at the data, and its velocity is data - noise. Published files hold a bare state dict; its training writes
`model`, `ema`, `opt` and `args`.
"""

from checkpoints.projects.project import COMMON_PARTS, Project

__all__ = ["SIT"]

SIT = Project(
    name="SiT",
    parts={**COMMON_PARTS, "blocks": "blocks", "final_layer": "final_layer"},
    options={"learn_sigma": (False, True)},
    reversed_time=True,
    entry="",
)
