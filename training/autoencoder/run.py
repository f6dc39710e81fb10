"""A run of autoencoder training, from the options to the finished folder. `train_autoencoder` is its interface in Python.

OUTPUT/           the finished autoencoder, in diffusers format
OUTPUT.training/  config.json  content.pth  content.previous.pth  metrics.jsonl  tensorboard/  samples/  result.json
                  autoencoder/ (the newest weights)  budget.json (with --minutes)  run.lock (during training)
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets_prep.datasets import ImageDataset
from models.autoencoders.architectures import ARCHITECTURES
from options import make_options
from runtime.distributed import Processes
from runtime.files import read_json, write_json
from runtime.messages import fact, note
from runtime.precision import Machine
from runtime.processes.signals import orderly_exit
from training.autoencoder.loop import choose_last_step, train
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.output import check_statistics, has_weights, posterior_statistics, rounded, save_autoencoder
from training.autoencoder.saving import NEWEST
from training.autoencoder.setup import AutoencoderRun, check_paths, configuration_of, initial_state, prepare
from training.autoencoder.state import AutoencoderState
from training.autoencoder.terms.adversarial import warn_of_late_start
from training.budget import BUDGET
from training.experiment import begun_by_this_launch, only_run_in, open_experiment

__all__ = ["AutoencoderResult", "autoencoder_options", "train_autoencoder"]

RESULT = "result.json"  # in the run folder of a complete run: steps, validation, and the folder of the autoencoder


class AutoencoderResult(NamedTuple):
    """The end of a run.

    Args:
        folder: the finished autoencoder's, or the one with the newest weights of an interrupted run.
        complete: whether the run is complete.
        validation: measures of the held-out images, such as "psnr_db"; empty if the run was interrupted.
    """

    folder: Path
    complete: bool
    validation: dict[str, float]


def autoencoder_options(architecture: str = "kl", **values: Any) -> AutoencoderTrainingOptions:
    """The options of a run, with the architecture's own defaults for those that are not given.

    Raises:
        UsageError: a name or a value is invalid.
    """
    defaults = ARCHITECTURES[architecture].defaults if architecture in ARCHITECTURES else {}
    return make_options(AutoencoderTrainingOptions, {**defaults, "architecture": architecture, **values})


def train_autoencoder(
    dataset: ImageDataset,
    held_out: ImageDataset,
    options: AutoencoderTrainingOptions,
    machine: Machine,
    processes: Processes = Processes(),  # noqa: B008
) -> AutoencoderResult:
    """Train an autoencoder on all images of `dataset`, or resume its training. A finished one is returned at once.

    Every process must call this.

    Args:
        dataset: the training images.
        held_out: images for validation.
        options: see `autoencoder_options`.
        machine: device and precision. Whether to compile is decided here.
        processes: share each batch.

    Raises:
        UsageError: the options contradict each other or the images, the run began with other options, or files cannot be
            written.
        DivergedError: the loss or the weights are not finite.
    """
    started, folder = time.monotonic(), options.run_folder
    if options.overwrite and begun_by_this_launch(folder):
        options = replace(options, overwrite=False)
    if processes.is_main:
        check_paths(options)
    with orderly_exit(), only_run_in(folder, processes):
        run = prepare(dataset, held_out, options, machine, processes)
        processes.barrier()  # --overwrite may move files aside that other processes still read
        configuration = configuration_of(run)
        resume = open_experiment(folder, configuration, options, "--output") if processes.is_main else False
        resume = processes.from_main(resume)
        if finished := processes.from_main(_finished(options) if resume else None):
            note(f"{options.output} is finished; to train further, add --resume and raise --max_steps or --minutes")
            return AutoencoderResult(Path(options.output), True, finished)
        fact("run folder", str(folder))
        state = initial_state(run, resume)
        last_step = choose_last_step(run, state, started)
        warn_of_late_start(options, last_step)
        fact("length", f"{last_step:,} steps of {options.batch_size * processes.count} images")
        validation = train(run, state, last_step)
        if validation is None:
            return AutoencoderResult(folder / NEWEST, False, {})
        if processes.is_main:
            _finish(run, state, validation)
        processes.barrier()
        return AutoencoderResult(Path(options.output), True, validation)


def _finish(run: AutoencoderRun, state: AutoencoderState, validation: dict[str, float]) -> None:
    """Save the finished autoencoder, with the statistics of all training images' latents."""
    network = rounded(state.ema.network, run.training)
    statistics = posterior_statistics(network, run.images, run.machine)
    check_statistics(statistics)
    save_autoencoder(network, run.training.output, statistics, run.training, steps=state.step, validation=validation)
    write_json(run.folder / RESULT, {"steps": state.step, "seconds": state.seconds, "validation": validation})


def _finished(options: AutoencoderTrainingOptions) -> dict[str, float] | None:
    """The validation of a complete run of this length, whose autoencoder exists; else None."""
    record, budget = options.run_folder / RESULT, options.run_folder / BUDGET
    if not (record.exists() and has_weights(options.output)):
        return None
    wanted = options.max_steps
    if options.minutes:
        recorded = read_json(budget) if budget.exists() else {}
        wanted = recorded.get("steps", 0) if recorded.get("minutes") == options.minutes else 0
    found = read_json(record)
    return found.get("validation") if found.get("steps", 0) >= wanted > 0 else None
