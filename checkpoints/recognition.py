"""Infer a network's options from the names and shapes in its state dict, to explain a mismatch.

Networks are always built from their options, because a state dict does not determine everything. It does not show the
number of heads, dropout, or the order of queries, keys and values.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from models.dit_options import DIT_SIZES, DiTOptions
from models.family import Weights
from models.registry import ORIGIN_ADM

__all__ = ["latent_side", "recognise"]

PUBLISHED_DDT_BLOCKS = 2  # of all DDT heads in RAE's files


def recognise(weights: Weights) -> dict[str, Any]:
    """Infer options from the weights; empty if the weights are incomplete or their family is unknown.

    Returns:
        Values by option name. Three more entries are added where known: `model_type` (key of NETWORKS), `latent_size` (the
        side that appears in parameter names), and `label_rows` (rows of the label table, including any null class).
    """
    describe = next((describe for mark, describe in FAMILIES.items() if mark in weights), None)
    try:
        return describe(weights) if describe else {}
    except (KeyError, IndexError, ValueError, ZeroDivisionError):  # the names match a family, but weights are missing
        return {}


def _dit(weights: Weights) -> dict[str, Any]:
    """The entries that differ from a plain DiT's, besides channels and label rows. `model_heads` are absent if unknown."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    outputs = weights["final_layer.linear.weight"].shape[0] // patch**2
    block, blocks = "blocks.0.", 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    parts, rotated = weights.get(f"{block}adaLN_modulation.1.weight"), "feat_rope.freqs_cos" in weights
    optional = {
        "until_embedding": "interval" if "r_embedder.mlp.0.weight" in weights else "none",
        "guidance_embedding": "guidance_embedder.mlp.0.weight" in weights,
        "norm": "rms_affine" if f"{block}norm1.weight" in weights else "layer",
        "mlp": "swiglu" if f"{block}mlp.w12.weight" in weights else "gelu",
        "qk_norm": f"{block}attn.q_norm.weight" in weights,
        "rope": rotated,
        "pos_embed": "pos_embed" in weights,
        "adaln_shift": parts is None or parts.shape[0] != 4 * width,
        "time_embedding": "fourier" if "t_embedder.W" in weights else "sinusoids",
        "learn_sigma": outputs == 2 * channels,
    }
    plain = DiTOptions()
    return {
        **_dit_size(weights, width, blocks, patch),
        "num_in_channels": channels,
        "num_out_channels": channels if optional["learn_sigma"] else outputs,
        "label_rows": weights["y_embedder.embedding_table.weight"].shape[0],
        **{name: value for name, value in optional.items() if value != getattr(plain, name)},
        **_ddt_head(weights, width, blocks),
    }


def _dit_size(weights: Weights, width: int, depth: int, patch: int) -> dict[str, Any]:
    """The model type of a DiT, and its own size if it has no name. Only norms and rotations show the number of heads."""
    heads = _heads(weights, "blocks.0.", "feat_rope", width)
    for name, (known_width, known_depth, known_heads) in DIT_SIZES.items():
        if (known_width, known_depth) == (width, depth) and heads in (None, known_heads):
            return {"model_type": f"DiT-{name}/{patch}"}
    known = {} if heads is None else {"model_heads": heads}
    return {"model_type": f"DiT/{patch}", "model_width": width, "model_depth": depth, **known}


def _ddt_head(weights: Weights, width: int, depth: int) -> dict[str, Any]:
    """The DDT head's size; nothing without one. Blocks of the same width as the others do not show: 2 are assumed."""
    tokens = weights.get("second_stage.x_embedder.proj.weight")
    if tokens is None or "second_stage.pos_embed" in weights:
        return {}
    head_width = tokens.shape[0]
    widths = [weights[f"blocks.{number}.attn.proj.weight"].shape[0] for number in range(depth)]
    first = depth - PUBLISHED_DDT_BLOCKS if head_width == width else widths.index(head_width)
    heads = _heads(weights, f"blocks.{first}.", "second_stage.feat_rope", head_width)
    return {"ddt_blocks": depth - first, "ddt_width": head_width, **({} if heads is None else {"ddt_heads": heads})}


