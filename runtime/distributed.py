"""The processes of a run and their communication.

A launcher (torchrun, `accelerate launch`, or runtime/processes/launch.py) describes the processes in environment variables,
which it sets together. runtime/processes/clusters.py derives them from clusters' own variables. Without them, there is a
single process. Values are exchanged through host memory; only gradients use the devices' own communication backend.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from exits import explain
from options import UsageError
from runtime.messages import note

__all__ = [
    "Processes",
    "each_process_has_its_gpu",
    "join_processes",
    "launch_id",
    "launched",
    "may_restart_several_machines",
    "meeting_failed",
    "patience",
    "restarts",
]

T = TypeVar("T")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS_OF_SILENCE = 5.0
LONGEST_WAIT = timedelta(hours=6)  # for the main process, which may download files or compare statistics
DEFECT = 1  # exit code of an error that is not a user's error


@dataclass(frozen=True)
class Processes:
    """This process among all processes: `rank` of `count`, and `local_rank` of `local_count` on its machine.

    Every process must call the methods that communicate, in the same order.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item, starting at index `rank`; the processes together have each item once."""
        return items[self.rank :: self.count]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, on the tensor's device."""
        if self.count == 1:
            return value
        total = value.detach().to("cpu", copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes."""
        return self.sum(value) / self.count

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def any_each(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true in any process."""
        return (self.sum(torch.tensor(flags, dtype=torch.float)) > 0).tolist()

    def gather(self, value: T) -> list[T]:
        """Gather the values of all processes, by rank, in the main process; the others get an empty list."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.gather_object(value, values if self.is_main else None)
        return values if self.is_main else []

    def from_main(self, value: T) -> T:
        """Broadcast the main process's value to every process."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, for example so that only that process downloads a file."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def launched() -> bool:
    """Whether a launcher started this process and set all of LAUNCHER_VARIABLES. Clusters may set some of them globally."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES)


def restarts() -> int:
    """How often torchrun has restarted this machine's processes (--max-restarts), or Slurm the job (--requeue)."""
    return sum(_variable(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch_id() -> str:
    """Identifier of a launch, the same for all its restarts; "" without a launcher or job."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def may_restart_several_machines() -> bool:
    """Whether torchrun may restart processes on several machines, whose restart counts may then differ."""
    machines, admitted = (_variable(name, 0) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    return machines > 1 and admitted > 0


def _variable(name: str, default: int = 0) -> int:
    """The integer in an environment variable.

    Raises:
        UsageError: it holds something else.
    """
    value = os.environ.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,9}", value.strip()):
        raise UsageError(
            f"the environment variable {name}, which launchers set, holds {value!r}, but an integer was expected: unset it, or "
            "start the script with a launcher"
        )
    return int(value)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that a launcher describes in the environment, if there is one, for the duration of the block.

    Only the main process prints. An error in one process ends them all, and only the first process to fail reports it. The
    other processes fail with the same error or a broken connection, and exit silently with the same exit code.

    Raises:
        UsageError: torchrun may restart several machines, and its store would give them stale addresses.
    """
    if not launched() or _variable("WORLD_SIZE") == 1:
        yield Processes()
        return
    local_rank = _variable("LOCAL_RANK")
    if local_rank < torch.cuda.device_count():  # 1 if a batch system bound each process to its GPU
        torch.cuda.set_device(local_rank)
    address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    waiting = f"waiting for the other processes (WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment) at {address}"
    with patience(
        f"{waiting}; if no launcher is running, unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
    ):
        store, rank, count = _meet(address)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives the processes and keeps their addresses
        if may_restart_several_machines():
            raise UsageError(
                "--max-restarts on several machines needs a store that ends with the processes: "
                "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on every machine"
            )
        store = PrefixStore(f"attempt {restarts()}", store)
    # The default backend: gloo for CPU tensors, and the device's own (such as NCCL) for GPU tensors.
    dist.init_process_group(store=PrefixStore("run", store), rank=rank, world_size=count, timeout=LONGEST_WAIT)
    processes = Processes(rank, count, local_rank, _variable("LOCAL_WORLD_SIZE", count))
    try:
        with _silence(not processes.is_main):
            yield processes
            sys.stdout.flush()
            processes.barrier()  # the launcher stops all processes as soon as one exits with a nonzero code
    except (Exception, KeyboardInterrupt) as error:
        if (code := _code_of_first_failure(store, error)) is not None:
            raise SystemExit(code) from None
        raise
    dist.destroy_process_group()


def _meet(address: str) -> tuple[Store, int, int]:
    """Wait for the processes of the launch; returns their store, this process's rank and their number.

    Raises:
        UsageError: the address cannot be used, or not all processes came in time.
    """
    try:
        return next(rendezvous("env://"))
    except (dist.DistError, ValueError) as error:
        raise meeting_failed(address, error) from error


def meeting_failed(address: str, error: Exception) -> UsageError:
    """The one-line error of processes that cannot meet at `address`."""
    if "EADDRINUSE" in str(error):
        return UsageError(
            f"another program uses {address}, where the processes should meet: choose another --master_port, "
            "or another MASTER_PORT if torchrun, srun or mpirun starts them"
        )
    reason = str(error).splitlines()[0]
    return UsageError(
        f"the processes cannot meet at {address}: {reason}. Start all of them, with the same address and port"
    )


def each_process_has_its_gpu() -> bool:
    """Whether a machine's processes see different GPUs, because a batch system bound each of them to its own.

    Every process must call this.
    """
    if not dist.is_initialized():
        return False
    seen: list[Any] = [None] * dist.get_world_size()
    own = (
        (socket.gethostname(), str(torch.cuda.get_device_properties(0).uuid)) if torch.cuda.device_count() == 1 else ()
    )
    dist.all_gather_object(seen, own)
    return () not in seen and len(set(seen)) == len(seen)


@contextmanager
def patience(text: str) -> Iterator[None]:
    """Print a note if the block takes longer than a few seconds."""
    timer = Timer(SECONDS_OF_SILENCE, note, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _code_of_first_failure(store: Store, error: BaseException) -> int | None:
    """The exit code of the process that failed first; None if it is this one."""
    try:
        if store.add("failures", 1) == 1:
            reason = explain(error)
            store.set("exit_code", str(reason.exit_code if reason else DEFECT))
            return None
        return int(store.get("exit_code"))
    except (RuntimeError, ValueError):
        return None  # the process that hosted the store has ended


@contextmanager
def _silence(silent: bool) -> Iterator[None]:
    if not silent:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
