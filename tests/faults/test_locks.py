"""Only one process at a time works in a folder, and a dead process's lock file does not block it."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from options import UsageError
from runtime import locks
from runtime.distributed import Processes
from runtime.locks import Holder, locked
from runtime.processes.signals import orderly_exit
from training.experiment import Configuration, ExperimentOptions, only_run_in, open_experiment

ROOT = Path(__file__).parents[2]


HOLDER = """
import subprocess, sys
from pathlib import Path
from runtime.locks import locked
subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # a program of its own, which it may outlive
with locked(Path(sys.argv[1]), "is training"):
    print("inside", flush=True)
    input()
"""


@pytest.fixture
def hold():
    """`hold(path)` starts a process that holds the lock file until it ends."""
    started = []

    def start(path):
        command = [sys.executable, "-c", HOLDER, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"inside\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def write(path, holder):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(holder._asdict()))


def left_by(pid):
    """The lock that a process of this host leaves behind when it is killed."""
    return Holder(socket.gethostname(), pid, "2026-01-02 03:04:05", kernel_lock=True)


def test_the_lock_file_names_its_process_and_is_removed(tmp_path):
    path = tmp_path / "run" / "run.lock"
    with locked(path, "is training"):
        holder = Holder.read(path)
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert holder.kernel_lock
        (path.parent / "result").touch()
    assert [file.name for file in path.parent.iterdir()] == ["result"]


def test_an_empty_folder_goes_too(tmp_path):
    with pytest.raises(ValueError, match="mistake"), locked(tmp_path / "run" / "run.lock", "is training"):
        raise ValueError("a mistake before anything was written")
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_is_refused_and_changes_nothing(tmp_path, hold):
    path = tmp_path / "run" / "run.lock"
    first = hold(path)
    before = path.read_bytes()
    with pytest.raises(UsageError) as raised, locked(path, "is training in this folder"):
        pass
    since = Holder.read(path).since
    expected = (
        f"process {first.pid} on {socket.gethostname()}, since {since}, is training in this folder: {path.parent}"
    )
    assert expected in str(raised.value)
    assert "delete" not in str(raised.value)  # the other process is alive
    assert path.read_bytes() == before


def test_what_a_dead_process_left_is_removed_with_a_note(tmp_path, hold, capsys):
    """The dead process's own child may still be running."""
    path = tmp_path / "run" / "run.lock"
    dead = hold(path)
    dead.kill()
    dead.wait()
    assert Holder.read(path).pid == dead.pid
    with locked(path, "is training"):
        assert Holder.read(path).pid == os.getpid()
    assert f"removed run.lock, left by a process that has ended (process {dead.pid} on" in capsys.readouterr().err


def test_a_dead_process_whose_parent_has_not_asked_for_it_is_dead(tmp_path, hold, capsys):
    """Such processes, called zombies, are common in containers."""
    path = tmp_path / "run.lock"
    dead = hold(path)
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    os.kill(dead.pid, 0)  # the zombie still has its process id
    with locked(path, "is training"):
        assert "removed" in capsys.readouterr().err


def test_a_process_that_got_the_number_of_a_dead_one_is_told_from_it(tmp_path, hold, capsys):
    path = tmp_path / "run" / "run.lock"
    write(path, left_by(hold(tmp_path / "other.lock").pid))
    with locked(path, "is training"):
        pass
    assert "left by a process that has ended" in capsys.readouterr().err


def test_a_process_whose_number_means_nothing_here_is_believed(tmp_path, hold):
    """It runs in another container on this host, whose process ids are separate."""
    path = tmp_path / "run.lock"
    hold(path)
    path.write_text(path.read_text().replace(f'"pid": {Holder.read(path).pid}', f'"pid": {2**22 - 1}'))
    with pytest.raises(UsageError, match=f"process {2**22 - 1} on {socket.gethostname()}, since"):
        locked(path, "is training").__enter__()


def test_where_the_kernel_locks_nothing_the_file_is_believed(tmp_path, monkeypatch):
    """The holder may be a process on this host or an earlier version, so only the user knows whether it has ended."""

    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    path = tmp_path / "run" / "run.lock"
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unsupported)
        with locked(path, "is training"):
            assert not Holder.read(path).kernel_lock
            with pytest.raises(UsageError, match=rf"process {os.getpid()} on .*if it has ended, delete {path}"):
                locked(path, "is training").__enter__()
        assert list(tmp_path.iterdir()) == []
    path.parent.mkdir()
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 7, "identity": "boot 123", "since": "yesterday"}))
    with pytest.raises(
        UsageError, match=rf"process 7 on .*, since yesterday, is training.*if it has ended, delete {path}"
    ):
        locked(path, "is training").__enter__()


