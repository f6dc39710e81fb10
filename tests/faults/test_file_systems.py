"""File systems that lack features, full disks, lost connections, odd names, and folders that are links or mount points."""

import errno
import mmap
import os
import shutil
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.experiments import newest_model
from checkpoints.files import read_weights
from datasets_prep import build_lmdb, cached_moments
from datasets_prep.lmdb_file import open_lmdb_file
from exits import explain
from options import UsageError
from runtime import files
from runtime.distributed import Processes
from runtime.files import append_line, atomic_path, free_bytes, move_aside, replace_folder, write_json
from runtime.locks import locked
from runtime.outputs import write_error
from runtime.torch_files import read_torch_file, save_content
from tests.training.test_loop import new_run
from training import checkpointing, metrics_log
from training.experiment import LOCK, Configuration, ExperimentOptions, only_run_in, open_experiment
from training.loop import train
from training.metrics_log import MetricsLog
from training.nan_guard import NanGuard
from training.optimizers import OptimizerOptions
from training.resources import DiskUse, check_space
from training.state import TrainingState
from training.tracking import trackers


def system_error(number):
    return OSError(number, os.strerror(number))


def failing(number):
    """A function that raises the system's error `number`."""

    def fail(*_, **__):
        raise system_error(number)

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What a file system lacks.


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_where_nothing_can_be_flushed_files_are_written_all_the_same(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    assert write_error(tmp_path) is None
    write_json(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "1\n"


def test_a_flush_that_loses_data_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*file"):
        write_json(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_where_no_file_can_be_renamed_over_another_one_it_is_replaced_in_two_steps(tmp_path, monkeypatch):
    replace = Path.replace

    def refuse(self, target):
        if target.exists():
            raise system_error(errno.EEXIST)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    for value in (1, 2):
        write_json(tmp_path / "file", value)
    assert (tmp_path / "file").read_text() == "2\n"
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr(Path, "rename", lambda self, target: failing(errno.EIO)() if "tmp" in self.name else None)
    with pytest.raises(OSError, match="Input/output"):
        write_json(tmp_path / "file", 3)
    assert (tmp_path / "file").read_text() == "2\n"


def test_a_file_system_that_does_not_report_its_free_space_is_not_full(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(total=0, used=0, free=0))
    assert free_bytes(tmp_path) is None
    assert "free: unknown" in check_space(tmp_path, DiskUse(10, 20, 3, 2))
    with pytest.raises(ValueError, match="own"), atomic_path(tmp_path / "file"):
        raise ValueError("own")
    monkeypatch.setattr(shutil, "disk_usage", failing(errno.ENOSYS))
    with pytest.raises(ValueError, match="own"), atomic_path(tmp_path / "file"):
        raise ValueError("own")


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL])
def test_a_cache_is_read_where_files_have_no_shared_map(tmp_path, monkeypatch, number):
    np.save(tmp_path / "a.npy", np.arange(10.0))
    load = np.load

    def without_shared(path, mmap_mode):
        return failing(number)() if mmap_mode == "r" else load(path, mmap_mode=mmap_mode)

    monkeypatch.setattr(np, "load", without_shared)
    assert cached_moments._map_rows(tmp_path / "a.npy").tolist() == list(range(10))
    assert isinstance(cached_moments._map_rows(tmp_path / "a.npy").base, mmap.mmap)


def test_an_lmdb_where_no_file_can_be_mapped_says_so(tmp_path, monkeypatch):
    with lmdb.open(str(tmp_path / "a")):
        pass
    monkeypatch.setattr(lmdb, "open", lambda *_, **__: (_ for _ in ()).throw(lmdb.Error("a: No such device")))
    with pytest.raises(UsageError, match="cannot map files into memory: copy the LMDB to a local disk"):
        open_lmdb_file(tmp_path / "a")


# Full disks and lost connections.


def test_the_systems_error_behind_a_librarys_error_is_reported(tmp_path):
    """A quota fills without a full disk, and torch.save raises a RuntimeError while it closes the file."""
    with pytest.raises(OSError, match="quota") as raised, atomic_path(tmp_path / "file"):
        try:
            raise system_error(errno.EDQUOT)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    reason = explain(raised.value)
    assert reason.exit_code == 2
    assert reason.line.endswith(f"{tmp_path}/file: free some space, or choose another folder")
    with pytest.raises(OSError, match="quota"), replace_folder(tmp_path / "folder"):
        raise system_error(errno.EDQUOT)


@pytest.mark.parametrize("writing", [atomic_path, replace_folder])
def test_a_message_for_the_user_is_not_replaced_by_the_systems_error_behind_it(tmp_path, writing):
    with pytest.raises(UsageError, match="own words"), writing(tmp_path / "file"):
        raise UsageError("own words") from system_error(errno.ENOENT)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENAMETOOLONG, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMFILE,
     errno.ENOSYS, errno.EFBIG, errno.ELOOP, errno.EILSEQ, errno.ENOLCK],
)  # fmt: skip
def test_errors_of_the_file_system_are_lines_with_advice(number):
    error = OSError(number, os.strerror(number), "/some/file")
    line = explain(error).line
    assert line.startswith(f"error: {os.strerror(number)}: /some/file: ")
    assert "\n" not in line


