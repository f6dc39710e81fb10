import json
import math
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.distributed import Processes
from training.metrics_log import Clock, MetricsLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder, step, steps):
    log = MetricsLog(folder, step)
    for number in steps:
        log.write(number, "train", {"loss": number / 10, "note": "text"})
    log.close()


def test_one_json_object_per_line(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(5, "train", {"loss": 0.5, "skipped": 0.0})
    # The line is written before the log is closed.
    assert lines(tmp_path) == [{"step": 5, "kind": "train", "loss": 0.5, "skipped": 0.0}]
    log.write(5, "validation", {"loss": 0.1 + 0.2})
    log.close()
    assert lines(tmp_path)[1] == {"step": 5, "kind": "validation", "loss": 0.30000000000000004}


def test_entries_beyond_the_step_that_a_run_resumes_from_are_dropped(tmp_path):
    record(tmp_path, 0, [1, 2, 3, 4])
    record(tmp_path, 2, [3, 4, 5])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_new_run_drops_all_entries(tmp_path):
    record(tmp_path, 0, [1, 2])
    record(tmp_path, 0, [])
    assert lines(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 4, "ki', "[4]", "{}", "4", '{"step": "4"}', ""])
def test_a_line_truncated_by_a_crash_is_dropped(tmp_path, torn):
    record(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    record(tmp_path, 2, [3])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_tensorboard_shows_values_of_the_last_resumption(tmp_path):
    record(tmp_path, 0, [1, 2, 3])
    log = MetricsLog(tmp_path, 2)
    log.write(3, "train", {"loss": 7.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
        (3, 7.0),
    ]
    assert "train/note" not in events.Tags()["scalars"]


def test_a_nan_loss_does_not_stop_the_log(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": math.nan})
    log.close()
    record(tmp_path, 1, [2])
    assert math.isnan(lines(tmp_path)[0]["loss"])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_after_resuming_throughput_counts_new_steps_and_means_count_all(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    sums = torch.tensor([86.0, 43.0, 0.0, 43.0, 129.0])  # 43 steps before
    state = SimpleNamespace(step=143, seconds=100.0, sums=sums, auxiliary=("dispersive",))
    clock = Clock(state)
    state.sums += torch.tensor([14.0, 7.0, 0.0, 7.0, 21.0])
    state.step, now[0] = 150, 64.0
    values = clock.lap(128, Processes())
    assert values["images_per_s"] == pytest.approx(7 * 128 / 14)
    assert (values["loss"], values["grad_norm"], values["seconds"]) == pytest.approx((2.0, 1.0, 114.0))
    assert values["dispersive"] == pytest.approx(3.0)
    state.sums += torch.tensor([10.0, 10.0, 0.0, 10.0, 0.0])
    state.step, now[0] = 160, 84.0
    assert clock.lap(128, Processes())["images_per_s"] == pytest.approx(10 * 128 / 20)
