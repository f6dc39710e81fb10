import itertools
import math

import pytest

from training.schedules import SCHEDULES, learning_rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # at 0, 25, 50, 60, 80 and 100 % of the steps
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.4, 0.2, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 + math.cos(0.6 * math.pi)) / 2, None, 0]),
        ("trapezoid", [1, 1, 1, 1, 0.5, 0]),
    ],
)
def test_learning_rates(schedule, rates):
    for step, rate in zip([0, 25, 50, 60, 80, 100], rates, strict=True):
        if rate is not None:
            assert learning_rate(schedule, 3e-4, step, 100) == pytest.approx(3e-4 * rate, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_never_increase_after_the_warmup_and_never_jump(schedule):
    rates = [learning_rate(schedule, 1.0, step, 1000) for step in range(1001)]
    falls = [earlier - later for earlier, later in itertools.pairwise(rates)]
    assert min(falls) >= 0
    assert max(falls) < 0.004
    assert rates[0] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warmup_is_linear_and_starts_above_zero(schedule):
    bare = [learning_rate(schedule, 2.0, step, 100) for step in range(12)]
    warm = [learning_rate(schedule, 2.0, step, 100, warmup=10) for step in range(12)]
    assert warm == pytest.approx([rate * min(1, (step + 1) / 10) for step, rate in enumerate(bare)])
    assert warm[0] > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "trapezoid"])
def test_final_rate(schedule):
    assert learning_rate(schedule, 1e-3, 100, 100, final=1e-5) == pytest.approx(1e-5)
    assert learning_rate(schedule, 1e-3, 500, 100, final=1e-5) == pytest.approx(1e-5)  # past the last step
    assert learning_rate(schedule, 1e-3, 0, 100, final=1e-5) == pytest.approx(1e-3)


def test_final_rate_above_the_base_is_the_base():
    assert learning_rate("linear", 1e-6, 50, 100, final=1e-3) == pytest.approx(1e-6)


def test_a_run_without_steps():
    assert learning_rate("linear", 1.0, 0, 0) == 1.0
