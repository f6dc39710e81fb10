"""Shells, terminals and launchers: stale variables, ports in use, closed terminals, no git, `#` in a path."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import parse_options
from options import UsageError, option
from runtime import distributed
from runtime.distributed import join_processes, patience
from runtime.processes.signals import StopSignals, hangup_is_ignored
from runtime.provenance import code_version

ROOT = Path(__file__).parents[2]

# Prints "ready", waits for a stop signal, writes to the terminal that may be gone, and then saves.
SAVES_WHEN_STOPPED = """
import sys, time
from runtime.messages import show
from runtime.processes.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    show("stopping")
    open(sys.argv[1], "w").write("saved")
"""


@dataclass(frozen=True)
class Data:
    """Data."""

    datadir: str = option("", "folder")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("DATADIR=/data/set#1", "/data/set#1"),
        ("DATADIR=/data/set#1 # the first, isn't it", "/data/set#1"),
        ("DATADIR='/data/a # b'", "/data/a # b"),
        ("# DATADIR=/other\nDATADIR=/data", "/data"),
        ("DATADIR=/data\t#x", "/data"),
        (r"DATADIR=/data/it\'s # the first", "/data/it's"),
        (r'DATADIR="/a \" # b"', '/a " # b'),
        (r"DATADIR='/a\' # b", "/a\\"),
    ],
)
def test_a_number_sign_begins_a_comment_only_at_the_start_of_a_word(tmp_path, line, expected):
    (tmp_path / "arguments.txt").write_text(line)
    assert parse_options("", [Data], ["--args_file", str(tmp_path / "arguments.txt")])[Data].datadir == expected


def test_without_git_the_version_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert code_version() == "unknown"


@pytest.fixture
def launched(monkeypatch):
    """The environment of a launch of two processes on a free port; returns the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return port


def test_a_port_in_use_is_named(launched):
    with (
        socket.create_server(("", launched)),
        pytest.raises(UsageError, match=rf"127\.0\.0\.1:{launched}.*--master_port"),
        join_processes(),
    ):
        pass


def test_waiting_for_processes_that_nobody_started_is_reported(launched, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SECONDS_OF_SILENCE", 0.0)

    def never_comes(url):
        time.sleep(0.5)
        raise ValueError("timed out")

    monkeypatch.setattr(distributed, "rendezvous", never_comes)
    with pytest.raises(UsageError, match="cannot meet at .* timed out"), join_processes():
        pass
    note = capsys.readouterr().err
    assert f"WORLD_SIZE=2 in the environment) at 127.0.0.1:{launched}" in note
    assert "unset RANK, WORLD_SIZE, LOCAL_RANK" in note


def test_patience_is_silent_about_short_work(capsys):
    with patience("this takes long"):
        pass
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.fixture
def no_nohup():
    """Hangups have their default effect, even if nohup started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
def test_a_hangup_is_a_stop_request_unless_nohup_ignores_it(monkeypatch):
    monkeypatch.setattr("runtime.processes.signals._leave_terminal", lambda: None)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert hangup_is_ignored()
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
def test_a_run_saves_after_its_terminal_has_closed(tmp_path):
    terminal, inside = pty.openpty()
    command = [sys.executable, "-c", SAVES_WHEN_STOPPED, str(tmp_path / "content")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1024)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)  # on a busy machine, the signal may also end it after it has saved
    assert (tmp_path / "content").read_text() == "saved"
