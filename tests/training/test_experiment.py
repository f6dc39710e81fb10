import json
import subprocess

import pytest

from options import Options, UsageError
from runtime.processes.launch import LaunchOptions
from runtime.provenance import REPOSITORY
from training import experiment
from training.experiment import Configuration, ExperimentOptions
from training.setup import training_groups

VALUES = {"lr": 1e-3, "max_steps": 10, "dataset": "mnist", "adam_betas": (0.9, 0.999), "log_every": 50, "seed": 1}

OPTIONS = Options({}, frozenset(), (*training_groups(), LaunchOptions))


def open_experiment(folder, values, options):
    return experiment.open_experiment(folder, Configuration(values, OPTIONS.policies(), OPTIONS.defaults()), options)


@pytest.fixture
def folder(tmp_path):
    assert not open_experiment(tmp_path / "run", VALUES, ExperimentOptions())
    (tmp_path / "run" / "content.pth").write_text("trained for days")
    return tmp_path / "run"


def stored_options(folder):
    return json.loads((folder / "config.json").read_text())["options"]


def test_config_holds_options_commit_and_versions(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["options"] == VALUES | {"adam_betas": [0.9, 0.999]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if commit.returncode == 0:  # a copy may have no history
        assert commit.stdout.startswith(config["git"].removesuffix("-dirty"))
    import torch

    assert torch.__version__.startswith(config["versions"]["torch"])


def test_a_run_resumes_with_the_same_options(folder):
    assert open_experiment(folder, VALUES, ExperimentOptions())
    assert stored_options(folder)["max_steps"] == 10


def test_options_without_effect_on_training_may_change(folder):
    assert open_experiment(folder, VALUES | {"log_every": 7}, ExperimentOptions())


@pytest.mark.parametrize("resume", [False, True])
def test_other_options_are_refused_by_name(folder, resume):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UsageError) as raised:
        open_experiment(folder, VALUES | {"seed": 2, "adam_betas": (0.9, 0.95)}, ExperimentOptions(resume=resume))
    message = str(raised.value)
    assert "--adam_betas was [0.9, 0.999], now [0.9, 0.95], --seed was 1, now 2" in message
    assert "--overwrite" in message
    assert "--resume" not in message  # --resume does not allow this change
    assert "--lr" not in message
    assert (folder / "config.json").read_bytes() == before


def test_longer_training_needs_resume_and_is_recorded(folder, capsys):
    longer = VALUES | {"max_steps": 20}
    with pytest.raises(UsageError, match=r"--max_steps was 10, now 20.*--resume to resume with this change"):
        open_experiment(folder, longer, ExperimentOptions())
    assert open_experiment(folder, longer, ExperimentOptions(resume=True))
    assert "max_steps 10 -> 20" in capsys.readouterr().err
    assert stored_options(folder)["max_steps"] == 20
    assert open_experiment(folder, longer, ExperimentOptions())
    with pytest.raises(UsageError, match="--seed was 1, now 2"):
        open_experiment(folder, longer | {"lr": 1.0, "seed": 2}, ExperimentOptions(resume=True))


def test_another_number_of_processes_with_the_same_whole_batch_goes_on_and_says_so(folder, capsys):
    shared = VALUES | {"processes": 2, "batch_size": 16, "threads": 4}
    assert not open_experiment(folder, shared, ExperimentOptions(overwrite=True))
    (folder / "content.pth").write_text("trained for days")
    assert open_experiment(folder, shared | {"processes": 1, "batch_size": 32, "threads": 8}, ExperimentOptions())
    err = capsys.readouterr().err
    assert "resumes with changed options and will not be bit-identical: processes 2 -> 1, threads 4 -> 8" in err
    assert stored_options(folder)["processes"] == 1
    with pytest.raises(UsageError, match="global batch size was 32, now 64"):
        open_experiment(folder, shared | {"processes": 4}, ExperimentOptions(resume=True))
    with pytest.raises(UsageError, match="global batch size was 32, now 8"):
        open_experiment(folder, shared | {"processes": 1, "batch_size": 8}, ExperimentOptions())


def test_changed_training_is_not_described_as_rounding(folder, capsys):
    assert open_experiment(folder, VALUES | {"max_steps": 20}, ExperimentOptions(resume=True))
    assert "bit-identical" not in capsys.readouterr().err


def test_an_option_newer_than_the_run_had_its_default_value(folder):
    assert open_experiment(folder, VALUES | {"time_scale": 1.0, "objective": "flow_matching"}, ExperimentOptions())
    with pytest.raises(UsageError, match=r"--time_scale was 1\.0, now 2\.0"):
        open_experiment(folder, VALUES | {"time_scale": 2.0}, ExperimentOptions())


def test_overwrite_moves_the_old_run_aside(folder, capsys):
    assert not open_experiment(folder, VALUES | {"seed": 2}, ExperimentOptions(overwrite=True))
    moved = folder.with_name("run.old-1")
    assert (moved / "content.pth").read_text() == "trained for days"
    assert str(moved) in capsys.readouterr().err
    assert stored_options(folder)["seed"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    assert not open_experiment(folder, VALUES, ExperimentOptions(overwrite=True))
    assert stored_options(folder.with_name("run.old-2"))["seed"] == 2


def test_overwrite_without_an_old_run_starts_normally(tmp_path):
    assert not open_experiment(tmp_path / "run", VALUES, ExperimentOptions(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_options_may_change_after_a_start_that_failed_before_its_first_step(tmp_path):
    """For example, because the batch is larger than the dataset."""
    open_experiment(tmp_path / "run", VALUES, ExperimentOptions())
    assert not open_experiment(tmp_path / "run", VALUES | {"seed": 2}, ExperimentOptions())
    assert stored_options(tmp_path / "run")["seed"] == 2


@pytest.fixture
def published(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "content.pth").write_text("trained elsewhere")
    return tmp_path / "run"


def test_another_trainers_content_pth_is_resumed_only_on_request(published, capsys):
    with pytest.raises(UsageError, match=r"no run of this project wrote: choose --resume .*--overwrite"):
        open_experiment(published, VALUES, ExperimentOptions())
    assert [path.name for path in published.iterdir()] == ["content.pth"]
    assert open_experiment(published, VALUES, ExperimentOptions(resume=True))
    assert stored_options(published) == VALUES | {"adam_betas": [0.9, 0.999]}
    # A start that failed, for example because the network does not fit, may be repeated with other options.
    assert open_experiment(published, VALUES | {"seed": 2}, ExperimentOptions(resume=True))
    with pytest.raises(UsageError, match="choose --resume"):
        open_experiment(published, VALUES | {"seed": 2}, ExperimentOptions())
    # A run that has trained is like any other.
    (published / "metrics.jsonl").touch()
    assert open_experiment(published, VALUES | {"seed": 2}, ExperimentOptions())
    with pytest.raises(UsageError, match="--seed was 2, now 3"):
        open_experiment(published, VALUES | {"seed": 3}, ExperimentOptions())


def test_overwrite_moves_another_trainers_content_pth_aside(published):
    assert not open_experiment(published, VALUES, ExperimentOptions(overwrite=True))
    assert (published.with_name("run.old-1") / "content.pth").read_text() == "trained elsewhere"
    assert [path.name for path in published.iterdir()] == ["config.json"]


def test_damaged_config_is_named(folder):
    (folder / "config.json").write_text('{"options": ')
    with pytest.raises(UsageError, match=r"cannot read .*config\.json"):
        open_experiment(folder, VALUES, ExperimentOptions())


def names_of(policy):
    return {name for name, found in OPTIONS.policies().items() if found == policy}


def test_policies_on_resume():
    """Listed in full, since a wrong policy would prevent a run from resuming or change it silently."""
    saving = (
        "save_content save_content_every save_content_every_steps save_content_every_minutes save_ckpt_every "
        "save_ckpt_every_minutes keep_last posthoc_ema_every"
    )
    shown = (
        "plot_every plot_every_minutes eval_every eval_every_minutes eval_samples validate_excess log_every tracker "
    )
    shown += "grid_samples grid_columns show_neighbours preview_autoencoder autoencoder_minutes autoencoder_steps"
    sampling = "method num_steps step_size time_grid time_shift grid_location grid_scale grid_rho atol rtol churn "
    sampling += "churn_noise churn_interval diffusion diffusion_norm cfg_scale cfg_interval cfg_channels "
    sampling += (
        "internal_guidance internal_guidance_interval embedded_guidance reinject_noise last_step end_time fit_grid"
    )
    paths = "exp save_root datadir latent_cache_dir num_workers device skip_bad_images"
    scores = "features feature_weights feature_precision dims"
    launch = "num_process_per_node num_proc_node node_rank master_address master_port local_rank"
    others = "resume overwrite max_minutes max_bad_steps"
    assert names_of("freely") == set(" ".join([saving, shown, sampling, paths, scores, launch, others]).split())
    assert names_of("rounding") == {"grad_accumulation", "fsdp", "num_threads", "compile"}
    assert names_of("on_request") == set(
        "max_steps num_epoch minutes lr muon_lr lr_schedule no_lr_decay warmup_steps grad_clip precision auxiliary_until "
        "align_encoder_weights pairs".split()
    )
