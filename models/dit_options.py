"""Options of DiT, and checks that they fit together."""

from dataclasses import dataclass

from models.flow_maps import FlowMapOptions
from models.transformer_layers import MLPS, NORMS
from options import UsageError, option

__all__ = ["DiTOptions"]


@dataclass(frozen=True)
class DiTOptions(FlowMapOptions):
    """DiT."""

    norm: str = option(
        "layer",
        "norm of tokens: layer (layer norm), rms (RMSNorm), or rms_affine (RMSNorm with learned scales)",
        choices=NORMS,
    )
    mlp: str = option("gelu", "MLP of a block: gelu, or swiglu with as many parameters", choices=MLPS)
    qk_norm: bool = option(False, "normalize queries and keys in each head")
    rope: bool = option(False, "rotate queries and keys by their row and column (2-D RoPE)")
    value_residual: bool = option(False, "mix the first block's values into the values of every later block")
    shared_adaln: bool = option(False, "one modulation for all blocks, with a learned offset in each block")
    class_tokens: int = option(0, "number of tokens that hold the class, in front of the image's tokens", minimum=0)
    time_tokens: int = option(0, "number of tokens that hold the time, in front of the image's tokens", minimum=0)
    adaln_labels: bool = option(True, "modulate the blocks by the class too; off: by the time only")
    fine_blocks: int = option(
        0, "number of last blocks at the model's patch side; earlier ones use patches of twice the side", minimum=0
    )
    ddt_blocks: int = option(
        0, "number of last blocks that form a DDT head: the earlier blocks' tokens modulate theirs", minimum=0
    )
    ddt_width: int | None = option(None, "width of the DDT head; default: the model's", minimum=4)
    ddt_heads: int | None = option(
        None, "attention heads of the DDT head's blocks; default: as wide as the model's", minimum=1
    )

    @property
    def label_rows(self) -> int:
        """Rows of the label table: one per class (at least one), and one for the null class if labels are dropped."""
        return self.classes + (self.label_dropout > 0)

    @property
    def context_tokens(self) -> int:
        """Number of tokens in front of the image's."""
        return self.class_tokens + self.time_tokens

    def first_stage(self, depth: int) -> int:
        """Number of blocks before the second stage; `depth` if there is none."""
        return depth - (self.fine_blocks or self.ddt_blocks)

    def check(self, depth: int) -> None:
        """Check that the options fit each other and a network of `depth` blocks.

        Raises:
            UsageError: they contradict each other, or one has no effect.
        """
        if self.fine_blocks and self.ddt_blocks:
            raise UsageError("--fine_blocks and --ddt_blocks cannot be combined: leave one out")
        for name in ("fine_blocks", "ddt_blocks"):
            if getattr(self, name) >= depth:
                raise UsageError(
                    f"--{name} {getattr(self, name)}: at least one of the model's {depth} blocks must come before them, so "
                    f"expected at most {depth - 1}"
                )
        for name in ("ddt_width", "ddt_heads"):
            if getattr(self, name) is not None and not self.ddt_blocks:
                raise UsageError(f"--{name} has no effect without --ddt_blocks")
        if not self.adaln_labels and not self.class_tokens:
            raise UsageError("--no-adaln_labels needs --class_tokens, or the network would not see the class")
        self.check_tap(depth)
        self.check_flow_map(depth, self.ddt_blocks)
        if self.route_rate:
            self._check_stages_of_routing(depth)

    def ddt_size(self, hidden_size: int, num_heads: int) -> tuple[int, int]:
        """Width and number of heads of the DDT head on a model of this width and number of heads.

        Raises:
            UsageError: the heads' default width does not divide the head's width.
        """
        width = self.ddt_width or hidden_size
        if self.ddt_heads is None and width % (hidden_size // num_heads):
            raise UsageError(
                f"--ddt_width {width} cannot be divided into attention heads of the model's width {hidden_size // num_heads}: "
                "give --ddt_heads, or another --ddt_width"
            )
        return width, self.ddt_heads or width // (hidden_size // num_heads)

    def _check_stages_of_routing(self, depth: int) -> None:
        (first, last), start = self.route_blocks, self.first_stage(depth)
        given = f"--route_blocks {first} {last}"
        if first < start < last:
            raise UsageError(
                f"{given}: --fine_blocks or --ddt_blocks change the tokens after block {start}, so tokens can skip blocks "
                f"before or after that, but not both: choose I and J up to {start}, or from {start}"
            )
        if self.value_residual and first in (0, start):
            raise UsageError(
                f"{given} would skip the block whose values --value_residual mixes into later ones: choose I from {first + 1}"
            )
