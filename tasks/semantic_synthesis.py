"""Images of label maps: drawn for the maps of held-out images, and compared with the maps that they should show."""

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
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.precision import Machine
from sampling.setup import Opened, open_sampler
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_sampling import Setting, sample_for_images
from tasks.conditioned_setup import ConditionedOptions, images_to_sample_for, set_labels
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
    """Comparing samples with their maps."""

    segmentation_weights: str = option(
        "",
        "weights of a segmentation network for the dataset's classes, which finds the maps of the samples for mIoU: a state "
        "dict of torchvision's deeplabv3_resnet50; Fashion-MNIST needs none",
    )


def synthesise(options: Options, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
    """Make images of the held-out images' maps; returns the result that is also written as JSON.

    Raises:
        UsageError: no such checkpoint, one for another task, foreign weights, or a folder with other samples.
    """
    opened = open_sampler(options, processes, (SEMANTIC,))
    whole = cast(SegmentedDataset, images_to_sample_for(opened, SEMANTIC_SYNTHESIS, options))
    _check_classes(opened, whole)
    dataset = whole.head(options[ConditionedOptions].n_sample)
    set_labels(dataset, opened, options)
    made_of = {"images": whole.fingerprint, "maps": whole.maps_fingerprint}
    return sample_for_images(
        opened, lambda features: _setting(opened, dataset, features, made_of, options), options, processes
    )


class MapAgreement:
    """How well the maps that a segmenter finds in samples agree with those that they were made of.

    Args:
        dataset: knows the maps.
        segmenter: finds class ids in images.
    """

    def __init__(self, dataset: SegmentedDataset, segmenter: Segmenter) -> None:
        self._dataset, self._segmenter = dataset, segmenter
        self._classes = dataset.classes.count
        self._confusion = torch.zeros(self._classes, self._classes, dtype=torch.float64)  # [asked for, found]
        self._foreground = torch.zeros(2, dtype=torch.float64)  # sum over images of the regions' IoU, images

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """See `PairScore`."""
        maps = torch.stack([self._dataset.label_map(place) for place in places.tolist()])
        asked = crop_padding(maps, self._dataset.facts).long()
        found = self._segmenter(samples).cpu().long()
        labelled = (asked < self._classes) & ((asked > 0) | self._dataset.classes.scored)
        cells = asked[labelled] * self._classes + found[labelled]
        self._confusion += torch.bincount(cells, minlength=self._classes**2).view_as(self._confusion)
        inside, filled = (labelled & (asked > 0)).flatten(1), (labelled & (found > 0)).flatten(1)
        union = (inside | filled).sum(1)
        overlap = torch.where(union > 0, (inside & filled).sum(1) / union.clamp(min=1), 1.0)
        self._foreground += torch.tensor([overlap.double().sum(), float(len(maps))])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return torch.cat([self._confusion.flatten(), self._foreground])

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """`miou` over the classes that occur, `pixel_accuracy`, and the mean IoU of what is not background."""
        confusion, (overlap, images) = totals[:-2].view_as(self._confusion), totals[-2:].tolist()
        hits, asked, found = confusion.diag(), confusion.sum(1), confusion.sum(0)
        occurs = asked > 0
        union = (asked + found - hits)[occurs]
        result = {"miou": (hits[occurs] / union).mean().item(), "pixel_accuracy": (hits.sum() / asked.sum()).item()}
        classes = self._dataset.classes
        return result | ({"foreground_iou": overlap / images} if classes.background and classes.scored else {})


def _check_classes(opened: Opened, dataset: SegmentedDataset) -> None:
    expected = opened.header.dense.classes if opened.header.dense else None
    if dataset.classes.count != expected:
        raise UsageError(
            f"{opened.path} was trained on maps of {expected} classes, but those of --dataset {dataset.facts.name} have "
            f"{dataset.classes.count}"
        )


def _setting(
    opened: Opened,
    dataset: SegmentedDataset,
    features: FeatureNetwork | None,
    made_of: Mapping[str, str],
    options: Options,
) -> Setting:
    conditioned = ConditionedImages(dataset, LabelMaps(dataset, opened.sampler.autoencoder))
    pair_scores = recognition(features, dataset)
    if (segmenter := _segmenter(opened, dataset, features, options)) is not None:
        pair_scores.append(MapAgreement(dataset, segmenter))
    return Setting(conditioned, "maps", made_of, "samples", {"maps": conditioned.shown}, pair_scores=pair_scores)


def _segmenter(
    opened: Opened, dataset: SegmentedDataset, features: FeatureNetwork | None, options: Options
) -> Segmenter | None:
    weights = options[SegmentationOptions].segmentation_weights
    if weights:
        return load_segmenter(weights, dataset.classes.count, opened.sampler.machine.device)
    if features is None or not recognises(features, dataset) or dataset.facts.name != "fashion_mnist":
        return None
    return silhouette_segmenter(features)
