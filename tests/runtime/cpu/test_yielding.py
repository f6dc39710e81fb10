"""Threads that yield to other processes: the same bits, sleeping instead of spinning, and when."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from runtime.cpu import yielding
from runtime.cpu.yielding import seconds_without_core, yield_to_others
from runtime.precision import DeviceOptions, choose_device

ROOT = Path(__file__).parents[3]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
LOOPS = 50
# Counts how often the threads sleep in loops with pauses in between, without and with a second team, and trains a network.
IN_A_FRESH_PROCESS = f"""
import hashlib, os, time, torch
from models.dit import DiTOptions
from models.conditions import Condition
from models.registry import build_network
from runtime.cpu.yielding import SecondTeam

torch.set_num_threads({CORES})
large = torch.ones(32768 * {CORES})

def sleeps():
    lines = [line for thread in threads for line in open(f"/proc/self/task/{{thread}}/status")]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))

def sleeps_in_loops():
    before = sleeps()
    for _ in range({LOOPS}):
        large.add_(1)
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
    return sleeps() - before

def trained():
    torch.manual_seed(0)
    network = build_network("DiT-Mi/2", 8, DiTOptions(num_classes=10))
    x, t, labels = torch.randn(64, 4, 8, 8), torch.rand(64), torch.arange(64) % 10
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for _ in range(2):
        network(t, x, Condition(labels)).sub(x).square().mean().backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()

large.add_(1)
threads = os.listdir("/proc/self/task")  # without the second team
alone, digest = sleeps_in_loops(), trained()
team = SecondTeam()
yielding, same = sleeps_in_loops(), trained() == digest
team.disband()
again = sleeps_in_loops()
print(alone, yielding, again, same)
"""


@pytest.mark.skipif(CORES < 2 or not yielding.THREADS.is_dir(), reason="needs Linux and two cores")
def test_a_second_team_lets_threads_sleep_and_keeps_the_bits():
    run = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    alone, with_team, again, same = run.stdout.split()
    assert int(with_team) > max(0.9 * LOOPS, int(alone), int(again))
    assert same == "True"


class Team:
    """Records whether a second team exists."""

    exists = False

    def __init__(self) -> None:
        Team.exists = True

    def disband(self) -> None:
        Team.exists = False


def test_the_team_exists_from_the_first_busy_look_until_several_quiet_ones(monkeypatch):
    monkeypatch.setattr(yielding, "SecondTeam", Team)
    watch, states = yielding._Watch(), []
    for share in [0.05, 0.15, 0.4, 0.15, 0.05, 0.05, 0.05, 0.15, 0.0, 0.0, 0.0, 0.0, 0.15]:
        watch.look(share)
        states.append(Team.exists)
    assert states == [False] * 2 + [True] * 9 + [False] * 2


def test_waiting_times_are_summed_over_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(yielding, "THREADS", tmp_path)
    for thread, text in {"1": "9 1500000000 3\n", "2": "9 250000000 3\n", "3": "0\n"}.items():
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()  # a thread that has just ended
    assert seconds_without_core() == 1.75


def watchers() -> int:
    return sum(thread.name == "yielding" for thread in threading.enumerate())


@pytest.mark.skipif(not yielding.THREADS.is_dir(), reason="needs Linux")
def test_one_background_thread_watches_if_torch_uses_most_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(yielding, "_watched_process", 0)
    monkeypatch.setattr(yielding._Watch, "run", lambda watch: stop.wait())
    stop, before = threading.Event(), watchers()
    try:
        torch.set_num_threads(1)
        assert not yield_to_others()
        choose_device(DeviceOptions("cpu", num_threads=1))
        assert watchers() == before
        choose_device(DeviceOptions("cpu", num_threads=2))
        assert yield_to_others()
        assert watchers() == before + 1
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
        assert not yield_to_others()
    finally:
        stop.set()
