"""The architecture and the initial weights of a run's network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.files import describes_network, read_header, read_weights
from checkpoints.header import Header
from checkpoints.projects.opening import check_direction, read_start
from datasets_prep.datasets import ImageDataset
from datasets_prep.folder_layout.report import class_names
from flow.losses.options import prediction_of
from models.autoencoders.protocol import UNMEASURED, Autoencoder, AutoencoderFacts
from models.conditions import DenseInput
from models.family import FamilyOptions, Weights, own_options
from models.registry import Architecture, build_network, network_groups
from options import UsageError
from runtime.messages import fact, note, warn
from runtime.precision import Machine
from runtime.randomness import seed_for
from runtime.weights import check_finite, list_names, match_names
from sampling.conventions import Subject, warn_of_conventions

__all__ = [
    "check_classes",
    "check_labels",
    "choose_architecture",
    "load_fitting_weights",
    "new_network",
    "warn_of_other_conventions",
]


def choose_architecture(
    model_type: str,
    options: FamilyOptions,
    given: Mapping[str, Any],
    image_size: int,
    autoencoder: Autoencoder,
    dense: DenseInput | None,
) -> Architecture:
    """Choose the architecture for an autoencoder's latents.

    Args:
        model_type: key of NETWORKS.
        options: the family's options. Their channels are set according to the latents and the dense condition.
        given: values of the options that the user gave, by name.
        image_size: side of the images in pixels.
        autoencoder: determines the latents' channels and size.
        dense: the dense condition in the network's input, if any.

    Raises:
        UsageError: the autoencoder's factor does not divide the image size, or given options contradict the autoencoder or
            belong to another network.
    """
    size, remainder = divmod(image_size, autoencoder.factor)
    if remainder or not size:
        raise UsageError(
            f"the image size must be a multiple of {autoencoder.factor} for this autoencoder, "
            f"but it is {image_size} (--image_size)"
        )
    latents, extra = autoencoder.latent_channels, dense.channels if dense else 0
    channels: dict[str, Any] = {"num_in_channels": latents + extra, "num_out_channels": latents}
    for name, expected in channels.items():
        if name in given and given[name] != expected:
            condition = f", and the condition adds {extra} to the network's input" if extra else ""
            raise UsageError(
                f"--{name} {given[name]} contradicts the autoencoder, whose latents have {latents} channels{condition}: "
                f"use {expected}, or leave the flag out"
            )
    _check_class_flag(options, given)
    _check_family(model_type, options, given)
    for name, explanation in options.unmatched(size).items():
        if name in given:
            note(f"--{name} {explanation}")
    return Architecture(model_type, size, replace(options, **channels), dense)


def check_labels(options: FamilyOptions, splits: tuple[ImageDataset, ...]) -> None:
    """Set all labels to 0 for an unconditional network; otherwise check that the network has enough classes.

    Raises:
        UsageError: the images have labels beyond the network's classes.
    """
    for split in splits:
        if options.classes == 1:
            split.labels.zero_()
        elif split.labels.max() >= options.classes:
            raise UsageError(
                f"the dataset has labels up to {int(split.labels.max())}, out of range for --{options.class_flag} "
                f"{options.classes}: labels must lie in 0..{options.classes - 1}"
            )


def check_classes(options: FamilyOptions, dataset: ImageDataset, *, new: bool) -> None:
    """Compare the network's number of classes with the classes of the training images.

    Classes without images get a warning, because files of a dataset with all its classes must also train on a part of it.

    Args:
        options: the network's.
        dataset: the training images, after `check_labels`.
        new: whether the weights are new. Otherwise, they may know classes that these images lack.

    Raises:
        UsageError: all images have one label, and the weights are new.
    """
    if options.classes == 1:
        count = len(set(dataset.stored_labels.tolist()))
        if new and dataset.survey is not None and count > 1:
            note(
                f"the network is unconditional: it ignores the {count:,} classes; --{options.class_flag} "
                f"{int(dataset.stored_labels.max()) + 1} trains on them"
            )
        return
    asked, names = f"--{options.class_flag} {options.classes}", class_names(dataset)
    found = dataset.labels.unique().tolist()
    absent = [number for number in range(options.classes) if number not in set(found)]
    if not absent:
        return
    if len(found) > 1 or not new:
        listed = list_names(map(str, absent))
        warn(
            f"{asked}, but no training image has the label {listed}: the network does not learn these classes, and their "
            "samples mean nothing. Choose the labels of samples with --labels, or start again with another "
            f"--{options.class_flag}"
        )
        return
    survey = dataset.survey
    reason = f"{names[found[0]]}" if names else "there are no classes"
    if survey is not None and survey.no_classes:
        reason += f", because {survey.no_classes}"
    labels = (
        ""
        if survey is None
        else (
            "put the images of each class into a folder of their own, or write a metadata.csv with the columns file_name and "
            "label, or "
        )
    )
    raise UsageError(
        f"{asked}, but all {len(dataset):,} training images have one label ({reason}): {labels}leave out "
        f"--{options.class_flag}"
    )


def new_network(
    architecture: Architecture,
    seed: int,
    start_from: Path | None,
    autoencoder: AutoencoderFacts,
    prediction: str = "velocity",
) -> nn.Module:
    """Build the network with random initial weights, or with the weights of the checkpoint `start_from` that fit.

    Notes say if that checkpoint learned another `prediction`, or latents of the same autoencoder in another scale.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        network = build_network(*architecture)
    if start_from is None:
        return network
    if not describes_network(start_from):
        load_fitting_weights(network, read_start(start_from, architecture.options))
        return network
    weights, header = read_weights(start_from)
    check_direction(str(start_from), getattr(header.network, "reversed_time", False), architecture.options)
    load_fitting_weights(network, weights)
    if (learned := prediction_of(header.path)) != prediction:
        note(f"{start_from} learned to predict the {learned}, but this run starts to predict the {prediction} from it")
    if header.autoencoder.sha256 == autoencoder.sha256 and not header.autoencoder.same_scale(autoencoder):
        note(
            f"{start_from} learned latents with the mean {header.autoencoder.latents_mean} and standard deviation "
            f"{header.autoencoder.latents_std}, but this run uses {autoencoder.latents_mean} and {autoencoder.latents_std}"
        )
    return network


