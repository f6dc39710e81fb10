"""Processes of one run: started by torchrun (all of its variables present together), else a single one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["Processes", "start_processes"]

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT = timedelta(hours=6)  # of the others, while the main process scores or builds statistics


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `count`, `local_rank` on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value = value / self.count
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        if self.count == 1:
            return flag
        verdict = torch.tensor(float(flag))
        dist.all_reduce(verdict)
        return bool(verdict > 0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block before the others do: it fetches, they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def stop(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            dist.destroy_process_group()


def start_processes() -> Processes:
    """Join the process group that torchrun (or accelerate launch) describes in the environment, if there is one."""
    if not all(name in os.environ for name in LAUNCHER_VARIABLES) or int(os.environ["WORLD_SIZE"]) == 1:
        return Processes()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group(timeout=LONGEST_WAIT)  # gloo for tensors on the CPU, the GPU's own backend for others
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank)
