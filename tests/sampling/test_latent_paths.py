import math
from itertools import pairwise

import torch

from flow.solvers import SolverOptions, solve
from sampling.latent_paths import Recorder, spherical

FIRST, LAST = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_spherical_interpolation_starts_and_ends_exactly():
    torch.testing.assert_close(spherical(FIRST, LAST, 0.0), FIRST)
    torch.testing.assert_close(spherical(FIRST, LAST, 1.0), LAST)


def test_spherical_interpolation_keeps_the_norm_and_has_equal_angles():
    first = FIRST / FIRST.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    last = LAST / LAST.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    points = [spherical(first, last, share).flatten(1) for share in (0, 0.25, 0.5, 0.75, 1)]
    for point in points:
        torch.testing.assert_close(point.norm(dim=1), torch.ones(3, dtype=torch.float64))
    angles = [torch.arccos((a * b).sum(1)) for a, b in pairwise(points)]
    whole = torch.arccos((points[0] * points[-1]).sum(1))
    for angle in angles:
        torch.testing.assert_close(angle, whole / 4)


def test_spherical_interpolation_between_equal_noises_is_constant():
    torch.testing.assert_close(spherical(FIRST, FIRST, 0.3), FIRST, rtol=1e-6, atol=1e-6)


def test_recorded_points_lie_on_the_trajectory():
    """For v = x / (t + 0.1), x_t is (t + 0.1) / 1.1 of the noise, and the data prediction is 1 / 11 of it at all times."""
    for method, rounding in (("euler", 1e-12), ("dopri5", 1e-4)):
        recorder = Recorder(lambda t, x: x / (t.view(-1, 1, 1, 1) + 0.1), 3)
        solve(recorder, FIRST, SolverOptions(method, 8))
        for row in range(3):
            (start, guess), (middle, _) = recorder.nearest(row, [1.0, 0.5])
            torch.testing.assert_close(start, FIRST[row])
            torch.testing.assert_close(guess, FIRST[row] / 11)
            share = (middle / FIRST[row]).mean().item()
            assert math.isclose(share, 0.6 / 1.1, abs_tol=rounding if method == "euler" else 0.2)
            torch.testing.assert_close(middle, share * FIRST[row], rtol=0, atol=rounding)
