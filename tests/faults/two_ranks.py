"""Script that test_processes.py runs in two processes: rank 1 fails while rank 0 waits for it.

`python two_ranks.py --fate FATE --num_process_per_node 2`, or without that flag under torchrun.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.processes.launch import run_script

LONG_S = 600  # longer than any test waits
SAVING_S = 35  # longer than torchrun's timeout of 30


@dataclass(frozen=True)
class FateOptions:
    """Fate."""

    fate: str = option(
        "killed",
        "what happens to rank 1, or what both ranks do",
        choices=("killed", "defect", "mistake", "hangs", "saves"),
    )


def save() -> None:
    """Wait for SIGTERM, then take SAVING_S seconds to save. Both processes do this."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    print("ready", flush=True)
    while not received:
        time.sleep(0.1)
    time.sleep(SAVING_S)
    print("saved", flush=True)


def main(options: Options, processes: Processes) -> None:
    fate = options[FateOptions].fate
    if fate == "hangs":  # like a GPU collective without its partner, during which no Python signal handler runs
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes.barrier()
    if fate == "hangs":
        print("ready", flush=True)
    if fate == "saves":
        save()
    elif processes.is_main:
        time.sleep(LONG_S if fate == "hangs" else 0)
    elif fate == "defect":
        raise RuntimeError("the last words of rank 1")
    elif fate == "mistake":
        raise UsageError("the last words of rank 1")
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


if __name__ == "__main__":
    run_script(main, str(__doc__), [FateOptions])
