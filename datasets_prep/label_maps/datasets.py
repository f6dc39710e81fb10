"""Datasets with label maps by name, for semantic synthesis."""

from collections.abc import Callable
from pathlib import Path

from datasets_prep.datasets import DatasetOptions, readable_images
from datasets_prep.image_dataset import Split
from datasets_prep.label_maps.celebamask_hq import open_celebamask
from datasets_prep.label_maps.scenes import open_ade20k, open_coco
from datasets_prep.label_maps.segmented_dataset import SegmentedDataset
from datasets_prep.label_maps.silhouettes import open_silhouettes
from options import UsageError

__all__ = ["SEGMENTATION_DATASETS", "open_segmentation"]

# Openers take the dataset's name, its directory, the split and the image side in pixels.
SEGMENTATION_DATASETS: dict[str, Callable[[str, Path, Split, int], SegmentedDataset]] = {
    "celeba": open_celebamask,
    "celeba_256": open_celebamask,
    "ade20k": open_ade20k,
    "coco": open_coco,
    "fashion_mnist": open_silhouettes,
}


def open_segmentation(options: DatasetOptions, split: Split) -> SegmentedDataset:
    """Open one split of the dataset that `options` names, with its label maps.

    Raises:
        UsageError: the dataset is unknown or has no maps, files are missing, or it does not support the image size.
    """
    if options.dataset not in SEGMENTATION_DATASETS:
        known = ", ".join(SEGMENTATION_DATASETS)
        raise UsageError(f"the dataset {options.dataset!r} has no label maps: expected one of {known}")
    dataset = SEGMENTATION_DATASETS[options.dataset](options.dataset, Path(options.datadir), split, options.image_size)
    return dataset.subset(readable_images(dataset)) if options.skip_bad_images else dataset
