"""Semantic synthesis: samples for the label maps of held-out images, scored by a segmentation network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoints.tasks import SEMANTIC
from datasets_prep.conditions import ConditionSource, LabelMaps
from datasets_prep.datasets import ImageDataset, crop_padding
from datasets_prep.label_maps.datasets import open_segmentation
from datasets_prep.label_maps.segmented_dataset import SegmentedDataset
from evaluation.features.protocol import FeatureNetwork
from models.autoencoders.protocol import Autoencoder
from models.conditions import ConditionOptions
from options import UsageError, option
from runtime.distributed import Processes
from runtime.precision import Machine
from sampling.loading import LoadedSampler, load_sampler
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_request import ConditionedRequest, open_held_out, set_labels
from tasks.conditioned_sampling import SamplingPlan, sample_for_images
from tasks.pair_scores import recognises, recognition
from tasks.segmenters import Segmenter, load_segmenter, silhouette_segmenter
from tasks.task import TrainingTask

__all__ = ["SEMANTIC_SYNTHESIS", "MapAgreement", "SegmentationOptions", "synthesise"]


def _label_maps(
    dataset: ImageDataset, autoencoder: Autoencoder, machine: Machine, options: None, seed: int
) -> ConditionSource:
    return LabelMaps(cast(SegmentedDataset, dataset), autoencoder)


SEMANTIC_SYNTHESIS = TrainingTask(SEMANTIC, open_segmentation, _label_maps, options=(ConditionOptions,))


@dataclass(frozen=True)
class SegmentationOptions:
    """Comparison of samples with their maps."""

    segmentation_weights: str = option(
        "",
        "weights of a segmentation network for mIoU: a state dict of torchvision's deeplabv3_resnet50 with the dataset's "
        "classes; Fashion-MNIST needs none",
    )


def synthesise(
    request: ConditionedRequest,
    segmentation: SegmentationOptions,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Sample for the label maps of the held-out images.

    Args:
        request: network, images and scores.
        segmentation: the segmentation network for the scores.
        processes: the batches are sharded over them.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: the checkpoint is missing or for another task, the maps have another number of classes, the segmentation
            weights do not fit, or the folder holds samples with other settings.
    """
    loaded = load_sampler(request.sampler, processes, (SEMANTIC,))
    whole = cast(SegmentedDataset, open_held_out(request, loaded, SEMANTIC_SYNTHESIS))
    _check_classes(loaded, whole)
    dataset = whole.head(request.conditioned.n_sample)
    set_labels(dataset, loaded, request.conditioned.use_labels)
    identity = {"images": whole.fingerprint, "maps": whole.maps_fingerprint}

    def make_plan(features: FeatureNetwork | None) -> SamplingPlan:
        return _plan(loaded, dataset, features, identity, segmentation)

    return sample_for_images(request, loaded, make_plan, processes)


class MapAgreement:
    """Agreement between the samples' target maps and the maps that a segmenter finds in the samples.

    Args:
        dataset: images with their maps.
        segmenter: predicts class ids for images.
    """

    def __init__(self, dataset: SegmentedDataset, segmenter: Segmenter) -> None:
        self._dataset, self._segmenter = dataset, segmenter
        self._classes = dataset.classes.count
        self._confusion = torch.zeros(self._classes, self._classes, dtype=torch.float64)  # [target, found]
        self._foreground = torch.zeros(2, dtype=torch.float64)  # sum of the images' foreground IoUs, number of images

    def update(self, samples: torch.Tensor, originals: torch.Tensor, image_indices: torch.Tensor) -> None:
        """See `PairScore`."""
        maps = torch.stack([self._dataset.label_map(index) for index in image_indices.tolist()])
        target = crop_padding(maps, self._dataset.facts).long()
        found = self._segmenter(samples).cpu().long()
        labeled = (target < self._classes) & ((target > 0) | self._dataset.classes.scored)
        cells = target[labeled] * self._classes + found[labeled]
        self._confusion += torch.bincount(cells, minlength=self._classes**2).view_as(self._confusion)
        target_region, found_region = (labeled & (target > 0)).flatten(1), (labeled & (found > 0)).flatten(1)
        union = (target_region | found_region).sum(1)
        iou = torch.where(union > 0, (target_region & found_region).sum(1) / union.clamp(min=1), 1.0)
        self._foreground += torch.tensor([iou.double().sum(), float(len(maps))])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return torch.cat([self._confusion.flatten(), self._foreground])

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """The entries `miou`, `pixel_accuracy` and, for datasets with a background class, `foreground_iou`.

        `miou` is the mean over the classes that occur in the target maps.
        """
        confusion, (ious, images) = totals[:-2].view_as(self._confusion), totals[-2:].tolist()
        hits, target, found = confusion.diag(), confusion.sum(1), confusion.sum(0)
        occurs = target > 0
        union = (target + found - hits)[occurs]
        result = {"miou": (hits[occurs] / union).mean().item(), "pixel_accuracy": (hits.sum() / target.sum()).item()}
        classes = self._dataset.classes
        return result | ({"foreground_iou": ious / images} if classes.background and classes.scored else {})


def _check_classes(loaded: LoadedSampler, dataset: SegmentedDataset) -> None:
    expected = loaded.header.dense.classes if loaded.header.dense else None
    if dataset.classes.count != expected:
        raise UsageError(
            f"{loaded.path} was trained on maps of {expected} classes, but the maps of --dataset {dataset.facts.name} have "
            f"{dataset.classes.count}"
        )


def _plan(
    loaded: LoadedSampler,
    dataset: SegmentedDataset,
    features: FeatureNetwork | None,
    identity: Mapping[str, str],
    segmentation: SegmentationOptions,
) -> SamplingPlan:
    conditioned = ConditionedImages(dataset, LabelMaps(dataset, loaded.sampler.autoencoder))
    pair_scores = recognition(features, dataset)
    if (segmenter := _segmenter(loaded, dataset, features, segmentation)) is not None:
        pair_scores.append(MapAgreement(dataset, segmenter))
    return SamplingPlan(conditioned, "maps", identity, "samples", {"maps": conditioned.shown}, pair_scores=pair_scores)


def _segmenter(
    loaded: LoadedSampler,
    dataset: SegmentedDataset,
    features: FeatureNetwork | None,
    segmentation: SegmentationOptions,
) -> Segmenter | None:
    """Load the segmentation network for the scores; None if the dataset has none."""
    if weights := segmentation.segmentation_weights:
        return load_segmenter(weights, dataset.classes.count, loaded.sampler.machine.device)
    if features is None or not recognises(features, dataset) or dataset.facts.name != "fashion_mnist":
        return None
    return silhouette_segmenter(features)
