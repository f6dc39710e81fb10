"""Outputs that cannot be written are refused before the work, and results are printed even if writing fails after it.

Public reports: vdemichev/DiaNN#720, Lightning-AI/litgpt#942, SlicerMorph/SlicerMorph#45, rtqichen/torchdiffeq#57.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from command_line import parse_options
from flow import ode
from flow.solvers import SolverOptions, solve, unreachable_tolerances
from options import UsageError
from runtime import outputs
from runtime.outputs import check_file, check_folder, warn_of_space, write_error
from sampling.script import mode_groups, run_modes
from tests.fake_features import Pixels
from tests.faults.test_not_finite import call as call_modes
from tests.faults.test_not_finite import write_checkpoint

FAST = ("--method", "euler", "--num_steps", 1, "--n_sample", 3)


@pytest.fixture
def blocked(tmp_path):
    """A path that no user, not even root, can use as a folder: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "below"


@pytest.fixture
def read_only(monkeypatch):
    """`read_only(folder)` makes every write into a folder fail, as on a read-only file system."""
    closed = []

    def probe(folder):
        if any(Path(folder).is_relative_to(part) for part in closed):
            return "Read-only file system"
        return write_error(folder)

    for module in ("runtime.outputs", "sampling.sample_and_score"):
        monkeypatch.setattr(f"{module}.write_error", probe)
    return closed.append


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    return write_checkpoint(tmp_path / "run" / "model_1.safetensors")


def no_work(monkeypatch):
    monkeypatch.setattr("sampling.sampler.solve", lambda *_, **__: pytest.fail("the work has begun"))


def test_probes_leave_nothing_behind(tmp_path, blocked):
    assert write_error(tmp_path / "new" / "folder") is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert write_error(blocked.parent) == "it is not a folder"
    assert write_error(blocked) is not None
    with pytest.raises(UsageError, match=rf"cannot write into {blocked} .*: name another folder with --output_dir"):
        check_folder(blocked, "--output_dir")
    for path in (blocked / "x.json", blocked):
        with pytest.raises(UsageError, match=r"cannot write .* name another file with --output_json"):
            check_file(path, "--output_json")
    with pytest.raises(UsageError, match="it is a folder"):
        check_file(tmp_path, "--output_json")
    check_file(tmp_path / "file", "--output_json")
    check_file(None, "--output_json")
    check_file("", "--output_json")


def test_devices_pipes_and_logs_need_no_folder_that_can_be_written(tmp_path, read_only):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "log").write_text("before\n")
    read_only(tmp_path)
    check_file(tmp_path / "pipe", "--output_json")
    check_file(tmp_path / "log", "--output_log", appended=True)
    with (tmp_path / "log").open("a") as opened:
        check_file(f"/proc/self/fd/{opened.fileno()}", "--output_log", appended=True)
    for path, appended in ((tmp_path / "log", False), (tmp_path / "new", True)):
        with pytest.raises(UsageError, match="Read-only file system"):
            check_file(path, "--output_log", appended=appended)


def test_what_is_read_only_is_replaced_but_not_appended_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_file(tmp_path / "file", "--output_json")
    with pytest.raises(UsageError, match="it is read-only"):
        check_file(tmp_path / "file", "--output_log", appended=True)


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.os, "fsync", full)
    assert write_error(tmp_path) == "No space left on device"


def test_space_is_compared_with_what_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 50, 2_000_000))
    warn_of_space(tmp_path, 1_999_999, "the samples")
    assert capsys.readouterr().err == ""
    warn_of_space(tmp_path, 3_000_000_000, "the samples")
    assert f"warning: the samples may need 3 GB in {tmp_path}, but only 2 MB is free" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--output_json", "--output_log", "--output_dir"])
