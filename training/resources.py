"""The disk space that a run needs and the memory of its steps, checked before it starts, and tolerance of failed writes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from models.conditions import Condition
from models.registry import NETWORKS
from options import UsageError
from runtime.cpu.kernels import with_cpu_kernels
from runtime.files import free_bytes
from runtime.memory import StepMemory, advise, describe_free, free_memory, measure_activations
from runtime.messages import fact, note, warn
from runtime.outputs import with_unit
from training.experiment import ExperimentOptions
from training.optimizers import Muon, muon_matrices
from training.run import TrainingRun
from training.state import TrainingState

__all__ = ["DiskUse", "WriteGuard", "check_space", "estimate_memory", "optimizer_bytes", "predict_use", "show_memory"]


@dataclass(frozen=True)
class DiskUse:
    """Bytes of a checkpoint, a content.pth and a snapshot of a power average, and how many the complete run keeps."""

    weights: int
    content: int
    checkpoints: int
    contents: int
    snapshot: int = 0
    snapshots: int = 0

    @property
    def one_saving(self) -> int:
        """Bytes that must be free to write a content.pth and a checkpoint before the old ones are deleted."""
        return self.weights + self.content

    @property
    def total(self) -> int:
        """Bytes of all kept files, and of one temporary file during a save."""
        kept = self.checkpoints * self.weights + self.contents * self.content + self.snapshots * self.snapshot
        return kept + max(self.weights, self.content)

    def describe(self) -> str:
        """The kept files with their sizes."""
        snapshots = f", {self.snapshots} snapshots of {with_unit(self.snapshot)}" if self.snapshots else ""
        return (
            f"{with_unit(self.total)} for {self.checkpoints} checkpoints of {with_unit(self.weights)}{snapshots} and "
            f"{self.contents} content.pth of {with_unit(self.content)}"
        )


def predict_use(
    state: TrainingState, experiment: ExperimentOptions, per_epoch: int, last_step: int, snapshot_every: int = 1
) -> DiskUse:
    """Predict the disk use of a run of `last_step` steps. The checkpoints include best.safetensors."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state.ema.weights.values())
    regular, remainder = divmod(last_step, per_epoch * experiment.save_ckpt_every)
    numbered = regular + (1 if remainder else 0)
    numbered = min(numbered, experiment.keep_last or numbered)
    tracked = len(state.power_averages)
    content = (2 + tracked) * weights + optimizer_bytes(state.optimizers)
    snapshots = tracked * -(-last_step // snapshot_every)
    return DiskUse(weights, content, numbered + 1, 2 if experiment.save_content else 0, weights // 2, snapshots)


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the optimizers' states, of which Muon has one per weight and AdamW has two."""
    return sum(
        parameter.numel() * parameter.element_size() * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def check_space(folder: Path, use: DiskUse, flag: str = "--save_root") -> str:
    """Compare a run's disk use with the free space. Prints a warning if the complete run does not fit.

    The option `flag` names the folder.

    Returns:
        A description of both.

    Raises:
        UsageError: a checkpoint and a content.pth do not fit.
    """
    free = free_bytes(folder)
    if free is None:  # some network and FUSE file systems do not report it
        return f"{with_unit(use.total)} for {use.checkpoints} checkpoints and {use.contents} content.pth; free: unknown"
    if free < use.one_saving:
        raise UsageError(
            f"{folder}: a checkpoint and a content.pth need {with_unit(use.one_saving)}, but only {with_unit(free)} is "
            f"free: free some space or choose another {flag}"
        )
    if use.total > free:
        warn(
            f"the complete run needs {with_unit(use.total)} in {folder}, but only {with_unit(free)} is free: save fewer "
            "checkpoints with --keep_last or --save_ckpt_every"
            + (", and fewer snapshots with --posthoc_ema_every" if use.snapshots else "")
        )
    return f"{use.describe()}; {with_unit(free)} free"


def show_memory(run: TrainingRun) -> None:
    """On a GPU, print the estimated memory of a step, and what to change if it does not fit."""
    space = free_memory(run.machine.device)
    if space is None:
        return
    try:
        needed = estimate_memory(run)
    except Exception as error:  # a network that somebody registered may read values, which an estimate does not have
        note(f"the memory of a step was not estimated: {type(error).__name__}")
        return
    fact(
        "memory",
        f"{needed.describe()}; {describe_free(*space)}, enough for {needed.largest(space[0]):,} images at once",
    )
    if advice := advise(needed, space[0], run.training.batch_size, run.header.network.use_grad_checkpointing):
        warn(advice)


def estimate_memory(run: TrainingRun) -> StepMemory:
    """Estimate the memory of a step in each process. The weights may be on any device, but must not be sharded yet."""
    options, dense, device = run.training, run.header.dense, run.machine.device

    def loss(network: Callable[..., torch.Tensor], count: int) -> torch.Tensor:
        data, noise = torch.rand(2, count, *run.header.latent_shape, device=device)
        maps = None
        if dense is not None:
            maps = torch.rand(count, dense.classes or dense.channels, *data.shape[2:], device=device)
        condition = Condition(torch.zeros(count, dtype=torch.long, device=device), maps)
        draws = run.objective.at(torch.rand(count, device=device))
        return run.objective.loss(run.machine.evaluating(network), data, noise, draws, condition).mean()

    share = 1 / (run.processes.count if run.is_sharded else 1)
    weights = share * sum(tensor.numel() * tensor.element_size() for tensor in run.network.state_dict().values())
    trained = share * sum(p.numel() * p.element_size() for p in run.network.parameters() if p.requires_grad)
    # Adam has two states per weight, and Muon has one.
    hidden = NETWORKS[run.header.model_type].hidden_matrices(run.network) if options.optimizer == "muon" else []
    matrices = muon_matrices(run.network, options, hidden)
    return StepMemory(
        weights=weights,
        gradients=trained,
        optimizer=2 * trained - sum(matrix.numel() * matrix.element_size() for matrix in matrices),
        average=(1 + len(options.posthoc_ema)) * weights,
        activations=measure_activations(with_cpu_kernels(run.network), loss, device),
        images=options.batch_size // options.grad_accumulation,
    )


class WriteGuard:
    """Lets a run go on after a failed write, for example on a full disk, because a later write may succeed.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failed: dict[str, OSError] = {}

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn an OSError of the block, which writes the file `name`, into a warning."""
        try:
            yield
        except OSError as error:
            self._failed[name] = error
            warn(
                f"cannot write {self._folder / name} ({error.strerror or error}); the run goes on, and older files stay"
            )

    def has_failed(self, name: str) -> bool:
        """Whether writing the file `name` failed since the last call of `check`."""
        return name in self._failed

    def check(self, last: bool) -> None:
        """Forget the failures, or raise them if no later write of this run can make up for them (`last`).

        Raises:
            UsageError: names the files that could not be written.
        """
        failed, self._failed = self._failed, {}
        if last and failed:
            listed = ", ".join(f"{name} ({error.strerror or error})" for name, error in failed.items())
            raise UsageError(
                f"the run has stopped, but these files could not be written in {self._folder}: {listed}. Older files are "
                "complete: free some space, then repeat the command to resume from the last content.pth"
            )
