"""State dicts of feature networks: from a local file, or downloaded from where they are published."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from options import UsageError
from runtime.files import UNREADABLE
from runtime.torch_files import read_torch_file

__all__ = ["download_weights", "read_weights_file"]


def read_weights_file(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in one of torch.save, which is read with weights_only=True.

    Raises:
        UsageError: the file is missing, damaged, or holds something else.
    """
    try:
        weights = load_file(path) if Path(path).suffix == ".safetensors" else read_torch_file(path)
    except (OSError, SafetensorError, UsageError) as error:
        raise UsageError(f"--feature_weights {path}: {error}") from error
    if not isinstance(weights, dict):
        raise UsageError(f"--feature_weights {path}: expected a state dict, but found {type(weights).__name__}")
    return weights


def download_weights(url: str, what: str, *, check_hash: bool = False) -> dict[str, torch.Tensor]:
    """The state dict published at `url`, kept in torch's cache; `check_hash` where the file's name holds its SHA-256.

    Raises:
        UsageError: it cannot be fetched; the message says what to do.
    """
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=check_hash, weights_only=True)
    except UNREADABLE as error:
        raise UsageError(
            f"cannot download the {what} weights ({error}): fetch {url} on another machine and pass it as "
            "--feature_weights FILE"
        ) from error
