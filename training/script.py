"""What the training scripts have in common: they differ in the task."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoints.tasks import GENERATE, Task
from datasets_prep.datasets import DatasetOptions
from models.registry import IGNORED_NETWORK_FLAGS, guided_diffusion_by_default
from options import INTERRUPTED, Options, UsageError
from runtime.distributed import Processes, may_restart_several_machines
from runtime.launch import run_script
from runtime.messages import fact, note, show
from runtime.signals import orderly_exit
from tasks.task import TrainingTask
from training.experiment import ExperimentOptions, begun_by_this_launch, only_run_in, run_folder
from training.loop import train
from training.setup import prepare, training_groups

__all__ = ["IGNORED_FLAGS", "run_training", "run_training_script"]

LOCATION = ("dataset", "exp", "save_root", "datadir")  # options that say where a run and its data are

# Published flags without an effect, here or there.
IGNORED_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "beta1": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
    "beta2": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
}


def run_training_script(task: TrainingTask, description: str) -> None:
    """The whole of a training script: parse the command line, start the processes, train, exit."""
    groups = (*training_groups(), *task.options)
    run_script(
        partial(run_training, task),
        description,
        groups,
        ignored=IGNORED_FLAGS,
        task=task.task.name,
        adjust=(lambda options: options) if task.task is GENERATE else guided_diffusion_by_default,
    )


def run_training(task: TrainingTask, options: Options, processes: Processes) -> int:
    """Train for a task and print the next command; returns the exit code."""
    folder = run_folder(options[ExperimentOptions], options[DatasetOptions].dataset, task.task)
    if options[ExperimentOptions].overwrite:
        options = _overwrite_once(options, folder)
    show(options.describe("config.json has all"))
    with orderly_exit(), only_run_in(folder, processes):
        run, resume = prepare(options, processes, task)
        parameters = sum(p.numel() for p in run.network.parameters())
        fact("model", f"{run.header.model_type}, {parameters / 1e6:.1f} M parameters")
        fact("run folder", str(run.folder))
        complete = train(run, resume)
    if not complete:
        show("interrupted; run the same command again, without --overwrite, to resume")
        return INTERRUPTED
    show(f"complete; sample with:\n  {_sampling_command(options, task.task)}")
    return 0


def _sampling_command(options: Options, task: Task) -> str:
    """The command that samples the run, with the arguments file of the same name if there is one."""
    arguments = Path("test_args", Path(options.args_file).name)
    known = arguments.is_file() and Path(options.args_file).parent.name == "train_args"
    command = f"bash run_test.sh {arguments}" if known else f"python test_flow_latent{task.script}.py"
    defaults = options.defaults()
    flags = [f"--{name} {options.written(name)}" for name in LOCATION if options.values[name] != defaults[name]]
    return " ".join([command, *flags])


def _overwrite_once(options: Options, folder: Path) -> Options:
    """The options without --overwrite where the launcher has started the processes of this very run again."""
    if may_restart_several_machines():
        raise UsageError(
            "--overwrite with --max-restarts on several machines: move the old run aside, and leave the flag out"
        )
    if not begun_by_this_launch(folder):
        return options
    note("the launcher restarted the processes; the run resumes, without --overwrite")
    return replace(options, values={**options.values, "overwrite": False})
