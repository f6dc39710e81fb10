"""The options that all families of velocity networks share."""

from dataclasses import dataclass

from options import option

__all__ = ["FamilyOptions"]


@dataclass(frozen=True)
class FamilyOptions:
    """Every network."""

    num_in_channels: int = option(4, "channels of the network's input; default: those of the latents", minimum=1)
    num_out_channels: int = option(4, "channels of the velocity; default: those of the latents", minimum=1)
    label_dropout: float = option(
        0.0, "probability of dropping a label in training; above 0: a null class", minimum=0, maximum=1
    )
    use_grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")

    @property
    def classes(self) -> int:
        """Number of classes K, which is also the null class's id; 1: unconditional."""
        return 1
