"""content.pth survives kills, full disks and flipped bits. Older checkpoints are removed, and disk use is predicted."""

import errno
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

from models.dit import hidden_matrices
from options import UsageError
from runtime.distributed import Processes
from runtime.files import remove_leftovers
from runtime.torch_files import read_torch_file
from tests.training.test_loop import assert_same_run, new_run
from training.checkpointing import remove_older
from training.loop import train
from training.optimizers import OptimizerOptions
from training.resources import check_space, predict_use
from training.state import TrainingState
from training.state_file import has_state, read_newest, save_state

OFTEN = {"save_content_every_steps": 3}
OPERATIONS = {"open", "os.rename", "os.link", "os.remove"}


def content_of(step):
    return {"step": step, "weights": torch.full((5000,), float(step))}


def refuse_links(*_):
    raise OSError(errno.EPERM, "no links here")


def in_child(action):
    """Run `action` in a forked process. Returns the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def kill_before(operation, folder):
    """Kill this process before its n-th operation on a file in `folder`."""
    seen = count()

    def hook(event, arguments):
        if event in OPERATIONS and str(folder) in str(arguments[0]) and next(seen) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_before_any_operation_leaves_a_whole_content(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    for operation in count():
        folder = tmp_path / str(operation)
        for step in (1, 2):
            save_state(folder, content_of(step))

        def save(operation=operation, folder=folder):
            kill_before(operation, folder)
            save_state(folder, content_of(3))

        killed = in_child(save)
        content = read_newest(folder / "content.pth", read_torch_file, Processes())[1]
        assert content["step"] in (2, 3)
        assert content["weights"].unique().tolist() == [content["step"]]
        if not killed:
            break
    assert operation >= 4  # at least open, flush, link and rename
    steps = [read_torch_file(folder / name)["step"] for name in ("content.pth", "content.previous.pth")]
    assert steps == [3, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["content.previous.pth", "content.pth"]


def test_a_kill_in_the_middle_of_writing_leaves_both(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, content_of(step))

    def save():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        save_state(tmp_path, content_of(3))

    assert in_child(save) == signal.SIGXFSZ
    assert [read_torch_file(tmp_path / name)["step"] for name in ("content.pth", "content.previous.pth")] == [2, 1]
    (half,) = tmp_path.glob("*.tmp-*")
    assert half.stat().st_size == 5000
    (tmp_path / f"own.tmp-{os.getpid()}").touch()
    (tmp_path / "notes.tmp-x").touch()
    assert remove_leftovers(tmp_path) == [half]
    assert len(list(tmp_path.glob("*.tmp-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_two_hundred_kills_at_random_moments_cost_nothing_that_was_saved(tmp_path, monkeypatch, links):
    """A child process saves in a loop until it is killed after some milliseconds. The next one resumes from what it finds."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    generator, found, halves, savings = random.Random(0), 0, 0, 0
    for _ in range(200):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in count(found + 1):
                    save_state(tmp_path, content_of(step))
                    os.write(writer, b".")
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(generator.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with os.fdopen(reader, "rb") as file:
            done = len(file.read())
        if has_state(tmp_path):
            content = read_newest(tmp_path / "content.pth", read_torch_file, Processes())[1]
            assert content["step"] in (found + done, found + done + 1)
            assert content["weights"].unique().tolist() == [content["step"]]
            found = content["step"]
        assert has_state(tmp_path) or done == 0
        halves, savings = halves + len(remove_leftovers(tmp_path)), savings + done
    assert not list(tmp_path.glob("*damaged*"))
    assert halves > 0  # some were killed while writing
    assert savings > 0


def test_a_failed_write_leaves_both(tmp_path, monkeypatch):
    for step in (1, 2):
        save_state(tmp_path, content_of(step))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, content_of(3))
    assert [read_torch_file(tmp_path / name)["step"] for name in ("content.pth", "content.previous.pth")] == [2, 1]


