"""A failed validation, sample grid, report or log file costs a run nothing: it warns once and ends with the same bits."""

import errno
import os

import pytest
import torch

import training.checkpointing
import training.metrics_log
import training.tracking.trackers
from runtime.attempts import FAILURES, Attempts
from runtime.torch_files import read_torch_file
from tests.training.test_loop import STEPS, new_run
from training.loop import train
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
    "report": (
        lambda patch, folder: patch.setattr(training.checkpointing, "write_report", fail),
        ["the report failed (RuntimeError: expected a ball)"],
    ),
    "no TensorBoard": (
        lambda patch, folder: patch.setattr(training.tracking.trackers, "SummaryWriter", refuse),
        ["TensorBoard's file is not written any more"],
    ),
    "TensorBoard": (
        lambda patch, folder: patch.setattr(training.tracking.trackers.SummaryWriter, "add_scalar", refuse),
        ["TensorBoard's file is not written any more"],
    ),
    "metrics": (
        lambda patch, folder: patch.setattr(training.metrics_log, "append_line", refuse),
        ["metrics.jsonl (No space left on device); its lines are written once this is possible again"],
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
    if "failed" in expected[0]:
        assert "Traceback" in (folder / FAILURES).read_text()


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), Attempts(tmp_path).attempt("the validation", 1):
        raise KeyboardInterrupt
    assert not (tmp_path / FAILURES).exists()
