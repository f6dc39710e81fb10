"""The tasks: what data each is trained on, and what the network is shown of it beside the point on the path."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from datasets_prep.conditions import ConditionSource, LabelMaps, MaskedImages
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from datasets_prep.image_dataset import shown_side
from datasets_prep.masks import MaskOptions, draw_mask
from datasets_prep.segmentation import open_segmentation
from datasets_prep.segmented_dataset import SegmentedDataset
from models.autoencoder import Autoencoder, PixelSpace
from options import Options
from runtime.precision import Machine

__all__ = ["GENERATE", "INPAINT", "SEMANTIC", "TASKS", "Task", "task_of"]


class Task(NamedTuple):
    """A task by `name`, for messages `purpose`, whose experiments lie below the folder `runs`.

    `open` opens a split of its data, `condition(dataset, autoencoder, machine, options, seed)` makes the dense conditions of
    training; without it there are none. `script` is the end of the scripts' names.
    """

    name: str
    purpose: str
    runs: str
    script: str
    open: Callable[[DatasetOptions, Split], ImageDataset]
    condition: Callable[[ImageDataset, Autoencoder | PixelSpace, Machine, Options, int], ConditionSource] | None = None


def _open_images(options: DatasetOptions, split: Split) -> ImageDataset:
    dataset = open_dataset(options, split)
    dataset.check_images("inpainting")
    return dataset


def _masked_images(
    dataset: ImageDataset, autoencoder: Autoencoder | PixelSpace, machine: Machine, options: Options, seed: int
) -> ConditionSource:
    masks = partial(draw_mask, options[MaskOptions].mask_kind, shown_side(dataset.facts), seed)
    return MaskedImages(dataset, autoencoder, masks, machine)


def _label_maps(
    dataset: ImageDataset, autoencoder: Autoencoder | PixelSpace, machine: Machine, options: Options, seed: int
) -> ConditionSource:
    return LabelMaps(cast(SegmentedDataset, dataset), autoencoder)


GENERATE = Task("generate", "generation", "latent_flow", "", open_dataset)
INPAINT = Task("inpaint", "inpainting", "latent_flow_inpaint", "_inpainting", _open_images, _masked_images)
SEMANTIC = Task(
    "semantic", "semantic synthesis", "latent_flow_mask2image", "_semantic_syn", open_segmentation, _label_maps
)
TASKS = {task.name: task for task in (GENERATE, INPAINT, SEMANTIC)}


def task_of(header: Mapping[str, Any]) -> Task:
    """The task that a checkpoint's header names; older ones are of generation."""
    return TASKS[header.get("task", GENERATE.name)]
