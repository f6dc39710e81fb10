"""Trackers, each used through its own library: TensorBoard, Weights & Biases and Trackio. All show the same names.

The run folder gives the names: task and dataset name the project, and the experiment names the run.
"""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch.utils.tensorboard import SummaryWriter

from options import UsageError
from runtime.files import atomic_path, read_json

__all__ = ["TRACKERS", "Tracker", "check_tracker"]


class Tracker(Protocol):
    """Shows the metrics of a run. Any method may raise an error, which ends only the tracking.

    `title` names what it writes, in messages.
    """

    title: ClassVar[str]

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Show values at a step. Their names are "kind/name", such as "train/loss"."""
        ...

    def close(self) -> None:
        """Write what has not been written yet."""
        ...


class TensorBoard:
    """Writes event files to the run folder's tensorboard/.

    Args:
        folder: the run folder.
        step: the step at which training starts or resumes; TensorBoard hides later values.
    """

    title: ClassVar = "TensorBoard's file"

    def __init__(self, folder: Path, step: int) -> None:
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values to the event file."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline.

    A resumed run keeps its id, which wandb/run_id.txt in the run folder records. Steps that it repeats are ignored there; on a
    CPU, they have the same values. The run gets options and metrics, but no output, code or measurements of the machine; the
    library itself adds the host's name and its own telemetry.
    """

    title: ClassVar = "the run of Weights & Biases"

    def __init__(self, folder: Path, step: int) -> None:
        import wandb

        record = folder / "wandb" / "run_id.txt"
        identity = record.read_text(encoding="utf-8").strip() if step and record.exists() else uuid.uuid4().hex[:8]
        with atomic_path(record) as temporary:
            temporary.write_text(f"{identity}\n", encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _project(folder),
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=_options(folder),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_save_requirements=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
            ),
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values; those of one step are merged."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Upload what is left, and end the run."""
        self._run.finish()


class Trackio:
    """A run of Trackio in its local database (`trackio show` displays it), or where its environment variables say.

    A resumed run continues the run of the same name.
    """

    title: ClassVar = "the run of Trackio"

    def __init__(self, folder: Path, step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=_project(folder),
            name=folder.name,
            config=_options(folder),
            resume="allow" if step else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left, and end the run."""
        self._run.finish()


class NoTracker:
    """Shows nothing; metrics.jsonl remains."""

    title: ClassVar = "nothing"

    def __init__(self, folder: Path, step: int) -> None:
        pass

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


TRACKERS: dict[str, type[TensorBoard | WeightsAndBiases | Trackio | NoTracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "none": NoTracker,
}
PACKAGES = ("wandb", "trackio")  # optional ones, which are also the names of their trackers


def check_tracker(name: str) -> None:
    """Check that a tracker's package is installed.

    Raises:
        UsageError: it is not.
    """
    if name in PACKAGES and find_spec(name) is None:
        raise UsageError(
            f"--tracker {name} needs the package {name}: pip install {name}, or choose another of {', '.join(TRACKERS)}"
        )


def _project(folder: Path) -> str:
    """The project of a run folder TASK/DATASET/EXPERIMENT, such as latent_flow-fashion_mnist."""
    return f"{folder.parent.parent.name or 'latent_flow'}-{folder.parent.name}"


def _options(folder: Path) -> dict[str, Any]:
    """The run's options, from config.json."""
    with suppress(UsageError):
        options = read_json(folder / "config.json").get("options")
        return options if isinstance(options, dict) else {}
    return {}
