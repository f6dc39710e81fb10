"""Processes started by srun, mpirun and other launchers of clusters work together, or the launcher is named."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from options import UsageError
from runtime import distributed, precision
from runtime.cpu.cores import cpu_quota, usable_cores
from runtime.distributed import Processes, launch_id, restarts
from runtime.precision import MachineOptions, choose_device, find_device
from runtime.processes.clusters import first_host, torch_variables
from runtime.processes.signals import WARNINGS, StopSignals

ROOT = Path(__file__).parents[2]
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008],login", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-1@1",
}
OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


def test_srun():
    found = torch_variables(SRUN)
    port = int(found.pop("MASTER_PORT"))
    found.pop("OMP_NUM_THREADS", None)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
    }
    assert 1024 < port < 32768
    others = torch_variables(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert others["MASTER_PORT"] == str(port)
    assert torch_variables(SRUN | {"SLURM_JOB_ID": "1235"})["MASTER_PORT"] != str(port)
    given = torch_variables(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "6000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: value for name, value in SRUN.items() if "STEP" not in name},  # the batch script of a job of 8 tasks
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | {"SLURM_PTY_PORT": "40000"},  # a shell of srun --pty
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"},
        OPERATOR | {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node", "MASTER_PORT": "29500", "WORLD_SIZE": "2"},  # set globally
    ],
)
def test_a_single_process_stays_alone(environment):
    assert torch_variables(environment) == {}


@pytest.mark.parametrize(
    "environment",
    [
        MPIRUN,
        {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_LOCAL_RANK": "0",
         "MV2_COMM_WORLD_LOCAL_SIZE": "2"},
        {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
        {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_LOCAL_RANK": "0",
         "JSM_NAMESPACE_LOCAL_SIZE": "2"},
        {"PMI_SIZE": "2", "PALS_RANKID": "0", "PALS_LOCAL_RANKID": "0", "PALS_LOCAL_SIZE": "2"},
    ],
)  # fmt: skip
def test_other_launchers_on_one_machine(environment):
    found = torch_variables(environment)
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "2", "0", "2"]
    assert found["MASTER_ADDR"] == "127.0.0.1"


def test_mpirun_on_several_machines_needs_an_address_and_one_process_says_so():
    spread = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(UsageError, match=r"mpirun \(Open MPI\) started 4 processes.*mpirun -x MASTER_ADDR"):
        torch_variables(spread)
    with pytest.raises(SystemExit) as ended:
        torch_variables(spread | {"OMPI_COMM_WORLD_RANK": "3"})
    assert ended.value.code == 2
    assert torch_variables(spread | {"MASTER_ADDR": "node1"})["MASTER_ADDR"] == "node1"


def test_an_operator_that_sets_no_local_rank():
    assert torch_variables(OPERATOR) == {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node[07-12,20],login1", "node07"),
        ("r[1-2]n[03,05]", "r1n03"),
        ("a-b-1,c", "a-b-1"),
        ("n[1,3]-ib.cluster", "n1-ib.cluster"),
        ("batch5 1 c05n06 16", "batch5"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_compressed_list(hosts, first):
    assert first_host(hosts) == first


TOGETHER = """
import sys
from options import option
from runtime.processes.launch import run_script
def main(options, processes):
    total = processes.sum(__import__("torch").tensor(float(processes.rank + 1)))
    print(f"rank {processes.rank} of {processes.count}, sum {total.item()}", flush=True)
run_script(main, "a test", [])
"""


@pytest.mark.parametrize("flags", [[], ["--num_process_per_node", "2"]])
def test_two_tasks_of_srun_work_together_unless_the_command_starts_its_own(tmp_path, flags):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{TOGETHER}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    base = {**os.environ, **SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(port)}
    base |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, script, *flags],
            env={**base, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2 if not flags else 1)
    ]
    results = [(process.communicate(timeout=200), process.returncode) for process in started]
    assert [code for _, code in results] == [0] * len(started), results
    assert results[0][0][0] == "rank 0 of 2, sum 3.0\n"
    assert ("the cluster's launcher started 2 processes" in results[0][0][1]) == (not flags)
    if not flags:
        assert results[1][0] == ("", "")


def test_a_requeued_job_is_a_restart_of_the_same_launch(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (restarts(), launch_id()) == (0, "")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "random")  # another one after every requeue
    first = launch_id()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert (restarts(), launch_id()) == (1, first)


@pytest.mark.parametrize("number", [*WARNINGS, signal.SIGTERM])
def test_warnings_of_batch_systems_are_stop_requests(number):
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested


# GPUs and cores.


@pytest.mark.parametrize(
    ("seen", "bound"),
    [
        ([("node", "GPU-1"), ("node", "GPU-2")], True),
        ([("node", "GPU-1"), ("node", "GPU-1")], False),
        ([(), ()], False),  # each sees several
    ],
)
def test_a_gpu_for_each_process_is_told_from_one_for_all(monkeypatch, seen, bound):
    class Properties:
        uuid = "GPU"

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: len(seen))
    monkeypatch.setattr(distributed.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), seen))
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed.torch.cuda, "get_device_properties", lambda index: Properties())
    assert distributed.each_process_has_its_gpu() == bound
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "each_process_has_its_gpu", lambda: bound)
    message = "--device cuda:0 is not available" if bound else "2 processes on a machine with 1 GPUs"
    monkeypatch.setattr(
        precision.torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no driver here"))
    )
    with pytest.raises(UsageError, match=message):
        choose_device(MachineOptions(), Processes(1, 2, 1, 2))


@pytest.mark.parametrize(
    ("group", "limits", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/docker/1", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        (
            "4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("3:memory:/a", {"a/cpu.max": "100000 100000"}, None),
        ("0::/", {}, None),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, group, limits, quota):
    for name, text in {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == quota


def test_there_are_no_more_threads_than_the_quota_allows(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setattr(precision, "cpu_quota", lambda: 3.9)
        choose_device(MachineOptions(device="cpu"))
        assert torch.get_num_threads() == 3
        set_threads = torch.set_num_threads
        monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("the number is right already"))
        choose_device(MachineOptions(device="cpu"))  # MKL chooses differently once a number was set
        find_device(MachineOptions(device="cpu"), Processes(1, 2, 1, 2))
        monkeypatch.setattr(torch, "set_num_threads", set_threads)
        choose_device(MachineOptions(device="cpu", num_threads=5))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("runtime.cpu.cores.cpu_quota", lambda: 0.5)
    assert usable_cores() == 1
