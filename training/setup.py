"""From options to a `Job`: data, autoencoder, network, and how the run looks at itself."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from datasets_prep.datasets import DatasetOptions, ImageDataset, open_dataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_moments
from evaluation.features import FeatureOptions, choose_features
from evaluation.generate import check_guidance
from flow.guidance import GuidanceOptions
from flow.paths import PathOptions
from flow.solvers import SolverOptions, check_method
from models.autoencoder import Autoencoder, AutoencoderOptions, PixelSpace, load_autoencoder
from models.edm_unet import EdmUNetOptions
from models.family import FamilyOptions
from models.registry import FAMILY_OPTIONS, NETWORKS, NetworkOptions, build_network
from options import Options, UsageError, as_json
from runtime.checkpoints import experiment_folder, find_checkpoint, read_weights
from runtime.distributed import Processes
from runtime.precision import MachineOptions, choose_machine
from runtime.published import read_published
from runtime.randomness import seed_for
from runtime.torch_files import is_torch_file
from training.experiment import ExperimentOptions, open_experiment, provenance
from training.loop import Job, TrainingOptions
from training.review import Review
from training.validation import LARGEST_SET

__all__ = ["TRAINING_GROUPS", "load_what_fits", "prepare"]

TRAINING_GROUPS = (
    ExperimentOptions,
    DatasetOptions,
    LatentCacheOptions,
    AutoencoderOptions,
    NetworkOptions,
    *FAMILY_OPTIONS,
    PathOptions,
    TrainingOptions,
    SolverOptions,
    GuidanceOptions,
    FeatureOptions,
    MachineOptions,
)
LISTED_NAMES = 10


def prepare(options: Options, processes: Processes) -> tuple[Job, bool]:
    """The job that the options describe, and whether it continues an existing run.

    Raises:
        UsageError: options that do not fit each other, the data, or the existing run.
    """
    machine = choose_machine(options[MachineOptions], processes.local_rank)
    data, experiment, training = options[DatasetOptions], options[ExperimentOptions], options[TrainingOptions]
    check_method(options[SolverOptions])
    if len(training.adam_betas) != 2 or max(training.adam_betas) >= 1:
        raise UsageError(f"--adam_betas: expected two numbers below 1, but {training.adam_betas} was given")
    with processes.main_first():
        dataset = open_dataset(data, "train")
        held_out = open_dataset(data, "validation").head(LARGEST_SET)
    if experiment.eval_samples:
        dataset.check_images("--eval_samples")
    autoencoder = load_autoencoder(options[AutoencoderOptions], dataset.facts.channels)
    network_options = _network_options(options, autoencoder, (dataset, held_out))
    latent_size, remainder = divmod(data.image_size, autoencoder.factor)
    if remainder or not latent_size:
        raise UsageError(
            f"the image size must be a multiple of {autoencoder.factor} for this autoencoder, "
            f"but it is {data.image_size} (--image_size)"
        )
    folder = experiment_folder(experiment.save_root, data.dataset, experiment.exp)
    network = _network(options, latent_size, network_options, folder)

    resolved = {**options.values, "precision": machine.precision, "processes": processes.count}
    resume = open_experiment(folder, resolved, experiment) if processes.is_main else True
    processes.barrier()
    autoencoder = autoencoder.to(machine.device)
    caches = options[LatentCacheOptions]
    source, held_out_source = (
        open_moments(split, autoencoder, data, caches, machine, processes) for split in (dataset, held_out)
    )
    review = Review(
        dataset=dataset,
        held_out=held_out_source,
        autoencoder=autoencoder,
        latent_shape=(autoencoder.latent_channels, latent_size, latent_size),
        num_classes=network_options.classes,
        solver=options[SolverOptions],
        cfg_scale=options[GuidanceOptions].cfg_scale,
        seed=training.seed,
        machine=machine,
        sigma_min=options[PathOptions].sigma_min,
        datadir=data.datadir,
        samples=experiment.eval_samples,
        features=choose_features(options[FeatureOptions], data.dataset, machine) if experiment.eval_samples else None,
    )
    header = {
        "model_type": options[NetworkOptions].resolve(),
        "network": network_options,
        "latent_size": latent_size,
        "latent_channels": autoencoder.latent_channels,
        "num_classes": network_options.classes,
        "autoencoder": autoencoder.describe(),
        "dataset": dataset.facts,
        "path": options[PathOptions],
        "training": training,
        "precision": machine.precision,
        "reproducible": training.max_minutes == 0,
        **provenance(),
    }
    job = Job(
        folder=folder,
        network=network,
        source=source,
        autoencoder=autoencoder,
        header=as_json(header),
        path=options[PathOptions],
        training=training,
        experiment=experiment,
        machine=machine,
        processes=processes,
        review=review,
        compile=options[MachineOptions].compile,
    )
    return job, resume


def load_what_fits(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load the weights whose name and shape fit, and list the rest.

    Raises:
        UsageError: not one weight fits.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UsageError("--init_from: not one weight of that checkpoint has the name and shape of this network's")
    network.load_state_dict(fitting, strict=False)
    left_out = sorted({*own, *weights} - {*fitting})
    more = f" and {len(left_out) - LISTED_NAMES} more" if len(left_out) > LISTED_NAMES else ""
    listed = f"; left as initialised or unused: {', '.join(left_out[:LISTED_NAMES])}{more}" if left_out else ""
    print(f"--init_from: loaded {len(fitting)} of {len(own)} weights{listed}")


def _network(options: Options, latent_size: int, network_options: FamilyOptions, folder: Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options[TrainingOptions].seed, "weights"))
        network = build_network(options[NetworkOptions].resolve(), latent_size, network_options)
    if name := options[ExperimentOptions].init_from:
        start = find_checkpoint(name, folder)
        load_what_fits(network, read_published(start).sampled if is_torch_file(start) else read_weights(start)[0])
    return network


def _network_options(
    options: Options, autoencoder: Autoencoder | PixelSpace, splits: tuple[ImageDataset, ...]
) -> FamilyOptions:
    """The family's options, its channels those of the latents; refuses labels that the network has no room for."""
    chosen = options[NETWORKS[options[NetworkOptions].resolve()].options]
    channels = autoencoder.latent_channels
    for name in ("num_in_channels", "num_out_channels"):
        if name in options.explicit and getattr(chosen, name) != channels:
            raise UsageError(
                f"--{name} {getattr(chosen, name)} contradicts the autoencoder, whose latents have {channels} channels"
            )
    flag = "label_dim" if isinstance(chosen, EdmUNetOptions) else "num_classes"
    other = {"label_dim": "num_classes", "num_classes": "label_dim"}[flag]
    if other in options.explicit and (options.values[other] or 0) > 1 and chosen.classes == 1:
        raise UsageError(
            f"--{other} {options.values[other]} is not for this network: its classes are given by --{flag}"
        )
    for split in splits:
        if chosen.classes == 1:
            split.labels.zero_()  # unconditional: all images are of one class
        elif split.labels.max() >= chosen.classes:
            raise UsageError(
                f"the dataset has labels up to {int(split.labels.max())}, out of range for --{flag} "
                f"{chosen.classes}: labels must lie in 0..{chosen.classes - 1}"
            )
    check_guidance(as_json(chosen), options[GuidanceOptions].cfg_scale)
    return replace(chosen, num_in_channels=channels, num_out_channels=channels)
