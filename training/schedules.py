"""Learning-rate schedules: the factor of the base learning rate as a function of progress in [0, 1]."""

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "learning_rate"]


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _trapezoid(progress: float) -> float:
    """Constant for the first 60 %, then linear decay to zero."""
    return min(1.0, (1 - progress) / 0.4)


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "trapezoid": _trapezoid,
    "constant": _constant,
}


def learning_rate(schedule: str, base: float, step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warmup, then the schedule from `base` to `final`."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    floor = min(final, base)
    return ramp * (floor + (base - floor) * SCHEDULES[schedule](min(1.0, step / max(1, steps))))
