"""Throughput of a run."""

from types import SimpleNamespace

import pytest
import torch

from runtime.distributed import Processes
from training.clock import Clock


def test_throughput_after_a_resumption_is_of_the_steps_since_but_means_are_of_all(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state = SimpleNamespace(step=143, seconds=100.0, sums=torch.tensor([86.0, 43.0, 0.0, 43.0]))  # 43 steps before
    clock = Clock(state)
    state.sums += torch.tensor([14.0, 7.0, 0.0, 7.0])
    state.step, now[0] = 150, 64.0
    values = clock.lap(128, Processes())
    assert values["images_per_s"] == pytest.approx(7 * 128 / 14)
    assert (values["loss"], values["grad_norm"], values["seconds"]) == pytest.approx((2.0, 1.0, 114.0))
    state.sums += torch.tensor([10.0, 10.0, 0.0, 10.0])
    state.step, now[0] = 160, 84.0
    assert clock.lap(128, Processes())["images_per_s"] == pytest.approx(10 * 128 / 20)
