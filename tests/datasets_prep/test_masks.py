import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep import masks
from datasets_prep.masks import MASK_KINDS, MaskSetOptions, draw_mask, hole_ratio, mask_set
from options import UsageError

RANDOM = ("strokes", "boxes", "mixed", "outpaint")  # "outpaint" has few distinct masks


def draw_many(kind, size, count, seed=0):
    return torch.stack([draw_mask(kind, size, seed, index) for index in range(count)])


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_mask_depends_only_on_its_arguments(kind):
    expected = draw_many(kind, 32, 4)
    torch.manual_seed(1)  # not on the global random state
    assert torch.equal(draw_mask(kind, 32, 0, 3), expected[3])
    assert expected.dtype == torch.bool
    assert expected.shape == (4, 32, 32)


@pytest.mark.parametrize("kind", RANDOM)
def test_random_masks_differ_by_seed_and_index(kind):
    first, other = draw_many(kind, 64, 8), draw_many(kind, 64, 8, seed=1)
    assert len(torch.cat([first, other]).flatten(1).unique(dim=0)) >= (14 if kind == "outpaint" else 16)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(("size", "count"), [(4, 50), (5, 50), (28, 50), (64, 100)])
def test_no_mask_is_empty_or_covers_everything(kind, size, count):
    ratios = hole_ratio(draw_many(kind, size, count))
    assert ratios.shape == (count,)
    lowest, highest = (0.02, 0.8) if kind in ("strokes", "boxes", "mixed") else (0.15, 0.85)
    assert lowest <= ratios.min()
    assert ratios.max() <= highest


def test_fixed_kinds():
    centre, half, lines = (draw_mask(kind, 8, 0, 0) for kind in ("centre", "half", "lines"))
    assert torch.equal(centre.nonzero(), torch.cartesian_prod(torch.arange(2, 6), torch.arange(2, 6)))
    assert half.any(0).tolist() == half.all(0).tolist() == [False] * 4 + [True] * 4
    assert lines.any(1).tolist() == lines.all(1).tolist() == [False, True] * 4
    assert hole_ratio(torch.stack([centre, half, lines])).tolist() == [0.25, 0.5, 0.5]


def test_mean_hole_ratios_match_the_documentation():
    means = {kind: float(hole_ratio(draw_many(kind, 64, 200)).mean()) for kind in RANDOM}
    expected = {"strokes": 0.22, "boxes": 0.20, "mixed": 0.24, "outpaint": 0.42}
    assert means == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("kind", sorted(MASK_KINDS.keys() - {"lines"}))  # lines are one pixel thick at every size
def test_other_sizes_show_the_same_mask(kind):
    small, large = draw_many(kind, 64, 20), draw_many(kind, 256, 20)
    differences = (large[:, 2::4, 2::4] != small).float().mean((1, 2))
    assert differences.max() < 0.05


def test_outpainting_keeps_a_rectangle_with_one_free_side_or_none():
    kept_sides = set()
    for mask in draw_many("outpaint", 32, 60):
        known = ~mask
        assert torch.equal(known, known.any(1, keepdim=True) & known.any(0, keepdim=True))
        touched = known[0].any(), known[-1].any(), known[:, 0].any(), known[:, -1].any()
        kept_sides.add(tuple(map(bool, touched)))
    one_hidden = {tuple(side != hidden for side in range(4)) for hidden in range(4)}
    assert kept_sides == one_hidden | {(False,) * 4}


def corners(mask):
    """Points where one or three of the four surrounding pixels are holes. Boxes have four, oblique lines many."""
    padded = torch.nn.functional.pad(mask.int(), [1] * 4)
    around = padded[1:, 1:] + padded[1:, :-1] + padded[:-1, 1:] + padded[:-1, :-1]
    return int((around % 2 == 1).sum())


def test_mixed_masks_are_strokes_boxes_or_both():
    most = max(corners(mask) for mask in draw_many("boxes", 128, 60))
    assert min(corners(mask) for mask in draw_many("strokes", 128, 30)) > most
    boxes_alone = np.mean([corners(mask) <= most for mask in draw_many("mixed", 128, 100)])
    assert 0.3 < boxes_alone < 0.5  # the expected fraction is (1 - 0.2) / 2


def test_an_image_too_small_for_masks_is_refused():
    with pytest.raises(UsageError, match=r"at least 4 x 4 .*--image_size 3 was given"):
        draw_mask("boxes", 3, 0, 0)


def test_a_set_without_a_folder_is_drawn():
    drawn = mask_set(MaskSetOptions(mask_kind="strokes", mask_seed=5), 32)
    assert torch.equal(drawn(7), draw_mask("strokes", 32, 5, 7))


def test_a_folders_masks_are_used_in_turn(tmp_path):
    generator = np.random.default_rng(0)
    values = [generator.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(3)]
    for name, value, mode in zip(("b.png", "a.png", "c.bmp"), values, ("L", "RGB", "L"), strict=True):
        Image.fromarray(value).convert(mode).save(tmp_path / name)
    masks_of = mask_set(MaskSetOptions(mask_dir=str(tmp_path)), 16)
    for index, number in enumerate([1, 0, 2, 1, 0]):
        np.testing.assert_array_equal(masks_of(index).numpy(), values[number] >= 128)
    enlarged = mask_set(MaskSetOptions(mask_dir=str(tmp_path)), 32)(0).numpy()
    np.testing.assert_array_equal(enlarged, np.kron(values[1] >= 128, np.ones((2, 2), bool)))


def test_a_mask_of_another_shape_is_cropped_as_images_are(tmp_path):
    values = np.zeros((16, 24), np.uint8)
    values[:, :8] = 255  # half of the eight columns lie outside the central square
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = mask_set(MaskSetOptions(mask_dir=str(tmp_path)), 16)(0)
    assert mask.all(0).tolist() == mask.any(0).tolist() == [True] * 4 + [False] * 12


def test_empty_and_full_masks_are_named(tmp_path):
    with pytest.raises(UsageError, match="no mask images in"):
        mask_set(MaskSetOptions(mask_dir=str(tmp_path)), 16)
    Image.new("L", (16, 16)).save(tmp_path / "0.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    masks_of = mask_set(MaskSetOptions(mask_dir=str(tmp_path)), 16)
    for index, message in enumerate([r"0\.png covers nothing", r"1\.png covers everything", r"cannot read.*2\.png"]):
        with pytest.raises(UsageError, match=message):
            masks_of(index)


def test_command_draws_a_row_of_each_kind(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "masks.png"
    monkeypatch.setattr(sys, "argv", ["masks", str(picture), "--size", "16", "--count", "8"])
    masks.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MASK_KINDS)
    with Image.open(picture) as image:
        assert image.size == (2 + 8 * 18, 2 + len(MASK_KINDS) * 18)
        cells = np.asarray(image)
    first = cells[2:18, 2:18] > 200
    np.testing.assert_array_equal(first, draw_mask("strokes", 16, 0, 0).numpy())
