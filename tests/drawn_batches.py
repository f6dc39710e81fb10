"""Training batches drawn from any source of posterior moments, for tests that change only a few settings."""

from collections.abc import Iterator
from typing import Any

from datasets_prep.moments import MomentSource
from flow.objectives import FlowMatching, Objective
from flow.paths import PathOptions
from models.autoencoders.protocol import Autoencoder
from runtime.distributed import Processes
from training.data import Batch, batches

__all__ = ["draw_batches"]

SETTINGS: dict[str, Any] = {"seed": 0, "flips": True, "label_dropout": 0.1, "processes": Processes()}


def draw_batches(
    source: MomentSource,
    autoencoder: Autoencoder,
    first: int,
    last: int,
    *,
    objective: Objective = FlowMatching(PathOptions()),  # noqa: B008
    **settings: Any,
) -> Iterator[Batch]:
    """The batches of the steps first .. last - 1, by default mirrored at random and with dropped labels."""
    limits = {"first_step": first, "last_step": last}
    return batches(source, autoencoder, objective, **limits, **SETTINGS | settings)
