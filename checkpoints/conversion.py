"""Conversion of LFM's and other projects' checkpoints to this project's format, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import read_weights, save_weights
from checkpoints.header import PublishedForm
from checkpoints.lfm import build_published, refuse_own_state, refuse_training_state, weights_for_lfm
from checkpoints.lfm_files import PREFIX, STAGE_WEIGHT, condition_stage_path, read_published
from checkpoints.lfm_request import request_network, select_options
from checkpoints.projects.opening import channels_of, project_of, read_project, weights_for_project
from checkpoints.projects.registry import PROJECTS
from models.autoencoders.loading import AutoencoderOptions, is_hub_id, load_autoencoder
from models.autoencoders.protocol import Autoencoder
from options import UsageError
from runtime.messages import note
from runtime.torch_files import save_content

__all__ = ["FORMATS", "from_published", "to_published"]

LFM = "LFM"
FORMATS = (LFM, *PROJECTS)  # that `to_published` writes


def from_published(source: Path, target: Path, given: Mapping[str, Any]) -> None:
    """Convert a checkpoint of LFM or another project to this project's format.

    Args:
        source: the file.
        target: the new file, a .safetensors.
        given: values of the flags that describe what the file does not, by name.

    Raises:
        UsageError: the file cannot be read or does not fit the flags, or the target's name has another suffix.
    """
    _check_suffix(target, (".safetensors",), f"{source} does not describe its network")
    file = read_published(source)
    refuse_own_state(file, source)
    project = project_of(file, source, given)
    if project is not None:
        autoencoder = _autoencoder(select_options(AutoencoderOptions, given), channels_of(given), target)
        save_weights(target, *read_project(project, file, source, given, autoencoder))
        return
    refuse_training_state(file, source)
    request = request_network(given, file.arguments)
    autoencoder = _autoencoder(request.autoencoder, request.dataset.channels, target)
    if {"scale_factor", "latent_statistics"}.isdisjoint(given):
        scale = request.autoencoder.scale_factor
        note(f"assuming that latents are scaled by {scale}, as in LFM's checkpoints; otherwise, set --scale_factor")
    network, header = build_published(file, source, request, autoencoder)
    save_weights(target, network.state_dict(), header)


def to_published(source: Path, target: Path, project: str = "", *, module_prefix: bool = False) -> None:
    """Convert a checkpoint of this project to the format of LFM or another project.

    A file that came from another project gets the form that it had: the entry with the weights, and the prefix of names.

    Args:
        source: the checkpoint.
        target: the new file, a .pth or .pt.
        project: one of FORMATS; "": the one that the file came from, else LFM.
        module_prefix: prefix names with `module.`.

    Raises:
        UsageError: the project's networks lack an option of this one, or the target's name has another suffix.
    """
    _check_suffix(target, (".pth", ".pt"), f"{source} describes its network")
    weights, header = read_weights(source)
    form = header.published_form or PublishedForm(LFM)
    if project not in ("", form.project):
        form = PublishedForm(project, "" if project == LFM else PROJECTS[project].entry)
    prefix = PREFIX if module_prefix else form.prefix
    if form.project != LFM:
        renamed = weights_for_project(PROJECTS[form.project], weights, header, source)
        content = {prefix + name: value for name, value in renamed.items()}
        save_content(target, {form.entry: content} if form.entry else content)
        return
    weights = weights_for_lfm(weights, header, source)
    stage = {name: weights.pop(name) for name in (STAGE_WEIGHT,) if name in weights}
    for path, part in ((target, weights), (condition_stage_path(target), stage)):
        if part:
            save_content(path, {prefix + name: value for name, value in part.items()})


def _autoencoder(options: AutoencoderOptions, channels: int, target: Path) -> Autoencoder | None:
    """The autoencoder for images with these channels; None for one on the hub, which is not downloaded.

    Raises:
        UsageError: it cannot be loaded, or --latent_statistics is given for one on the hub.
    """
    name = options.pretrained_autoencoder_ckpt
    if not is_hub_id(name):
        return load_autoencoder(options, channels)
    if options.latent_statistics:
        raise UsageError(
            f"--latent_statistics needs the autoencoder {name}, which conversion does not download: give it as "
            "--pretrained_autoencoder_ckpt FOLDER"
        )
    note(f"the autoencoder {name} is not downloaded, so {target} records its id but no hash")
    return None


def _check_suffix(target: Path, suffixes: tuple[str, ...], reason: str) -> None:
    if target.suffix not in suffixes:
        raise UsageError(f"{target}: expected a name ending in {' or '.join(suffixes)}, because {reason}")
