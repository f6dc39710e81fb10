"""Strict loading of state dicts; errors list the mismatched names and suggest flags that would fit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from checkpoints.recognition import recognise
from models.family import Weights
from models.registry import NETWORKS, ORIGIN_ADM, Architecture, build_network
from options import UsageError
from runtime.messages import note
from runtime.weights import check_finite, find_mismatch, match_names

__all__ = ["TYPICAL_LABEL_DROPOUT", "check_weights", "load_weights", "suggest_flags"]

TYPICAL_LABEL_DROPOUT = 0.1  # LFM's networks with a null class


def load_weights(network: nn.Module, weights: Weights, where: str, architecture: Architecture) -> None:
    """Load a state dict into `network`.

    Names may carry the prefixes of wrappers (see runtime/weights.py). A position table for another latent size is recomputed
    where the network family allows it, with a note.

    Args:
        network: the network to load into.
        weights: the state dict.
        where: path of the file, for messages.
        architecture: the network's architecture, used to suggest flags.

    Raises:
        UsageError: names or shapes differ, or values are not finite. The message lists up to ten names per category, and
            flags that would fit.
    """
    own = network.state_dict()
    weights = match_names(weights, own)
    fitted = _fit(own, weights, where, architecture)
    if fitted is not weights:
        note(f"{where}: position table recomputed, because the file has one for another latent size")
    check_finite(weights, where, own)
    network.load_state_dict(fitted)


def check_weights(weights: Weights, where: str, architecture: Architecture) -> None:
    """Check that a network of this architecture can load a state dict with its own names; no network is built.

    Raises:
        UsageError: names or shapes differ, or values are not finite.
    """
    with torch.device("meta"):
        own = build_network(*architecture).state_dict()
    _fit(own, weights, where, architecture)
    check_finite(weights, where)


def suggest_flags(weights: Weights, architecture: Architecture) -> dict[str, Any]:
    """The smallest set of option changes that would make `weights` fit; empty if none is found."""
    found = recognise(weights)
    current = _values(architecture)
    if "label_rows" in found:
        found |= _label_flags(found.pop("label_rows"), current)
    changes = {name: value for name, value in found.items() if current.get(name) != value}
    if not changes or not _fits(weights, current | changes):
        return {}
    for name in list(changes):
        fewer = {key: value for key, value in changes.items() if key != name}
        if _fits(weights, current | fewer):
            changes = fewer
    return changes


def _fit(own: Weights, weights: Weights, where: str, architecture: Architecture) -> Weights:
    """`weights` with the position tables of the network with the state dict `own`; else an error that lists mismatches."""
    fitted = NETWORKS[architecture.model_type].fit_grid(own, weights)
    mismatch = find_mismatch(own, fitted)
    if any(mismatch):
        raise UsageError(
            f"{where} does not fit this {architecture.model_type}; {mismatch}{_advice(fitted, architecture)}"
        )
    return fitted


def _label_flags(rows: int, current: Mapping[str, Any]) -> dict[str, Any]:
    """Interpret N label rows as N classes, or as N - 1 and a null class if the flags or a round N - 1 suggest it."""
    null = rows > 1 and (current.get("num_classes") == rows - 1 or current["label_dropout"] > 0 or rows % 10 == 1)
    dropout = (current["label_dropout"] or TYPICAL_LABEL_DROPOUT) if null else 0.0
    return {"num_classes": rows - null or None, "label_dropout": dropout}


def _values(architecture: Architecture) -> dict[str, Any]:
    model_type, latent_size, options, dense = architecture
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return values | {"model_type": model_type, "latent_size": latent_size, "dense": dense}


def _fits(weights: Weights, values: Mapping[str, Any]) -> bool:
    if values["model_type"] not in NETWORKS:
        return False  # no model type has this patch size
    kind = NETWORKS[values["model_type"]].options
    chosen = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})
    try:
        with torch.device("meta"):
            own = build_network(values["model_type"], values["latent_size"], chosen, values["dense"]).state_dict()
    except UsageError:
        return False
    return not any(find_mismatch(own, NETWORKS[values["model_type"]].fit_grid(own, weights)))


def _advice(weights: Weights, architecture: Architecture) -> str:
    if "channel_mapper.weight" in weights and len(weights) == 1:
        return "; it holds only a label-map embedding: pass the model_<epoch>.pth in the same folder instead"
    flags = suggest_flags(weights, architecture)
    if not flags:
        return "; no flags were found that would make it fit: check that this is the right file"
    return f"; the file would fit with {' '.join(_spell(name, value) for name, value in flags.items())}"


def _spell(name: str, value: Any) -> str:
    if name == "model_type":
        return "--use_origin_adm" if value == ORIGIN_ADM else f"--no-use_origin_adm --model_type {value}"
    if name == "latent_size":
        return f"latents of side {value} (--image_size divided by --f)"
    if value is None:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
