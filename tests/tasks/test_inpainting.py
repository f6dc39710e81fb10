"""Pasting known pixels, and errors inside the holes."""

import numpy as np
import pytest
import torch

from tasks.hole_scores import HoleErrors, paste_known


def random(shape, seed):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


SAMPLES, ORIGINALS, HOLES = random((5, 3, 6, 7), 0), random((5, 3, 6, 7), 1), random((5, 1, 6, 7), 2) > 150


def test_known_pixels_are_pasted_exactly():
    pasted = paste_known(SAMPLES, ORIGINALS, HOLES)
    assert pasted.dtype == torch.uint8
    assert torch.equal(pasted, torch.where(HOLES, SAMPLES, ORIGINALS))


@pytest.mark.parametrize(
    ("feather", "expected"),
    [
        (0, [0, 0, 0, 100, 100, 0, 0, 0]),
        (1, [0, 0, 50, 100, 100, 50, 0, 0]),
        (3, [25, 50, 75, 100, 100, 75, 50, 25]),
    ],
)
def test_feathering_of_a_row_equals_values_computed_by_hand(feather, expected):
    holes = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    holes[..., 3:5] = True
    sample, original = torch.full((1, 1, 1, 8), 100, dtype=torch.uint8), torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
    assert paste_known(sample, original, holes, feather).flatten().tolist() == expected


def test_feathering_changes_only_pixels_near_the_hole():
    sample, original = (
        torch.full((1, 3, 9, 9), 200, dtype=torch.uint8),
        torch.full((1, 3, 9, 9), 100, dtype=torch.uint8),
    )
    holes = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    holes[..., 4, 4] = True
    pasted = paste_known(sample, original, holes, feather=2)[0, 0]
    expected = np.full((9, 9), 100)
    expected[2:7, 2:7], expected[3:6, 3:6], expected[4, 4] = 133, 167, 200
    np.testing.assert_array_equal(pasted.numpy(), expected)


def errors_of(places):
    errors = HoleErrors(lambda chosen: HOLES[chosen])
    errors.update(SAMPLES[places], ORIGINALS[places], torch.tensor(places))
    return errors


def test_errors_in_the_holes_equal_numpys():
    images, holes = ORIGINALS.numpy().astype(float), np.broadcast_to(HOLES.numpy(), SAMPLES.shape)
    squared, of_mean = [], []
    for sample, image, hole in zip(SAMPLES.numpy().astype(float), images, holes, strict=True):
        for channel in range(3):
            inside = hole[channel]
            squared += list((sample[channel][inside] - image[channel][inside]) ** 2)
            of_mean += list((image[channel][~inside].mean() - image[channel][inside]) ** 2)
    errors = errors_of([0, 1, 2, 3, 4])
    result = errors.result(errors.totals())
    assert result["psnr_hole"] == pytest.approx(10 * np.log10(255**2 / np.mean(squared)))
    assert result["psnr_hole_mean_colour"] == pytest.approx(10 * np.log10(255**2 / np.mean(of_mean)))


def test_sums_over_processes_equal_one_pass():
    parts, whole = [errors_of([0, 3]), errors_of([4]), errors_of([1, 2])], errors_of([0, 1, 2, 3, 4])
    totals = sum(part.totals() for part in parts)
    torch.testing.assert_close(totals, whole.totals(), rtol=1e-14, atol=0)
    assert parts[0].result(totals) == pytest.approx(whole.result(whole.totals()))


def test_an_image_without_known_pixels_is_handled():
    """Cropping the padding may leave only hole pixels."""
    holes = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    holes[1, 0, 0] = False
    errors = HoleErrors(lambda places: holes[places])
    errors.update(random((2, 3, 4, 4), 3), random((2, 3, 4, 4), 4), torch.arange(2))
    assert all(np.isfinite(value) for value in errors.result(errors.totals()).values())
