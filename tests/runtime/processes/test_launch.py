import os

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from options import UsageError
from runtime.distributed import LAUNCHER_VARIABLES, Processes, join_processes, launched
from runtime.precision import MachineOptions, choose_machine
from runtime.processes.launch import LaunchOptions, _killed, run_script

PAIR = Processes(0, 2, 0, 2)


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_launcher_is_recognized_by_all_of_its_variables(environment):
    environment.setenv("MASTER_PORT", "29500")  # set globally on many clusters
    environment.setenv("MASTER_ADDR", "node")
    environment.setenv("RANK", "1")
    assert not launched()
    with join_processes() as processes:
        assert processes == Processes(0, 1, 0, 1)
    environment.setenv("LOCAL_RANK", "0")
    environment.setenv("WORLD_SIZE", "1")
    assert launched()
    with join_processes() as processes:  # a single process does not wait for a group
        assert processes == Processes()


def test_process_counts_that_contradict_the_launcher_are_refused():
    LaunchOptions().check(PAIR)
    LaunchOptions(num_process_per_node=2, num_proc_node=1).check(PAIR)
    LaunchOptions(num_process_per_node=2, num_proc_node=2).check(Processes(3, 4, 1, 2))
    with pytest.raises(UsageError, match="--num_process_per_node 4, but the launcher started 2 on this machine"):
        LaunchOptions(num_process_per_node=4).check(PAIR)
    with pytest.raises(UsageError, match=r"--num_proc_node 3 with 2 processes each, but the launcher started 4"):
        LaunchOptions(num_proc_node=3).check(Processes(0, 4, 0, 2))


def test_number_of_processes_to_start():
    assert LaunchOptions().wanted == 1
    assert LaunchOptions(num_process_per_node=3).wanted == 3
    assert LaunchOptions(num_process_per_node=3, num_proc_node=2).wanted == 6


def test_collectives_of_a_single_process():
    alone, value = Processes(), torch.tensor([1.0, 2.0])
    assert alone.gather("x") == ["x"]
    assert alone.from_main("x") == "x"
    assert torch.equal(alone.sum(value), value)
    assert torch.equal(alone.mean(value), value)
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert alone.share(range(4)) == range(4)
    alone.barrier()


def test_shares_partition_the_items():
    for count in (1, 2, 3, 7):
        shares = [list(Processes(rank, count).share(range(5))) for rank in range(count)]
        assert sorted(index for share in shares for index in share) == list(range(5))


def test_processes_of_a_machine_share_its_cores(environment):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        choose_machine(MachineOptions(device="cpu"), PAIR)
        assert torch.get_num_threads() == 3
        choose_machine(MachineOptions(device="cpu"), Processes(0, 8, 0, 8))
        assert torch.get_num_threads() == 1
        choose_machine(MachineOptions(device="cpu", num_threads=2), PAIR)
        assert torch.get_num_threads() == 2
        os.environ["OMP_NUM_THREADS"] = "2"
        choose_machine(MachineOptions(device="cpu"), PAIR)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("failures", "killed"),
    [
        ([(1, -9, 0)], ["rank 1 (process 71) was killed by SIGKILL, signal 9"]),
        ([(0, -15, 0), (1, -15, 0)], ["rank 0 (process 70) was killed by SIGTERM, signal 15"]),
        # Rank 0 fails because it misses rank 1.
        ([(0, 1, 0), (1, -9, 0)], ["rank 1 (process 71) was killed by SIGKILL, signal 9"]),
        ([(1, -11, 0), (0, -9, 30)], ["rank 1 (process 71) was killed by SIGSEGV, signal 11"]),  # rank 0 hung
        ([(1, 2, 0), (0, -15, 0)], []),
        ([(1, 2, 0), (0, -9, 30)], []),
        ([(1, 2, 0), (0, -6, 1)], []),
    ],
)
def test_those_whom_the_launcher_ended_were_not_killed(failures, killed):
    """`failures` are (rank, exit code, seconds) in the order in which the launcher noticed them."""
    found = {}
    for rank, code, seconds in failures:
        found[rank] = ProcessFailure(rank, 70 + rank, code, "")
        found[rank].timestamp = 1000 + seconds
    assert _killed(found) == [f"error: {line}" for line in killed]


def test_scripts_flush_denormal_numbers_to_zero():
    """Otherwise, gradients that fade make a CPU several times slower."""
    products = []

    def main(options, processes):
        products.append((torch.full((4,), 1e-30) * 1e-10).tolist())

    try:
        torch.set_flush_denormal(False)
        assert (torch.full((4,), 1e-30) * 1e-10).min() > 0
        with pytest.raises(SystemExit):
            run_script(main, "a test", [], argv=[])
    finally:
        torch.set_flush_denormal(False)
    assert products == [[0.0] * 4]
