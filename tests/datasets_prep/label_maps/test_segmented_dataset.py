import numpy as np
import pytest
import torch

from datasets_prep.image_dataset import DatasetFacts
from datasets_prep.label_maps.segmented_dataset import (
    NO_CLASS,
    MapClasses,
    SegmentedDataset,
    colour_map,
    distinct_colours,
    mirror_map,
)

CLASSES = MapClasses(("background", "l_eye", "r_eye", "nose"), ((1, 2),))


@pytest.fixture
def dataset():
    images = torch.arange(5 * 3 * 4, dtype=torch.uint8).view(5, 3, 2, 2)
    facts = DatasetFacts("scenes", 2, 3, None, True, ())
    return SegmentedDataset(
        facts,
        "train",
        np.arange(5),
        images.__getitem__,
        "print",
        CLASSES,
        lambda index: torch.full((2, 2), index, dtype=torch.uint8),
    )


def test_subsets_keep_images_labels_and_maps_together(dataset):
    for part, indices in ((dataset.head(2), [0, 1]), (dataset.subset(np.array([1, 4])), [1, 4])):
        assert isinstance(part, SegmentedDataset)
        assert part.classes is CLASSES
        assert part.labels.tolist() == part.stored_labels.tolist() == indices
        for position, index in enumerate(indices):
            assert torch.equal(part[position], dataset[index])
            assert torch.equal(part.label_map(position), dataset.label_map(index))
    fingerprints = {part.fingerprint for part in (dataset, dataset.head(2), dataset.subset(np.array([1, 4])))}
    assert len(fingerprints) == 3
    assert dataset.subset(np.arange(5)).fingerprint == dataset.fingerprint


def test_mirroring_swaps_left_and_right_classes():
    maps = torch.tensor([[[0, 1, 3], [2, 2, NO_CLASS]]], dtype=torch.uint8)
    mirrored = mirror_map(maps, CLASSES)
    assert mirrored.tolist() == [[[3, 2, 0], [NO_CLASS, 1, 1]]]
    assert mirrored.dtype == torch.uint8
    assert torch.equal(mirror_map(mirrored, CLASSES), maps)
    assert torch.equal(mirror_map(maps, MapClasses(CLASSES.names)), maps.flip(-1))


def test_colors_equal_pascal_vocs():
    """From the published table: aeroplane 1, chair 9, person 15, television 20, border 255."""
    colors = distinct_colours(256)
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        9: (192, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {number: tuple(colors[number].tolist()) for number in expected} == expected
    assert len(np.unique(colors, axis=0)) == 256


@pytest.mark.parametrize("background", [True, False])
def test_colored_maps(background):
    classes = MapClasses(CLASSES.names, background=background)
    maps = torch.tensor([[[0, 3], [NO_CLASS, 2]]], dtype=torch.uint8)
    picture = colour_map(maps, classes)
    assert (picture.dtype, picture.shape) == (torch.uint8, (1, 3, 2, 2))
    assert picture[0, :, 0, 1].tolist() == classes.palette[3].tolist()
    assert picture[0, :, 1, 0].tolist() == [0, 0, 0]
    assert (picture[0, :, 0, 0].sum() == 0) == background
    assert classes.palette.shape == (4, 3)
    assert classes.count == 4
