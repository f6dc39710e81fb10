"""The weights in a local folder in diffusers format, read without diffusers where it does not find or recognize them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from options import UsageError
from runtime.files import read_json
from runtime.messages import note
from runtime.torch_files import read_tensors
from runtime.weights import Mismatch, find_mismatch, match_names, split_averages

__all__ = ["explain_damage", "find_weight_files", "has_standard_name", "load_unwrapped"]

STEM, SAFE = "diffusion_pytorch_model", ".safetensors"  # diffusers' names
OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def has_standard_name(folder: Path) -> bool:
    """Whether the folder's weights have the name that diffusers looks for."""
    return any((folder / f"{STEM}{SAFE}{suffix}").exists() for suffix in ("", ".index.json"))


def find_weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or several with an index; empty if none is found or the choice is unclear.

    If none has the standard name, a variant such as diffusion_pytorch_model.fp16.safetensors counts, then a torch.save file
    of that stem, then the only safetensors file.
    """
    index, standard = folder / f"{STEM}{SAFE}.index.json", folder / f"{STEM}{SAFE}"
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if standard.exists():
        return [standard]
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: (len(path.name), path.name))
    safe = [path for path in files if path.suffix == SAFE]
    named = [path for path in files if path.name.startswith(f"{STEM}.") and path.suffix in (SAFE, *OTHER_SUFFIXES)]
    preferred = [path for path in named if path in safe] or named
    return preferred[:1] or (safe if len(safe) == 1 else [])


def load_unwrapped(network: nn.Module, folder: Path, files: Sequence[Path]) -> Mismatch:
    """Load the weights in `files` by their names without wrappers' prefixes, or report what does not fit.

    Raises:
        UsageError: a file is unreadable.
    """
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        part = read_tensors(file)
        if not isinstance(part, dict) or not all(isinstance(value, torch.Tensor) for value in part.values()):
            raise UsageError(f"{file}: expected a state dict that maps names to tensors")
        stored |= part
    raw, averages = split_averages(stored, folder)
    own = network.state_dict()
    weights = match_names(raw | averages, own)
    mismatch = find_mismatch(own, weights)
    if not any(mismatch):
        network.load_state_dict(weights)
        if averages:
            note(f"{folder}: the weights behind 'ema.' are used, not the others")
    return mismatch


def explain_damage(folder: Path) -> str:
    """Why a file of weights in the folder is unreadable; "" if all can be read."""
    try:
        for file in find_weight_files(folder):
            read_tensors(file)
    except UsageError as error:
        return str(error)
    return ""
