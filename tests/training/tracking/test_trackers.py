"""Trackers, with stand-ins for the libraries' documented interfaces; one slow test uses the library of Weights & Biases."""

import json
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from options import UsageError
from tests.training.test_loop import new_run
from training.loop import train
from training.metrics_log import MetricsLog
from training.tracking.trackers import PACKAGES, TRACKERS, check_tracker


class FakeLibrary(ModuleType):
    """`init`, and the run that it returns, of wandb and trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.logged, self.finished = [], [], 0

    def init(self, **arguments):
        self.calls.append(arguments)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def Settings(self, **arguments):  # noqa: N802
        return arguments

    def _log(self, data, step=None):
        self.logged += [(name, step, value) for name, value in data.items()]

    def _finish(self):
        self.finished += 1


@pytest.fixture(params=PACKAGES)
def library(request, monkeypatch):
    fake = FakeLibrary(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "latent_flow" / "stripes" / "mine"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"options": {"lr": 0.5}}))
    return path


def events_of(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def test_all_trackers_show_the_same_names_at_the_same_steps(library, tmp_path):
    shown = {"log_every": 4, "eval_every": 1}
    assert train(new_run(tmp_path / "board", experiment=shown), resume=False)
    assert train(new_run(tmp_path / "other", experiment={**shown, "tracker": library.__name__}), resume=False)
    assert {(name, step) for name, step, _ in library.logged} == events_of(tmp_path / "board")
    assert ("validation/loss_q1", 14) in events_of(tmp_path / "board")
    assert library.finished == 1
    assert not (tmp_path / "other" / "tensorboard").exists()


def test_the_folder_names_project_and_run(library, folder):
    MetricsLog(folder, 0, library.__name__).close()
    (call,) = library.calls
    assert (call["project"], call["name"], call["config"]) == ("latent_flow-stripes", "mine", {"lr": 0.5})


def test_values_and_steps_are_passed_on_without_texts(library, folder):
    log = MetricsLog(folder, 0, library.__name__)
    log.write(5, "train", {"loss": 0.25, "note": "text"})
    log.write(5, "skipped", {"indices": [1, 2]})
    log.close()
    assert library.logged == [("train/loss", 5, 0.25)]


def test_a_resumed_run_continues_and_a_new_one_does_not(library, folder):
    for step in (0, 7, 0):
        MetricsLog(folder, step, library.__name__).close()
    if library.__name__ == "trackio":
        assert [call["resume"] for call in library.calls] == ["never", "allow", "never"]
    else:
        first, second, third = (call["id"] for call in library.calls)
        assert first == second != third
        assert {call["resume"] for call in library.calls} == {"allow"}


def test_nothing_but_metrics_is_collected(library, folder):
    MetricsLog(folder, 0, library.__name__).close()
    call = library.calls[0]
    if library.__name__ == "trackio":
        assert (call["auto_log_cpu"], call["auto_log_gpu"], call["embed"]) == (False, False, False)
    else:
        assert call["settings"]["console"] == "off"
        assert call["settings"]["disable_code"] is call["settings"]["x_disable_stats"] is True


@pytest.mark.parametrize("part", ["init", "_log", "_finish"])
def test_a_failure_ends_only_the_tracking(part, library, folder, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(library, part, fail)
    log = MetricsLog(folder, 0, library.__name__)
    for step in (1, 2):
        log.write(step, "train", {"loss": 1.0})
    log.close()
    assert log.past("train", "loss") == [1.0, 1.0]
    assert (
        capsys.readouterr().err.count(f"warning: {TRACKERS[library.__name__].title} is not written any more (no route)")
        == 1
    )


def test_without_a_tracker_only_the_file_is_written(folder):
    log = MetricsLog(folder, 0, "none")
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_an_error_before_the_work(name, monkeypatch):
    monkeypatch.setattr("training.tracking.trackers.find_spec", lambda package: None)
    if name in PACKAGES:
        with pytest.raises(UsageError, match=f"needs the package {name}: pip install {name}"):
            check_tracker(name)
    else:
        check_tracker(name)


@pytest.mark.slow
def test_weights_and_biases_without_a_network(folder, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 2):
        log = MetricsLog(folder, first, "wandb")
        log.write(first + 1, "train", {"loss": 0.5})
        log.write(first + 1, "validation", {"loss": 0.25})
        log.write(first + 2, "train", {"loss": 0.125})
        log.close()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1  # both parts belong to one run
    rows = []
    for path in files:
        content, position = path.read_bytes(), 7  # a log of records, each after a checksum, its length and its type
        while position < len(content):
            (length,) = struct.unpack_from("<H", content, position + 4)
            record = wandb_internal_pb2.Record.FromString(content[position + 7 : position + 7 + length])
            rows += [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}]
            position += 7 + length
    kept = [{name: value for name, value in row.items() if name in ("_step", *NAMES)} for row in rows if row]
    assert kept == [
        {"_step": 1, "train/loss": 0.5, "validation/loss": 0.25},
        {"_step": 2, "train/loss": 0.125},
        {"_step": 3, "train/loss": 0.5, "validation/loss": 0.25},
        {"_step": 4, "train/loss": 0.125},
    ]


NAMES = ("train/loss", "validation/loss")
