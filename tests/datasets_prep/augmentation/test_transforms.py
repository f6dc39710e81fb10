import pytest
import torch

from datasets_prep.augmentation.transforms import TRANSFORMS, augment, draw_parameters
from models.conditions import AUGMENTATIONS, count_parameters

KINDS = tuple(AUGMENTATIONS)
IMAGE = torch.randint(0, 256, (3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
RAMP = torch.arange(0, 240, 10, dtype=torch.uint8).expand(3, 24, 24)  # brighter to the right


def changed(image, kind, *parameters):
    return augment(image, (kind,), torch.tensor(parameters))


def test_every_kind_has_a_transform_in_the_order_of_the_parameters():
    assert tuple(TRANSFORMS) == KINDS


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_zeros_are_the_image_itself(kinds):
    zeros = torch.zeros(count_parameters(kinds))
    for image in (IMAGE, IMAGE[:1], RAMP):
        assert torch.equal(augment(image, kinds, zeros), image)


def test_a_mirrored_image_is_the_mirror_image():
    assert torch.equal(changed(IMAGE, "flip", 1.0), IMAGE.flip(2))


@pytest.mark.parametrize(("shift", "first", "last"), [(-1.0, 0, 175), (0.0, 27.5, 202.5), (1.0, 55, 230)])
def test_the_strongest_crop_shows_three_quarters_of_the_side(shift, first, last):
    """Of the ramp's pixels 0 to 23, the window covers 18, whose border pixels are a quarter of a pixel inside."""
    row = changed(RAMP, "crop", 1.0, shift, 0.0)[0, 5].float()
    assert row[0].item() == pytest.approx(first, abs=4)
    assert row[-1].item() == pytest.approx(last, abs=4)
    assert torch.all(row.diff() >= 0)


def test_a_vertical_shift_moves_the_window_down():
    upright = RAMP.transpose(1, 2)
    assert torch.equal(changed(upright, "crop", 1.0, 0.0, 1.0), changed(RAMP, "crop", 1.0, 1.0, 0.0).transpose(1, 2))


def test_colors():
    gray = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    assert changed(gray, "color", 1.0, 0.0, 0.0).unique().tolist() == [151]  # a fifth of white
    assert changed(gray, "color", 0.0, 1.0, 0.0).unique().tolist() == [89]  # 27.5 below mid-gray, times the root of 2
    assert torch.equal(changed(gray, "color", 0.0, 0.0, -1.0), gray)
    red = torch.tensor([160, 70, 70], dtype=torch.uint8)[:, None, None]
    assert changed(red, "color", 0.0, 0.0, -1.0).flatten().tolist() == [130, 85, 85]  # half as far from the mean of 100
    assert changed(red, "color", 0.0, 0.0, 1.0).flatten().tolist() == [220, 40, 40]


def test_parameters_lie_in_their_range_and_fill_it():
    table = draw_parameters(KINDS, 200, 4)
    names = [name for kind in KINDS for name in AUGMENTATIONS[kind]]
    assert table.shape == (800, len(names))
    columns = dict(zip(names, table.T, strict=True))
    assert columns["mirrored"].tolist() == [1.0, 0.0, 1.0, 0.0] * 200
    assert 0 <= columns["zoom"].min() < 0.02
    assert 0.98 < columns["zoom"].max() < 1
    for name in ("shift_x", "shift_y"):
        assert torch.all(columns[name].abs() <= columns["zoom"])
        assert columns[name].abs().max() > 0.85
    for name in ("brightness", "contrast", "saturation"):
        assert -1 <= columns[name].min() < -0.98
        assert 0.98 < columns[name].max() < 1


def test_parameters_are_the_same_in_every_run_and_with_other_kinds():
    """Recorded values: with others, cached variants would not be what their parameters say."""
    table = draw_parameters(("flip", "crop"), 3, 2)
    assert torch.equal(table, draw_parameters(KINDS, 3, 2)[:, :4])
    torch.manual_seed(5)
    assert torch.equal(table, draw_parameters(("flip", "crop"), 3, 2))
    assert table[1].tolist() == pytest.approx([0.0, 0.42466462, 0.10587076, 0.39801303])
