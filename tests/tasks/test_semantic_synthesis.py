"""Agreement of label maps, compared with values computed by hand."""

import numpy as np
import pytest
import torch

from datasets_prep.image_dataset import DatasetFacts
from datasets_prep.label_maps.segmented_dataset import NO_CLASS, MapClasses, SegmentedDataset
from tasks.semantic_synthesis import MapAgreement

# 2 x 2 pixels inside a border that is cropped.
REQUESTED = [[[0, 1], [1, 2]], [[0, 0], [NO_CLASS, 1]]]
FOUND = [[[0, 1], [3, 2]], [[0, 1], [1, 1]]]


def dataset_of(**settings):
    maps = torch.zeros(2, 4, 4, dtype=torch.uint8)
    maps[:, 1:3, 1:3] = torch.tensor(REQUESTED)
    classes = MapClasses(("nothing", "one", "two", "three"), **settings)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    facts = DatasetFacts("x", 4, 3, 2, False, ())
    return SegmentedDataset(facts, "validation", np.zeros(2), images.__getitem__, "x", classes, maps.__getitem__)


def agreement(places, **settings):
    """Agreement after adding the samples with the given indices. Each sample is filled with its index."""
    score = MapAgreement(dataset_of(**settings), lambda samples: torch.tensor(FOUND)[samples[:, 0, 0, 0].long()])
    samples = torch.tensor(places, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    score.update(samples, torch.zeros_like(samples), torch.tensor(places))
    return score


def test_scores_of_tiny_maps_equal_values_computed_by_hand():
    score = agreement([0, 1])
    result = score.result(score.totals())
    # Class 0: 3 pixels requested, 2 of them correct, 2 predicted. Class 1: 3, 2, 3. Class 2: 1, 1, 1. Class 3: not requested.
    assert result["miou"] == pytest.approx((2 / 3 + 2 / 4 + 1 / 1) / 3)
    assert result["pixel_accuracy"] == pytest.approx(5 / 7)
    assert result["foreground_iou"] == pytest.approx((1 + 1 / 2) / 2)


def test_sums_over_processes_equal_one_pass():
    parts, whole = [agreement([0]), agreement([1])], agreement([1, 0])
    totals = sum(part.totals() for part in parts)
    assert torch.equal(totals, whole.totals())
    assert parts[0].result(totals) == whole.result(whole.totals())


def test_foreground_iou_is_omitted_if_class_0_is_scored():
    score = agreement([0, 1], background=False)
    assert score.result(score.totals()).keys() == {"miou", "pixel_accuracy"}


def test_pixels_of_class_0_count_only_where_it_is_scored():
    score = agreement([0, 1], scored=False)
    result = score.result(score.totals())
    # Class 1: 3 pixels requested, 2 of them correct. Class 2: 1 pixel, correct. Pixels requested as class 0 are ignored.
    assert result == {"miou": pytest.approx((2 / 3 + 1 / 1) / 2), "pixel_accuracy": pytest.approx(3 / 4)}


def test_perfect_agreement():
    data = dataset_of()
    score = MapAgreement(
        data, lambda samples: torch.where(torch.tensor(REQUESTED) == NO_CLASS, 3, torch.tensor(REQUESTED))
    )
    score.update(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 3, 2, 2), torch.arange(2))
    assert score.result(score.totals()) == {"miou": 1, "pixel_accuracy": 1, "foreground_iou": 1}
