"""From options to a `Job`: data, autoencoder, network, and how the run looks at itself."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoints.experiments import find_checkpoint
from checkpoints.files import read_weights
from checkpoints.header import Header
from checkpoints.lfm import read_sampled
from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import HELD_OUT_IMAGES, DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import MomentSource, open_moments
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.reconstruction import draw_reconstructions
from flow.guidance import GuidanceOptions
from flow.paths import PathOptions
from flow.solvers import SolverOptions, check_method, needs_float32
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import Autoencoder
from models.conditions import ConditionOptions, DenseInput
from models.edm_unet import EdmUNetOptions
from models.family import FamilyOptions
from models.registry import FAMILY_OPTIONS, NETWORKS, Architecture, NetworkOptions, build_network
from options import Options, UsageError, as_json
from runtime.distributed import Processes
from runtime.files import write_json
from runtime.pictures import GridOptions
from runtime.precision import Machine, MachineOptions, choose_machine
from runtime.provenance import provenance
from runtime.randomness import seed_for
from runtime.torch_files import is_torch_file
from sampling.sampler import check_guidance
from tasks.conditioned_images import ConditionedImages
from tasks.task import GENERATION, TrainingTask
from training.data import steps_per_epoch
from training.experiment import (
    IMAGES,
    STATE_OF_IMAGES,
    ExperimentOptions,
    open_experiment,
    run_folder,
    will_continue,
)
from training.run import Job, TrainingOptions
from training.validation import Review

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
    GridOptions,
    SolverOptions,
    GuidanceOptions,
    FeatureOptions,
    MachineOptions,
)
LISTED_NAMES = 10


class _Inputs(NamedTuple):
    """What a run works with: the splits, the autoencoder, dense conditions of both splits, and the scoring network if any."""

    dataset: ImageDataset
    held_out: ImageDataset
    autoencoder: Autoencoder
    condition: ConditionSource | None
    held_out_condition: ConditionSource | None
    features: FeatureNetwork | None


def prepare(options: Options, processes: Processes, task: TrainingTask = GENERATION) -> tuple[Job, bool]:
    """The job of a task that the options describe, and whether it continues an existing run.

    Raises:
        UsageError: options that do not fit each other, the data, or the existing run.
    """
    machine = choose_machine(options[MachineOptions], processes)
    data, experiment, training = options[DatasetOptions], options[ExperimentOptions], options[TrainingOptions]
    _check(options)
    inputs = _inputs(options, task, machine.for_encoding, processes)
    whole = training.batch_size * processes.count
    steps = training.last_step(steps_per_epoch(len(inputs.dataset), whole))
    machine = machine.settled(steps * training.grad_accumulation, processes, whole=not training.fsdp)
    print(machine.describe())
    architecture = _architecture(options, inputs)
    folder = run_folder(options, task.task)
    start_from = None
    if experiment.init_from and not will_continue(folder, experiment):
        start_from = find_checkpoint(experiment.init_from, folder)
    network = _network(architecture, training.seed, start_from)

    processes.barrier()  # all have read what --overwrite may move aside
    resolved: dict[str, Any] = {"precision": machine.precision, "compile": machine.compile}
    resolved |= {"processes": processes.count, "threads": torch.get_num_threads()}
    resolved = {**options.values, **resolved, IMAGES: len(inputs.dataset), STATE_OF_IMAGES: _state_of(inputs.dataset)}
    resume = processes.from_main(open_experiment(folder, resolved, experiment) if processes.is_main else False)
    if processes.is_main and not resume:
        _show_reconstructions(inputs, machine, folder / "samples" / "reconstructions.png")
    caches = options[LatentCacheOptions]
    source, held_out_source = (
        open_moments(split, inputs.autoencoder, data, caches, machine.for_encoding, processes)
        for split in (inputs.dataset, inputs.held_out)
    )
    header = _header(options, machine, task, inputs, architecture)
    job = Job(
        folder=folder,
        network=network,
        source=source,
        autoencoder=inputs.autoencoder,
        header=header,
        path=options[PathOptions],
        training=training,
        experiment=experiment,
        machine=machine,
        processes=processes,
        review=_review(options, machine, inputs, held_out_source, header, processes),
        condition=inputs.condition,
    )
    return job, resume


def _state_of(dataset: ImageDataset) -> str:
    """What tells that the images, labels or maps are no longer those that a run began with."""
    state = dataset.fingerprint + getattr(dataset, "maps_fingerprint", "")
    return hashlib.sha256(state.encode()).hexdigest()[:12]


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


def _show_reconstructions(inputs: _Inputs, machine: Machine, picture: Path) -> None:
    """What the autoencoder alone loses, which no network on its latents can bring back: a picture, and its PSNR beside it."""
    autoencoder = inputs.autoencoder
    if autoencoder.is_pixel_space or not inputs.held_out.has_images:
        return
    ratio = draw_reconstructions(autoencoder, inputs.held_out, machine.device, picture)
    write_json(picture.with_suffix(".json"), {"psnr_db": ratio, "autoencoder": autoencoder.describe()})
    print(f"held-out images above their reconstructions by the autoencoder, PSNR {ratio:.2f} dB: {picture}")


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
    if training.fsdp and options[MachineOptions].precision == "fp16":
        raise UsageError("--fsdp: the scale of fp16's losses is not shared among processes: use --precision bf16")
    if training.batch_size % training.grad_accumulation:
        raise UsageError(
            f"--grad_accumulation {training.grad_accumulation} cuts the batch of a process into equal parts, so it must "
            f"divide --batch_size {training.batch_size}"
        )


def _inputs(options: Options, task: TrainingTask, machine: Machine, processes: Processes) -> _Inputs:
    data, scores = options[DatasetOptions], options[ExperimentOptions].eval_samples > 0
    with processes.main_first():  # the others find what it has downloaded
        dataset, held_out = task.open(data, "train"), task.open(data, "validation").head(HELD_OUT_IMAGES)
        autoencoder = load_autoencoder(options[AutoencoderOptions], dataset.facts.channels).to(machine.device)
        if scores:
            dataset.check_images("--eval_samples")
        features = choose_features(options[FeatureOptions], data.dataset, machine) if scores else None
    seeds = options[TrainingOptions].seed, seed_for("held-out conditions")
    own_options = options[task.condition_options] if task.condition_options else None
    condition, held_out_condition = (
        task.condition(split, autoencoder, machine, own_options, seed) if task.condition else None
        for split, seed in zip((dataset, held_out), seeds, strict=True)
    )
    return _Inputs(dataset, held_out, autoencoder, condition, held_out_condition, features)


def _architecture(options: Options, inputs: _Inputs) -> Architecture:
    dense = None
    if inputs.condition is not None:
        dense = replace(inputs.condition.dense, dropout=options[ConditionOptions].condition_dropout)
    network_options = _network_options(options, inputs.autoencoder, (inputs.dataset, inputs.held_out), dense)
    latent_size = _latent_size(options[DatasetOptions], inputs.autoencoder)
    return Architecture(options[NetworkOptions].resolve(), latent_size, network_options, dense)


def _latent_size(data: DatasetOptions, autoencoder: Autoencoder) -> int:
    """The latents' side."""
    size, remainder = divmod(data.image_size, autoencoder.factor)
    if remainder or not size:
        raise UsageError(
            f"the image size must be a multiple of {autoencoder.factor} for this autoencoder, "
            f"but it is {data.image_size} (--image_size)"
        )
    return size


