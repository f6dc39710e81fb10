"""A failed validation, sample grid or log file costs a run nothing: it warns once and ends with the same bits."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import training.checkpointing
import training.metrics_log
from runtime.torch_files import read_torch_file
from tests.training.test_loop import STEPS, new_run
from training.loop import train
from training.metrics_log import FAILURES, Attempts, MetricsLog
from training.validation import Validation

SHOWN = {"log_every": 2, "eval_every": 1, "plot_every": 1}


def refuse(*arguments, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def fail(*arguments, **settings):
    raise RuntimeError("expected a ball\nbut found a cube")


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def trained(folder, capsys):
    """Train, and return the final state and the warnings."""
    capsys.readouterr()
    assert train(new_run(folder, experiment=SHOWN), resume=False)
    return read_torch_file(folder / "content.pth"), warnings_in(capsys.readouterr().err)


@pytest.fixture
def reference(tmp_path, capsys):
    state, warnings = trained(tmp_path / "reference", capsys)
    assert warnings == []
    return state


def remove_folder(monkeypatch, folder):
    """The run folder disappears before the first metrics are written."""
    original = MetricsLog._append

    def remove_once(self):
        if not remove_once.done:
            remove_once.done = True
            shutil.rmtree(folder)
        original(self)

    remove_once.done = False
    monkeypatch.setattr(MetricsLog, "_append", remove_once)


# Each breaks something; the warnings are about these kinds of work.
FAULTS = {
    "validation": (
        lambda patch, folder: patch.setattr(Validation, "evaluate", fail),
        ["the validation failed (RuntimeError: expected a ball)"],
    ),
    "samples": (
        lambda patch, folder: patch.setattr(Validation, "preview", fail),
        ["the sample grid failed (RuntimeError: expected a ball)"],
    ),
    "picture": (
        lambda patch, folder: patch.setattr(training.checkpointing, "save_sheet", refuse),
        ["the sample grid failed (OSError: [Errno 28] No space left on device: 'somewhere')"],
    ),
    "no TensorBoard": (
        lambda patch, folder: patch.setattr(training.metrics_log, "SummaryWriter", refuse),
        ["opening the TensorBoard file failed (OSError"],
    ),
    "TensorBoard": (
        lambda patch, folder: patch.setattr(training.metrics_log.SummaryWriter, "add_scalar", refuse),
        ["writing TensorBoard's file failed (OSError"],
    ),
    "metrics": (
        lambda patch, folder: patch.setattr(MetricsLog, "_append", refuse),
        ["writing metrics.jsonl failed (OSError"],
    ),
    "removed": (
        remove_folder,
        ["writing metrics.jsonl failed (FileNotFoundError", "writing TensorBoard's file failed (FileNotFoundError"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_warns_once_and_ends_with_the_same_bits(fault, tmp_path, capsys, monkeypatch, reference):
    breaks, expected = FAULTS[fault]
    folder = tmp_path / "run"
    breaks(monkeypatch, folder)
    state, warnings = trained(folder, capsys)
    assert len(warnings) == len(expected)
    assert all(text in warning for text, warning in zip(expected, warnings, strict=True)), warnings
    assert state["step"] == reference["step"] == STEPS
    assert all(torch.equal(state["network"][name], value) for name, value in reference["network"].items())
    assert fault == "removed" or "Traceback" in (folder / FAILURES).read_text()


def test_metrics_wait_for_the_next_write(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        log.write(2, "train", {"loss": 2.0})
    log.write(3, "train", {"loss": 3.0})
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in entries] == [1.0, 2.0, 3.0]


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": 1.0})
    complete = (tmp_path / "metrics.jsonl").read_bytes()
    original = Path.open

    def open_and_fill_the_disk(path, *arguments, **settings):
        file = original(path, *arguments, **settings)
        if path.name == "metrics.jsonl":
            file.write('{"step": ')
            file.close()
            refuse()
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_and_fill_the_disk)
        log.write(2, "train", {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == complete
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), Attempts(tmp_path).attempt("the validation", 1):
        raise KeyboardInterrupt
    assert not (tmp_path / FAILURES).exists()