def test_a_file_that_one_process_cannot_read_is_used_by_none(tmp_path, monkeypatch):
    for step in (1, 2):
        save_state(tmp_path, content_of(step))
    somewhere = iter([True, False])  # whether a process failed to read the newest file, and then the previous one
    monkeypatch.setattr(Processes, "any", lambda self, failed: next(somewhere))
    path, content = read_newest(tmp_path / "content.pth", read_torch_file, Processes(1, 2))
    assert (path.name, content["step"]) == ("content.previous.pth", 1)
    assert (tmp_path / "content.pth").exists()  # only the main process moves the file


def crash():
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert train(new_run(folder, experiment=OFTEN), resume=False)
    return folder


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A run folder with step 9 in content.pth and step 6 in content.previous.pth."""
    folder = tmp_path_factory.mktemp("faults") / "crashed"
    with pytest.raises(RuntimeError, match="power cut"):
        train(new_run(folder, event=(12, crash), experiment=OFTEN), resume=False)
    return folder


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + entry.file_size // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save(Malicious(), path),
    "another thing": lambda path: torch.save({"step": 9}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_content_is_kept_aside_and_the_run_goes_on_from_the_one_before(
    damage, crashed, reference_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    DAMAGES[damage](folder / "content.pth")
    damaged = (folder / "content.pth").read_bytes()
    assert train(new_run(folder, experiment=OFTEN), resume=True)
    captured = capsys.readouterr()
    assert f"{folder}/content.pth" in captured.err
    assert "content.pth.damaged-1. The run resumes from content.previous.pth" in captured.err
    assert "resuming at step 6 of 14" in captured.out
    assert "this must not run" not in captured.out + captured.err
    assert (folder / "content.pth.damaged-1").read_bytes() == damaged
    assert_same_run(folder, reference_run)


def test_a_kill_between_two_renames_loses_nothing(crashed, reference_run, tmp_path, capsys):
    shutil.copytree(crashed, tmp_path / "run")
    (tmp_path / "run" / "content.pth").unlink()
    assert has_state(tmp_path / "run")
    assert train(new_run(tmp_path / "run", experiment=OFTEN), resume=True)
    assert "resuming at step 6 of 14" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", reference_run)


def test_where_both_are_damaged_nothing_is_touched(crashed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    for name in ("content.pth", "content.previous.pth"):
        cut(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = r"cannot read .*content\.pth: .*cannot read .*content\.previous\.pth: .*--overwrite .*--init_from"
    with pytest.raises(UsageError, match=message):
        train(new_run(folder, experiment=OFTEN), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_saving_by_the_clock(tmp_path):
    """The interval is so short that every step is saved. A crash at the fetch of batch 12 costs one or two steps."""
    with pytest.raises(RuntimeError, match="power cut"):
        train(
            new_run(tmp_path / "run", event=(12, crash), experiment={"save_content_every_minutes": 1e-9}), resume=False
        )
    assert read_torch_file(tmp_path / "run" / "content.pth")["step"] >= 10
    previous = read_torch_file(tmp_path / "run" / "content.previous.pth")["step"]
    assert previous == read_torch_file(tmp_path / "run" / "content.pth")["step"] - 1


def test_the_clock_begins_anew_with_every_saving(tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("training.metrics_log.time.monotonic", lambda: float(next(now)))
    saved = []
    monkeypatch.setattr("training.checkpointing.save_state", lambda folder, content: saved.append(content["step"]))
    train(new_run(tmp_path / "run", experiment={"save_content_every_minutes": 0.25}), resume=False)
    steps = [later - earlier for earlier, later in pairwise(saved)]
    assert len(saved) > 2
    assert 1 < max(steps[:-1]) < 14  # not at every step, and not only at the end
    assert saved[-1] == 14


@pytest.mark.parametrize(
    ("option", "work"), [("eval_every_minutes", "_validate"), ("plot_every_minutes", "_draw")], ids=["validate", "draw"]
)
def test_each_work_has_its_own_clock(tmp_path, monkeypatch, option, work):
    """Saving at every step does not delay a validation or a grid, whose minutes count from the last one's end."""
    now = iter(range(1000))
    monkeypatch.setattr("training.metrics_log.time.monotonic", lambda: float(next(now)))
    steps = []
    monkeypatch.setattr(
        f"training.checkpointing.Checkpointer.{work}", lambda self, *args: steps.append(self._state.step)
    )
    often = {"eval_every": 1000, "plot_every": 1000, "save_content_every_steps": 1, option: 0.25}
    train(new_run(tmp_path / "run", experiment=often), resume=False)
    assert steps[-1] == 14
    assert len(steps) > 2
    assert min(later - earlier for earlier, later in pairwise(steps[:-1])) > 1


