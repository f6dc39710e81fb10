"""A run whose weights or rates overflow says so and saves nothing useless; a run that starts again keeps the old files.

Public reports: openai/guided-diffusion#50, hustvl/LightningDiT#23, Rikorose/DeepFilterNet#30, bmaltais/kohya_ss#735,
Lightricks/LTX-2#35, tdrussell/diffusion-pipe#159.
"""

import json
import signal

import pytest
import torch

from checkpoints.files import read_weights
from datasets_prep.datasets import DatasetFacts
from options import DivergedError, Options, UsageError
from runtime.processes.launch import LaunchOptions
from tests.training.test_experiment import VALUES, open_experiment
from tests.training.test_loop import metrics_of, new_run, send_signal, state_of
from training.ema import Ema
from training.experiment import ExperimentOptions
from training.loop import train
from training.metrics_log import MetricsLog
from training.run import TrainingOptions
from training.setup import training_groups
from training.validation import Validation

HUGE = {"lr": 3e38, "weight_decay": 1e38}
FACTS = DatasetFacts("tiny", 4, 1, None, False, ())
KEPT = ("model_1.safetensors", "best.safetensors", "content.pth")


def test_weights_that_overflow_are_not_saved(tmp_path):
    run = new_run(tmp_path / "run", max_steps=5, no_lr_decay=True, **HUGE)
    with pytest.raises(DivergedError, match=r"at step 5, weights are not finite: .*; no content\.pth was saved before"):
        train(run, resume=False)
    assert not [name for name in KEPT if (run.folder / name).exists()]


def test_what_was_saved_before_the_overflow_stays(tmp_path):
    folder = tmp_path / "run"
    train(new_run(folder, max_steps=5), resume=False)
    before = {name: (folder / name).read_bytes() for name in KEPT}
    with pytest.raises(DivergedError, match=r"content\.pth was saved before .* --resume and a smaller --lr"):
        train(new_run(folder, max_steps=10, no_lr_decay=True, **HUGE), resume=True)
    assert {name: (folder / name).read_bytes() for name in KEPT} == before
    assert train(new_run(folder, max_steps=10), resume=True)
    assert all(value.isfinite().all() for value in read_weights(folder / "model_2.safetensors")[0].values())


def test_weights_are_checked_before_a_save_at_a_signal_too(tmp_path):
    """The state of an interrupted run would replace the last useful one."""
    run = new_run(tmp_path / "run", event=(4, send_signal(signal.SIGINT)), max_steps=20, no_lr_decay=True, **HUGE)
    with pytest.raises(DivergedError, match=r"at step \d, weights are not finite"):
        train(run, resume=False)
    assert not (run.folder / "content.pth").exists()


def test_infinity_in_a_buffer_is_no_divergence(tmp_path):
    run = new_run(tmp_path / "run", max_steps=5)
    run.network.register_buffer("mask", torch.full((2,), -torch.inf))
    assert train(run, resume=False)
    assert (run.folder / "content.pth").exists()


@pytest.mark.parametrize(("steps", "warned"), [(2, True), (0, False)])
def test_a_run_that_ends_among_skipped_steps_says_so(steps, warned, tmp_path, capsys, monkeypatch):
    run = new_run(tmp_path / "run", max_steps=5)
    calls, loss = [0], run.objective.loss

    def failing(*arguments):
        calls[0] += 1
        return loss(*arguments) * (torch.nan if calls[0] > 5 - steps else 1)

    object.__setattr__(run.objective, "loss", failing)
    monkeypatch.setattr(Validation, "evaluate", lambda self, network: {"loss": 1.0, "objective": 1.0})
    assert train(run, resume=False)
    assert (f"its last {steps} steps had no effect" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(("warmup", "noted"), [(1000, True), (10, True), (9, False), (0, False)])
def test_a_warmup_that_outlasts_the_run_is_a_note(warmup, noted, capsys):
    TrainingOptions(warmup_steps=warmup, no_lr_decay=True, lr=1e-3).note_long_warmup(10)
    text = capsys.readouterr().err
    assert (f"--warmup_steps {warmup:,} outlasts the run's 10 steps" in text) is noted
    assert ("the last learning rate is 1e-05" in text) is (warmup == 1000)


@pytest.mark.parametrize("name", ["lr", "muon_lr", "weight_decay"])
def test_infinite_rates_are_refused(name):
    with pytest.raises(UsageError, match=f"--{name}: expected a finite number, but inf was given"):
        TrainingOptions(**{name: float("inf")}).check()


def test_a_start_from_the_first_step_keeps_the_checkpoints_of_the_one_before(tmp_path, capsys):
    folder, never = tmp_path / "run", {"save_content": False}

    def crash():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(new_run(folder, event=(12, crash), experiment=never), resume=False)
    before = {
        name: (folder / name).read_bytes() for name in ("model_1.safetensors", "model_2.safetensors", "metrics.jsonl")
    }
    assert train(new_run(folder, experiment=never, lr=1e-3), resume=True)
    warning = capsys.readouterr().err
    for name, content in before.items():
        assert (folder / f"{name}.old-1").read_bytes() == content
        assert f"{name}.old-1" in warning
        assert (folder / name).read_bytes() != content
    assert [entry["step"] for entry in metrics_of(folder) if entry["kind"] == "train"] == [4, 8, 12]


def test_damaged_lines_of_the_metrics_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    with log.path.open("ab") as file:
        file.write(b"\xff\xfe\x00" * 9 + b"\n" + b"\x00" * 50 + b"\n")
    resumed = MetricsLog(tmp_path, 1)
    resumed.close()
    assert resumed.past("train", "loss") == [1.0]


def test_a_run_resumes_from_intact_states_after_a_cut_in_the_metrics(tmp_path):
    train(new_run(tmp_path / "run", max_steps=5), resume=False)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\x00" * 4096)
    assert train(new_run(tmp_path / "run", max_steps=10), resume=True)
    assert state_of(tmp_path / "run")["step"] == 10


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "run"
    open_experiment(folder, VALUES, ExperimentOptions())
    (folder / "content.pth").write_text("trained for days")
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("content", [None, "", "{", '{"options": null}', "[]"])
def test_a_run_without_its_options_resumes_on_request(content, begun, capsys):
    config = begun / "config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(UsageError, match=r"config\.json.* --resume to resume with the options of this command"):
        open_experiment(begun, VALUES, ExperimentOptions())
    assert open_experiment(begun, VALUES, ExperimentOptions(resume=True))
    assert "does not record the options" in capsys.readouterr().err
    assert json.loads(config.read_text())["options"]["seed"] == VALUES["seed"]
    assert open_experiment(begun, VALUES, ExperimentOptions())  # and is compared from then on
    with pytest.raises(UsageError, match="--seed was 1, now 2"):
        open_experiment(begun, VALUES | {"seed": 2}, ExperimentOptions())


def test_a_renamed_run_resumes():
    """Users rename run folders; the name has no influence on the weights."""
    assert Options({}, frozenset(), (*training_groups(), LaunchOptions)).policies()["exp"] == "freely"


def test_a_decay_of_one_has_a_last_warmup_update():
    network = torch.nn.Linear(2, 2)
    assert 0 < Ema(network, 1.0).warmup_updates < float("inf")
    assert Ema(network, 0.9).warmup_updates == pytest.approx(80, abs=1)
