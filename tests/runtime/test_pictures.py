import numpy as np
import pytest
import torch
from PIL import Image

from options import UsageError
from runtime.pictures import GridOptions, read_sheet, save_sheet


@pytest.mark.parametrize(
    ("options", "num_classes", "columns", "count"),
    [
        (GridOptions(), 1, 8, 64),
        (GridOptions(), 2, 2, 16),
        (GridOptions(), 10, 10, 80),
        (GridOptions(), 1000, 10, 80),
        (GridOptions(grid_samples=16), 1, 8, 16),
        (GridOptions(grid_columns=16), 10, 16, 128),
        (GridOptions(grid_samples=128, grid_columns=16), 1, 16, 128),
    ],
)
def test_shape_of_a_grid(options, num_classes, columns, count):
    assert (options.columns(num_classes), options.count(num_classes)) == (columns, count)


def test_a_sheet_is_filled_row_by_row(tmp_path):
    """Five gray images of 56 pixels, too large to be enlarged, three per row, with white lines of 2 pixels."""
    images = (10 * torch.arange(5, dtype=torch.uint8)).view(5, 1, 1, 1).expand(5, 1, 56, 56)
    save_sheet(images, tmp_path / "sheet.png", 3)
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2 * 58 + 2, 3 * 58 + 2)
    tiles = [pixels[2 + 58 * (i // 3) :, 2 + 58 * (i % 3) :][:56, :56] for i in range(5)]
    assert [(tile.min(), tile.max()) for tile in tiles] == [(10 * i, 10 * i) for i in range(5)]
    assert pixels[0].tolist() == [255] * 176


@pytest.mark.parametrize(
    ("side", "channels", "count", "columns"), [(28, 1, 7, 3), (56, 3, 4, 4), (20, 3, 5, 8), (9, 1, 1, 1)]
)
def test_a_sheet_can_be_read_back(side, channels, count, columns, tmp_path):
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
    save_sheet(images, tmp_path / "sheet.png", columns)
    assert torch.equal(read_sheet(tmp_path / "sheet.png", side, channels), images)


def test_what_is_no_sheet_is_refused(tmp_path):
    save_sheet(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), tmp_path / "sheet.png", 2)
    with pytest.raises(UsageError, match="expected a grid of 32 x 32 images"):
        read_sheet(tmp_path / "sheet.png", 32, 1)
    (tmp_path / "sheet.png").write_bytes(b"text")
    with pytest.raises(UsageError, match="cannot read"):
        read_sheet(tmp_path / "sheet.png", 28, 1)
