"""If a process dies, the others end soon and report why. torchrun may then restart them all."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_launch import ROOT, TEST, TORCHRUN, TRAIN, environment, folder_of, place, train_flags
from tests.training.test_loop import assert_same_run

__all__ = ["place"]  # a fixture, imported for pytest
TWO_RANKS = Path(__file__).with_name("two_ranks.py")
LAUNCHERS = {"flag": ([sys.executable], ["--num_process_per_node", "2"]), "torchrun": (TORCHRUN, [])}
WITHIN_S = 60  # limit stated in the documentation
START_S = 900
STEPS = 300  # long enough that a kill hits the run in the middle
IN_PARTS = ["--grad_accumulation", 2, "--num_workers", 2]


STARTED = []


@pytest.fixture(autouse=True)
def end_started_processes():
    """End all processes that a test started, even if it fails."""
    yield
    while STARTED:
        process = STARTED.pop()
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def start(launcher, script, flags):
    """Start two processes with a launcher and return the launcher's process."""
    before, after = LAUNCHERS[launcher]
    command = [*before, str(script), *map(str, flags), *after]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    STARTED.append(process)
    return process


def descendants(pid):
    try:
        children = [
            int(pid) for path in Path(f"/proc/{pid}/task").glob("*/children") for pid in path.read_text().split()
        ]
    except OSError:
        return []
    return [*children, *(pid for child in children for pid in descendants(child))]


def ranks_of(process):
    """The process ids of the launcher's ranks."""
    found = {}
    for pid in descendants(process.pid):
        with suppress(OSError):  # the process has just ended
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    found.setdefault(int(variable[5:]), pid)  # processes started by a rank come after it
    return found


def wait_until(condition, process):
    deadline = time.monotonic() + START_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end_of(process, pids, within=WITHIN_S):
    """Return the stderr of a launcher, which must fail in time and leave no processes behind."""
    err = process.communicate(timeout=within)[1]
    assert process.returncode > 0
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    return err


def assert_names_the_killed(launcher, err, rank, pid):
    """Check the last line of our launcher, or torchrun's report, for the killed rank. `pid` may be a pattern."""
    if launcher == "flag":
        last = rf"error: rank {rank} \(process {pid}\) was killed by SIGKILL, signal 9"
        assert re.fullmatch(last, err.splitlines()[-1])
        assert err.count("was killed by") == 1
    else:
        cause = err[err.index("Root Cause") :]
        assert re.search(rf"rank +: {rank} .*\n *exitcode +: -9 \(pid: {pid}\) +\(SIGKILL\)", cause)


def in_training(place, launcher, exp):
    """Start training, wait for the first steps, and return the launcher's process and its ranks' process ids."""
    process = start(launcher, TRAIN, train_flags(place, exp, 8, steps=100_000))
    record = folder_of(place, exp) / "metrics.jsonl"
    wait_until(lambda: record.exists() and record.read_text().count("\n") > 3, process)
    return process, ranks_of(process)


KILLS = [("flag", 0), ("flag", 1), ("torchrun", 0), ("torchrun", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), KILLS)
def test_a_rank_killed_in_training_ends_the_others(place, launcher, rank):
    process, pids = in_training(place, launcher, f"killed_{launcher}_{rank}")
    os.kill(pids[rank], signal.SIGKILL)
    assert_names_the_killed(launcher, end_of(process, pids.values()), rank, pids[rank])


@pytest.fixture(scope="module")
def trained(place):
    """Name of a run trained for two steps."""
    command = [sys.executable, TRAIN, *map(str, train_flags(place, "trained", 16, steps=2))]
    subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, check=True)
    return "trained"


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), KILLS)
def test_a_rank_killed_in_sampling_ends_the_others(place, trained, launcher, rank, tmp_path):
    flags = [
        "--save_root",
        place / "saved",
        "--exp",
        trained,
        "--dataset",
        "fashion_mnist",
        "--datadir",
        place / "data",
    ]
    flags += ["--n_sample", 1_000_000, "--batch_size", 8, "--save_images", "png", "--output_dir", tmp_path]
    process = start(launcher, TEST, [*flags, "--precision", "fp32", "--num_threads", 1, "--device", "cpu"])
    wait_until(lambda: len(list(tmp_path.glob("*.png"))) > 50, process)
    pids = ranks_of(process)
    os.kill(pids[rank], signal.SIGKILL)
    assert_names_the_killed(launcher, end_of(process, pids.values()), rank, pids[rank])


@pytest.mark.parametrize("launcher", ["flag", pytest.param("torchrun", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fate", ["killed", "defect", pytest.param("mistake", marks=pytest.mark.slow)])
def test_the_reason_of_a_rank_that_dies_alone_is_told(launcher, fate):
    process = start(launcher, TWO_RANKS, ["--fate", fate])
    err = end_of(process, (), START_S)  # the limit includes starting the launcher
    if fate == "killed":
        return assert_names_the_killed(launcher, err, 1, r"\d+")
    reason = {"defect": "RuntimeError: the last words of rank 1", "mistake": "error: the last words of rank 1"}[fate]
    assert len(re.findall(rf"^(\[rank1\]: )?{reason}$", err, re.MULTILINE)) == 1
    if launcher == "flag":
        assert err.count("Traceback") == (fate == "defect")
        assert process.returncode == {"defect": 1, "mistake": 2}[fate]
        assert "killed" not in err
    return None


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_hangs_after_the_death_of_another_is_ended(launcher):
    """The hanging rank's own end must not be reported as the cause."""
    process = start(launcher, TWO_RANKS, ["--fate", "hangs"])
    assert process.stdout.readline() == "ready\n"
    assert_names_the_killed(launcher, end_of(process, ()), 1, r"\d+")


@pytest.mark.slow
def test_a_signal_to_the_launcher_leaves_minutes_for_saving():
    process = start("flag", TWO_RANKS, ["--fate", "saves"])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=START_S)
    assert (process.returncode, out) == (130, "saved\n"), err


@pytest.fixture(scope="module")
def uninterrupted(place):
    """Run folder of an uninterrupted run in two processes."""
    process = start("torchrun", TRAIN, [*train_flags(place, "uninterrupted", 8, STEPS), *IN_PARTS])
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 0, err
    return folder_of(place, "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_torchrun_starts_again_goes_on_and_ends_with_the_same_bits(place, uninterrupted, rank, monkeypatch):
    """Rank 0 leaves its lock file. --overwrite applies only to the first start."""
    monkeypatch.setitem(LAUNCHERS, "torchrun", ([*TORCHRUN, "--max-restarts", "1"], []))
    exp = f"again_{rank}"
    flags = [*train_flags(place, exp, 8, STEPS), *IN_PARTS, "--save_content_every_steps", 5, "--overwrite"]
    process = start("torchrun", TRAIN, flags)
    record = folder_of(place, exp) / "metrics.jsonl"
    wait_until(lambda: record.exists() and record.read_text().count("\n") > 15, process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    out, err = process.communicate(timeout=START_S)
    assert process.returncode == 0, err
    assert re.search(rf"resuming at step \d*[05] of {STEPS}", out)
    assert ("removed run.lock, left by a process that has ended" in err) == (rank == 0)
    assert [path.name for path in record.parent.parent.glob(f"{exp}*")] == [exp]
    (record.parent / "content.previous.pth").unlink()
    assert_same_run(record.parent, uninterrupted)
