"""State dicts read from files: names without the prefixes of wrappers, comparison with a network's own, finite values."""

import hashlib
from collections.abc import Container, Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

import torch

from options import UsageError

__all__ = [
    "Mismatch",
    "check_finite",
    "common_wrappers",
    "count_bad",
    "find_mismatch",
    "list_names",
    "match_names",
    "split_averages",
    "weights_hash",
]

Weights = Mapping[str, torch.Tensor]

AVERAGES = frozenset(("ema", "ema_model", "model_ema"))  # components of the names of EMA weights
# Components that wrappers insert into parameter names: data parallelism, torch.compile, FSDP, activation checkpointing, an
# EMA copy, and latent diffusion's slot for the autoencoder. They may be nested in any order.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "online_model", "first_stage_model")
).union(AVERAGES)
LISTED_NAMES = 10


class Mismatch(NamedTuple):
    """Names only in the network, names only in the file, and names whose shapes differ."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        parts = zip(("missing", "unexpected", "wrong shape"), self, strict=True)
        return "; ".join(f"{what}: {list_names(names)}" for what, names in parts if names)


def find_mismatch(own: Weights, weights: Weights) -> Mismatch:
    """Compare the names and shapes of `weights` with a network's own state dict."""
    return Mismatch(
        [name for name in own if name not in weights],
        [name for name in weights if name not in own],
        [
            f"{name} ({_shape(weights[name])} in the file, {_shape(value)} in the network)"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    )


def split_averages(weights: Weights, where: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Remove the components of wrappers from all names, and separate EMA weights from raw ones.

    Args:
        weights: the state dict.
        where: path of the file, for messages.

    Returns:
        Raw weights, and EMA weights (behind `ema.` or a similar prefix). If the file has only one kind, it is the first, and
        the second is empty.

    Raises:
        UsageError: two entries of one kind have the same name without wrappers.
    """
    raw: dict[str, torch.Tensor] = {}
    averages: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        kind = raw if AVERAGES.isdisjoint(name.split(".")) else averages
        plain = _without_wrappers(name)
        if plain in kind:
            raise UsageError(
                f"{where}: some names appear both with and without the prefix 'module.' or another wrapper's, such as "
                f"{name}: keep one of the two"
            )
        kind[plain] = value
    if not raw:
        return averages, {}
    if not raw.keys() & averages.keys():  # as in model.x and ema.x
        raw = {cut: raw[name] for name, cut in _cut_prefix(raw, averages).items()}
    return raw, averages


def common_wrappers(names: Iterable[str]) -> str:
    """The wrappers' components that all names start with, such as "module."; "" if names have others too."""
    names = list(names)
    prefixes = {"".join(f"{part}." for part in takewhile(WRAPPERS.__contains__, name.split("."))) for name in names}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return prefix if all(prefix + _without_wrappers(name) == name for name in names) else ""


def match_names(weights: Weights, own: Weights) -> Weights:
    """Rename entries to a network's own names where these differ by wrappers or by a common prefix, such as `model.`.

    Entries that match no name of the network keep theirs. `weights` itself is returned if no name changes.
    """
    names = {_without_wrappers(name): name for name in own}
    renamed = {name: name if name in own else names.get(_without_wrappers(name), name) for name in weights}
    foreign = [name for name, target in renamed.items() if target not in own]
    renamed |= {name: names.get(cut, cut) for name, cut in _cut_prefix(foreign, names).items()}
    if len(set(renamed.values())) < len(renamed) or all(name == target for name, target in renamed.items()):
        return weights
    return {renamed[name]: value for name, value in weights.items()}


def check_finite(weights: Weights, where: object, own: Weights | None = None) -> None:
    """Refuse a state dict with NaN or infinite values, with complex numbers, or with integers for a network's real weights.

    Args:
        weights: the state dict.
        where: path of the file, for messages.
        own: the network's own state dict. Its entries may contain infinity on purpose, as attention masks do.

    Raises:
        UsageError: there are such values; the message lists the names.
    """
    foreign = [name for name, value in weights.items() if not _has_type(value, (own or {}).get(name))]
    if foreign:
        listed = list_names(f"{name} ({str(weights[name].dtype).removeprefix('torch.')})" for name in foreign)
        raise UsageError(f"{where} has weights of another type than the network, whose weights are real: {listed}")
    counts = {name: count_bad(value) for name, value in weights.items()}
    bad = [
        name for name, count in counts.items() if count and (own is None or name not in own or not count_bad(own[name]))
    ]
    if bad:
        listed = list_names(f"{name} ({counts[name]} of {weights[name].numel()})" for name in bad)
        raise UsageError(
            f"{where} has weights that are not finite (NaN or infinity): {listed}. "
            "Either the training that wrote it diverged or the file was damaged: use an earlier checkpoint or another copy"
        )


def list_names(names: Iterable[str]) -> str:
    """The first ten names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names and values in a state dict."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _cut_prefix(names: Iterable[str], known: Container[str]) -> dict[str, str]:
    """Map names to what is left without the longest prefix of all names that leaves at least one known name."""
    names = list(names)
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    for count in range(len(shared), 0, -1):
        cut = {name: _without_wrappers(".".join(name.split(".")[count:])) for name in names}
        if any(target in known for target in cut.values()):
            return cut
    return {name: name for name in names}


def _has_type(value: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Whether a network's own tensor, if it is known, can hold these values."""
    return not value.is_complex() and (own is None or value.is_floating_point() or not own.is_floating_point())


def count_bad(value: torch.Tensor) -> int:
    """Number of values that are NaN or infinite."""
    if not value.is_floating_point():
        return 0
    wide = value if value.element_size() >= 4 else value.float()
    # The sum is ten times faster than isfinite. It is not finite if any value is not, and perhaps if it overflows.
    return 0 if wide.sum().isfinite() else int((~wide.isfinite()).sum())


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
