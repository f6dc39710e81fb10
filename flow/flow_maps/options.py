"""Options that several few-step objectives share."""

from dataclasses import dataclass

from flow.paths import PathOptions
from options import UsageError, option

__all__ = ["ALWAYS", "FewStepOptions", "IntervalOptions", "guides_targets"]

ALWAYS = (0.0, 1.0)  # the interval of all times


@dataclass(frozen=True)
class FewStepOptions(PathOptions):
    """Few-step objectives."""

    flow_share: float | None = option(
        None,
        "share of steps that train the velocity alone, at the times of --time_sampling; one random number decides for a whole "
        "step",
        minimum=0,
        maximum=1,
        shown="the objective's",
    )
    target_omega: float = option(
        1.0,
        "guidance inside the target: weight of the data's velocity; the weights of it, of --target_kappa and of the null "
        "class's velocity add up to 1",
        minimum=0,
    )
    target_kappa: float = option(
        0.0,
        "guidance inside the target: weight of the network's velocity for the class; the scale is omega / (1 - kappa)",
        minimum=0,
        maximum=0.999,
    )
    target_interval: tuple[float, ...] = option(
        ALWAYS, "times LOW HIGH within [0, 1] (0: data) between which targets are guided", minimum=0
    )

    def __post_init__(self) -> None:
        if len(self.target_interval) != 2 or not 0 <= self.target_interval[0] <= self.target_interval[1] <= 1:
            given = " ".join(map(str, self.target_interval))
            raise UsageError(f"--target_interval: expected two times 0 <= LOW <= HIGH <= 1, but {given} was given")

    @property
    def guides(self) -> bool:
        """Whether targets are guided."""
        return (self.target_omega, self.target_kappa) != (1.0, 0.0)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network gets a guidance scale as an input."""
        return False

    @property
    def learns_variance(self) -> bool:
        """Whether the network's log-variance weights the loss."""
        return False


@dataclass(frozen=True)
class IntervalOptions(FewStepOptions):
    """Intervals of times, and weights of the loss."""

    interval_locations: tuple[float, ...] = option(
        (),
        "locations of the two logit-normal times of which the later is t and the earlier is until",
        shown="the objective's",
    )
    interval_scale: float = option(1.0, "scale of these logit-normal times", minimum=0)
    adaptive_power: float | None = option(
        None,
        "p in the loss |error|^2 / (|error|^2 + c)^p, where the denominator has no gradient; 0: none",
        minimum=0,
        shown="the objective's",
    )
    adaptive_constant: float = option(0.01, "c in the adaptive loss", minimum=1e-12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.interval_locations) not in (0, 2):
            given = " ".join(map(str, self.interval_locations))
            raise UsageError(f"--interval_locations: expected two numbers, but {given} was given")

    def power(self, default: float) -> float:
        """The adaptive loss's p: the option, or else the objective's `default`."""
        return default if self.adaptive_power is None else self.adaptive_power


def guides_targets(options: PathOptions) -> bool:
    """Whether an objective's targets are guided, so that its draws need the null condition."""
    return isinstance(options, FewStepOptions) and options.guides
