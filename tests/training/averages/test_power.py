"""Power averages: their widths, and linear combinations that match other widths."""

import math

import pytest
import torch
from torch import nn

from checkpoints.header import PowerAverage
from training.averages.power import LARGEST_WIDTH, SMALLEST_WIDTH, combine, exponent_of, width_of
from training.ema import PowerEma

# Exponents to two decimals, solved by hand from the cubic equation.
EXPONENTS = {0.05: 16.97, 0.075: 10.29, 0.10: 6.94, 0.15: 3.56, 0.20: 1.83, 0.25: 0.72}


@pytest.mark.parametrize(("sigma_rel", "exponent"), EXPONENTS.items())
def test_exponents_of_widths(sigma_rel, exponent):
    assert exponent_of(sigma_rel) == pytest.approx(exponent, abs=0.006)


@pytest.mark.parametrize("sigma_rel", [SMALLEST_WIDTH, 0.03, 0.1, LARGEST_WIDTH])
def test_the_exponent_solves_the_cubic_equation_and_has_the_width(sigma_rel):
    gamma, inverse = exponent_of(sigma_rel), sigma_rel**-2
    assert abs(gamma**3 + 7 * gamma**2 + (16 - inverse) * gamma + 12 - inverse) < 1e-9 * (gamma + 1) ** 3
    assert width_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_width_is_the_standard_deviation_of_the_profile():
    """A uniform average has the standard deviation 1 / sqrt(12)."""
    assert width_of(0) == pytest.approx(1 / math.sqrt(12))
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = 4.5 * tau**3.5
    density /= density.sum()
    mean = (density * tau).sum()
    assert ((density * tau**2).sum() - mean**2).sqrt().item() == pytest.approx(width_of(3.5), rel=1e-6)


class Walk:
    """A network with one float64 weight vector, which `step` sets to `values` of the step's number."""

    def __init__(self, values):
        self.network = nn.Linear(8, 1, bias=False).double()
        self.values = values
        self.set(0)

    def set(self, step):
        with torch.no_grad():
            self.network.weight.copy_(self.values(step))


def track(values, sigma_rel, steps, every=1):
    """The power average after each `every`-th step, by step."""
    walk = Walk(values)
    average = PowerEma(walk.network, sigma_rel)
    found = {}
    for step in range(1, steps + 1):
        walk.set(step)
        average.update(walk.network)
        if step % every == 0:
            found[step] = average.weights["weight"].clone()
    return found


def drifting(step):
    """Weights that converge while they oscillate at several frequencies."""
    rates = torch.linspace(0.01, 0.2, 8, dtype=torch.float64)
    return (1 + torch.exp(-0.01 * torch.tensor(step).double()) * torch.cos(rates * step))[None]


def test_a_constant_network_is_its_average():
    assert torch.equal(track(lambda step: torch.full((1, 8), 0.3), 0.1, 50)[50], torch.full((1, 8), 0.3).double())


def test_the_first_update_copies_the_weights():
    assert torch.equal(track(lambda step: torch.full((1, 8), float(step)), 0.05, 1)[1], torch.ones(1, 8).double())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.15])
