"""Options of DiT, and checks that they fit together."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.flow_maps import FlowMapOptions
from models.transformer_layers import MLPS, NORMS
from options import UsageError, option

__all__ = ["DIT_SIZES", "DiTOptions"]

# Width, depth and heads. Ti and Mi are not in DiT's paper; they suit small images and small machines. 1p0B and 1p6B are
# LightningDiT's.
DIT_SIZES = {
    "Mi": (128, 6, 4),
    "Ti": (192, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "1p0B": (1536, 24, 24),
    "1p6B": (1792, 28, 28),
}
OWN_SIZE: Mapping[str, str] = {
    "model_width": "width",
    "model_depth": "number of blocks",
    "model_heads": "number of attention heads",
}


@dataclass(frozen=True)
class DiTOptions(FlowMapOptions):
    """DiT."""

    model_width: int | None = option(None, "width of the tokens of a DiT/<patch side>, which names no size", minimum=4)
    model_depth: int | None = option(None, "number of blocks of a DiT/<patch side>", minimum=1)
    model_heads: int | None = option(None, "attention heads of a DiT/<patch side>", minimum=1)
    norm: str = option(
        "layer",
        "norm of tokens: layer (layer norm), rms (RMSNorm), or rms_affine (RMSNorm with learned scales)",
        choices=NORMS,
    )
    mlp: str = option("gelu", "MLP of a block: gelu, or swiglu with as many parameters", choices=MLPS)
    qk_norm: bool = option(False, "normalize queries and keys in each head")
    rope: bool = option(False, "rotate queries and keys by their row and column (2-D RoPE)")
    pos_embed: bool = option(True, "add a table of sines and cosines of the positions to the tokens; off needs --rope")
    value_residual: bool = option(False, "mix the first block's values into the values of every later block")
    shared_adaln: bool = option(False, "one modulation for all blocks, with a learned offset in each block")
    adaln_shift: bool = option(True, "modulate a block's tokens by shift and scale; off: by scale alone")
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
    learn_sigma: bool = option(
        False, "twice as many output channels, of which the first half is the velocity and the others are unused (SiT)"
    )
    reversed_time: bool = option(
        False, "the network itself gets the time 1 - t and predicts data - noise, as in SiT's and LightningDiT's files"
    )

    @property
    def label_rows(self) -> int:
        """Rows of the label table: one per class (at least one), and one for the null class if labels are dropped."""
        return self.classes + (self.label_dropout > 0)

    @property
    def context_tokens(self) -> int:
        """Number of tokens in front of the image's."""
        return self.class_tokens + self.time_tokens

    @property
    def modulation_parts(self) -> int:
        """Number of vectors by which a block modulates its tokens."""
        return 6 if self.adaln_shift else 4

    def size_of(self, name: str) -> tuple[int, int, int]:
        """Width, depth and heads of the size `name` in DIT_SIZES, or the options' own if `name` is "".

        Raises:
            UsageError: the options lack a size, or contradict the name.
        """
        own = [getattr(self, option_name) for option_name in OWN_SIZE]
        if name and any(own):
            raise UsageError(
                f"--{', --'.join(OWN_SIZE)} have no effect on the size {name}: leave them out, or choose --model_type DiT/2"
            )
        if name:
            return DIT_SIZES[name]
        if missing := [option_name for option_name, value in zip(OWN_SIZE, own, strict=True) if not value]:
            wanted = ", ".join(f"--{option_name} ({OWN_SIZE[option_name]})" for option_name in missing)
            raise UsageError(
                f"a DiT/<patch side> names no size: give {wanted}, or choose a DiT with a size, such as DiT-B/2"
            )
        width, depth, heads = own
        return width, depth, heads

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
        if not self.pos_embed and (not self.rope or self.fine_blocks):
            raise UsageError(
                "--no-pos_embed needs --rope and no --fine_blocks, or the network would not see the positions"
            )
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