def _heads(weights: Weights, block: str, rope: str, width: int) -> int | None:
    """Attention heads of the block, whose names start with `block`, from the width of one; None if nothing shows it."""
    shown = (weights.get(f"{rope}.freqs_cos"), weights.get(f"{block}attn.q_norm.weight"))
    return next((width // table.shape[-1] for table in shown if table is not None), None)


def latent_side(weights: Weights) -> int | None:
    """Side of the latents that a DiT's tables of positions are made for; None without tables."""
    patch = weights["x_embedder.proj.weight"].shape[-1]
    tables = (weights.get(name) for name in ("pos_embed", "feat_rope.freqs_cos"))
    return next((patch * math.isqrt(table.shape[-2]) for table in tables if table is not None), None)


def _edm_unet(weights: Weights) -> dict[str, Any]:
    found = (re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in weights)
    blocks = [(int(match[1]), int(match[2])) for match in found if match]
    sides = sorted({side for side, _ in blocks}, reverse=True)
    kind = "adm" if "out_conv.weight" in weights else "ncsn++" if "map_noise.freqs" in weights else "ddpm++"
    last = "out_conv" if kind == "adm" else f"dec.{sides[0]}x{sides[0]}_aux_conv"
    width = weights["map_layer1.weight"].shape[0] // 4
    label = weights.get("map_label.weight")
    return {
        "model_type": kind,
        "latent_size": sides[0],
        "num_in_channels": weights[f"enc.{sides[0]}x{sides[0]}_conv.weight"].shape[1],
        "num_out_channels": weights[f"{last}.weight"].shape[0],
        "nf": width,
        "ch_mult": tuple(weights[f"enc.{r}x{r}_block0.conv0.weight"].shape[0] // width for r in sides),
        "num_res_blocks": 1 + max(index for _, index in blocks),
        "attn_resolutions": tuple(r for r in sides if f"enc.{r}x{r}_block0.qkv.weight" in weights),
        "label_dim": 0 if label is None else label.shape[1],
    }


def _guided_unet(weights: Weights) -> dict[str, Any]:
    width = weights["time_embed.0.weight"].shape[1]
    present = {int(name.split(".")[1]) for name in weights if name.startswith("input_blocks.")}
    entries = 1 + max(present)
    # Levels are joined by strided convolutions, pooling (entries without weights) or residual blocks. Only the decoder shows
    # which residual blocks resample.
    convolved = [i for i in present if f"input_blocks.{i}.0.op.weight" in weights]
    pooled = [i for i in range(entries) if i not in present]
    residual = [i + 1 for i in range(entries) for j in (1, 2) if f"output_blocks.{i}.{j}.in_layers.0.weight" in weights]
    steps = convolved or pooled or residual
    period = min(steps, default=entries)  # entries per level
    first_blocks = range(1, entries, period)  # the first residual block of each level
    first = "input_blocks.1.0."
    film = weights[f"{first}emb_layers.1.weight"].shape[0] != weights[f"{first}out_layers.3.weight"].shape[0]
    label = weights.get("label_emb.weight")
    described = {
        "model_type": ORIGIN_ADM,
        "num_in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "num_out_channels": weights["out.2.weight"].shape[0],
        "nf": width,
        "ch_mult": tuple(weights[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] // width for i in first_blocks),
        "num_res_blocks": period - 1,
        "attn_resolutions": tuple(
            2**level for level, i in enumerate(first_blocks) if f"input_blocks.{i}.1.qkv.weight" in weights
        ),
        "use_scale_shift_norm": film,
        "label_rows": 0 if label is None else label.shape[0],
    }
    if steps:
        described |= {"resblock_updown": steps is residual, "resamp_with_conv": steps is not pooled}
    return described


# Each key is a weight that every network of the family has.
FAMILIES: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "x_embedder.proj.weight": _dit,
    "map_layer0.weight": _edm_unet,
    "time_embed.0.weight": _guided_unet,
}
