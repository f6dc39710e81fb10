"""Checkpoints in this project's format: safetensors weights, and a header that describes network and autoencoder.

LFM's checkpoints are read by checkpoints/lfm_files.py, and training states (content.pth) by training/state_file.py.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from checkpoints.header import FORMAT, Header
from checkpoints.state_dicts import load_weights
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import MEASURED, UNMEASURED, Autoencoder
from models.registry import build_network
from models.taps import weights_for_sampling
from options import UsageError
from runtime.files import atomic_path
from runtime.torch_files import explain_failure, is_torch_file
from runtime.weights import weights_hash

__all__ = [
    "LoadedModel",
    "check_scale",
    "describes_network",
    "load_model",
    "read_header",
    "read_weights",
    "save_weights",
]


class LoadedModel(NamedTuple):
    """A network in evaluation mode, its autoencoder, and the checkpoint's header."""

    network: nn.Module
    autoencoder: Autoencoder
    header: Header


def describes_network(path: str | Path) -> bool:
    """Whether a checkpoint has a header; otherwise it is bare weights, and flags must describe its network.

    Bare weights are torch.save files such as LFM's, and other projects' safetensors files. A damaged file counts as described,
    so that reading it explains the damage.
    """
    if is_torch_file(path):
        return False
    try:
        with _open_safetensors(path) as file:
            return "header" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return True


def save_weights(path: str | Path, weights: Mapping[str, torch.Tensor], header: Header) -> None:
    """Write a state dict and its header atomically."""
    weights = _separate({name: value.detach().cpu().contiguous() for name, value in weights.items()})
    full = replace(header, weights_sha256=weights_hash(weights)).to_json()
    with atomic_path(path) as temporary:
        # safetensors' save_file would report a full disk as a SafetensorError and restrict reading to the owner.
        temporary.write_bytes(serialize(weights, metadata={"header": json.dumps(full)}))


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], Header]:
    """Read the state dict and header that `save_weights` wrote.

    Raises:
        UsageError: the file is missing, damaged, or not a checkpoint of this project.
    """
    with _open(path) as file:
        stored = _stored_header(file, path)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if weights_hash(weights) != stored.get("weights_sha256"):
        raise UsageError(f"the checkpoint {path} is damaged: its weights do not match the checksum in its header")
    return weights, _parse(stored, path)


def read_header(path: str | Path) -> Header:
    """Read the header that `save_weights` wrote, without the weights.

    Raises:
        UsageError: the file is missing, unreadable, or not a checkpoint of this project.
    """
    with _open(path) as file:
        return _parse(_stored_header(file, path), path)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    autoencoder: AutoencoderOptions | None = None,
) -> LoadedModel:
    """Rebuild the network and autoencoder from a checkpoint alone, without weights that serve only training.

    Args:
        path: a `model_*.safetensors` file.
        device: device of both.
        autoencoder: where to load the autoencoder from if it has moved since training; its weights must be the same. Its
            statistics apply only if the checkpoint does not record a scale.

    Raises:
        UsageError: the checkpoint is unreadable, or the autoencoder is not the one used in training.
    """
    weights, header = read_weights(path)
    architecture = header.architecture.for_sampling()
    network = build_network(*architecture)
    load_weights(network, weights_for_sampling(weights), str(path), architecture)
    stored = header.autoencoder
    source = replace(autoencoder or AutoencoderOptions(stored.id), scale_factor=stored.scale_factor)
    recorded = None if stored.statistics == UNMEASURED else stored
    loaded = load_autoencoder(source, header.dataset.channels, recorded)
    found = loaded.describe().sha256 or ""
    if stored.sha256 not in (None, found):  # None if the checkpoint was converted without the autoencoder
        raise UsageError(
            f"the checkpoint {path} was trained with the autoencoder {stored.id} (SHA-256 {stored.sha256[:12]}), "
            f"but {source.pretrained_autoencoder_ckpt} has other weights ({found[:12]})"
        )
    check_scale(path, loaded, source.latent_statistics)
    return LoadedModel(network.eval().requires_grad_(False).to(device), loaded.to(device), header)


def check_scale(path: str | Path, autoencoder: Autoencoder, statistics: str = "") -> None:
    """Check that the scale of the latents is known, because samples with another scale are wrong.

    Args:
        path: the checkpoint, for the message.
        autoencoder: the checkpoint's autoencoder.
        statistics: the user's --latent_statistics.

    Raises:
        UsageError: neither the checkpoint nor the autoencoder nor the user gives the scale.
    """
    facts = autoencoder.describe()
    if facts.statistics != UNMEASURED:
        return
    reason = f"the autoencoder {facts.id} has none"
    if statistics == MEASURED:
        reason = "--latent_statistics measured needs the training images"
    raise UsageError(
        f"the checkpoint {path} does not record the scale of its latents, and {reason}: pass "
        f"--pretrained_autoencoder_ckpt {facts.id} with --latent_statistics FILE (mean and std per channel)"
    )


def _separate(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with an earlier one, such as tied weights, because safetensors refuses them."""
    separate, taken = dict[str, torch.Tensor](), set[int]()
    for name, value in weights.items():
        memory = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if memory in taken else value
        taken.add(memory)
    return separate


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    if is_torch_file(path):
        raise UsageError(
            f"{path} is a torch.save file, which does not describe its network: "
            "convert it with python -m checkpoints.convert"
        )
    try:
        with _open_safetensors(path) as file:
            yield file
    except UsageError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"cannot read the checkpoint {path}: {explain_failure(path, error)}") from error


@contextmanager
def _open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a file of any name: safetensors refuses a path that is not UTF-8, but not the number of an open file."""
    with Path(path).open("rb") as opened:
        name = str(path) if _is_utf8(path) else f"/proc/self/fd/{opened.fileno()}"
        with safe_open(name, framework="pt") as file:
            yield file


def _is_utf8(path: str | Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _stored_header(file: Any, path: str | Path) -> dict[str, Any]:
    try:
        stored = json.loads((file.metadata() or {}).get("header", "null"))
    except ValueError:  # another project's entry
        stored = None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of this project: expected the format {FORMAT} in its header")
    return stored


def _parse(stored: dict[str, Any], path: str | Path) -> Header:
    try:
        return Header.from_json(stored)
    except UsageError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error}") from error