def test_an_invalid_argument_is_a_name_only_with_a_name():
    assert explain(OSError(errno.EINVAL, "Invalid argument")) is None
    assert "choose another name" in explain(OSError(errno.EINVAL, "Invalid argument", "a:b")).line


def test_a_line_of_a_log_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    log = tmp_path / "log"
    append_line(log, "one")
    handle = Path.open

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise system_error(errno.ENOSPC)

        def write(self, text):
            with handle(log, "a") as file:
                file.write(text[:2])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: Full())
        with pytest.raises(OSError, match=r"No space.*log"):
            append_line(log, "two")
    append_line(log, "three")
    assert log.read_text() == "one\nthree\n"


def test_metrics_that_cannot_be_written_are_written_later(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_log, "append_line", failing(errno.ENOSPC))
        log.write(1, "train", {"loss": 1.0})
        log.write(2, "train", {"loss": 2.0})
    assert not log.path.exists()
    log.write(3, "train", {"loss": 3.0})
    log.close()
    assert log.past("train", "loss") == [1.0, 2.0, 3.0]
    assert capsys.readouterr().err.count("cannot write") == 1


@pytest.mark.parametrize("part", ["start", "write", "close"])
def test_a_failure_of_tensorboard_costs_only_its_file(tmp_path, monkeypatch, capsys, part):
    class Broken:
        def __init__(self, *_, **__):
            self._fail("start")

        def add_scalar(self, *_):
            self._fail("write")

        def close(self):
            self._fail("close")

        def _fail(self, here):
            if here == part:
                raise system_error(errno.EIO)

    monkeypatch.setattr(trackers, "SummaryWriter", Broken)
    hook = threading.excepthook
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write(step, "train", {"loss": 1.0})
    log.close()
    assert log.past("train", "loss") == [1.0, 1.0]
    assert capsys.readouterr().err.count("TensorBoard's file is not written any more") == 1
    assert threading.excepthook == hook


OFTEN = {"save_content_every_steps": 3, "save_ckpt_every": 1, "eval_every": 1, "plot_every": 1}
WRITERS = ("save_weights", "save_state", "save_sheet")


