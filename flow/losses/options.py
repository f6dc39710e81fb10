"""Options of flow matching's target, loss terms and weights, and checks of them before a run."""

from dataclasses import dataclass

from flow.losses.predictions import PREDICTIONS
from flow.losses.weightings import WEIGHTINGS
from flow.paths import PathOptions
from options import UsageError, option

__all__ = ["FlowMatchingOptions", "LossOptions", "check_losses", "contrastive_weight", "prediction_of"]

LARGEST_WEIGHT = 1e6
LARGEST_CONTRAST = 0.9  # at 1, the contrastive loss has no minimum


@dataclass(frozen=True)
class LossOptions:
    """Target and loss."""

    prediction: str = option("velocity", "what the network predicts, at the same loss", choices=PREDICTIONS)
    velocity_direction: float = option(
        0.0,
        "weight of the velocity direction loss, 1 - the cosine of predicted and true velocity; 0: off",
        minimum=0,
        maximum=LARGEST_WEIGHT,
    )
    contrastive_weight: float = option(
        0.0,
        "contrastive flow matching: weight of the squared distance from another class's velocity, which grows; 0: off",
        minimum=0,
        maximum=LARGEST_CONTRAST,
    )
    loss_weighting: str = option("constant", "weight of the loss over time", choices=WEIGHTINGS)

    @property
    def changes_loss(self) -> bool:
        """Whether the training loss differs from the plain squared error of the velocity."""
        return self.loss_weighting != "constant" or self.velocity_direction > 0 or self.contrastive_weight > 0


@dataclass(frozen=True)
class FlowMatchingOptions(LossOptions, PathOptions):
    """Flow matching: path, training times, target and loss."""


def contrastive_weight(options: PathOptions) -> float:
    """The weight of contrastive flow matching in an objective's options; 0 if the objective has no such option."""
    return options.contrastive_weight if isinstance(options, LossOptions) else 0.0


def prediction_of(options: PathOptions) -> str:
    """The target of an objective's network, a key of PREDICTIONS; "velocity" if the objective has no such option."""
    return options.prediction if isinstance(options, LossOptions) else LossOptions.prediction


def check_losses(options: PathOptions, channels: int, global_batch: int, *, dense: bool) -> None:
    """Check that the data fit an objective's options.

    Args:
        options: the objective's.
        channels: of the latents.
        global_batch: samples per step.
        dense: whether the network takes a dense condition.

    Raises:
        UsageError: they do not.
    """
    if isinstance(options, LossOptions) and options.velocity_direction and channels == 1:
        raise UsageError(
            "--velocity_direction needs latents of at least two channels, because a single number has no direction, but "
            "these have one: leave it out"
        )
    if contrastive_weight(options) and global_batch < 2:
        raise UsageError("--contrastive_weight contrasts the images of a batch: use a --batch_size of at least 2")
    if options.coupling != "independent" and dense:
        raise UsageError(
            f"--coupling {options.coupling} would make the noise depend on the mask or label map, which differs for every "
            "image: use --coupling independent with a dense condition"
        )
