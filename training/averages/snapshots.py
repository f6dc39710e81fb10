"""Snapshots of a run's power averages: checkpoints in half precision in the run's folder posthoc_ema/.

The trained weights are stored in float16. Between tracked widths, a reconstruction's coefficients have a norm of at most
about 1, so rounding errors do not grow: float16's relative error of at most 2^-11 is below the error of a profile from 32
snapshots, about 1e-3, but bfloat16's 2^-8 is not. Weights outside float16's range, and tensors that are not trained, keep
their type.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints.files import read_header
from checkpoints.header import Header, PowerAverage
from options import UsageError
from runtime.messages import fact, note
from training.averages.power import LARGEST_WIDTH

__all__ = [
    "FOLDER",
    "Snapshot",
    "list_snapshots",
    "remove_later",
    "show_snapshots",
    "snapshot_interval",
    "snapshot_name",
    "to_half_precision",
]

FOLDER = "posthoc_ema"
SNAPSHOTS = 32  # of a complete run, if --posthoc_ema_every does not set their interval


class Snapshot(NamedTuple):
    """A stored power average."""

    path: Path
    header: Header

    @property
    def average(self) -> PowerAverage:
        """The width and the number of averaged updates."""
        assert self.header.average is not None  # list_snapshots checks this
        return self.header.average


def snapshot_interval(chosen: int, last_step: int) -> int:
    """Steps between snapshots: `chosen`, or for 0 an interval that divides the run into SNAPSHOTS parts."""
    return chosen or -(-last_step // SNAPSHOTS)


def snapshot_name(sigma_rel: float, step: int) -> str:
    """The path of a snapshot in its run's folder."""
    return f"{FOLDER}/sigma_{sigma_rel}_step_{step:07d}.safetensors"


def to_half_precision(weights: Mapping[str, torch.Tensor], trained: Collection[str]) -> dict[str, torch.Tensor]:
    """Convert the `trained` weights that fit into float16's range to float16; the others are unchanged."""
    largest = torch.finfo(torch.float16).max
    return {
        name: value.half() if name in trained and not (value.abs() > largest).any() else value
        for name, value in weights.items()
    }


def list_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots in a run's folder, by step and width.

    Raises:
        UsageError: there is none, or one is unreadable.
    """
    found = []
    for path in _paths(run):
        try:
            header = read_header(path)
        except UsageError as error:
            raise UsageError(f"{error}. Remove the file to use the other snapshots") from error
        average = header.average
        if average is None or header.step is None or average.updates < 1 or not 0 < average.sigma_rel <= LARGEST_WIDTH:
            raise UsageError(f"{path} is not a snapshot of a power average: remove it to use the other files")
        found.append(Snapshot(path, header))
    if not found:
        raise UsageError(
            f"{run} has no snapshots in {FOLDER}/: expected the folder of a run that was trained with --posthoc_ema, for "
            "example --posthoc_ema 0.05 0.10"
        )
    return sorted(found, key=lambda snapshot: (snapshot.header.step, snapshot.average.sigma_rel))


def show_snapshots(run: Path, widths: Collection[float], every: int) -> None:
    """Print the tracked widths, the interval and how many snapshots the folder has."""
    stored = len(_paths(run))
    there = f"; {stored} snapshots there" if stored else ""
    listed = " and ".join(str(width) for width in widths)
    interval = "step" if every == 1 else f"{every:,} steps"
    fact("averages", f"relative widths {listed}, stored every {interval} in {FOLDER}/{there}")


def remove_later(run: Path, step: int) -> None:
    """Remove the snapshots after `step`, from which the run resumes, because it writes them again."""
    later = [path for path in _paths(run) if _step(path) > step]
    for path in later:
        path.unlink()
    if later:
        note(f"removed {len(later)} snapshots in {run / FOLDER} from after step {step}, where the run resumes")


def _paths(run: Path) -> list[Path]:
    return sorted(path for path in (run / FOLDER).glob("sigma_*_step_*.safetensors") if _step(path) >= 0)


def _step(path: Path) -> int:
    """The step in a snapshot's name; -1 if it has none."""
    match = re.search(r"_step_(\d+)\.safetensors$", path.name)
    return int(match[1]) if match else -1
