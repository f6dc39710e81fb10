"""MeanFlow in SiT's form (Geng et al. 2025, arXiv:2505.13447): DiT with a second time embedding, of t - until.

Its time is 0 at the data, as ours. Files hold `model`, `ema`, `opt`, `args` and `steps`.
"""

from checkpoints.projects.project import COMMON_PARTS, Project

__all__ = ["MEAN_FLOW"]

LABELS = "y_embedder"

MEAN_FLOW = Project(
    name="MeanFlow",
    parts={
        **{name: own for name, own in COMMON_PARTS.items() if name != LABELS},
        "r_embedder": "r_embedder",
        LABELS: LABELS,
        "blocks": "blocks",
        "final_layer": "final_layer",
    },
    options={"until_embedding": ("interval",)},
)
