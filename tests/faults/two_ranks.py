"""What test_processes.py runs in each of two processes, started by a launcher or as one: rank 1 dies, rank 0 waits for it.

`python two_ranks.py --fate FATE [--num_process_per_node 2]`, or behind torchrun.
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
from runtime.launch import run_script

LONG_S = 600  # than anybody waits
SAVING_S = 35  # longer than torchrun's own patience of 30


@dataclass(frozen=True)
class FateOptions:
    """Fate."""

    fate: str = option(
        "killed", "of rank 1; or what rank 0 does meanwhile", choices=("killed", "defect", "mistake", "hangs", "saves")
    )


def save() -> None:
    """Both processes, upon SIGTERM; it takes its time."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    print("ready", flush=True)
    while not asked:
        time.sleep(0.1)
    time.sleep(SAVING_S)
    print("saved", flush=True)


def main(options: Options, processes: Processes) -> None:
    fate = options[FateOptions].fate
    if fate == "hangs":  # as in a collective on GPUs whose partner is gone: no handler of a signal gets its turn
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
