"""The per-sample embedded pair of orders 5 and 4, compared with closed forms and with itself in other batches."""

import math

import pytest
import torch

from flow.adaptive import DORMAND_PRINCE, ERROR_WEIGHTS, FOURTH_ORDER
from flow.solvers import SolverOptions, solve
from options import UsageError

RATES = torch.tensor([0.1, 0.5, 3.0, 30.0], dtype=torch.float64)
X = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Oscillation:
    """dx/dt = rate cos(2 pi rate t) with one rate per sample. Records the number of rows of each call."""

    def __init__(self, rates):
        self.rates, self.calls = rates, []

    def __call__(self, t, x):
        self.calls.append(len(x))
        rate = self.rates.to(x.dtype)
        return (rate * torch.cos(2 * math.pi * rate * t)).view(-1, 1, 1, 1).expand_as(x)

    def select_rows(self, rows):
        part = Oscillation(self.rates[rows])
        part.calls = self.calls
        return part


def exact(x):
    rates = RATES[: len(x)]
    return x - (torch.sin(2 * math.pi * rates) / (2 * math.pi)).view(-1, 1, 1, 1)


def test_the_tableau_satisfies_its_order_conditions():
    """Checks sum b c^k = 1 / (k + 1) for k < 5, the same up to order 4 for the embedded method, and row sums equal to c."""
    nodes = torch.tensor(DORMAND_PRINCE.nodes, dtype=torch.float64)
    for weights, order in ((DORMAND_PRINCE.weights, 5), (FOURTH_ORDER, 4)):
        for power in range(order):
            assert (torch.tensor(weights, dtype=torch.float64) @ nodes**power).item() == pytest.approx(1 / (power + 1))
    for node, row in zip(DORMAND_PRINCE.nodes, DORMAND_PRINCE.stages, strict=True):
        assert sum(row) == pytest.approx(node)
    assert sum(ERROR_WEIGHTS) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_every_sample_reaches_the_tolerance(tolerance):
    solution = solve(Oscillation(RATES), X, SolverOptions(atol=tolerance, rtol=tolerance))
    assert (solution.x - exact(X)).abs().max() < 20 * tolerance
    assert (solution.evaluations.diff() >= 0).all()  # faster motion needs more evaluations
    assert solution.evaluations[3] > 10 * solution.evaluations[0]


def test_samples_do_not_depend_on_their_batch():
    options = SolverOptions(atol=1e-6, rtol=1e-6)
    together = solve(Oscillation(RATES), X, options)
    for row in range(4):
        alone = solve(Oscillation(RATES[row : row + 1]), X[row : row + 1], options)
        assert torch.equal(alone.x[0], together.x[row])
        assert alone.evaluations[0] == together.evaluations[row]


def test_finished_samples_leave_the_batch():
    velocity = Oscillation(RATES)
    solution = solve(velocity, X, SolverOptions(atol=1e-6, rtol=1e-6))
    assert sum(velocity.calls) == solution.evaluations.sum()
    assert velocity.calls[0] == 4
    assert velocity.calls[-1] == 1
    assert sorted(velocity.calls, reverse=True) == velocity.calls
    assert ((solution.evaluations - 2) % 6 == 0).all()


def test_solving_backwards_returns_to_the_start():
    options = SolverOptions(atol=1e-7, rtol=1e-7)
    there = solve(Oscillation(RATES), X, options, backwards=True).x
    torch.testing.assert_close(solve(Oscillation(RATES), there, options).x, X, rtol=0, atol=1e-5)


def test_a_constant_velocity_needs_few_steps():
    solution = solve(lambda t, x: torch.ones_like(x), X, SolverOptions())
    torch.testing.assert_close(solution.x, X - 1, rtol=0, atol=1e-12)
    assert (solution.evaluations <= 2 + 6 * 4).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_non_finite_velocity_ends_in_nan(broken):
    """Whoever decodes or uses the samples reports them (tests/faults/test_not_finite.py)."""
    assert solve(lambda t, x: torch.full_like(x, broken), X, SolverOptions()).x.isnan().all()


def test_a_tolerance_of_zero_is_refused():
    with pytest.raises(UsageError, match="found no step size that meets --atol 0 and --rtol 0"):
        solve(Oscillation(RATES), X, SolverOptions(atol=0, rtol=0))
