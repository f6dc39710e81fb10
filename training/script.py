"""The common part of the training scripts, which differ only in their task."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoints.tasks import GENERATE, Task
from datasets_prep.datasets import DatasetOptions
from exits import INTERRUPTED
from models.registry import IGNORED_NETWORK_FLAGS, complete_network
from options import Options, UsageError
from runtime.distributed import Processes, may_restart_several_machines
from runtime.messages import fact, note, show
from runtime.processes.launch import run_script
from runtime.processes.signals import orderly_exit
from tasks.task import TrainingTask
from training.experiment import (
    ExperimentOptions,
    begun_by_this_launch,
    check_run_folder,
    only_run_in,
    run_folder,
)
from training.loop import train
from training.preparation.own_autoencoder import UnfinishedError
from training.setup import prepare, training_groups

__all__ = ["IGNORED_FLAGS", "run_training", "run_training_script"]

LOCATION = ("dataset", "exp", "save_root", "datadir")  # options that locate a run and its data

# Training flags of LFM's published code that have no effect, and the reason.
IGNORED_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "beta1": "LFM's published code never used it (its AdamW had betas 0.9 and 0.999); see --adam_betas",
    "beta2": "LFM's published code never used it (its AdamW had betas 0.9 and 0.999); see --adam_betas",
}


def run_training_script(task: TrainingTask, description: str) -> None:
    """Run a training script: parse the command line, start the processes, train and exit."""
    groups = (*training_groups(), *task.options)
    run_script(
        partial(run_training, task),
        description,
        groups,
        ignored=IGNORED_FLAGS,
        task=task.task.name,
        adjust=partial(complete_network, guided_diffusion=task.task is not GENERATE),
    )


def run_training(task: TrainingTask, options: Options, processes: Processes) -> int:
    """Train for a task and print the next command; returns the exit code."""
    folder = run_folder(options[ExperimentOptions], options[DatasetOptions].dataset, task.task)
    if options[ExperimentOptions].overwrite:
        options = _overwrite_once(options, folder)
    show(options.describe("config.json lists all"))
    if processes.is_main:
        check_run_folder(folder)
    with orderly_exit(), only_run_in(folder, processes):
        try:
            run, resume = prepare(options, processes, task)
        except UnfinishedError:
            return _interrupted()
        parameters = sum(p.numel() for p in run.network.parameters())
        fact("model", f"{run.header.model_type}, {parameters / 1e6:.1f} M parameters")
        fact("run folder", str(run.folder))
        complete = train(run, resume)
    if not complete:
        return _interrupted()
    show(f"complete; sample with:\n  {_sampling_command(options, task.task)}")
    return 0


def _interrupted() -> int:
    show("interrupted; to resume, run the same command again, without --overwrite")
    return INTERRUPTED


def _sampling_command(options: Options, task: Task) -> str:
    """The command that samples from the run; it uses the sampling arguments file of the same name if there is one."""
    arguments = Path("test_args", Path(options.args_file).name)
    known = arguments.is_file() and Path(options.args_file).parent.name == "train_args"
    command = f"bash run_test.sh {arguments}" if known else f"{_python()} test_flow_latent{task.script}.py"
    defaults = options.defaults()
    named = [name for name in LOCATION if options.values[name] != defaults[name] or name == "exp"]
    flags = [f"--{name} {options.written(name)}" for name in named]
    return " ".join([command, *flags, *([] if known else ["--n_sample 16"])])


def _python() -> str:
    """The interpreter as a user types it: the path of .venv's, which need not be active, or `python`."""
    own = Path(sys.executable)
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "python"


def _overwrite_once(options: Options, folder: Path) -> Options:
    """Remove --overwrite from the options if the launcher has restarted this run's processes.

    Raises:
        UsageError: the launcher may restart processes on several machines, where this cannot be decided.
    """
    if may_restart_several_machines():
        raise UsageError(
            "--overwrite does not work with --max-restarts on several machines: rename the old run's folder, and leave out "
            "--overwrite"
        )
    if not begun_by_this_launch(folder):
        return options
    note("the launcher restarted the processes, so the run resumes and --overwrite has no effect")
    return replace(options, values={**options.values, "overwrite": False})