def test_a_disk_that_is_full_for_a_while_ends_no_run(tmp_path, monkeypatch, capsys):
    """After it has room again, the training state is that of an undisturbed run."""
    after = checkpointing.Checkpointer.after_step
    for folder, full in (("calm", ()), ("full", range(3, 12))):
        run, step = new_run(tmp_path / folder, experiment=OFTEN), [0]

        def after_step(self, *arguments, step=step):
            step[0] = self._state.step
            return after(self, *arguments)

        def unless_full(write, full=full, step=step):
            return lambda *arguments: failing(errno.ENOSPC)() if step[0] in full else write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(checkpointing.Checkpointer, "after_step", after_step)
            for name in WRITERS:
                patch.setattr(checkpointing, name, unless_full(getattr(checkpointing, name)))
            assert train(run, resume=False)
    errors = capsys.readouterr().err
    for name in ("content.pth", "best.safetensors", "model_1.safetensors", "samples/step_"):
        assert f"{tmp_path}/full/{name}" in errors
    calm, full = (read_torch_file(tmp_path / name / "content.pth") for name in ("calm", "full"))
    assert calm["step"] == full["step"]
    assert all(torch.equal(calm["network"][name], full["network"][name]) for name in calm["network"])
    assert "best.safetensors" in names(tmp_path / "full")


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_the_last_files_stay(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", experiment=OFTEN)
    train(run, resume=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.name != "metrics.jsonl"}
    monkeypatch.setattr(files, "_flush", failing(errno.ENOSPC))
    longer = new_run(tmp_path / "run", experiment=OFTEN)
    state = TrainingState(longer.network, longer.machine, 0.9, OptimizerOptions())
    log = MetricsLog(tmp_path / "other", 0)
    guard = NanGuard(longer, state, log, last_step=5)
    checkpointer = checkpointing.Checkpointer(longer, state, log, metrics_log.Clock(state), 5, guard, 5)
    with pytest.raises(
        UsageError, match=r"could not be written in .*model_0.*content\.pth .*No space.*repeat the command"
    ):
        checkpointer.after_step(True, checkpointing.Requests(False, False, False))
    monkeypatch.undo()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_a_full_disk_while_an_lmdb_is_built_is_a_line_and_the_build_continues(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    options = build_lmdb.BuildLmdbOptions(image_size=16, num_workers=1)
    paths = build_lmdb.list_in_order(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr(
            build_lmdb, "_commit", lambda *_: (_ for _ in ()).throw(lmdb.Error("mdb_txn_commit: Input/output error"))
        )
        with pytest.raises(UsageError, match="cannot write the LMDB .*MB are free: check the disk.*continues"):
            build_lmdb.build_lmdb(tmp_path / "a.lmdb", paths, tmp_path / "images", options)
    with locked(tmp_path / "a.lmdb.lock", "is building"), pytest.raises(UsageError, match=r"is building a\.lmdb"):
        build_lmdb.build_lmdb(tmp_path / "a.lmdb", paths, tmp_path / "images", options)
    assert build_lmdb.build_lmdb(tmp_path / "a.lmdb", paths, tmp_path / "images", options) == 3
    assert names(tmp_path) == ["a.lmdb", "images"]


# Names.


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a\nb'\"%{x}", os.fsdecode(b"\xff" * 255), "-rf", "trailing "])
def test_files_may_have_any_name_that_the_file_system_takes(tmp_path, name):
    for value in (1, 2):
        write_json(tmp_path / name, value)
    assert (tmp_path / name).read_text() == "2\n"
    moved = move_aside(tmp_path / name)
    assert moved.name.endswith(".old-1")
    save_content(tmp_path / name, {"a": 1})
    assert move_aside(tmp_path / name).name.endswith(".old-2")
    with replace_folder(tmp_path / name) as temporary:
        (temporary / "inside").touch()
    assert names(tmp_path / name) == ["inside"]


def test_checkpoints_are_read_from_folders_whose_names_are_no_text(tmp_path):
    run = new_run(tmp_path / os.fsdecode(b"\xff"), experiment={"plot_every": 10**6})
    train(run, resume=False)
    weights, header = read_weights(newest_model(run.folder))
    assert header.ended
    assert weights


def test_devices_and_pipes_are_written_into_and_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", 1)
    assert os.read(reader, 100) == b"1\n"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    before = Path(os.devnull).stat()
    write_json(os.devnull, 1)
    assert os.path.samestat(before, Path(os.devnull).stat())


def test_an_open_file_named_in_proc_is_appended_to(tmp_path):
    with (tmp_path / "out").open("w") as out:
        out.write("before\n")
        out.flush()
        write_json(f"/proc/self/fd/{out.fileno()}", 1)
    assert (tmp_path / "out").read_text() == "before\n1\n"


# Links and mount points.


def begun(folder):
    """Begin a run in `folder`, as far as --overwrite is concerned."""
    open_experiment(folder, Configuration({"seed": 1}, {}, {}), ExperimentOptions())
    (folder / "content.pth").touch()


def overwrite(folder):
    with only_run_in(folder, Processes()):
        open_experiment(folder, Configuration({"seed": 2}, {}, {}), ExperimentOptions(overwrite=True))
        assert names(folder) == ["config.json", LOCK]


def test_a_run_folder_that_is_a_link_is_moved_aside_on_its_own_disk(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    begun(tmp_path / "run")
    overwrite(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk" / "run.old-1") == ["config.json", "content.pth"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_the_contents_of_a_folder_that_cannot_be_renamed_are_moved(tmp_path, monkeypatch, number):
    """EBUSY: a mount point. EXDEV: a folder of a container's image, on overlayfs."""
    begun(tmp_path / "run")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: failing(number)() if self.name == "run" else rename(self, to))
    overwrite(tmp_path / "run")
    assert names(tmp_path / "run.old-1") == ["config.json", "content.pth"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk" / "vae").mkdir(parents=True)
    (tmp_path / "vae").symlink_to(tmp_path / "disk" / "vae")
    with replace_folder(tmp_path / "vae") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "vae").is_symlink()
    assert names(tmp_path / "disk") == ["vae"]
    assert names(tmp_path / "vae") == ["new"]
