"""The space that a run will take on the disk, told before it begins."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from options import UsageError
from runtime.messages import warn
from training.experiment import ExperimentOptions
from training.optimizers import Muon
from training.state import TrainingState

__all__ = ["DiskUse", "check_space", "predict_use"]

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class DiskUse:
    """Bytes of one checkpoint and of one content.pth, and how many of each are kept in the end."""

    weights: int
    content: int
    checkpoints: int
    contents: int

    @property
    def one_saving(self) -> int:
        """Bytes that must be free when a content.pth and a checkpoint are written, beside those that they replace."""
        return self.weights + self.content

    @property
    def total(self) -> int:
        """Bytes of all that is kept, and of the temporary file of a saving."""
        return self.checkpoints * self.weights + self.contents * self.content + max(self.weights, self.content)


def predict_use(state: TrainingState, experiment: ExperimentOptions, per_epoch: int, last_step: int) -> DiskUse:
    """What a run of `last_step` steps will keep; best.safetensors is one of the checkpoints."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state.ema.weights.values())
    moments = sum(
        parameter.numel() * parameter.element_size() * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    regular, beside = divmod(last_step, per_epoch * experiment.save_ckpt_every)
    numbered = regular + (1 if beside else 0)
    numbered = min(numbered, experiment.keep_last or numbered)
    return DiskUse(weights, 2 * weights + moments, numbered + 1, 2 if experiment.save_content else 0)


def check_space(folder: Path, use: DiskUse) -> str:
    """Compare the space that a run needs with the free space; returns both in words, and warns if the whole does not fit.

    Raises:
        UsageError: not even one checkpoint and one content.pth fit.
    """
    free = shutil.disk_usage(folder).free
    if free < use.one_saving:
        raise UsageError(
            f"{folder}: a checkpoint and a content.pth need {_written(use.one_saving)}, but only {_written(free)} are free: "
            "free some space or choose another --save_root"
        )
    if use.total > free:
        warn(
            f"the whole run needs {_written(use.total)} in {folder}, but only {_written(free)} are free: see --keep_last "
            "and --save_ckpt_every"
        )
    return (
        f"{_written(use.total)} for {use.checkpoints} checkpoints of {_written(use.weights)} and {use.contents} content.pth "
        f"of {_written(use.content)}; {_written(free)} free"
    )


def _written(size: float) -> str:
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {UNITS[-1]}"