@pytest.mark.parametrize("mode", ["sample", "interpolate", "trajectory", "compute_nfe", "measure_time"])
def test_sampling_refuses_outputs_before_the_work(flag, mode, tmp_path, checkpoint, blocked, monkeypatch):
    for module in ("sampler", "latent_paths", "cost"):
        monkeypatch.setattr(f"sampling.{module}.solve", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(UsageError, match=rf"cannot write (into )?{blocked}.*name another (file|folder) with {flag}"):
        call_modes(tmp_path, checkpoint, *FAST, "--mode", mode, flag, blocked)


def sample(checkpoint, *flags):
    words = ["--checkpoint", checkpoint, "--precision", "fp32", *FAST, *flags]
    return run_modes(parse_options("", mode_groups(), [*map(str, words)]))


def test_a_read_only_checkpoint_folder_needs_another_output_folder(
    tmp_path, checkpoint, read_only, monkeypatch, capsys
):
    read_only(tmp_path / "run")
    (result,) = sample(checkpoint, "--output_dir", tmp_path / "out")
    assert Path(result["grid"]).parent == tmp_path / "out"
    (result,) = sample(checkpoint, "--compute_nfe", "--output_json", tmp_path / "nfe.json")
    assert (tmp_path / "nfe.json").exists()
    (result,) = sample(checkpoint, "--output_dir", tmp_path / "png", "--save_images", "png")
    assert Path(result["grid"]).parent == tmp_path / "png_grid"
    assert result["files"] == str(tmp_path / "png")
    assert Path(result["grid"]).exists()
    assert "so the picture and the result are in" in capsys.readouterr().err
    assert len(list((tmp_path / "png").glob("*.png"))) == 3
    no_work(monkeypatch)
    for flags in ((), ("--save_images", "png"), ("--save_images", "npz")):
        with pytest.raises(UsageError, match=r"Read-only file system\): name another folder with --output_dir"):
            next(sample(checkpoint, *flags))


@pytest.mark.parametrize(
    ("mode", "failing"),
    [
        ("sample", "sampling.sample_and_score.save_sheet"),
        *((mode, "sampling.results.write_json") for mode in ("sample", "interpolate", "trajectory", "compute_nfe")),
    ],
)
def test_a_result_is_yielded_before_the_error_of_writing_it(mode, failing, tmp_path, checkpoint, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(failing, full)
    results = sample(checkpoint, "--output_dir", tmp_path / "out", "--mode", mode)
    assert next(results)["summary" if mode != "sample" else "samples"]
    with pytest.raises(UsageError, match=r"the result above is complete, but .*: somewhere: No space left on device"):
        next(results)


def test_scores_are_printed_before_their_file_is_written(tmp_path, image_folders, call, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr("evaluation.comparison.load_features", lambda *_: Pixels())
    monkeypatch.setattr("runtime.files.json.dumps", full)
    code, out, err = call("pytorch_fid/fid_score.py", [*image_folders, "--output_json", tmp_path / "score.json"])
    assert code == 2
    assert "(70 samples)" in out
    assert "error: No space left on device" in err


SCRIPTS = {
    "pytorch_fid/fid_score.py": ("a", "b", "--output_json", "BAD"),
    "pytorch_fid/cal_inpainting.py": ("a", "b", "--output_json", "BAD"),
    "pytorch_fid/compute_dataset_stat.py": (
        "--dataset",
        "folder",
        "--datadir",
        "a",
        "--image_size",
        16,
        "--output",
        "BAD",
    ),
    "evaluation/reconstruction.py": ("--dataset", "folder", "--datadir", "a", "--picture", "BAD"),
    "evaluation/reconstruction.py ": ("--dataset", "folder", "--datadir", "a", "--output_json", "BAD"),
    "checkpoints/convert.py": ("model.pth", "BAD"),
    "datasets_prep/build_lmdb.py": ("--source", "a", "--datadir", "BAD"),
    "train_autoencoder.py": ("--dataset", "folder", "--datadir", "a", "--output", "BAD"),
    "train_classifier.py": ("--dataset", "fashion_mnist", "--datadir", "a", "--output", "BAD"),
    "train_flow_latent.py": ("--dataset", "folder", "--datadir", "a", "--save_root", "BAD"),
    "test_flow_latent_inpainting.py": ("--output_json", "BAD"),
    "test_flow_latent_semantic_syn.py": ("--output_log", "BAD"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_its_output_before_the_work(script, image_folders, blocked, call, monkeypatch):
    for target in (
        "evaluation.comparison.compare",
        "training.autoencoder.run.prepare",
        "training.script.prepare",
    ):
        monkeypatch.setattr(target, lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.setattr("evaluation.features.registry.load_features", lambda *_: Pixels())
    names = {"a": image_folders[0], "b": image_folders[1], "BAD": blocked}
    code, _, err = call(script.strip(), [names.get(word, word) for word in SCRIPTS[script]])
    assert code == 2
    assert "error: cannot write" in err
    assert "name another f" in err


@pytest.mark.parametrize("method", ["dopri5", "torchdiffeq_dopri5", "bosh3"])
def test_adaptive_solvers_give_up_after_many_evaluations(method, monkeypatch):
    monkeypatch.setattr(ode, "MOST_UNREACHABLE_EVALUATIONS", 300)
    monkeypatch.setattr(ode, "MOST_EVALUATIONS", 3000)
    x = torch.ones(2, 1, 2, 2)

    def velocity(t, x):
        return torch.sin(40 * x)

    assert solve(velocity, x, SolverOptions(method)).evaluations.max() > 20
    with pytest.raises(UsageError, match=rf"--method {method} has not reached the end after 300 evaluations .*raise"):
        solve(velocity, x, SolverOptions(method, atol=1e-12, rtol=1e-12))


def test_tolerances_below_the_precision_cause_a_note():
    assert "below what float32 resolves" in unreachable_tolerances(
        SolverOptions("dopri5", atol=1e-9, rtol=1e-9), "fp32"
    )
    assert "below what --precision bf16 resolves" in unreachable_tolerances(SolverOptions("bosh3"), "bf16")
    for settings, precision in (({}, "fp32"), ({"atol": 1e-9}, "fp32"), ({"atol": 1e-2, "rtol": 1e-2}, "bf16")):
        assert unreachable_tolerances(SolverOptions("dopri5", **settings), precision) == ""
    assert unreachable_tolerances(SolverOptions("euler", atol=1e-12, rtol=1e-12), "fp32") == ""
