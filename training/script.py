"""What the training scripts have in common: they differ in the task."""

from dataclasses import replace

from datasets_prep.tasks import GENERATE, Task
from models.registry import IGNORED_NETWORK_FLAGS, guided_diffusion_by_default
from options import INTERRUPTED, Options
from runtime.distributed import Processes, restarts
from runtime.signals import orderly_exit
from training.experiment import ExperimentOptions, only_run_in, run_folder
from training.loop import train
from training.setup import prepare

__all__ = ["IGNORED_FLAGS", "run_training"]

# Published flags without an effect, here or there.
IGNORED_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "beta1": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
    "beta2": "the published trainer never used it (AdamW's betas were 0.9 and 0.999); see --adam_betas",
}


def run_training(task: Task, options: Options, processes: Processes) -> int:
    """Train for a task, and say how to go on; returns the exit code."""
    if task is not GENERATE:
        options = guided_diffusion_by_default(options)
    if restarts() and options[ExperimentOptions].overwrite:
        print("note: the launcher has started the processes again: the run goes on, without --overwrite")
        options = replace(options, values={**options.values, "overwrite": False})
    print(options.describe("those that differ from the defaults; all: config.json in the run's folder"))
    with orderly_exit(), only_run_in(run_folder(options, task), processes):
        job, resume = prepare(options, processes, task)
        parameters = sum(p.numel() for p in job.network.parameters())
        print(
            f"{job.header['model_type']}, {parameters / 1e6:.1f} M parameters, {len(job.source)} images; {job.folder}"
        )
        complete = train(job, resume)
    next_step = (
        f"complete; sample with test_flow_latent{task.script}.py"
        if complete
        else "interrupted; the same command (without --overwrite) continues it"
    )
    print(f"{job.folder}: {next_step}")
    return 0 if complete else INTERRUPTED
