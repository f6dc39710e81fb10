"""From options to a `Job`: data, autoencoder, network, and how the run looks at itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_prep.datasets import HELD_OUT_IMAGES, DatasetOptions, ImageDataset, open_dataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import MomentSource, open_moments
from evaluation.features import FeatureNetwork, FeatureOptions, choose_features
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
from runtime.precision import Machine, MachineOptions, choose_machine
from runtime.provenance import provenance
from runtime.published import read_published
from runtime.randomness import seed_for
from runtime.torch_files import is_torch_file
from training.experiment import ExperimentOptions, has_content, open_experiment
from training.loop import Job, TrainingOptions
from training.review import Review

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
    machine = choose_machine(options[MachineOptions], processes)
    data, experiment, training = options[DatasetOptions], options[ExperimentOptions], options[TrainingOptions]
    _check(options)
    with processes.main_first():  # the others find what it has downloaded
        dataset = open_dataset(data, "train")
        held_out = open_dataset(data, "validation").head(HELD_OUT_IMAGES)
        autoencoder = load_autoencoder(options[AutoencoderOptions], dataset.facts.channels)
        if experiment.eval_samples:
            dataset.check_images("--eval_samples")
        score = choose_features(options[FeatureOptions], data.dataset, machine) if experiment.eval_samples else None
    network_options = _network_options(options, autoencoder, (dataset, held_out))
    latent_size = _latent_size(data, autoencoder)
    folder = experiment_folder(experiment.save_root, data.dataset, experiment.exp)
    start_from = None
    if experiment.init_from and not has_content(folder, experiment):
        start_from = find_checkpoint(experiment.init_from, folder)
    network = _network(options, latent_size, network_options, start_from)

    processes.barrier()  # all have read what --overwrite may move aside
    resolved = {"precision": machine.precision, "processes": processes.count, "threads": torch.get_num_threads()}
    resolved = {**options.values, **resolved}
    resume = processes.from_main(open_experiment(folder, resolved, experiment) if processes.is_main else False)
    autoencoder = autoencoder.to(machine.device)
    caches = options[LatentCacheOptions]
    source, held_out_source = (
        open_moments(split, autoencoder, data, caches, machine, processes) for split in (dataset, held_out)
    )
    header = _header(options, machine, dataset, autoencoder, network_options, latent_size)
    job = Job(
        folder=folder,
        network=network,
        source=source,
        autoencoder=autoencoder,
        header=header,
        path=options[PathOptions],
        training=training,
        experiment=experiment,
        machine=machine,
        processes=processes,
        review=_review(options, machine, dataset, held_out_source, autoencoder, header, score, processes),
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


def _check(options: Options) -> None:
    """Refuse options of training that cannot be."""
    training = options[TrainingOptions]
    check_method(options[SolverOptions])
    if len(training.adam_betas) != 2 or max(training.adam_betas) >= 1:
        raise UsageError(f"--adam_betas: expected two numbers below 1, but {training.adam_betas} was given")
    if training.fsdp and training.optimizer != "adamw":
        raise UsageError(
            f"--fsdp shares every matrix out, and --optimizer {training.optimizer} needs it whole: use adamw"
        )
    if training.batch_size % training.grad_accumulation:
        raise UsageError(
            f"--grad_accumulation {training.grad_accumulation} cuts the batch of a process into equal parts, so it must "
            f"divide --batch_size {training.batch_size}"
        )


def _latent_size(data: DatasetOptions, autoencoder: Autoencoder | PixelSpace) -> int:
    """The latents' side."""
    size, remainder = divmod(data.image_size, autoencoder.factor)
    if remainder or not size:
        raise UsageError(
            f"the image size must be a multiple of {autoencoder.factor} for this autoencoder, "
            f"but it is {data.image_size} (--image_size)"
        )
    return size


def _header(
    options: Options,
    machine: Machine,
    dataset: ImageDataset,
    autoencoder: Autoencoder | PixelSpace,
    network_options: FamilyOptions,
    latent_size: int,
) -> dict[str, Any]:
    """What every checkpoint of the run says about it."""
    header = {
        "model_type": options[NetworkOptions].resolve(),
        "network": network_options,
        "latent_size": latent_size,
        "latent_channels": autoencoder.latent_channels,
        "num_classes": network_options.classes,
        "autoencoder": autoencoder.describe(),
        "dataset": dataset.facts,
        "path": options[PathOptions],
        "training": options[TrainingOptions],
        "precision": machine.precision,
        "reproducible": options[TrainingOptions].max_minutes == 0,
        **provenance(),
    }
    return as_json(header)


def _review(
    options: Options,
    machine: Machine,
    dataset: ImageDataset,
    held_out: MomentSource,
    autoencoder: Autoencoder | PixelSpace,
    header: dict[str, Any],
    features: FeatureNetwork | None,
    processes: Processes,
) -> Review:
    """How the run looks at itself."""
    return Review(
        dataset=dataset,
        held_out=held_out,
        autoencoder=autoencoder,
        latent_shape=(header["latent_channels"], header["latent_size"], header["latent_size"]),
        num_classes=header["num_classes"],
        solver=options[SolverOptions],
        guidance=options[GuidanceOptions],
        seed=options[TrainingOptions].seed,
        machine=machine,
        sigma_min=options[PathOptions].sigma_min,
        datadir=options[DatasetOptions].datadir,
        samples=options[ExperimentOptions].eval_samples,
        features=features,
        # A network that is shared out takes part as a whole: all processes draw every sample with it.
        processes=Processes() if options[TrainingOptions].fsdp else processes,
    )


def _network(options: Options, latent_size: int, network_options: FamilyOptions, start_from: Path | None) -> nn.Module:
    """The network with its initial weights, or those of the checkpoint `start_from`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options[TrainingOptions].seed, "weights"))
        network = build_network(options[NetworkOptions].resolve(), latent_size, network_options)
    if start_from:
        weights = read_published(start_from).sampled if is_torch_file(start_from) else read_weights(start_from)[0]
        load_what_fits(network, weights)
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
