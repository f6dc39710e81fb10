"""The sweep over widths and guidance scales: which checkpoints are sampled how, and its table, JSON and plot."""

import json
import sys

import pytest

from checkpoints.files import read_header
from checkpoints.tasks import TASKS
from command_line import parse_options
from options import UsageError
from tests.training.test_loop import new_run
from training.averages import sweep
from training.averages.snapshots import list_snapshots
from training.averages.sweep import SCORERS, RebuildOptions, Scorer, rebuild_and_score
from training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    assert train(new_run(folder, posthoc_ema=(0.05, 0.1), max_steps=4), resume=False)
    return folder


def sweep_with(run, monkeypatch, flags):
    """Run the sweep with a sampler that scores (100 sigma_rel)^2 + scale; returns its result and the sampled options."""
    seen = []

    def sample(options, processes):
        values = options.values
        seen.append(values)
        value = (100 * read_header(values["checkpoint"]).average.sigma_rel) ** 2 + values["cfg_scale"]
        score = {"metric": "FD", "value": value, "error": 0.5}
        return score | {"scores": {"fid": score}, "samples": 4, "image_format": "png"}

    scorer = SCORERS["generate"]
    monkeypatch.setitem(sweep.SCORERS, "generate", Scorer(sample, scorer.groups))
    options = parse_options("", [RebuildOptions, *scorer.groups], flags)
    return rebuild_and_score(run, list_snapshots(run), options), seen


def test_every_width_is_scored_at_every_scale(run, tmp_path, monkeypatch, capsys):
    flags = ["--sigma_rel", "0.1", "0.05", "--cfg_scales", "2", "1", "--compute_fid", "--checkpoint_dir", str(tmp_path)]
    result, seen = sweep_with(run, monkeypatch, flags)
    rows = [(row["sigma_rel"], row["cfg_scale"], row["value"]) for row in result["rows"]]
    assert rows == [(0.05, 1, 26), (0.05, 2, 27), (0.1, 1, 101), (0.1, 2, 102)]
    assert {values["checkpoint"] for values in seen} == {
        str(tmp_path / f"posthoc_ema_{width}.safetensors") for width in ("0.05", "0.1")
    }
    output = capsys.readouterr().out
    table = [line.split() for line in output.splitlines() if line.startswith(("sigma_rel", "0.", "best"))]
    assert table[:3] == [
        ["sigma_rel", "scale", "1", "scale", "2"],
        ["0.05", "26", "±", "0.5", "27", "±", "0.5"],
        ["0.1", "101", "±", "0.5", "102", "±", "0.5"],
    ]
    assert table[3][:5] == ["best", "sigma_rel", "0.05,", "scale", "1:"]
    stored = json.loads((tmp_path / "samples" / "posthoc_ema.json").read_text())
    assert stored["rows"] == result["rows"]
    assert (tmp_path / "samples" / "posthoc_ema.png").read_bytes().startswith(b"\x89PNG")


def test_an_older_table_is_kept_and_rows_get_their_own_folders(run, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    flags = [
        "--compute_fid",
        "--output_json",
        str(table),
        "--output_dir",
        str(tmp_path),
        "--checkpoint_dir",
        str(tmp_path),
    ]
    for width in ("0.05", "0.08"):
        _, seen = sweep_with(run, monkeypatch, ["--sigma_rel", width, *flags])
    assert json.loads((tmp_path / "table.json.old-1").read_text())["rows"][0]["sigma_rel"] == 0.05
    assert json.loads(table.read_text())["rows"][0]["sigma_rel"] == 0.08
    assert [values["output_dir"] for values in seen] == [str(tmp_path / "posthoc_ema_0.08_cfg1")]
    assert [values["output_json"] for values in seen] == [""]


def test_without_compute_fid_nothing_is_sampled(run, tmp_path, monkeypatch):
    result, seen = sweep_with(
        run, monkeypatch, ["--sigma_rel", "0.07", "--step", "2", "--checkpoint_dir", str(tmp_path)]
    )
    path = tmp_path / "posthoc_ema_0.07_step_2.safetensors"
    assert (result["step"], result["rows"][0]["checkpoint"], seen) == (2, str(path), [])
    assert read_header(path).step == 2
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_width_is_required(run, monkeypatch):
    with pytest.raises(UsageError, match="expected the relative widths to rebuild"):
        sweep_with(run, monkeypatch, [])


def test_every_task_has_a_scorer():
    assert SCORERS.keys() == TASKS.keys()


def test_the_command(run, monkeypatch, tmp_path, capsys):
    from training.posthoc_ema import main

    arguments = [str(run), "--sigma_rel", "0.08", "--checkpoint_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["posthoc_ema", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert read_header(tmp_path / "posthoc_ema_0.08.safetensors").average.sigma_rel == 0.08
    monkeypatch.setattr(sys, "argv", ["posthoc_ema", str(tmp_path), "--sigma_rel", "0.08"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "has no snapshots" in capsys.readouterr().err