def test_a_process_of_another_host_is_believed(tmp_path):
    path = tmp_path / "run" / "run.lock"
    write(path, Holder("elsewhere", 2**22 - 1, "2026-01-02 03:04:05", kernel_lock=True))
    with pytest.raises(UsageError, match=rf"process \d+ on elsewhere, since .*if it has ended, delete {path}"):
        locked(path, "is training").__enter__()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"host": 1}', b"\xff", b"7", b'{"host": "a", "pid": '])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    with pytest.raises(
        UsageError, match=rf"cannot read the lock file {path} .*if no process is using its folder, delete the file"
    ):
        locked(path, "is training").__enter__()
    assert path.read_bytes() == content


def test_another_processs_lock_file_is_not_removed(tmp_path, hold):
    """The lock file was deleted by hand, and a third run has locked the folder."""
    path = tmp_path / "run.lock"
    with locked(path, "is training"):
        path.unlink()
        third = hold(path)
    assert Holder.read(path).pid == third.pid


def test_releasing_a_deleted_lock_file_succeeds(tmp_path):
    path = tmp_path / "run" / "run.lock"
    with locked(path, "is training"):
        path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_lock_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        locked(tmp_path / "run.lock", "is training").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_process_gets_the_lock(tmp_path, hold, monkeypatch, capsys):
    path = tmp_path / "cache" / "build.lock"
    other = hold(path)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            other.communicate(b"\n")  # the process ends

    # Not `time.sleep` itself, which threads of other tests may call.
    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=nap, strftime=time.strftime))
    with locked(path, "is building", wait=True):
        assert Holder.read(path).pid == os.getpid()
    assert len(naps) == 3
    assert capsys.readouterr().out.count(f"waiting: process {other.pid} on") == 1


RACER = """
import sys, time
from pathlib import Path
from runtime import locks
locks.SECONDS_BETWEEN_LOOKS = 0.002
for _ in range(20):
    with locks.locked(Path(sys.argv[1]), "races", wait=True), Path(sys.argv[2]).open("a") as log:
        for word in ("in", "out"):
            print(word, file=log, flush=True)
            time.sleep(0.001)
"""


@pytest.mark.slow
def test_of_many_processes_one_is_inside(tmp_path):
    """All of them first find a dead process's lock file."""
    write(tmp_path / "lock", left_by(7))
    command = [sys.executable, "-c", RACER, tmp_path / "lock", tmp_path / "log"]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(6)]
    assert [racer.wait(600) for racer in racers] == [0] * 6
    assert (tmp_path / "log").read_text() == "in\nout\n" * 120


def test_of_several_processes_the_main_one_takes_it(tmp_path):
    with only_run_in(tmp_path / "run", Processes(0, 2)), only_run_in(tmp_path / "run", Processes(1, 2)):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_partial_files_of_a_killed_run_are_removed(tmp_path, capsys):
    (tmp_path / "content.pth.tmp-1").touch()
    (tmp_path / "content.pth").touch()
    with only_run_in(tmp_path, Processes()):
        assert {path.name for path in tmp_path.iterdir()} == {"content.pth", "run.lock"}
    assert "removed unfinished files of a killed process: content.pth.tmp-1" in capsys.readouterr().err


def test_overwriting_keeps_the_lock(tmp_path):
    folder = tmp_path / "run"
    open_experiment(folder, Configuration({"seed": 1}, {}, {}), ExperimentOptions())
    (folder / "content.pth").touch()
    with only_run_in(folder, Processes()):
        assert not open_experiment(folder, Configuration({"seed": 2}, {}, {}), ExperimentOptions(overwrite=True))
        assert {path.name for path in folder.iterdir()} == {"config.json", "run.lock"}
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    assert {path.name for path in (tmp_path / "run.old-1").iterdir()} == {"config.json", "content.pth"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_releases_it(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, orderly_exit(), locked(tmp_path / "run" / "run.lock", "is training"):
            os.kill(os.getpid(), number)
        assert ended.value.code == 128 + number
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_existing_signal_handlers_are_not_replaced():
    arrived = []
    before = signal.signal(signal.SIGUSR1, lambda *_: arrived.append(1))
    with orderly_exit():
        signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert arrived == [1]
