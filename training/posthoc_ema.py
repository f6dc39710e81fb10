"""Rebuild a power average (EMA) of any width from a run's snapshots, as a checkpoint, and score samples of several widths.

    python -m training.posthoc_ema RUN --sigma_rel 0.08
    python -m training.posthoc_ema RUN --sigma_rel 0.05 0.075 0.10 0.15 --compute_fid --n_sample 5000 --cfg_scales 1 2.5

RUN is the folder of a run that was trained with --posthoc_ema. The sampling flags are the test scripts'.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

from checkpoints.tasks import GENERATE, TASKS, Task
from command_line import leading_word
from exits import exit_cleanly
from options import Options, UsageError
from runtime.distributed import Processes
from runtime.processes.launch import run_script
from sampling.request import IGNORED_SAMPLING_FLAGS, checkpoint_groups, note_unused
from training.averages.snapshots import list_snapshots
from training.averages.sweep import SCORERS, RebuildOptions, rebuild_and_score

SOURCE_FLAGS = ("checkpoint", "exp", "save_root", "epoch_id")


def main() -> None:
    """Rebuild and score in the requested processes. The snapshots' task determines the flags."""
    run, words = leading_word("RUN, the folder of a run that was trained with --posthoc_ema")
    task = _task_of(Path(run))
    run_script(
        partial(_work, Path(run)),
        str(__doc__).splitlines()[0],
        (RebuildOptions, *SCORERS[task.name].groups),
        argv=words,
        positional="RUN",
        ignored=IGNORED_SAMPLING_FLAGS,
        task=task.name,
        rare=checkpoint_groups(),
    )


def _work(run: Path, options: Options, processes: Processes) -> None:
    note_unused(options.given, SOURCE_FLAGS, "because RUN determines the checkpoints")
    rebuild_and_score(run, list_snapshots(run), options, processes)


def _task_of(run: Path) -> Task:
    """The task of a run's snapshots. Without snapshots, which is an error later, the flags of generation apply."""
    with suppress(UsageError):
        return TASKS[list_snapshots(run)[-1].header.task]
    return GENERATE


if __name__ == "__main__":
    exit_cleanly(main)
