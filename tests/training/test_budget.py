import itertools
import json

import pytest
import torch

from options import UsageError
from runtime.distributed import Processes
from training import budget
from training.budget import Forecast, recorded_steps, steps_within, undone


def test_the_steps_that_fit_are_counted_after_warmup():
    """Two slow steps of 5 seconds, then steps of 0.5 seconds: 100 s - 2 x 5 s - 10 x 0.5 s leaves 170 steps."""
    now, taken = [0.0], []

    def run_step():
        taken.append(None)
        now[0] += 5.0 if len(taken) <= 2 else 0.5

    assert steps_within(100.0, run_step, clock=lambda: now[0]) == 170
    assert len(taken) == 12


def test_at_least_one_step_fits():
    ticks = itertools.count()
    assert steps_within(0.0, lambda: None, clock=lambda: next(ticks)) == 1


def test_steps_are_undone():
    class State:
        def __init__(self):
            self.weights = torch.zeros(2)

        def content(self, processes):
            return {"weights": self.weights}

        def restore(self, content, processes):
            self.weights.copy_(content["weights"])

    state = State()
    with undone(state):
        state.weights += 1
    assert torch.equal(state.weights, torch.zeros(2))


def test_the_number_is_recorded_for_its_minutes(tmp_path):
    assert recorded_steps(tmp_path, 2.0, lambda: 7, Processes()) == 7
    assert recorded_steps(tmp_path, 2.0, lambda: pytest.fail("measured again"), Processes()) == 7
    assert recorded_steps(tmp_path, 3.0, lambda: 9, Processes()) == 9
    assert json.loads((tmp_path / "budget.json").read_text()) == {"minutes": 3.0, "steps": 9}
    (tmp_path / "budget.json").write_text('{"minutes": 3.0}')
    with pytest.raises(UsageError, match="delete it to measure"):
        recorded_steps(tmp_path, 3.0, lambda: 9, Processes())


def test_the_forecast_is_printed_once_after_the_first_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    forecast = Forecast(step=1000, last_step=4600)
    now[0] += 30
    forecast.print_once(1030, 64)
    assert "images/s" not in "".join(capsys.readouterr())
    now[0] += 30
    forecast.print_once(1060, 64)  # a step per second
    forecast.print_once(1061, 64)
    printed = "".join(capsys.readouterr())
    assert printed.count("images/s") == 1
    assert "64 images/s; the remaining 3,540 steps take about 59 minutes" in printed
