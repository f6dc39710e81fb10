"""Starts a script in one or several processes, by elastic_launch; torchrun, the command around it, loses exit codes.

`--num_process_per_node N` ends with the scripts' own exit code (2 for a mistake, 3 for a run that diverged, 130 for an
interruption) and one line that names a killed process; torchrun ends with 1 and a report. It also leaves minutes to save.
"""

import io
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from command_line import parse_options
from options import INTERRUPTED, Options, UsageError, exit_cleanly, option
from runtime.distributed import DEFECT, Processes, join_processes, launched

__all__ = ["LaunchOptions", "run_script"]

SECONDS_TO_SAVE = "300"  # after a signal to the launcher, before it kills
SECONDS_TO_FOLLOW = 30  # after the death of another, before it kills: torch's own, whatever the number above


@dataclass(frozen=True)
class LaunchOptions:
    """Several processes (torchrun and accelerate launch in front of the script work as well)."""

    num_process_per_node: int | None = option(
        None, "start this many processes here, one per GPU", minimum=1, on_resume="freely", common=True
    )
    num_proc_node: int | None = option(
        None, "machines; start the same command on each, with its node_rank", minimum=1, on_resume="freely"
    )
    node_rank: int = option(0, "number of this machine", minimum=0, on_resume="freely")
    master_address: str = option("127.0.0.1", "name or address of machine number 0", on_resume="freely")
    master_port: int = option(
        29500, "a free port of machine number 0, where there are several machines", minimum=1, on_resume="freely"
    )
    local_rank: int | None = option(
        None, "accepted; the launcher tells each process its rank", flags=("--local-rank",), on_resume="freely"
    )

    @property
    def wanted(self) -> int:
        """Number of processes on all machines."""
        return (self.num_process_per_node or 1) * (self.num_proc_node or 1)

    def check(self, processes: Processes) -> None:
        """Refuse numbers that are not those of the launcher.

        Raises:
            UsageError: both numbers.
        """
        here, machines = self.num_process_per_node, self.num_proc_node
        if here is not None and here != processes.local_count:
            raise UsageError(
                f"--num_process_per_node {here}, but the launcher started {processes.local_count} on this machine "
                "(--nproc_per_node or --num_processes): leave the flag out, or start without a launcher"
            )
        if machines is not None and machines * processes.local_count != processes.count:
            raise UsageError(
                f"--num_proc_node {machines} with {processes.local_count} processes each, but the launcher started "
                f"{processes.count} (WORLD_SIZE): leave the flag out, or start without a launcher"
            )


def run_script(
    main: Callable[[Options, Processes], int | None],
    description: str,
    groups: Sequence[type],
    *,
    ignored: Mapping[str, str] | None = None,
    task: str | None = None,
    rare: Collection[type] = (),
    adjust: Callable[[Options], Options] = lambda options: options,
) -> None:
    """Parse the command line (as `parse_options` does) and run `main` in each of the processes that it asks for.

    Without a launcher, `--num_process_per_node N` starts N processes of this same command. The exit code is that of
    `main`, 2 after a user's error, which is printed once, and 130 after an interruption.
    """

    def work() -> int:
        with join_processes() as processes:
            with redirect_stderr(io.StringIO()) as notes:
                options = parse_options(
                    description, [*groups, LaunchOptions], ignored=ignored, task=task, rare=rare, adjust=adjust
                )
            settings = options[LaunchOptions]
            if settings.wanted > 1 and not launched():
                return _launch(settings)
            sys.stderr.write(notes.getvalue())  # here, lest the launcher and its main process both say it
            settings.check(processes)
            return main(options, processes) or 0

    exit_cleanly(work)


def _launch(settings: LaunchOptions) -> int:
    """Run this command in several processes, by torchrun's elastic launch; returns the exit code of the first failure."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))  # which is passed on
    machines = settings.num_proc_node or 1
    alone = machines == 1
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=settings.num_process_per_node or 1,
        run_id=str(uuid.uuid4()) if alone else "latent-flow",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else f"{settings.master_address}:{settings.master_port}",
        rdzv_configs={} if alone else {"rank": settings.node_rank},
        local_addr="localhost" if alone else None,
        max_restarts=0,
    )
    try:
        module = sys.modules["__main__"].__spec__  # where it was started with -m
        elastic_launch(config, sys.executable)(*(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:])
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        if killed := _killed(error.failures):
            print("", *killed, sep="\n", file=sys.stderr)  # the line before may be a progress bar's
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        return codes[0] if codes and not killed else DEFECT
    return 0


def _killed(failures: Mapping[int, ProcessFailure]) -> list[str]:
    """A line for each process that was killed, but by the launcher, which ends those that outlive another.

    Args:
        failures: by rank, in the order in which the launcher noticed them.
    """
    first = next(iter(failures.values()))
    lines = []
    for rank, failure in failures.items():
        number = -failure.exitcode
        late = failure.timestamp - first.timestamp >= SECONDS_TO_FOLLOW - 1  # timestamps are whole seconds
        follows = number in (signal.SIGTERM, signal.SIGABRT) or late  # SIGABRT: GPUs' own way to miss a partner
        if number > 0 and (failure is first or not follows):
            lines.append(
                f"error: rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}, signal {number}"
            )
    return lines
