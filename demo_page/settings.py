"""The solver, guidance and seed that the page's controls set."""

from dataclasses import dataclass
from typing import Any

from flow.guidance import GuidanceOptions
from flow.solvers import SOLVERS, SolverOptions, check_method
from options import UsageError, make_options

__all__ = ["Limits", "Settings"]

TOLERANCE = 1e-3  # of adaptive solvers


@dataclass(frozen=True)
class Limits:
    """Limits of one request: the numbers of samples and steps, and the time in seconds."""

    samples: int
    steps: int
    seconds: float

    def check(self, samples: int, steps: int) -> None:
        """Check a request.

        Raises:
            UsageError: it asks for more than allowed, or for no sample.
        """
        if not 1 <= samples <= self.samples:
            raise UsageError(f"expected 1 to {self.samples} samples (--max_samples), but {samples} were asked for")
        if steps > self.steps:
            raise UsageError(f"expected at most {self.steps} steps (--max_steps), but {steps} were asked for")


@dataclass(frozen=True)
class Settings:
    """The values of the controls that all tabs share, in the page's order."""

    method: str
    steps: int
    scale: float
    low: float
    high: float
    internal: float
    embedded: float
    shift: float
    seed: int

    def solver(self, **changes: Any) -> SolverOptions:
        """The solver, with `changes` to its options.

        Raises:
            UsageError: an option is invalid.
        """
        values = {"method": self.method, "num_steps": int(self.steps), "time_shift": float(self.shift)}
        options = make_options(SolverOptions, {**values, "atol": TOLERANCE, "rtol": TOLERANCE, **changes})
        check_method(options)
        return options

    def guidance(self) -> GuidanceOptions:
        """The guidance.

        Raises:
            UsageError: an option is invalid.
        """
        interval = [float(self.low), float(self.high)]
        values = {"cfg_scale": self.scale, "internal_guidance": self.internal, "embedded_guidance": self.embedded}
        scales = {name: float(value) for name, value in values.items()}
        return make_options(GuidanceOptions, {**scales, "cfg_interval": interval})

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.method in SOLVERS and SOLVERS[self.method].adaptive
