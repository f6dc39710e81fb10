"""The script train_autoencoder.py: command line, data, and the next command."""

from datasets_prep.datasets import DatasetOptions, FlipOptions, Split, choose_flips, open_dataset
from datasets_prep.folder_layout.report import show_data
from exits import INTERRUPTED
from models.autoencoders.architectures import ARCHITECTURES
from runtime.distributed import Processes
from runtime.messages import show
from runtime.precision import MachineOptions, choose_machine
from runtime.processes.launch import run_script
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.output import check_output
from training.autoencoder.run import train_autoencoder

__all__ = ["run_autoencoder", "run_autoencoder_script"]

SPLITS: tuple[Split, ...] = ("train", "validation")


def run_autoencoder_script(description: str) -> None:
    """Run the script: parse the command line, start the processes, train and exit."""
    run_script(
        lambda options, processes: run_autoencoder(
            options[AutoencoderTrainingOptions],
            options[DatasetOptions],
            options[FlipOptions],
            options[MachineOptions],
            processes,
            options.describe("the config.json of the run lists all"),
        ),
        description,
        (AutoencoderTrainingOptions, DatasetOptions, FlipOptions, MachineOptions),
        adjust=lambda options: options.completed(ARCHITECTURES[options.values["architecture"]].defaults),
    )


def run_autoencoder(
    settings: AutoencoderTrainingOptions,
    data: DatasetOptions,
    flips: FlipOptions,
    wanted: MachineOptions,
    processes: Processes,
    described: str,
) -> int:
    """Print `described`, the changed options; train an autoencoder, and print the next command; returns the exit code."""
    if processes.is_main:
        check_output(settings.output)
    show(described)
    machine = choose_machine(wanted, processes)
    with processes.main_first():  # only the main process downloads
        train, held_out = (choose_flips(open_dataset(data, split), flips) for split in SPLITS)
    show_data(train, held_out)
    result = train_autoencoder(train, held_out, settings, machine, processes)
    if not result.complete:
        show("interrupted; to resume, run the same command again, without --overwrite")
        return INTERRUPTED
    show(
        f"saved to {settings.output}: PSNR {result.validation['psnr_db']:.2f} dB on held-out images; measure all of them "
        f"with: python -m evaluation.reconstruction --pretrained_autoencoder_ckpt {settings.output} and the flags of the "
        "dataset"
    )
    return 0
