#!/usr/bin/env python
"""Train a small KL autoencoder for a dataset without a pretrained one, and save it in diffusers format."""

import shutil

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from command_line import parse_options
    from datasets_prep.datasets import DatasetOptions, FlipOptions, choose_flips, open_dataset
    from datasets_prep.folder_layout.report import show_data
    from runtime.messages import show
    from runtime.precision import PrecisionOptions, choose_machine
    from training.autoencoder import (
        AutoencoderTrainingOptions,
        check_output,
        posterior_statistics,
        save_autoencoder,
        snapshot_folder,
        train_autoencoder,
    )


def main() -> None:
    """Parse the flags, train, measure the latents' scale, and save."""
    groups = [AutoencoderTrainingOptions, DatasetOptions, FlipOptions, PrecisionOptions]
    options = parse_options(str(__doc__), groups)
    settings = options[AutoencoderTrainingOptions]
    check_output(settings.output)
    machine = choose_machine(options[PrecisionOptions])
    dataset = choose_flips(open_dataset(options[DatasetOptions], "train"), options[FlipOptions])
    show_data(dataset)
    network = train_autoencoder(dataset, settings, machine)
    save_autoencoder(network, snapshot_folder(settings), {}, settings)
    save_autoencoder(network, settings.output, posterior_statistics(network, dataset, machine), settings)
    shutil.rmtree(snapshot_folder(settings))
    show(
        f"saved to {settings.output}; measure its reconstructions with: python -m evaluation.reconstruction "
        f"--pretrained_autoencoder_ckpt {settings.output} and the flags of the dataset"
    )


if __name__ == "__main__":
    exit_cleanly(main)
