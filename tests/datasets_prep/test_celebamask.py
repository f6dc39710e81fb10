"""A small tree in CelebAMask-HQ's official layout: real photographs, part masks and merged label maps."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep import celebamask
from datasets_prep.celebamask import merge_parts, merge_tree
from datasets_prep.datasets import DatasetOptions
from datasets_prep.images import read_image
from datasets_prep.label_maps.celebamask_hq import CELEBA_CLASSES, PARTS
from datasets_prep.label_maps.datasets import open_segmentation
from options import UsageError

NUMBERS = [*range(15), 1999, 2000, 4001, 27000, 29999]  # 20 images, with masks in four folders
SIDE = 64


def part_mask(box, shape=(SIDE // 2, SIDE // 2)):
    mask = np.zeros(shape, np.uint8)
    top, bottom, left, right = box
    mask[top:bottom, left:right] = 255
    return mask


def masks_of(number):
    """The head, an ear partly covered by hair, an eye inside the skin, and for some images a hat."""
    shift = number % 5
    masks = {
        "skin": part_mask((4, 28, 4 + shift, 24)),
        "l_eye": part_mask((10, 12, 8 + shift, 12 + shift)),
        "r_ear": part_mask((8, 16, 22, 28)),
        "hair": part_mask((2, 12, 18, 30)),
    }
    return masks | ({"hat": part_mask((0, 6, 0, 32))} if number % 2 else {})


@pytest.fixture
def tree(tmp_path, squares):
    root = tmp_path / "data" / "CelebAMask-HQ"
    (root / "CelebA-HQ-img").mkdir(parents=True)
    for number in NUMBERS:
        Image.fromarray(squares[number % 24]).save(root / "CelebA-HQ-img" / f"{number}.jpg", quality=95)
        folder = root / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        folder.mkdir(parents=True, exist_ok=True)
        for part, mask in masks_of(number).items():
            Image.fromarray(mask).convert("RGB").save(folder / f"{number:05d}_{part}.png")
    return root


def open_split(datadir, split="train", size=32, **settings):
    return open_segmentation(DatasetOptions("celeba", str(datadir), size, **settings), split)


def test_classes_equal_lfms():
    assert CELEBA_CLASSES.count == 19
    expected = "background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r"
    assert CELEBA_CLASSES.names == (*expected.split(), "neck_l", "neck", "cloth")
    assert CELEBA_CLASSES.mirrored == ((4, 5), (6, 7), (8, 9))


def test_later_parts_cover_earlier_ones():
    masks = [None] * 18
    masks[0] = np.array([[255, 255, 255, 0]], np.uint8)  # skin
    masks[12] = np.array([[0, 1, 255, 0]], np.uint8)  # hair with one faint pixel
    masks[17] = np.array([[0, 0, 7, 0]], np.uint8)  # cloth
    merged = merge_parts(masks)
    assert merged.tolist() == [[1, 13, 18, 0]]
    assert merged.dtype == np.uint8


def test_parts_are_merged_in_order():
    """Part k covers column k and all columns after it, so it is the topmost part in column k."""
    masks = [np.arange(18)[None] >= number for number in range(18)]
    assert merge_parts(masks).tolist() == [list(range(1, 19))]
    assert merge_parts(masks[::-1]).tolist() == [[18] * 18]


def test_merged_maps_are_exact(tree):
    assert merge_tree(tree, 2) == (20, 20)
    assert sorted(path.name for path in (tree / "masks").iterdir()) == sorted(f"{number}.png" for number in NUMBERS)
    for number in NUMBERS:
        parts = masks_of(number)
        with Image.open(tree / "masks" / f"{number}.png") as image:
            assert image.mode == "L"
            found = np.asarray(image)
        expected = np.zeros((32, 32), np.uint8)
        for name in ("skin", "l_eye", "r_ear", "hair", "hat"):
            if name in parts:
                expected[parts[name] > 0] = PARTS.index(name) + 1
        np.testing.assert_array_equal(found, expected)


def test_merging_resumes_where_it_stopped(tree, monkeypatch):
    """Merging stops at a damaged mask. The maps written before remain, and none is partially written."""
    damaged = tree / "CelebAMask-HQ-mask-anno" / "1" / "02000_hair.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:60])
    with pytest.raises(UsageError, match=r"cannot read the mask .*02000_hair\.png.*damaged"):
        merge_tree(tree, 1)
    made = {path.name: path.read_bytes() for path in (tree / "masks").iterdir()}
    assert "0.png" in made
    assert "2000.png" not in made
    for path in (tree / "masks").iterdir():
        with Image.open(path) as image:
            image.load()
    damaged.write_bytes(whole)
    (tree / "masks" / "0.png").write_bytes(b"kept as it is")
    assert merge_tree(tree, 2) == (20 - len(made), 20)
    assert (tree / "masks" / "0.png").read_bytes() == b"kept as it is"
    assert all((tree / "masks" / name).read_bytes() == made[name] for name in made if name != "0.png")
    assert merge_tree(tree, 2) == (0, 20)


def test_a_failed_write_leaves_nothing(tree, monkeypatch):
    def save(self, path, format):
        path.write_bytes(b"half")
        raise OSError("interrupted")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="interrupted"):
        merge_tree(tree, 2)
    assert list((tree / "masks").iterdir()) == []


def test_images_with_missing_or_wrong_masks_are_named(tree):
    folder = tree / "CelebAMask-HQ-mask-anno" / "0"
    Image.fromarray(part_mask((0, 4, 0, 4), (16, 16))).save(folder / "00003_hair.png")
    with pytest.raises(UsageError, match=r"image 3: .*found the sizes \[\(16, 16\), \(32, 32\)\]"):
        merge_tree(tree, 1)
    for path in folder.glob("00003_*"):
        path.unlink()
    with pytest.raises(UsageError, match="image 3: .*00003_<part>.png.*found none"):
        merge_tree(tree, 1)


def test_command(tree, monkeypatch, capsys):
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["celebamask", str(tree.parent), "--num_workers", "2"])
        celebamask.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "20 maps, 20 of them new",
        "20 maps, 0 of them new",
    ]


def test_splits_by_number(tree):
    merge_tree(tree, 2)
    for datadir in (tree, tree.parent):
        train, validation = open_split(datadir), open_split(datadir, "validation")
        assert (len(train), len(validation)) == (18, 2)
        for dataset, numbers in ((train, NUMBERS[:18]), (validation, NUMBERS[18:])):
            for index, number in enumerate(numbers):
                assert torch.equal(dataset[index], read_image(tree / "CelebA-HQ-img" / f"{number}.jpg", 32))
                with Image.open(tree / "masks" / f"{number}.png") as image:
                    np.testing.assert_array_equal(dataset.label_map(index).numpy(), np.asarray(image))
    assert train.fingerprint != validation.fingerprint
    assert (train.facts.name, train.facts.flips, train.facts.class_names) == ("celeba", True, ())
    assert open_split(tree, "validation", 64).label_map(0).shape == (64, 64)


def test_missing_files_are_named(tree, tmp_path):
    with pytest.raises(UsageError, match=r"expected the folder CelebAMask-HQ/CelebA-HQ-img in"):
        open_split(tmp_path)
    with pytest.raises(UsageError, match=r"18 of 18 label maps are missing.*python -m datasets_prep\.celebamask"):
        open_split(tree)
    for path in (tree / "CelebA-HQ-img").glob("1*.jpg"):
        path.unlink()
    for path in (tree / "CelebA-HQ-img").glob("2*.jpg"):
        path.unlink()
    with pytest.raises(UsageError, match="too few to hold out a tenth"):
        open_split(tree)


def test_bad_maps_can_be_skipped(tree):
    merge_tree(tree, 2)
    (tree / "masks" / "3.png").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"cannot read the image .*3\.png"):
        open_split(tree).label_map(3)
    kept = open_split(tree, skip_bad_images=True)
    assert len(kept) == 17
    whole = open_split(tree)
    assert torch.equal(kept.label_map(3), whole.label_map(4))
    assert torch.equal(kept[3], whole[4])
    assert (
        open_split(tree, "validation", skip_bad_images=True).fingerprint == open_split(tree, "validation").fingerprint
    )
