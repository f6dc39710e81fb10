"""Non-finite numbers: skipped steps are recorded with their cause, and a diverged run stops and keeps its last good state."""

import json
import math

import pytest
import torch

from exits import explain
from options import DivergedError
from runtime.torch_files import read_torch_file
from tests.training.test_loop import BATCH, COUNT, STEPS, assert_same_run, metrics_of, new_run, send_signal
from training.loop import train
from training.nan_guard import LossHistory
from training.reading.order import epoch_indices


class Poisoned:
    """A source that multiplies its moments by `factor` whenever `is_bad(call, indices)` is true."""

    def __init__(self, source, is_bad, factor=math.nan):
        self.source, self.is_bad, self.factor, self.labels, self.calls = source, is_bad, factor, source.labels, 0

    def __len__(self):
        return len(self.source)

    def moments(self, indices, mirrored):
        self.calls += 1
        moments = self.source.moments(indices, mirrored)
        return moments * self.factor if self.is_bad(self.calls, indices.tolist()) else moments


def poisoned_run(folder, is_bad, factor=math.nan, **settings):
    run = new_run(folder, **settings)
    run.source = Poisoned(run.source, is_bad, factor)
    return run


def entries_of(folder, kind):
    return [entry for entry in metrics_of(folder) if entry["kind"] == kind]


def bad_image(call, indices):
    return 17 in indices


