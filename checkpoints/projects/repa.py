"""REPA (Yu et al. 2025, arXiv:2410.06940; github.com/sihyun-yu/REPA): SiT without a learned variance, and projectors.

Its time is 0 at the data, as ours. `projectors.<i>.{0,2,4}` predict the features of encoder i from the tokens after
`encoder_depth` blocks. Sampling needs none; training continues the first one (--align_features), and keeps the others. Older
files name the blocks after the first `encoder_depth` ones `decoder_blocks`.
"""

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.projects.project import COMMON_PARTS, Project
from models.family import Weights

__all__ = ["REPA"]

MOST_PROJECTORS = 16
PROJECTORS = ["projectors.features.mlp.layers", *(f"projectors.unused.{i}.layers" for i in range(MOST_PROJECTORS - 1))]
OLD_BLOCKS = "decoder_blocks."
ENCODER_DEPTHS = {12: 4}  # by number of blocks: DiT-B's
ENCODER_DEPTH, WEIGHT = 8, 0.5  # of other sizes, and of the loss


def _projectors(weights: Weights, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of REPA's projectors, whose block only the run's arguments and older names show."""
    shapes = {name: value.shape for name, value in weights.items() if name.startswith("projectors.")}
    widths = [shapes[f"{prefix}.4.weight"][0] for prefix in PROJECTORS if f"{prefix}.4.weight" in shapes]
    if not widths:
        return {}
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    block = int(arguments.get("encoder_depth") or min(depth, ENCODER_DEPTHS.get(depth, ENCODER_DEPTH)))
    return {
        "tap_block": block,
        "align_features": float(arguments.get("proj_coeff") or WEIGHT),
        "align_hidden": shapes[f"{PROJECTORS[0]}.0.weight"][0],
        "align_width": widths[0],
        "unused_projectors": tuple(widths[1:]),
    }


def _named_arguments(weights: Weights) -> dict[str, Any]:
    """`encoder_depth`, which is the number of blocks before `decoder_blocks` in older files; {} for current ones."""
    if not any(name.startswith(OLD_BLOCKS) for name in weights):
        return {}
    numbers = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, weights) if match]
    return {"encoder_depth": 1 + max(numbers, default=-1)}


def _current_names(weights: Weights) -> Weights:
    """Number `decoder_blocks` after `blocks`."""
    first = _named_arguments(weights).get("encoder_depth")
    if first is None:
        return weights

    def current(name: str) -> str:
        if not name.startswith(OLD_BLOCKS):
            return name
        number, _, rest = name.removeprefix(OLD_BLOCKS).partition(".")
        return f"blocks.{first + int(number)}.{rest}" if number.isdecimal() else name

    return {current(name): value for name, value in weights.items()}


REPA = Project(
    name="REPA",
    parts={
        **COMMON_PARTS,
        "blocks": "blocks",
        **{f"projectors.{number}": own for number, own in enumerate(PROJECTORS)},
        "final_layer": "final_layer",
    },
    options={"qk_norm": (False, True)},
    describe_training=_projectors,
    modernize=_current_names,
    named_arguments=_named_arguments,
)
