"""Construction of a `TrainingRun` from the options: data, autoencoder, network, objective and validation."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoints.experiments import find_checkpoint
from checkpoints.files import describes_network, read_header
from checkpoints.header import Header
from datasets_prep.datasets import DatasetOptions, FlipOptions
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import mean_latents, measure_scale, open_encoded, open_moments
from evaluation.features.registry import FeatureOptions
from evaluation.report.nearest import note_searched
from evaluation.trained_flow import ExactPoints, check_exact_velocity
from flow.auxiliary.losses import AuxiliaryOptions
from flow.guidance import GuidanceOptions
from flow.losses.options import contrastive_weight, prediction_of
from flow.objectives import OBJECTIVES, ObjectiveOptions, objective_groups
from flow.paths import PathOptions
from flow.solvers import SolverOptions, check_method, needs_float32, unreachable_tolerances
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.preview import fit_twin
from models.autoencoders.statistics import inherit_scale
from models.conditions import ConditionOptions
from models.family import FamilyOptions
from models.registry import NETWORKS, Architecture, NetworkOptions, network_groups
from options import Options, UsageError, as_json
from runtime.distributed import Processes
from runtime.messages import fact, note
from runtime.pictures import GridOptions
from runtime.precision import Machine, MachineOptions, choose_machine
from runtime.provenance import provenance
from sampling.checks import check_guidance, check_network, warn_of_untrained
from tasks.conditioned_images import ConditionedImages
from tasks.task import GENERATION, TrainingTask
from training.auxiliary.setup import (
    EncoderOptions,
    add_auxiliary,
    check_auxiliary,
    fit_encoder,
    load_encoder,
    open_features,
    uses_auxiliary,
)
from training.experiment import (
    ExperimentOptions,
    open_experiment,
    run_folder,
    will_resume,
)
from training.network import (
    check_classes,
    check_labels,
    choose_architecture,
    new_network,
    warn_of_other_conventions,
)
from training.objectives.checks import settle_options
from training.objectives.training_pairs import open_training_pairs
from training.preparation.augmentation import (
    check_augmentation,
    check_network_takes_augmentation,
    open_variants,
    settle_flips,
)
from training.preparation.configuration import configuration_of
from training.preparation.inputs import Inputs, keep_scale, open_inputs, open_splits, show_reconstructions
from training.preparation.own_autoencoder import OwnAutoencoderOptions, resolve_own
from training.reading.order import steps_per_epoch
from training.run import TrainingOptions, TrainingRun
from training.tracking.trackers import check_tracker
from training.validation import Validation

__all__ = ["prepare", "training_groups"]


def training_groups() -> tuple[type, ...]:
    """The option dataclasses of a training script, in the order of `--help`."""
    return (
        ExperimentOptions,
        DatasetOptions,
        FlipOptions,
        LatentCacheOptions,
        AutoencoderOptions,
        OwnAutoencoderOptions,
        NetworkOptions,
        *network_groups(),
        ObjectiveOptions,
        *objective_groups(),
        AuxiliaryOptions,
        EncoderOptions,
        TrainingOptions,
        GridOptions,
        SolverOptions,
        GuidanceOptions,
        FeatureOptions,
        MachineOptions,
    )


def prepare(options: Options, processes: Processes, task: TrainingTask = GENERATION) -> tuple[TrainingRun, bool]:
    """Prepare a run of a task; returns it, and whether it resumes an existing run.

    Raises:
        UsageError: the options contradict each other, the data or the existing run.
        UnfinishedError: the training of the data's own autoencoder was interrupted.
    """
    data, experiment, training = options[DatasetOptions], options[ExperimentOptions], options[TrainingOptions]
    _check(training, options[SolverOptions], options[MachineOptions])
    check_tracker(experiment.tracker)
    machine = choose_machine(options[MachineOptions], processes)
    with processes.main_first():  # only the main process downloads
        flips = settle_flips(options[FamilyOptions], options[FlipOptions])
        splits = open_splits(task, data, flips)
    encoder_options = resolve_own(options, *splits, machine, processes)
    with processes.main_first():
        inputs = open_inputs(task, options, splits, encoder_options, machine.for_encoding)
    model_type, objective_name = options[NetworkOptions].resolve(), options[ObjectiveOptions].objective
    chosen, objective_options = options[NETWORKS[model_type].options], options[OBJECTIVES[objective_name].options]
    pairs = open_training_pairs(
        objective_options, inputs.autoencoder, data.image_size, chosen.classes, dense=inputs.condition is not None
    )
    is_dense = inputs.condition is not None
    check_augmentation(chosen, options.given, inputs.dataset, dense=is_dense, pairs=pairs is not None)
    per_epoch = steps_per_epoch(len(pairs or inputs.dataset), training.batch_size * processes.count)
    if 0 < len(pairs or inputs.dataset) < training.batch_size * processes.count:
        note("the images do not fill one batch, so each batch contains them more than once")
    steps = math.inf if training.minutes else training.last_step(per_epoch)
    if not training.minutes:
        training.note_long_warmup(int(steps))
    machine = machine.settled(steps * training.grad_accumulation, processes, whole=not training.fsdp)
    fact("machine", machine.describe())
    precise = needs_float32(options[SolverOptions]) and options[MachineOptions].precision == "auto"
    if text := unreachable_tolerances(options[SolverOptions], "fp32" if precise else machine.precision):
        note(text)

    folder = run_folder(experiment, data.dataset, task.task)
    resumes = will_resume(folder, experiment)
    if resumes:
        keep_scale(inputs.autoencoder, folder)
    dense = inputs.dense(options[ConditionOptions].condition_dropout if task.condition else 0.0)
    given = options.given
    check_auxiliary(chosen, options[AuxiliaryOptions], options[EncoderOptions], given)
    with processes.main_first():
        encoder, chosen = load_encoder(options[EncoderOptions], chosen)
    architecture = choose_architecture(model_type, chosen, given, data.image_size, inputs.autoencoder, dense)
    check_labels(architecture.options, (inputs.dataset, inputs.held_out))
    check_classes(architecture.options, inputs.dataset, new=not resumes and not experiment.init_from)
    check_guidance(architecture.options.label_dropout, dense, options[GuidanceOptions].cfg_scale)
    auxiliary = options[AuxiliaryOptions]
    path = settle_options(
        objective_name,
        objective_options,
        architecture,
        machine,
        given,
        global_batch=training.batch_size * processes.count,
        fsdp=training.fsdp,
        auxiliary=uses_auxiliary(architecture.options, auxiliary),
    )
    check_network(architecture.options, options[SolverOptions], options[GuidanceOptions])
    if options[GridOptions].show_neighbours:
        inputs.dataset.check_images("--show_neighbours")
        if dense is not None:
            raise UsageError(
                "--show_neighbours: grids of this task show images next to the samples already: omit the flag"
            )
        note_searched(inputs.dataset)
    header = _header(architecture, inputs, task, objective_name, path, training, machine)
    warn_of_untrained(header, options[SolverOptions], options[GuidanceOptions])
    if experiment.validate_excess:
        check_exact_velocity(header, "--validate_excess: this run")
    objective = add_auxiliary(OBJECTIVES[objective_name].build(path), architecture.options, auxiliary)
    weights = find_checkpoint(experiment.init_from, folder) if experiment.init_from and not resumes else None
    if weights and describes_network(weights) and not options[AutoencoderOptions].latent_statistics:
        inherit_scale(inputs.autoencoder, read_header(weights).autoencoder)
    network = new_network(architecture, training.seed, weights, inputs.autoencoder.describe(), prediction_of(path))
    check_network_takes_augmentation(model_type, architecture.options, network)
    if weights is not None and processes.is_main and not training.fsdp:  # a sharded network may not fit on one device
        warn_of_other_conventions(weights, network, header, inputs.held_out, inputs.autoencoder, machine)
    fitted = fit_encoder(encoder, options[EncoderOptions], network, inputs.dataset)
    header = replace(header, auxiliary=auxiliary, encoder=fitted.describe() if fitted else None)

    processes.barrier()  # --overwrite may move files aside that other processes still read
    configuration = configuration_of(options, machine, processes, inputs.dataset, pairs)
    resume = processes.from_main(open_experiment(folder, configuration, experiment) if processes.is_main else False)
    if processes.is_main and not resume:
        show_reconstructions(inputs.autoencoder, inputs.held_out, machine, folder)
    caches, spare = options[LatentCacheOptions], Path(experiment.save_root) / "latent_cache"
    *sources, held_out = (
        open_moments(split, inputs.autoencoder, data, caches, machine.for_encoding, processes, spare)
        for split in ((inputs.held_out,) if pairs else (inputs.dataset, inputs.held_out))
    )
    source = pairs or sources[0]
    measure_scale(source, inputs.autoencoder, header.dataset.flips, processes)
    header = replace(header, autoencoder=inputs.autoencoder.describe())
    if inputs.twin:
        fit_twin(inputs.twin, inputs.autoencoder)
    if contrastive_weight(path):
        means = mean_latents(source, inputs.autoencoder, header.num_classes, header.dataset.flips, machine.device)
        header = replace(header, contrast_means=tuple(float(f"{x:.6g}") for x in means.flatten().tolist()))
    features = open_features(fitted, inputs.dataset, data, caches, machine.for_encoding, processes, spare)
    encoded = partial(
        open_encoded, data=data, cache=caches, machine=machine.for_encoding, processes=processes, spare=spare
    )
    augmented, features = open_variants(
        architecture.options, training, inputs.dataset, source, inputs.autoencoder, features, fitted, encoded
    )
    condition = inputs.held_out_condition
    # A sharded network needs all processes for every evaluation, so each process evaluates all points and samples.
    validating = Processes() if training.fsdp else processes
    count, exact = experiment.validate_excess, None
    if count:
        exact = ExactPoints.draw(header, source, inputs.autoencoder, count, machine.device, validating)
    validation = Validation(
        header=header,
        dataset=inputs.dataset,
        held_out=held_out,
        autoencoder=inputs.autoencoder,
        objective=objective,
        solver=options[SolverOptions],
        guidance=options[GuidanceOptions],
        seed=training.seed,
        machine=machine,
        precise=precise,
        derived=data.derived,
        samples=experiment.eval_samples,
        features=inputs.features,
        grid=options[GridOptions],
        processes=validating,
        conditioned=ConditionedImages(inputs.held_out, condition) if condition else None,
        exact=exact,
        twin=inputs.twin,
    )
    run = TrainingRun(
        folder=folder,
        network=network,
        source=augmented,
        autoencoder=inputs.autoencoder,
        header=header,
        objective=objective,
        training=training,
        experiment=experiment,
        machine=machine,
        processes=processes,
        validation=validation,
        condition=inputs.condition,
        features=features,
    )
    return run, resume


def _header(
    architecture: Architecture,
    inputs: Inputs,
    task: TrainingTask,
    objective: str,
    path: PathOptions,
    training: TrainingOptions,
    machine: Machine,
) -> Header:
    """The header of the run's checkpoints."""
    return Header(
        model_type=architecture.model_type,
        network=architecture.options,
        latent_size=architecture.latent_size,
        autoencoder=inputs.autoencoder.describe(),
        dataset=inputs.dataset.facts,
        task=task.task.name,
        dense=architecture.dense,
        path=path,
        objective=objective,
        training=as_json(training),
        precision=machine.precision,
        compiled=machine.compile,
        reproducible=training.max_minutes == 0,
        **provenance(),
    )


def _check(training: TrainingOptions, solver: SolverOptions, machine: MachineOptions) -> None:
    """Check that the training options do not contradict each other.

    Raises:
        UsageError: they do.
    """
    check_method(solver)
    training.check()
    if training.fsdp and machine.precision == "fp16":
        raise UsageError(
            "--fsdp does not support --precision fp16, because processes do not share its loss scale: use --precision bf16"
        )
