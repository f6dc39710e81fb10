"""Start a script in one or several processes.

Several processes are started with torch's `elastic_launch`, not with the torchrun command, which loses exit codes.
`--num_process_per_node N` exits with the script's own code (2 for a user's error, 3 for a run that diverged, 130 for an
interruption) and prints one line for a killed process, where torchrun exits with 1 and prints a report. It also gives
interrupted processes minutes to save.
"""

import io
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from command_line import parse_options
from exits import INTERRUPTED, exit_cleanly
from options import Options, UsageError, option
from runtime.distributed import DEFECT, Processes, join_processes, launched, meeting_failed
from runtime.messages import note, show
from runtime.processes.clusters import torch_variables
from runtime.processes.signals import WARNINGS, hangup_is_ignored

__all__ = ["LaunchOptions", "run_script"]

SECONDS_TO_SAVE = "300"  # from a signal to the launcher until it kills the processes
SECONDS_TO_FOLLOW = 30  # from one process's death until the launcher kills the others; fixed by torch


@dataclass(frozen=True)
class LaunchOptions:
    """Multiple processes (launching with torchrun, accelerate launch, srun or mpirun also works)."""

    num_process_per_node: int | None = option(
        None, "number of processes on this machine, one per GPU", minimum=1, on_resume="freely", common=True
    )
    num_proc_node: int | None = option(
        None, "number of machines; run the same command on each, with its --node_rank", minimum=1, on_resume="freely"
    )
    node_rank: int = option(0, "index of this machine, from 0", minimum=0, on_resume="freely")
    master_address: str = option("127.0.0.1", "host name or address of machine 0", on_resume="freely")
    master_port: int = option(
        29500, "free port on machine 0; used only with several machines", minimum=1, on_resume="freely"
    )
    local_rank: int | None = option(
        None, "accepted but ignored; the launcher sets each process's rank", flags=("--local-rank",), on_resume="freely"
    )

    @property
    def wanted(self) -> int:
        """Requested number of processes on all machines."""
        return (self.num_process_per_node or 1) * (self.num_proc_node or 1)

    def check(self, processes: Processes) -> None:
        """Check that the flags match the processes that the launcher started.

        Raises:
            UsageError: they differ; the message states both numbers.
        """
        here, machines = self.num_process_per_node, self.num_proc_node
        if here is not None and here != processes.local_count:
            raise UsageError(
                f"--num_process_per_node {here}, but the launcher started {processes.local_count} on this machine "
                "(--nproc_per_node or --num_processes): omit the flag, or start the script without a launcher"
            )
        if machines is not None and machines * processes.local_count != processes.count:
            raise UsageError(
                f"--num_proc_node {machines} with {processes.local_count} processes each, but the launcher started "
                f"{processes.count} (WORLD_SIZE): omit the flag, or start the script without a launcher"
            )


def run_script(
    main: Callable[[Options, Processes], int | None],
    description: str,
    groups: Sequence[type],
    *,
    argv: Sequence[str] | None = None,
    positional: str = "",
    ignored: Mapping[str, str] | None = None,
    task: str | None = None,
    rare: Collection[type] = (),
    adjust: Callable[[Options], Options] = lambda options: options,
) -> None:
    """Parse the command line (as `parse_options` does) and run `main` in each requested process.

    Without a launcher, `--num_process_per_node N` starts this command in N processes. Processes that a cluster's launcher
    started, such as srun, work together like torchrun's. The exit code is `main`'s, 2 after a
    user's error, which is printed once, and 130 after an interruption.
    """

    def parse() -> Options:
        return parse_options(
            description,
            [*groups, LaunchOptions],
            argv=argv,
            positional=positional,
            ignored=ignored,
            task=task,
            rare=rare,
            adjust=adjust,
        )

    def work() -> int:
        # On a CPU, a number below 1e-38 costs a hundred times as much as another one. Threads started later inherit this.
        torch.set_flush_denormal(True)
        variables = {} if launched() else torch_variables()
        if variables and _wanted(parse) == 1:
            os.environ.update(variables)
        with join_processes() as processes:
            with redirect_stderr(io.StringIO()) as notes:
                options = parse()
            settings = options[LaunchOptions]
            if settings.wanted > 1 and not launched():
                return _launch(settings)
            sys.stderr.write(notes.getvalue())  # only now, so that the launcher does not print them too
            settings.check(processes)
            if variables and processes.count > 1:
                note(
                    f"the cluster's launcher started {processes.count} processes, which work together as torchrun's do"
                )
            return main(options, processes) or 0

    exit_cleanly(work)


def _wanted(parse: Callable[[], Options]) -> int:
    """The number of processes that the command line asks for; 1 if it cannot be parsed, which is reported later."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), suppress(UsageError, SystemExit):
        return parse()[LaunchOptions].wanted
    return 1


def _launch(settings: LaunchOptions) -> int:
    """Run this command in several processes with elastic_launch; returns the exit code of the first failure."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes report their own errors
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    for warning in WARNINGS:  # the launcher forwards SIGTERM
        signal.signal(warning, lambda number, frame: signal.raise_signal(signal.SIGTERM))
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
    if hangup_is_ignored() and hasattr(config, "signals_to_handle"):  # torch handles SIGHUP even under nohup
        config.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
    if not alone:
        show(
            f"waiting for {machines} machines at {config.rdzv_endpoint}: start this command on each, with its --node_rank"
        )
    try:
        module = sys.modules["__main__"].__spec__  # set if the script was started with -m
        elastic_launch(config, sys.executable)(*(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:])
    except SignalException:
        return INTERRUPTED
    except DistError as error:
        raise meeting_failed(config.rdzv_endpoint, error) from error
    except ChildFailedError as error:
        if killed := _killed(error.failures):
            print("", *killed, sep="\n", file=sys.stderr)  # the current line may hold a progress bar
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        return codes[0] if codes and not killed else DEFECT
    return 0


def _killed(failures: Mapping[int, ProcessFailure]) -> list[str]:
    """One line for each killed process, except those that the launcher killed because another process had died.

    Args:
        failures: failures by rank, in the order the launcher noticed them.
    """
    first = next(iter(failures.values()))
    lines = []
    for rank, failure in failures.items():
        number = -failure.exitcode
        late = failure.timestamp - first.timestamp >= SECONDS_TO_FOLLOW - 1  # timestamps are whole seconds
        follows = number in (signal.SIGTERM, signal.SIGABRT) or late  # GPU backends abort when they lose a peer
        if number > 0 and (failure is first or not follows):
            lines.append(
                f"error: rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}, signal {number}"
            )
    return lines
