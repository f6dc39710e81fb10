"""Run folders and the checkpoints found in them, and errors that say what is missing."""

from pathlib import Path

import pytest

from checkpoints.experiments import experiment_folder, find_checkpoint, newest_model
from options import UsageError


def test_newest_model_has_the_largest_number(tmp_path):
    for name in ["model_9", "model_10", "model_100", "best", "model_200.tmp-3", "model_x", "old_model_300"]:
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "model_400.safetensors.tmp-12").touch()
    assert newest_model(tmp_path).name == "model_100.safetensors"
    assert newest_model(tmp_path, 9).name == "model_9.safetensors"
    with pytest.raises(
        UsageError,
        match=r"no model_11\.safetensors or model_11\.pth in .*found: model_10\.safe.*model_9\.saf.*--checkpoint",
    ):
        newest_model(tmp_path, 11)


def test_lfms_checkpoints_are_found_and_ours_take_precedence(tmp_path):
    for name in ["model_475.pth", "model_450.pth", "model_450.safetensors", "cond_stage_model_500.pth", "content.pth"]:
        (tmp_path / name).touch()
    assert newest_model(tmp_path).name == "model_475.pth"
    assert newest_model(tmp_path, 450).name == "model_450.safetensors"
    with pytest.raises(UsageError, match=r"no model_500\.safetensors or model_500\.pth in .*model_475\.pth"):
        newest_model(tmp_path, 500)


def test_a_bare_checkpoint_name_is_looked_up_in_the_run_folder(tmp_path):
    (tmp_path / "model_1.pth").touch()
    assert find_checkpoint("model_1.pth", tmp_path) == tmp_path / "model_1.pth"
    assert find_checkpoint(str(tmp_path / "model_1.pth"), tmp_path / "x") == tmp_path / "model_1.pth"
    assert find_checkpoint("absent.pth", tmp_path) == Path("absent.pth")


def test_run_without_checkpoints_says_what_to_do(tmp_path):
    for folder, found in ((tmp_path, "found: no checkpoints"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(
            UsageError,
            match=rf"no model_<epoch>\.safetensors or model_<epoch>\.pth in {folder} .*{found}.*run\.sh",
        ):
            newest_model(folder)


@pytest.mark.parametrize("name", ["a", "run-1.5_b+c", "2024", "größe"])
def test_plain_names(name, tmp_path):
    assert experiment_folder(str(tmp_path), "mnist", name) == tmp_path / "latent_flow" / "mnist" / name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/a", "-a", ".hidden", "a b", "a\n", "a\\b"])
def test_names_that_are_not_plain_folder_names_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match=r"--exp .*expected a plain name"):
        experiment_folder(str(tmp_path), "mnist", name)


def test_the_best_checkpoint_alone_is_named(tmp_path):
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(
        UsageError, match=r"found: best.safetensors\); train first .*, or pass a file with --checkpoint"
    ):
        newest_model(tmp_path)
