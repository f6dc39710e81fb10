"""Loading state dicts of feature networks, from a local file or by download."""

import torch

from options import UsageError
from runtime.files import UNREADABLE
from runtime.torch_files import read_tensors
from runtime.weights import check_finite, split_averages

__all__ = ["download_weights", "read_weights_file"]


def read_weights_file(path: str) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file or a torch.save file. The latter is read with weights_only=True.

    Prefixes of wrappers are removed from the names.

    Raises:
        UsageError: the file is missing, damaged, holds something else, or has values that are not finite.
    """
    try:
        weights = read_tensors(path)
    except UsageError as error:
        raise UsageError(f"cannot use the weights file {path}: {error}") from error
    if not isinstance(weights, dict):
        raise UsageError(
            f"cannot use the weights file {path}: expected a state dict, but found {type(weights).__name__}"
        )
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
        return weights  # the network that it is for explains what it expects
    raw, averages = split_averages(weights, path)
    check_finite(raw | averages, f"the weights file {path}")
    return raw | averages


def download_weights(url: str, what: str, flag: str, *, check_hash: bool = False) -> dict[str, torch.Tensor]:
    """Download a state dict into torch's cache, or load it from there.

    Args:
        url: where it is published.
        what: the network's name, for the error message.
        flag: the option that names a local file instead.
        check_hash: check the SHA-256 prefix in the file name.

    Raises:
        UsageError: the download failed. The message explains how to use a local file instead.
    """
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=check_hash, weights_only=True)
    except UNREADABLE as error:
        raise UsageError(
            f"cannot download the {what} weights ({error}): download {url} on another machine, then pass it as {flag} FILE"
        ) from error
