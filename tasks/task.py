"""What a task adds to training: the data it is trained on, and what the network sees next to the point on the path."""

from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoints.tasks import GENERATE, Task
from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from models.autoencoders.protocol import Autoencoder
from runtime.precision import Machine

__all__ = ["GENERATION", "TrainingTask"]


class TrainingTask(NamedTuple):
    """A task as training sees it.

    Args:
        task: name, folder of its experiments, name of its scripts.
        open: opens a split of its data.
        condition: (dataset, autoencoder, machine, its own options, seed) to the dense conditions; None: there are none.
        condition_options: the dataclass of `condition`'s options.
        options: groups of options that its training script has besides everyone's.
    """

    task: Task
    open: Callable[[DatasetOptions, Split], ImageDataset]
    condition: Callable[[ImageDataset, Autoencoder, Machine, Any, int], ConditionSource] | None = None
    condition_options: type | None = None
    options: tuple[type, ...] = ()


GENERATION = TrainingTask(GENERATE, open_dataset)