def _header(
    options: Options, machine: Machine, task: TrainingTask, inputs: _Inputs, architecture: Architecture
) -> Header:
    """What every checkpoint of the run says about it."""
    return Header(
        model_type=architecture.model_type,
        network=architecture.options,
        latent_size=architecture.latent_size,
        autoencoder=inputs.autoencoder.describe(),
        dataset=inputs.dataset.facts,
        task=task.task.name,
        dense=architecture.dense,
        path=options[PathOptions],
        training=as_json(options[TrainingOptions]),
        precision=machine.precision,
        compiled=machine.compile,
        reproducible=options[TrainingOptions].max_minutes == 0,
        **provenance(),
    )


def _review(
    options: Options,
    machine: Machine,
    inputs: _Inputs,
    held_out: MomentSource,
    header: Header,
    processes: Processes,
) -> Review:
    """How the run looks at itself."""
    condition = inputs.held_out_condition
    return Review(
        dataset=inputs.dataset,
        held_out=held_out,
        autoencoder=inputs.autoencoder,
        latent_shape=header.latent_shape,
        num_classes=header.num_classes,
        solver=options[SolverOptions],
        guidance=options[GuidanceOptions],
        seed=options[TrainingOptions].seed,
        machine=machine,
        precise=needs_float32(options[SolverOptions]) and options[MachineOptions].precision == "auto",
        sigma_min=options[PathOptions].sigma_min,
        derived=options[DatasetOptions].derived,
        samples=options[ExperimentOptions].eval_samples,
        features=inputs.features,
        grid=options[GridOptions],
        # A network that is shared out takes part as a whole: all processes draw every sample with it.
        processes=Processes() if options[TrainingOptions].fsdp else processes,
        conditioned=ConditionedImages(inputs.held_out, condition) if condition else None,
        drops_labels=header.drops_labels,
        drops_dense=header.drops_dense,
    )


def _network(architecture: Architecture, seed: int, start_from: Path | None) -> nn.Module:
    """The network with its initial weights, or those of the checkpoint `start_from`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        network = build_network(*architecture)
    if start_from:
        weights = read_sampled(start_from) if is_torch_file(start_from) else read_weights(start_from)[0]
        load_what_fits(network, weights)
    return network


def _network_options(
    options: Options,
    autoencoder: Autoencoder,
    splits: tuple[ImageDataset, ...],
    dense: DenseInput | None,
) -> FamilyOptions:
    """The family's options, its channels those of the latents and of a dense condition; refuses labels without room."""
    chosen = options[NETWORKS[options[NetworkOptions].resolve()].options]
    beside = dense.channels if dense else 0
    channels: dict[str, Any] = {
        "num_in_channels": autoencoder.latent_channels + beside,
        "num_out_channels": autoencoder.latent_channels,
    }
    for name, expected in channels.items():
        if name in options.explicit and getattr(chosen, name) != expected:
            condition = f" and those of the condition beside them {beside}" if beside else ""
            raise UsageError(
                f"--{name} {getattr(chosen, name)} contradicts the autoencoder, whose latents have "
                f"{autoencoder.latent_channels} channels{condition}: {expected}, or leave the flag out"
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
    check_guidance(chosen.label_dropout, dense, options[GuidanceOptions].cfg_scale)
    return replace(chosen, **channels)