def steps_with_bad_image():
    """Pairs (step, image indices) of the steps whose batch contains the bad image. Steps count from 1."""
    batches = [
        epoch_indices(1024, step // 5, COUNT)[step % 5 * BATCH : (step % 5 + 1) * BATCH].tolist()
        for step in range(STEPS)
    ]
    return [(step + 1, images) for step, images in enumerate(batches) if 17 in images]


def test_skipped_steps_are_recorded_with_their_images(tmp_path, capsys):
    expected = steps_with_bad_image()
    assert len(expected) >= 2
    assert train(poisoned_run(tmp_path / "run", bad_image), resume=False)
    assert [(entry["skipped_step"], entry["indices"]) for entry in entries_of(tmp_path / "run", "skipped")] == expected
    counted = [(entry["step"], entry["skipped"]) for entry in entries_of(tmp_path / "run", "train")]
    assert counted == [(end, sum(end - 4 < step <= end for step, _ in expected)) for end in (4, 8, 12)]
    step, images = expected[0]
    assert f"the first at step {step} with images {', '.join(map(str, images))}, ..." in capsys.readouterr().err


@pytest.mark.parametrize("fetch", [3, 7])
def test_a_resumed_run_records_the_same(tmp_path, fetch):
    assert train(poisoned_run(tmp_path / "whole", bad_image), resume=False)
    event = (fetch, send_signal(15))
    assert not train(poisoned_run(tmp_path / "run", bad_image, event=event), resume=False)
    assert train(poisoned_run(tmp_path / "run", bad_image), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_crashed_run_records_a_skipped_step_once(tmp_path):
    """Step 2 is skipped, step 3 saved and step 4 recorded. The run resumes from step 3."""

    def crash():
        raise RuntimeError("power cut")

    image, often = epoch_indices(1024, 0, COUNT)[BATCH].item(), {"save_content_every_steps": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        run = poisoned_run(tmp_path / "run", lambda _, images: image in images, event=(6, crash), experiment=often)
        train(run, resume=False)
    assert read_torch_file(tmp_path / "run" / "content.pth")["step"] == 3
    assert len(entries_of(tmp_path / "run", "skipped")) == 1
    assert train(poisoned_run(tmp_path / "run", lambda _, images: image in images, experiment=often), resume=True)
    assert train(poisoned_run(tmp_path / "whole", lambda _, images: image in images, experiment=often), resume=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_after_too_many_skipped_steps_in_a_row_the_run_stops_with_a_diagnosis(tmp_path):
    folder, options = tmp_path / "run", {"save_content_every_steps": 2}
    run = poisoned_run(folder, lambda call, _: call >= 6, experiment=options, max_bad_steps=3)
    with pytest.raises(DivergedError) as raised:
        train(run, resume=False)
    message = str(raised.value)
    assert "the last 3 steps had no finite gradient" in message
    assert f"The first was step 6: learning rate {run.training.rate_at(5, STEPS):.4g}, loss nan" in message
    first = epoch_indices(1024, 1, COUNT)[:BATCH].tolist()
    assert f"images {', '.join(map(str, first))}, ...; content.pth was saved before them" in message
    assert "--resume and a smaller --lr" in message
    assert explain(raised.value).exit_code == 3
    assert "\n" not in explain(raised.value).line
    assert read_torch_file(folder / "content.pth")["step"] == 4
    assert read_torch_file(folder / "content.previous.pth")["step"] == 2
    assert [entry["skipped_step"] for entry in entries_of(folder, "skipped")] == [6, 7, 8]


def test_a_lost_run_can_go_on_from_before(tmp_path):
    folder, options = tmp_path / "run", {"save_content_every_steps": 2}
    with pytest.raises(DivergedError):
        train(poisoned_run(folder, lambda call, _: call >= 6, experiment=options, max_bad_steps=3), resume=False)
    assert train(new_run(folder, experiment=options), resume=True)
    assert train(new_run(tmp_path / "good", experiment=options), resume=False)
    assert metrics_of(folder) == metrics_of(tmp_path / "good")


def test_without_any_content_the_diagnosis_says_so(tmp_path):
    with pytest.raises(DivergedError, match=r"The first was step 1: .*no content\.pth was saved before them"):
        train(poisoned_run(tmp_path / "run", lambda *_: True, max_bad_steps=4), resume=False)
    assert not (tmp_path / "run" / "content.pth").exists()


def test_a_short_streak_of_skipped_steps_does_not_stop_the_run(tmp_path):
    assert train(poisoned_run(tmp_path / "run", lambda call, _: call in (2, 3, 5, 6), max_bad_steps=3), resume=False)


def test_what_is_due_in_a_bad_step_is_saved_after_the_next_good_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("training.checkpointing.save_state", lambda folder, content: saved.append(content["step"]))
    options = {"save_content_every_steps": 4}
    train(poisoned_run(tmp_path / "run", lambda call, _: call in (4, 5), experiment=options), resume=False)
    assert saved == [6, 8, 12, STEPS]


def test_max_bad_steps_0_never_stops_the_run(tmp_path):
    """Every step is skipped, so the network stays unchanged and no loss is recorded."""
    options = {"log_every": 1, "save_content_every_steps": 4}
    run = poisoned_run(tmp_path / "run", lambda *_: True, experiment=options, max_bad_steps=0)
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    assert train(run, resume=False)
    content = read_torch_file(tmp_path / "run" / "content.pth")
    assert all(torch.equal(content["network"][name], value) for name, value in before.items())
    entries = entries_of(tmp_path / "run", "train")
    assert [entry["skipped"] for entry in entries] == [1.0] * STEPS
    assert not any({"loss", "grad_norm"} & entry.keys() for entry in entries)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text().replace(json.dumps("NaN"), "")


def test_a_leap_is_one_beyond_three_times_the_median_of_the_last():
    history = LossHistory()
    losses = (100.0, 1.0, 1.1, 0.9, 1.0)
    assert [history.detect_spike(loss) for loss in losses] == [None] * 5  # too few losses for a median
    assert history.detect_spike(2.9) is None
    assert history.detect_spike(3.2) == pytest.approx(1.05)
    assert LossHistory([1.0] * 4).detect_spike(50.0) is None
    assert LossHistory([1.0] * 5).detect_spike(50.0) == 1.0
    assert LossHistory([9.0] * 30 + [1.0] * 15).detect_spike(4.0) == 1.0


def test_spikes_are_recorded_and_a_resumed_run_records_the_same(tmp_path):
    def spiky(folder, **settings):
        return poisoned_run(
            folder, lambda _, images: images[0] in spike, factor=30.0, experiment={"log_every": 1}, **settings
        )

    spike = {epoch_indices(1024, 1, COUNT)[2 * BATCH].item()}  # the first image of step 8
    assert train(spiky(tmp_path / "whole"), resume=False)
    (entry,) = [entry for entry in entries_of(tmp_path / "whole", "spike") if entry["step"] == 8]
    losses = {entry["step"]: entry["loss"] for entry in entries_of(tmp_path / "whole", "train")}
    assert entry["loss"] == losses[8] > 3 * entry["median"]
    assert entry["median"] == pytest.approx(sorted(losses[step] for step in range(1, 8))[3])
    assert not train(spiky(tmp_path / "run", event=(5, send_signal(15))), resume=False)
    assert train(spiky(tmp_path / "run"), resume=True)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
