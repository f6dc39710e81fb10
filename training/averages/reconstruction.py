"""Rebuild a power average of any width from a run's snapshots, as a checkpoint (arXiv 2312.02696, section 3)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints.files import read_weights, save_weights
from checkpoints.header import Header, PowerAverage
from options import UsageError
from runtime.messages import fact, warn
from runtime.progress import progress_bar
from runtime.weights import list_names
from training.averages.power import combine
from training.averages.snapshots import Snapshot

__all__ = ["choose_step", "rebuild", "rebuild_file"]

LARGE_ERROR = 0.05  # of a profile


def choose_step(snapshots: Sequence[Snapshot], step: int | None) -> list[Snapshot]:
    """The snapshots up to `step`, which must have one; None: the last one.

    Raises:
        UsageError: there is no snapshot at this step; the message lists the steps.
    """
    steps = sorted({snapshot.header.step or 0 for snapshot in snapshots})
    if step is not None and step not in steps:
        raise UsageError(f"--step {step}: expected the step of a snapshot, one of {list_names(map(str, steps))}")
    return [snapshot for snapshot in snapshots if (snapshot.header.step or 0) <= (steps[-1] if step is None else step)]


@torch.no_grad()
def rebuild(snapshots: Sequence[Snapshot], sigma_rel: float) -> tuple[dict[str, torch.Tensor], Header, float]:
    """Rebuild the power average of width `sigma_rel` up to the last of the snapshots, which are ordered by step.

    Weights are summed in float64. Tensors that are not floating-point are the last snapshot's.

    Returns:
        The weights in float32, their header, and the profile's relative error (`Combination.error`).

    Raises:
        UsageError: a snapshot is unreadable.
    """
    last = snapshots[-1]
    wanted = PowerAverage(sigma_rel, last.average.updates)
    coefficients, error = combine([snapshot.average for snapshot in snapshots], wanted)
    sums, weights = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    described = f"sigma_rel {sigma_rel:g}"
    parts = zip(snapshots, coefficients.tolist(), strict=True)
    for snapshot, coefficient in progress_bar(parts, total=len(snapshots), desc=described, unit="snapshot"):
        weights = _read(snapshot)
        for name, value in weights.items():
            if value.is_floating_point():
                term = coefficient * value.double()
                sums[name] = sums[name].add_(term) if name in sums else term
    types = {torch.float16: torch.float32}
    rebuilt = {
        name: sums[name].to(types.get(value.dtype, value.dtype)) if name in sums else value
        for name, value in weights.items()
    }
    return rebuilt, replace(last.header, average=wanted), error


def rebuild_file(snapshots: Sequence[Snapshot], sigma_rel: float, path: Path) -> float:
    """Write the power average of width `sigma_rel` as a checkpoint; returns the profile's relative error, and prints it."""
    weights, header, error = rebuild(snapshots, sigma_rel)
    save_weights(path, weights, header)
    fact("checkpoint", f"{path}: sigma_rel {sigma_rel:g} at step {header.step}, profile within {100 * error:.2g} %")
    if error > LARGE_ERROR:
        warn(
            f"sigma_rel {sigma_rel:g}: the snapshots match its profile only within {100 * error:.0f} %. Choose a width between "
            "the tracked ones, or train with a smaller --posthoc_ema_every"
        )
    return error


def _read(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    try:
        return read_weights(snapshot.path)[0]
    except UsageError as error:
        raise UsageError(f"{error}. Remove the file to use the other snapshots") from error
