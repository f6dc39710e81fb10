import numpy as np
import pytest
import torch

from datasets_prep.image_dataset import DatasetFacts
from datasets_prep.images import NO_CLASS
from datasets_prep.label_maps.segmented_dataset import MapClasses
from demo_page.pictures import (
    canvas_side,
    enlarged,
    pad_like,
    painted_hole,
    painted_image,
    painted_map,
    sheet,
    start_map,
)
from options import UsageError
from tests.demo_models import FACTS

CLASSES = MapClasses(("background", "shirt", "shoe", "bag"))
GRAY = DatasetFacts("gray", 16, 1, 14, False, ())


def painting(image, **strokes):
    """An editor's value: the image, and a layer with strokes at slices of the canvas."""
    opaque = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    layer = np.zeros_like(opaque)
    for rows, columns in strokes.values():
        layer[rows, columns] = (255, 0, 0, 255)
    composite = np.where(layer[..., 3:] > 0, layer, opaque)
    return {"background": opaque, "layers": [layer], "composite": composite}


def random_image(channels=3):
    return torch.randint(0, 256, (channels, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "facts"), [(3, FACTS), (1, GRAY)])
def test_an_enlarged_image_comes_back_unchanged(channels, facts):
    image = random_image(channels)
    large = enlarged(image)
    assert large.shape == (448, 448, 3)
    assert torch.equal(painted_image(painting(large), facts), image)


def test_an_uploaded_image_is_cropped_and_made_gray():
    upload = np.zeros((60, 100, 3), np.uint8)
    upload[:, 10:90] = (255, 0, 0)
    found = painted_image(painting(upload), GRAY)
    assert found.shape == (1, 14, 14)
    assert found.unique().tolist() == [76]  # luma of red; the black sides are cropped


def test_transparent_pixels_are_black():
    value = painting(np.full((28, 28, 3), 200, np.uint8))
    value["background"][:14, :, 3] = 0
    found = painted_image(value, FACTS)
    assert (found[:, :7] == 0).all()
    assert (found[:, 7:] == 200).all()


def test_strokes_become_a_hole():
    large = enlarged(random_image())
    block = canvas_side(14) // 14
    hole = painted_hole(painting(large, stroke=(slice(2 * block, 5 * block), slice(0, 3 * block))), 14)
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[2:5, :3] = True
    assert torch.equal(hole, expected)


def test_paintings_that_do_not_suffice_are_named():
    large = enlarged(random_image())
    with pytest.raises(UsageError, match="nothing is brushed"):
        painted_hole(painting(large), 14)
    with pytest.raises(UsageError, match="all of it is brushed"):
        painted_hole(painting(large, stroke=(slice(None), slice(None))), 14)
    with pytest.raises(UsageError, match="no image yet"):
        painted_image(None, FACTS)
    with pytest.raises(UsageError, match="the label map is empty"):
        painted_map(None, CLASSES, 14)


def test_colors_become_classes():
    start = painting(start_map(CLASSES, 14))
    found = painted_map(start, CLASSES, 14)
    assert found.dtype == torch.uint8
    assert found.unique().tolist() == [0, 1]
    assert found[7, 7] == 1
    block = canvas_side(14) // 14
    # Most of the pixels of column 0 and few of column 1 get a color near that of class 3.
    start["composite"][:, : block + block // 4] = (*(np.clip(CLASSES.palette[3].astype(int) + 9, 0, 255)), 255)
    found = painted_map(start, CLASSES, 14)
    assert (found[:, 0] == 3).all()
    assert (found[:, 1] == 0).all()


def test_transparent_pixels_of_maps():
    value = painting(start_map(CLASSES, 14))
    value["composite"][:224, :, 3] = 0
    assert (painted_map(value, CLASSES, 14)[:7] == 0).all()
    without = MapClasses(("a", "b"), background=False)
    value = painting(start_map(without, 14))
    value["composite"][:224, :, 3] = 0
    found = painted_map(value, without, 14)
    assert (found[:7] == NO_CLASS).all()
    assert set(found[7:].unique().tolist()) == {0, 1}


def test_padding():
    padded = pad_like(torch.ones(2, 3, 14, 14), FACTS)
    assert padded.shape == (2, 3, 16, 16)
    assert padded.sum() == 2 * 3 * 14 * 14
    assert pad_like(torch.ones(3, 8, 8), DatasetFacts("x", 8, 3, None, False, ())).shape == (3, 8, 8)


def test_sheets_have_rows_of_equal_length():
    for count, columns, rows in ((1, 1, 1), (5, 5, 1), (6, 3, 2), (8, 4, 2), (16, 4, 4)):
        picture = sheet(torch.zeros(count, 1, 14, 14, dtype=torch.uint8))
        assert (round(picture.width / 128), round(picture.height / 128)) == (columns, rows), count
