"""Infer a network's options from the names and shapes in its state dict, to explain a mismatch.

Networks are always built from their options, because a state dict does not determine everything. It does not show the
number of heads, dropout, or the order of queries, keys and values.
"""

import re
from collections.abc import Callable
from typing import Any

from models.dit import DIT_SIZES
from models.family import Weights
from models.registry import ORIGIN_ADM

__all__ = ["recognise"]


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
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {(hidden, blocks): name for name, (hidden, blocks, _) in DIT_SIZES.items()}
    return {
        "model_type": f"DiT-{sizes[width, depth]}/{patch}",
        "num_in_channels": channels,
        "num_out_channels": weights["final_layer.linear.weight"].shape[0] // patch**2,
        "label_rows": weights["y_embedder.embedding_table.weight"].shape[0],
        **({"until_embedding": "interval"} if "r_embedder.mlp.0.weight" in weights else {}),
        **({"guidance_embedding": True} if "guidance_embedder.mlp.0.weight" in weights else {}),
    }


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