def test_older_checkpoints_are_removed(reference_run, tmp_path):
    assert train(new_run(tmp_path / "run", experiment={**OFTEN, "keep_last": 2}), resume=False)
    names = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert names == {"model_2.safetensors", "model_3.safetensors", "best.safetensors"}
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (reference_run / name).read_bytes()


def test_nothing_but_numbered_checkpoints_is_removed(tmp_path):
    others = {"best.safetensors", "model_1.pth", "model_x.safetensors", "model_2.safetensors.tmp-1", "content.pth"}
    for name in {*others, *(f"model_{epoch}.safetensors" for epoch in (2, 9, 10, 100))}:
        (tmp_path / name).touch()
    remove_older(tmp_path, 3)
    left = {path.name for path in tmp_path.iterdir()}
    assert left - others == {f"model_{epoch}.safetensors" for epoch in (9, 10, 100)}
    remove_older(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == others | {"model_100.safetensors"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_predicted_use_is_that_of_the_files(tmp_path, optimizer):
    """Equal except for the names and headers in the files, some kilobytes per tensor."""
    run = new_run(tmp_path / "run", experiment=OFTEN, optimizer=optimizer)
    state = TrainingState(
        run.network, run.machine, 0.9, OptimizerOptions(optimizer=optimizer), hidden_matrices=hidden_matrices
    )
    use = predict_use(state, run.experiment, per_epoch=5, last_step=14)
    assert train(run, resume=False)
    folder = tmp_path / "run"
    assert use.checkpoints == len(list(folder.glob("*.safetensors"))) == 4
    assert use.contents == len(list(folder.glob("content*.pth"))) == 2
    tensors = len(run.network.state_dict())
    assert 0 < (folder / "best.safetensors").stat().st_size - use.weights < 8000
    assert 0 < (folder / "content.pth").stat().st_size - use.content < 1000 * 6 * tensors
    assert use.total == 4 * use.weights + 2 * use.content + use.content


def test_predicted_use_includes_power_averages(tmp_path):
    """The fixed position table of DiT is stored in float32, so snapshots exceed half of the weights by less than that."""
    run = new_run(tmp_path / "run", experiment=OFTEN, posthoc_ema=(0.05, 0.1), posthoc_ema_every=4)
    state = TrainingState(run.network, run.machine, 0.9, OptimizerOptions(), posthoc_ema=(0.05, 0.1))
    use = predict_use(state, run.experiment, per_epoch=5, last_step=14, snapshot_every=4)
    assert train(run, resume=False)
    snapshots = list((tmp_path / "run" / "posthoc_ema").iterdir())
    assert use.snapshots == len(snapshots) == 8
    assert 0 < snapshots[0].stat().st_size - use.snapshot < 8000
    tensors = len(run.network.state_dict())
    assert 0 < (tmp_path / "run" / "content.pth").stat().st_size - use.content < 1000 * 8 * tensors
    assert use.total == 4 * use.weights + 3 * use.content + 8 * use.snapshot


def test_a_run_without_room_for_one_saving_does_not_begin(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    run = new_run(tmp_path / "run", experiment=OFTEN)
    state = TrainingState(run.network, run.machine, 0.9, OptimizerOptions())
    use = predict_use(state, run.experiment, 5, 14)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=use.one_saving - 1))
    with pytest.raises(UsageError, match=r"a checkpoint and a content.pth need .* but only .* is free: .*--save_root"):
        train(run, resume=False)
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=use.one_saving))
    check_space(tmp_path, use)
    assert "the complete run needs" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=use.total))
    check_space(tmp_path, use)
    assert capsys.readouterr().err == ""
