import numpy as np
import pytest
from PIL import Image

from datasets_prep.tiles.__main__ import cut_tiles


def gradient(width, height):
    """The red channel is the column, the green one the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def corners(tiles):
    return [tile.getpixel((0, 0))[:2] for tile in tiles]


def test_the_tiles_of_the_whole_picture_cover_it_and_overlap_evenly():
    tiles = list(cut_tiles(gradient(40, 16), 16, (16,)))
    assert corners(tiles) == [(0, 0), (12, 0), (24, 0)]
    assert {tile.size for tile in tiles} == {(16, 16)}


@pytest.mark.parametrize(("scales", "count"), [((8,), 2), ((8, 16), 2 + 6), ((8, 16, 32), 2 + 6)])
def test_a_picture_is_cut_at_every_scale_up_to_its_own(scales, count):
    assert len(list(cut_tiles(gradient(24, 16), 8, scales))) == count


def test_the_script_refuses_impossible_folders_and_scales(tmp_path, call):
    gradient(20, 20).save(tmp_path / "a.png")
    script = "datasets_prep/tiles/__main__.py"
    source = ["--source", tmp_path, "--output", tmp_path / "new", "--tile_size", 8]
    assert "--scales 4 is smaller than a tile" in call(script, [*source, "--scales", 4])[2]
    assert "expected the name of a new folder" in call(script, ["--source", tmp_path, "--output", tmp_path])[2]
    assert "expected a folder of pictures" in call(script, ["--source", tmp_path / "none"])[2]
    code, out, _ = call(script, [*source, "--scales", 8, 16])
    assert code == 0
    assert "cut 1 pictures into 5 tiles of 8 pixels" in out
    assert len(list((tmp_path / "new").glob("*.png"))) == 5
