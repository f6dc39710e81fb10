"""DiT-DH of RAE (Zheng et al. 2025, arXiv:2510.11690; github.com/bytetriper/RAE): LightningDiT with a wide DDT head.

Its time is 0 at the data, as ours. `x_embedder` and `dec_feat_rope` belong to the head, `s_embedder` and `enc_feat_rope` to the
blocks before it. Published files hold a bare state dict; its training writes `model` and `ema`.
"""

from checkpoints.projects.project import Project

__all__ = ["DITDH"]

DITDH = Project(
    name="DiTDH",
    parts={
        "pos_embed": "pos_embed",
        "x_embedder": "second_stage.x_embedder",
        "s_embedder": "x_embedder",
        "s_projector": "second_stage.projector",
        "t_embedder": "t_embedder",
        "y_embedder": "y_embedder",
        "final_layer": "final_layer",
        "enc_feat_rope": "feat_rope",
        "dec_feat_rope": "second_stage.feat_rope",
        "blocks": "blocks",
    },
    options={
        "norm": ("rms_affine",),
        "mlp": None,
        "qk_norm": None,
        "rope": None,
        "pos_embed": None,
        "adaln_shift": None,
        "time_embedding": ("fourier",),
        "ddt_blocks": None,
        "ddt_width": None,
        "ddt_heads": None,
    },
    entry="",
)
