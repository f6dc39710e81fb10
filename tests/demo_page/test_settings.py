import dataclasses

import pytest

from demo_page.settings import Limits
from options import UsageError
from tests.demo_models import SETTINGS


def test_controls_become_options():
    settings = dataclasses.replace(SETTINGS, steps=5.0, scale=2, shift=3)  # as JSON numbers arrive
    solver, guidance = settings.solver(), settings.guidance()
    assert (solver.method, solver.num_steps, solver.time_shift) == ("dpm", 5, 3.0)
    assert (guidance.cfg_scale, guidance.cfg_interval) == (2.0, (0.2, 0.7))
    assert settings.solver(method="euler").method == "euler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rk5"}, "unknown --method 'rk5'"),
        ({"steps": 0}, "--num_steps of at least 1"),
        ({"low": 0.8}, "two times 0 <= LOW <= HIGH <= 1"),
        ({"scale": -1}, "--cfg_scale must be at least 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    settings = dataclasses.replace(SETTINGS, **changes)
    with pytest.raises(UsageError, match=message):
        settings.solver(), settings.guidance()


def test_limits():
    limits = Limits(samples=4, steps=10, seconds=1)
    limits.check(4, 10)
    for samples, steps, message in ((5, 10, "1 to 4 samples"), (0, 10, "but 0 were"), (4, 11, "at most 10 steps")):
        with pytest.raises(UsageError, match=message):
            limits.check(samples, steps)
