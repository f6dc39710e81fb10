"""A task's additions to training: its data, and the condition that the network gets in addition to x_t."""

from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoints.tasks import GENERATE, Task
from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from models.autoencoders.protocol import Autoencoder
from runtime.precision import Machine

__all__ = ["GENERATION", "TrainingTask"]


class TrainingTask(NamedTuple):
    """A task and its additions to training.

    Args:
        task: its name, the folder of its experiments and the names of its scripts.
        open: opens a split of its data.
        condition: creates the dense conditions, called as condition(dataset, autoencoder, machine, options, seed); None for
            a task without dense conditions.
        condition_options: the dataclass of the `options` argument of `condition`.
        options: option dataclasses of its training script, in addition to the common ones.
    """

    task: Task
    open: Callable[[DatasetOptions, Split], ImageDataset]
    condition: Callable[[ImageDataset, Autoencoder, Machine, Any, int], ConditionSource] | None = None
    condition_options: type | None = None
    options: tuple[type, ...] = ()


GENERATION = TrainingTask(GENERATE, open_dataset)
