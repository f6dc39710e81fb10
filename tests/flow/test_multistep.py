import numpy as np
import pytest
import torch

from flow.multistep import mean_weights
from flow.solvers import SolverOptions, solve


def gaussian_velocity(t, x):
    """Velocity for data N(0.7, 0.4^2). Its flow turns noise z into 0.7 + 0.4 z."""
    variance = (1 - t) ** 2 * 0.16 + t**2
    return (t - (1 - t) * 0.16) / variance * (x - (1 - t) * 0.7) - 0.7


def test_weights_on_a_uniform_grid_equal_the_textbooks():
    """Hairer, Norsett & Wanner 1993, section III.1, eq. 1.5."""
    assert mean_weights([0.8], 0.7) == pytest.approx([1])
    assert mean_weights([0.8, 0.9], 0.7) == pytest.approx([3 / 2, -1 / 2])
    assert mean_weights([0.8, 0.9, 1.0], 0.7) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    assert mean_weights([0.7, 0.8, 0.9, 1.0], 0.6) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize("nodes", [[0.5, 0.9], [0.5, 0.6, 1.0], [0.3, 0.35, 0.8, 1.0]])
def test_weights_on_a_nonuniform_grid_integrate_polynomials(nodes):
    polynomial = np.polynomial.Polynomial([0.7, -2.0, 3.0, 1.5][: len(nodes)])
    integral, end = polynomial.integ(), 0.1
    mean = (integral(end) - integral(nodes[0])) / (end - nodes[0])
    assert np.dot(mean_weights(nodes, end), polynomial(np.array(nodes))) == pytest.approx(mean, abs=1e-12)


NOISE = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error_of_dpm(steps):
    return (solve(gaussian_velocity, NOISE, SolverOptions("dpm", steps)).x - (0.7 + 0.4 * NOISE)).abs().max().item()


def test_dpm_solver_has_second_order_up_to_a_logarithm():
    """Near data, steps of equal length are long in log SNR, so the error decreases like log(N) / N^2."""
    coarse, fine = error_of_dpm(512), error_of_dpm(1024)
    assert coarse / fine == pytest.approx(4 * np.log(512) / np.log(1024), rel=0.04)
    assert fine < 4e-5


def test_dpm_solver_is_exact_for_a_constant_data_prediction():
    """With a single image as data, the data prediction is constant, and one step suffices."""
    for steps in (1, 2, 5):
        x = solve(lambda t, x: (x - 0.3) / t, NOISE, SolverOptions("dpm", steps)).x
        torch.testing.assert_close(x, torch.full_like(NOISE, 0.3), rtol=0, atol=1e-14)