def load_fitting_weights(network: nn.Module, weights: Weights) -> None:
    """Load the weights whose name and shape match, and print the names of the rest.

    Raises:
        UsageError: no weight matches, or some are not finite.
    """
    own = network.state_dict()
    weights = match_names(weights, own)
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UsageError(
            "--init_from: no weight of this checkpoint matches the network in name and shape; choose a checkpoint of the "
            "same --model_type"
        )
    check_finite(fitting, "--init_from: this checkpoint", own)
    network.load_state_dict(fitting, strict=False)
    left_out = sorted({*own, *weights} - {*fitting})
    listed = f"; no match in name and shape: {list_names(left_out)}" if left_out else ""
    fact("init", f"loaded {len(fitting)} of {len(own)} weights{listed}")


def warn_of_other_conventions(
    path: Path, network: nn.Module, header: Header, held_out: ImageDataset, autoencoder: Autoencoder, machine: Machine
) -> None:
    """Warn if a network that starts from another project's file does not follow the conventions of this one.

    Nothing is checked while the scale of the latents is unmeasured.

    Args:
        path: the file of --init_from. A run's own checkpoint is not checked.
        network: with the file's weights; moves to the machine's device.
        header: the header of the run.
        held_out: held-out images.
        autoencoder: of the run's latents.
        machine: device and precision.
    """
    ours = describes_network(path) and read_header(path).published_file is None
    unmeasured = autoencoder.describe().statistics == UNMEASURED
    if ours or unmeasured or header.dense is not None or prediction_of(header.path) != "velocity":
        return
    was_training = network.training
    subject = Subject.of(header, network.to(machine.device).eval(), autoencoder, machine)
    warn_of_conventions(f"--init_from {path}", subject, held_out)
    network.train(was_training)


def _check_class_flag(options: FamilyOptions, given: Mapping[str, Any]) -> None:
    """Check that the number of classes was not given by another family's flag."""
    for other in {group.class_flag for group in network_groups()} - {options.class_flag}:
        if (given.get(other) or 0) > 1 and options.classes == 1:
            raise UsageError(
                f"--{other} {given[other]} has no effect on this network: give its classes with --{options.class_flag}"
            )


def _check_family(model_type: str, options: FamilyOptions, given: Mapping[str, Any]) -> None:
    """Check that no option of another family was given, except those that LFM's arguments files give to all networks."""
    for group in network_groups():
        if group.only_for and not isinstance(options, group):
            for field in own_options(group):
                if given.get(field.name, field.default) != field.default:
                    raise UsageError(
                        f"--{field.name} is an option of {group.only_for} and has no effect on {model_type}: leave it out, or "
                        "choose another --model_type"
                    )
