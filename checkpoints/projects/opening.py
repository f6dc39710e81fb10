"""Open other projects' checkpoints, and LFM's, which do not describe their network; start from them; and convert them back.

Flags, names and shapes determine the network. checkpoints/lfm.py opens LFM's.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import LoadedModel, check_scale
from checkpoints.header import Header, PublishedForm
from checkpoints.lfm import describe_unseen, open_lfm, refuse_own_state
from checkpoints.lfm_files import PublishedFile, read_condition_stage, read_published
from checkpoints.lfm_request import SCALE_FACTOR, published_facts, select_options
from checkpoints.projects.project import Project, split_description
from checkpoints.projects.registry import find_project, fitting_projects
from checkpoints.recognition import latent_side
from checkpoints.state_dicts import check_weights, load_weights
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import Autoencoder
from models.dit_options import DIT_SIZES, DiTOptions
from models.family import FamilyOptions, Weights
from models.registry import NetworkOptions, build_network, published_options
from models.taps import weights_for_sampling
from options import UsageError, make_options
from runtime.messages import fact, note
from runtime.weights import weights_hash

__all__ = [
    "channels_of",
    "check_direction",
    "open_published",
    "project_of",
    "read_project",
    "read_start",
    "weights_for_project",
]

DATASET = "imagenet_256"  # of the published networks
FACTOR, SD_CHANNELS = 8, 4  # Stable Diffusion's autoencoder
STABLE_DIFFUSION = ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema")


def open_published(
    path: Path, given: Mapping[str, Any], device: torch.device | str, downstream: bool = False
) -> LoadedModel:
    """Open a checkpoint of another project or LFM, as `load_model` opens a checkpoint of this project.

    Args:
        path: the file.
        given: values of the flags that the user gave, by name.
        device: device of the network and the autoencoder.
        downstream: see `checkpoints.lfm_request.request_network`.

    Raises:
        UsageError: the file is unreadable, its weights do not fit the requested network, the flags do not determine the
            network, or the scale of the latents is unknown.
    """
    file = read_published(path)
    refuse_own_state(file, path)
    project = project_of(file, path, given)
    source = select_options(AutoencoderOptions, given)
    if project is None:
        model = open_lfm(file, path, given, device, downstream)
        check_scale(path, model.autoencoder, source.latent_statistics)
        return model
    autoencoder = load_autoencoder(source, channels_of(given))
    check_scale(path, autoencoder, source.latent_statistics)
    weights, header = read_project(project, file, path, given, autoencoder)
    architecture = header.architecture.for_sampling()
    network = build_network(*architecture)
    load_weights(network, weights_for_sampling(weights), str(path), architecture)
    return LoadedModel(network.eval().requires_grad_(False).to(device), autoencoder.to(device), header)


def project_of(file: PublishedFile, path: object, given: Mapping[str, Any]) -> Project | None:
    """The project whose file this is, given the user's flags; None: LFM's."""
    network = "adm" if given.get("use_origin_adm") else given.get("model_type", "")
    return find_project(file, path, network)


def channels_of(given: Mapping[str, Any]) -> int:
    """Channels of the images of the dataset that the flags name, ImageNet by default."""
    return published_facts(given.get("dataset", DATASET), 0).channels


def read_project(
    project: Project,
    file: PublishedFile,
    path: Path,
    given: Mapping[str, Any],
    autoencoder: Autoencoder | None,
) -> tuple[Weights, Header]:
    """The weights in a project's file under DiT's names, in the file's precision, and a header for them.

    Args:
        project: the project.
        file: contents of the file.
        path: path of the file.
        given: values of the flags that the user gave, by name.
        autoencoder: None if it was not downloaded; only Stable Diffusion's is then known.

    Raises:
        UsageError: the weights are not a network of the project, contradict the flags, or do not fit the autoencoder; or the
            factor of the autoencoder is unknown.
    """
    weights = project.read(file.sampled)
    model_type, options = _network(project, file, weights, path, given)
    source, channels = select_options(AutoencoderOptions, given), options.num_out_channels
    name = source.pretrained_autoencoder_ckpt
    if autoencoder:
        found, factor = autoencoder.latent_channels, autoencoder.factor
    elif name in STABLE_DIFFUSION:
        found, factor = SD_CHANNELS, FACTOR
    elif source.f:
        found, factor = channels, source.f
    else:
        raise UsageError(
            f"the factor of the autoencoder {name} is unknown, because it was not downloaded: add --f FACTOR"
        )
    if found != channels:
        raise UsageError(
            f"{path} needs latents of {channels} channels, but the latents of the autoencoder {name} have {found}: give the "
            "autoencoder that the network was trained with, as --pretrained_autoencoder_ckpt FOLDER"
        )
    if autoencoder is None:
        source = _with_known_scale(source)
    facts = published_facts(
        given.get("dataset", DATASET), given.get("image_size") or factor * (latent_side(weights) or 1)
    )
    size, remainder = divmod(facts.image_size, factor)
    if remainder or not size:
        raise UsageError(f"--image_size {facts.image_size} is not a multiple of {factor}, the autoencoder's factor")
    header = Header(
        model_type=model_type,
        network=options,
        latent_size=size,
        autoencoder=autoencoder.describe() if autoencoder else describe_unseen(source, channels),
        dataset=facts,
        published_file=path.name,
        published_form=PublishedForm(project.name, file.entry, file.prefix),
        weights_sha256=weights_hash(weights),
    )
    check_weights(weights, str(path), header.architecture)
    entry = f" in its entry {file.entry}" if file.entry else ""
    direction = ", whose time and velocity are reversed" if project.reversed_time else ""
    fact("checkpoint", f"{path}: {project.name}'s {model_type} with {len(weights)} weights{entry}{direction}")
    return weights, header


def read_start(path: Path, network: FamilyOptions) -> Weights:
    """The weights to start training from, under this project's names.

    Args:
        path: a file of another project or LFM.
        network: options of the network that is to be trained.

    Raises:
        UsageError: the file is unreadable, or the time of its network runs in the other direction.
    """
    file = read_published(path)
    fitting = fitting_projects(file)
    if not fitting:
        return file.sampled | read_condition_stage(path)
    reverses = getattr(network, "reversed_time", False)
    project = next((each for each in fitting if each.reversed_time == reverses), fitting[0])
    check_direction(f"{path}, a file of {project.name},", project.reversed_time, network)
    return project.read(file.sampled)


def check_direction(source: str, reversed_time: bool, network: FamilyOptions) -> None:
    """Check that the network to train has the time direction of the weights that it starts from.

    Raises:
        UsageError: it has the other one.
    """
    if reversed_time != getattr(network, "reversed_time", False):
        time, velocity, flag = ("1 - t", "data - noise", "add") if reversed_time else ("t", "noise - data", "leave out")
        raise UsageError(
            f"--init_from: the network in {source} gets the time {time} and predicts {velocity}, but this run's does not: "
            f"{flag} --reversed_time, or choose the project's --model_type (docs/published.md)"
        )


def weights_for_project(
    project: Project, weights: Weights, header: Header, source: str | Path
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under a project's names, in its order.

    Raises:
        UsageError: the network is none of the project's.
    """
    options = header.network
    if not isinstance(options, DiTOptions) or header.dense is not None or (lacking := project.lacks(options)):
        reason = (
            f"the options {', '.join(lacking)} differ" if isinstance(options, DiTOptions) and not header.dense else ""
        )
        raise UsageError(
            f"{source} holds no network of {project.name}, whose networks are DiT without dense conditions"
            f"{'; ' + reason if reason else ''}: its code could not load the file, or would draw wrong samples"
        )
    with torch.device("meta"):
        own = build_network(*header.architecture).state_dict()
    names = project.names(own)
    if left := sorted({*own} - {*names.values()}):
        note(f"the written file lacks {len(left)} weights of auxiliary heads or for training only, such as {left[0]}")
    return {name: weights[mine] for name, mine in names.items()}


