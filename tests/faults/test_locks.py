"""One process at a time in a folder; the file of a dead one is no obstacle."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from options import UsageError
from runtime import locks
from runtime.distributed import Processes
from runtime.locks import Holder, locked
from runtime.signals import orderly_exit
from training.experiment import ExperimentOptions, only_run_in, open_experiment


@pytest.fixture
def other():
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def holder_of(process):
    return Holder(socket.gethostname(), process.pid, locks._identity(process.pid), "2026-01-02 03:04:05")


def write(path, holder):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(holder._asdict()))


def test_the_file_names_the_process_and_goes_with_it(tmp_path):
    path = tmp_path / "run" / "run.lock"
    with locked(path, "is training"):
        holder = Holder.read(path)
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert holder.identity
        assert not holder.is_dead
        (path.parent / "result").touch()
    assert [file.name for file in path.parent.iterdir()] == ["result"]


def test_an_empty_folder_goes_too(tmp_path):
    with pytest.raises(ValueError, match="mistake"), locked(tmp_path / "run" / "run.lock", "is training"):
        raise ValueError("a mistake before anything was written")
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_is_refused_and_changes_nothing(tmp_path, other):
    path = tmp_path / "run" / "run.lock"
    write(path, holder_of(other))
    before = path.read_bytes()
    with pytest.raises(UsageError) as raised, locked(path, "is training in this folder"):
        pass
    expected = f"process {other.pid} on {socket.gethostname()}, since 2026-01-02 03:04:05 is training in this folder"
    assert expected in str(raised.value)
    assert "delete" not in str(raised.value)  # it lives
    assert path.read_bytes() == before


def test_what_a_dead_process_left_is_removed_with_a_note(tmp_path, other, capsys):
    path = tmp_path / "run" / "run.lock"
    write(path, holder_of(other))
    other.kill()
    other.communicate()
    with locked(path, "is training"):
        assert Holder.read(path).pid == os.getpid()
    assert f"run.lock was left by a process that has ended (process {other.pid} on" in capsys.readouterr().out


def test_a_dead_process_whose_parent_has_not_asked_for_it_is_dead(tmp_path, other, capsys):
    """As many a container's first process leaves them."""
    path = tmp_path / "run.lock"
    write(path, holder_of(other))
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    os.kill(other.pid, 0)  # it still has its number
    with locked(path, "is training"):
        assert "removed" in capsys.readouterr().out


def test_a_process_that_got_the_number_of_a_dead_one_is_told_from_it(tmp_path, other, capsys):
    path = tmp_path / "run" / "run.lock"
    boot, tick = holder_of(other).identity.split()
    write(path, holder_of(other)._replace(identity=f"{boot} {int(tick) - 1}"))
    with locked(path, "is training"):
        pass
    assert "was left by a process that has ended" in capsys.readouterr().out


def test_a_process_of_another_host_is_believed(tmp_path):
    path = tmp_path / "run" / "run.lock"
    write(path, Holder("elsewhere", 2**22 - 1, "", "2026-01-02 03:04:05"))
    with pytest.raises(UsageError, match=rf"process \d+ on elsewhere, since .*if it is dead, delete {path}"):
        locked(path, "is training").__enter__()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"host": 1}', b"\xff", b'{"host": "a", "pid": '])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{path} says that a process is at work .*if none is, delete it"):
        locked(path, "is training").__enter__()
    assert path.read_bytes() == content


def test_the_file_of_another_is_not_removed(tmp_path, other):
    """Somebody deleted ours, and a third run took the folder."""
    path = tmp_path / "run.lock"
    with locked(path, "is training"):
        write(path, holder_of(other))
    assert Holder.read(path) == holder_of(other)


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        locked(tmp_path / "run.lock", "is training").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_one_who_waits_gets_it_in_the_end(tmp_path, other, monkeypatch, capsys):
    path = tmp_path / "cache" / "build.lock"
    write(path, holder_of(other))
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            path.unlink()

    monkeypatch.setattr(locks.time, "sleep", nap)
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
def test_of_many_processes_one_is_inside(tmp_path, other):
    """All of them find the file of a dead process first."""
    write(tmp_path / "lock", holder_of(other)._replace(identity="of another boot"))
    command = [sys.executable, "-c", RACER, tmp_path / "lock", tmp_path / "log"]
    racers = [subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) for _ in range(6)]
    assert [racer.wait(600) for racer in racers] == [0] * 6
    assert (tmp_path / "log").read_text() == "in\nout\n" * 120


def test_of_several_processes_the_main_one_takes_it(tmp_path):
    with only_run_in(tmp_path / "run", Processes(0, 2)), only_run_in(tmp_path / "run", Processes(1, 2)):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_half_written_goes(tmp_path, capsys):
    (tmp_path / "content.pth.tmp-1").touch()
    (tmp_path / "content.pth").touch()
    with only_run_in(tmp_path, Processes()):
        assert {path.name for path in tmp_path.iterdir()} == {"content.pth", "run.lock"}
    assert "removed what a killed process left unfinished: content.pth.tmp-1" in capsys.readouterr().out


def test_overwriting_keeps_the_lock(tmp_path):
    folder = tmp_path / "run"
    open_experiment(folder, {"seed": 1}, ExperimentOptions())
    (folder / "content.pth").touch()
    with only_run_in(folder, Processes()):
        assert not open_experiment(folder, {"seed": 2}, ExperimentOptions(overwrite=True))
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


def test_handlers_of_others_are_left_as_they_are():
    arrived = []
    before = signal.signal(signal.SIGUSR1, lambda *_: arrived.append(1))
    with orderly_exit():
        signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert arrived == [1]
