"""Checkpoints that describe themselves: safetensors weights with everything in the header that rebuilds the network.

The header (one JSON object) holds `task`, `model_type`, `network` (the family's own options), `dense` (what the network
sees beside x_t, or null), `latent_size`, `autoencoder`, `dataset`, `path`, `step`, `epoch`, and the SHA-256 of the weights.
Files of the published code are in runtime/published.py, content.pth in runtime/torch_files.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from models.autoencoder import Autoencoder, AutoencoderOptions, PixelSpace, load_autoencoder, weights_hash
from models.conditions import DenseInput
from models.loading import load_weights
from models.registry import Architecture, build_network, options_from_header
from options import UsageError, as_json
from runtime.files import atomic_path
from runtime.torch_files import is_torch_file, load_content, save_content

__all__ = [
    "LoadedModel",
    "architecture_of",
    "experiment_folder",
    "find_checkpoint",
    "load_content",
    "load_model",
    "newest_model",
    "read_weights",
    "save_content",
    "save_weights",
]

FORMAT = "latent-flow-1"


class LoadedModel(NamedTuple):
    """A network in evaluation mode, its autoencoder, and the checkpoint's header."""

    network: nn.Module
    autoencoder: Autoencoder | PixelSpace
    header: dict[str, Any]


def save_weights(path: str | Path, weights: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write a state dict and its header, atomically."""
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    full = {"format": FORMAT, **as_json(header), "weights_sha256": weights_hash(weights)}
    with atomic_path(path) as temporary:
        # Not save_file, which reports a full disk as an error of its own kind and gives the file to its owner alone.
        temporary.write_bytes(serialize(weights, metadata={"header": json.dumps(full)}))


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and header that `save_weights` wrote.

    Raises:
        UsageError: a missing, torn or altered file, or one of another kind.
    """
    if is_torch_file(path):
        raise UsageError(
            f"{path} is a file of torch.save, which does not describe itself: see python -m models.convert"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UsageError(f"{path} is no checkpoint of this project: its header does not say {FORMAT}")
    if weights_hash(weights) != header.get("weights_sha256"):
        raise UsageError(f"the checkpoint {path} is damaged: its weights do not have the checksum in its header")
    return weights, header


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    autoencoder: AutoencoderOptions | None = None,
) -> LoadedModel:
    """Rebuild network and autoencoder from a checkpoint alone.

    Args:
        path: a `model_*.safetensors` file.
        device: where both go.
        autoencoder: where to load the autoencoder from, when it has moved since; its weights must be the same.

    Raises:
        UsageError: an unreadable checkpoint, or an autoencoder that is not the one it was trained with.
    """
    weights, header = read_weights(path)
    architecture = architecture_of(header)
    network = build_network(*architecture)
    load_weights(network, weights, str(path), architecture)
    stored = header["autoencoder"]
    source = autoencoder or AutoencoderOptions(stored["id"])
    source = replace(source, scale_factor=stored.get("scale_factor"))
    loaded = load_autoencoder(source, header["dataset"]["channels"])
    if stored["sha256"] not in (None, loaded.describe()["sha256"]):  # None: converted where it was not at hand
        raise UsageError(
            f"the checkpoint {path} was trained with the autoencoder {stored['id']} (SHA-256 {stored['sha256'][:12]}), "
            f"but {source.pretrained_autoencoder_ckpt} has other weights ({loaded.describe()['sha256'][:12]})"
        )
    if isinstance(
        loaded, Autoencoder
    ):  # the scale of training, though the folder's configuration may have changed since
        mean, std = (torch.tensor(stored[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        loaded.mean, loaded.std = mean, std
    return LoadedModel(network.eval().requires_grad_(False).to(device), loaded.to(device), header)


def architecture_of(header: Mapping[str, Any]) -> Architecture:
    """The architecture that a header describes.

    Raises:
        UsageError: one that this version does not know.
    """
    options = options_from_header(header["model_type"], header["network"])
    return Architecture(header["model_type"], header["latent_size"], options, DenseInput.of_header(header.get("dense")))


def experiment_folder(save_root: str, dataset: str, exp: str, kind: str = "latent_flow") -> Path:
    """The folder of an experiment; `kind` is the name that its task gives to all of its experiments.

    Raises:
        UsageError: a name that is not a plain folder name.
    """
    for flag, name in (("exp", exp), ("dataset", dataset)):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(f"--{flag} {name!r}: expected a plain name of letters, digits, '_', '-', '.' and '+'")
    return Path(save_root) / kind / dataset / exp


def find_checkpoint(name: str, folder: Path) -> Path:
    """The file of that name: as it stands, or else in an experiment's folder, as the published scripts looked for it."""
    inside = folder / name
    return inside if inside.exists() and not Path(name).exists() else Path(name)


def newest_model(folder: Path, epoch: int | None = None) -> Path:
    """The checkpoint of `epoch` in a run's folder, or the newest one; ours before a published one of the same epoch.

    Raises:
        UsageError: there is none; the message lists what the folder has.
    """
    found: dict[int, Path] = {}
    for suffix in (".pth", ".safetensors"):
        paths = sorted(folder.glob(f"model_*{suffix}"))
        found |= {int(match[1]): path for path in paths if (match := re.fullmatch(r"model_(\d+)", path.stem))}
    if not found or (epoch is not None and epoch not in found):
        wanted = f"model_{'<epoch>' if epoch is None else epoch}"
        present = f"it has: {', '.join(p.name for p in sorted(found.values())) or 'no checkpoints'}"
        raise UsageError(
            f"no {wanted}.safetensors or {wanted}.pth in {folder} ({present if folder.is_dir() else 'no such folder'}); "
            "train first with run.sh, or name a file with --checkpoint"
        )
    return found[max(found) if epoch is None else epoch]