def _network(
    project: Project, file: PublishedFile, weights: Weights, path: Path, given: Mapping[str, Any]
) -> tuple[str, DiTOptions]:
    """The model type and options of the network with these weights, from names, shapes, flags and the run's arguments.

    If weights are missing, the flags alone decide, so that loading lists what is missing.
    """
    names = {field.name for field in dataclasses.fields(DiTOptions)}
    arguments = {**file.run, **project.named_arguments(file.sampled)}
    found, asked = project.describe(weights, arguments), given.get("model_type", "")
    stated = {name: given[name] for name in names if name in given}
    wanted = NetworkOptions(asked).resolve() if asked else ""
    model_type, values = split_description(found) if found else (wanted, published_options(asked))
    if found and asked:
        expected, shown = _sizes(wanted, published_options(asked)), _sizes(model_type, values)
        if "/" not in asked:
            del expected["patch side"]  # a default, such as DiTDH-XL's
        if differing := [name for name in expected if name in shown and expected[name] != shown[name]]:
            raise UsageError(
                f"--model_type {asked} contradicts the weights in {path}: expected "
                f"{_list_sizes(expected, differing)}, but found {_list_sizes(shown, differing)}; correct it, or leave it out"
            )
    values |= stated
    if found and model_type.startswith("DiT/") and not values.get("model_heads"):
        raise UsageError(
            f"{path}: nothing in these weights, which have the width {found['model_width']}, shows the number of attention "
            "heads: add --model_heads"
        )
    options = make_options(DiTOptions, values)
    if found and (lacking := project.lacks(options)):
        raise UsageError(
            f"{path} is no file of {project.name} with these options, because its networks have another value of "
            f"{', '.join(f'--{name}' for name in lacking)}: leave the options out, or choose another --model_type"
        )
    return model_type, options


def _with_known_scale(source: AutoencoderOptions) -> AutoencoderOptions:
    """The options of an autoencoder that was not downloaded; one of Stable Diffusion's own gets its scale factor."""
    name = source.pretrained_autoencoder_ckpt
    if source.scale_factor is not None:
        return source
    if name in STABLE_DIFFUSION:
        note(f"assuming that latents are scaled by {SCALE_FACTOR}, as {name} does; otherwise, set --scale_factor")
        return replace(source, scale_factor=SCALE_FACTOR)
    note(
        f"the scale of the autoencoder {name} is unknown, because it was not downloaded; sampling will use its own scale; "
        "for another one, set --scale_factor"
    )
    return source


def _sizes(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The patch side of a DiT, and its width, depth and heads where its name or the options `values` contain them."""
    name, _, patch = model_type.partition("/")
    named = DIT_SIZES.get(name.partition("-")[2])
    sizes = named or [values.get(option) for option in ("model_width", "model_depth", "model_heads")]
    known = {"patch side": int(patch)} | dict(zip(("width", "depth", "heads"), sizes, strict=True))
    return {name: size for name, size in known.items() if size is not None}


def _list_sizes(sizes: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in names)