def test_the_average_is_the_integral_of_the_profile(sigma_rel):
    power, steps = exponent_of(sigma_rel) + 1, 300
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    weights = (ends**power).diff()
    expected = sum(weight * drifting(step) for step, weight in enumerate(weights, start=1))
    torch.testing.assert_close(track(drifting, sigma_rel, steps, steps)[steps], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
def test_mean_and_width_of_the_averaged_steps(sigma_rel):
    """For weights k and k^2 at update k, the average is the mean and the second moment of the averaged updates."""
    steps, gamma = 1000, exponent_of(sigma_rel)
    powers = torch.tensor([1.0, 2.0] * 4, dtype=torch.float64)[None]
    mean, second = track(lambda step: torch.tensor(step).double() ** powers, sigma_rel, steps, steps)[steps][0, :2]
    assert mean.item() == pytest.approx(steps * (gamma + 1) / (gamma + 2), abs=1)
    assert ((second - mean**2).sqrt() / steps).item() == pytest.approx(sigma_rel, rel=1e-2)


def stored(steps, every, convert=lambda value: value, widths=(0.05, 0.10)):
    """Power averages of `drifting` at every `every`-th step: what they are, and their values."""
    tracked = {width: track(drifting, width, steps, every) for width in widths}
    averages = [PowerAverage(width, step) for width, values in tracked.items() for step in values]
    values = [convert(value) for values in tracked.values() for value in values.values()]
    return averages, torch.stack(values).double()


@pytest.mark.parametrize("wanted", [PowerAverage(0.05, 640), PowerAverage(0.10, 640), PowerAverage(0.10, 320)])
def test_a_stored_average_is_rebuilt_exactly(wanted):
    averages, values = stored(640, 20)
    coefficients, error = combine(averages, wanted)
    rebuilt = torch.einsum("n, nij -> ij", coefficients, values)
    torch.testing.assert_close(rebuilt, values[averages.index(wanted)], rtol=1e-6, atol=0)
    assert error < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.055, 0.075, 0.09, 0.15])
@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [(lambda value: value, 1e-3), (lambda value: value.half(), 1.5e-3)],
    ids=["float64", "half"],
)
def test_any_width_is_rebuilt_within_a_thousandth_of_a_tracked_average(sigma_rel, convert, tolerance):
    averages, values = stored(640, 20, convert)
    coefficients, error = combine(averages, PowerAverage(sigma_rel, 640))
    rebuilt = torch.einsum("n, nij -> ij", coefficients, values)
    direct = track(drifting, sigma_rel, 640, 640)[640]
    assert ((rebuilt - direct).norm() / direct.norm()).item() < tolerance
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-12)
    assert coefficients.norm() < 1.1  # rounding errors of stored weights do not grow
    assert 1e-5 < error < 3e-3


def test_the_error_falls_with_the_number_of_snapshots():
    errors = []
    for every in (160, 40, 10):
        averages = [PowerAverage(width, step) for width in (0.05, 0.10) for step in range(every, 641, every)]
        errors.append(combine(averages, PowerAverage(0.075, 640)).error)
    assert errors[0] > 8 * errors[1] > 64 * errors[2]


def test_the_reported_error_is_the_profiles():
    averages = [PowerAverage(0.05, 300), PowerAverage(0.10, 600), PowerAverage(0.10, 640)]
    wanted = PowerAverage(0.075, 640)
    coefficients, error = combine(averages, wanted)
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000 * 640

    def profile(average):
        gamma = exponent_of(average.sigma_rel)
        return torch.where(tau < average.updates, (gamma + 1) * (tau / average.updates) ** gamma / average.updates, 0)

    combined = sum(c * profile(average) for c, average in zip(coefficients, averages, strict=True))
    expected = ((combined - profile(wanted)).norm() / profile(wanted).norm()).item()
    assert error == pytest.approx(expected, rel=1e-3)


def test_equal_averages_share_their_coefficient():
    """Snapshots with steps between them that were all skipped."""
    averages = [PowerAverage(0.05, 100), PowerAverage(0.10, 100)]
    coefficients, error = combine([*averages, *averages], PowerAverage(0.10, 100))
    torch.testing.assert_close(coefficients, torch.tensor([0, 0.5, 0, 0.5]).double(), atol=1e-6, rtol=0)
    assert error < 1e-6


def test_long_runs_and_small_widths_do_not_overflow():
    averages = [PowerAverage(width, step) for width in (0.005, 0.01) for step in range(10**7, 10**8 + 1, 10**7)]
    coefficients, _ = combine(averages, PowerAverage(0.01, 10**8))
    assert coefficients[-1].item() == pytest.approx(1, abs=1e-6)
