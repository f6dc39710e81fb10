"""Read LFM's checkpoints (github.com/VinAIResearch/LFM), which hold weights but do not describe their network.

- `model_<epoch>.pth`: a plain state dict. Names start with `module.` if it was saved under data parallelism. Other wrappers'
  prefixes are removed as well (runtime/weights.py).
- `content.pth`: epoch, step, arguments, weights and optimizer. Parameters are numbered in the order of
  `network.parameters()`. The optimizer state of each parameter also holds its EMA.
- `cond_stage_model_<epoch>.pth`: the label-map embedding of a semantic-synthesis model, saved in the same folder.

checkpoints/lfm_request.py and checkpoints/lfm.py determine which network the weights belong to.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from options import UsageError
from runtime.messages import note
from runtime.torch_files import Unread, read_tensors
from runtime.weights import common_wrappers, list_names, split_averages

__all__ = [
    "ALLOWED_CLASSES",
    "PREFIX",
    "STAGE_WEIGHT",
    "PublishedFile",
    "condition_stage_path",
    "is_published_content",
    "newest_condition_stage",
    "parse_published",
    "read_condition_stage",
    "read_published",
    "read_sampled",
]

ALLOWED_CLASSES = (argparse.Namespace,)  # the only class in content.pth besides tensors and containers
PREFIX = "module."
STAGE_WEIGHT = "channel_mapper.weight"
STAGE_FILE = re.compile(r"cond_stage_model_(\d+)\.pth")
BUFFERS = ("resample_filter", "freqs")  # last name component of entries that are not parameters


class PublishedFile(NamedTuple):
    """The contents of an LFM checkpoint.

    Args:
        weights: raw weights by parameter name, used to resume training.
        averages: EMA weights; empty if the file has none.
        states: optimizer state by parameter name.
        arguments: options of the run; empty for a plain state dict.
        epoch: epoch of the weights; for content.pth, the next epoch to train.
        step: number of completed training steps.
        ours: whether this is a training state (content.pth) of this project instead.
        entries: entries of another project's container that hold state dicts; empty for a plain state dict.
        entry: the one whose weights these are.
        prefix: what all names in the file start with because of wrappers, such as "module."; removed from `weights`.
        run: arguments of another project's run.
    """

    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    states: dict[str, dict[str, Any]]
    arguments: dict[str, Any]
    epoch: int | None = None
    step: int | None = None
    ours: bool = False
    entries: tuple[str, ...] = ()
    entry: str = ""
    prefix: str = ""
    run: Mapping[str, Any] = MappingProxyType({})

    @property
    def sampled(self) -> dict[str, torch.Tensor]:
        """The weights to sample with: EMA weights, and raw values for entries without an EMA (buffers, frozen weights)."""
        return self.weights | self.averages


def read_published(path: str | Path, device: torch.device | str = "cpu") -> PublishedFile:
    """Read any LFM checkpoint, a training state (content.pth) of this project, or a state dict of another project.

    Raises:
        UsageError: the file is unreadable, contains code, or is neither.
    """
    file = parse_published(read_tensors(path, device, ALLOWED_CLASSES), path)
    match = re.fullmatch(r"(?:cond_stage_)?model_(\d+)", Path(path).stem)
    return file._replace(epoch=int(match[1])) if match and file.epoch is None else file


def parse_published(content: Any, path: str | Path) -> PublishedFile:
    """Split an object that `read_tensors` returned into weights, EMA weights, optimizer states and arguments.

    Other projects' training states hold raw weights and EMA weights in two entries; the result has the EMA weights alone.

    Args:
        content: the object.
        path: path of the file, for messages.

    Raises:
        UsageError: the object is neither a state dict nor a training state.
    """
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected a state dict or the dict of content.pth, but found a {type(content).__name__}"
        )
    if {"network", "ema"} <= content.keys():  # a training state of this project
        weights, averages = (_weights(part, path)[0] for part in (content["network"], content["ema"]["weights"]))
        return PublishedFile(weights, averages, {}, {}, step=content.get("step"), ours=True)
    if not is_published_content(content):
        return _unpack(content, path)
    weights, averages = _weights(content["model_dict"], path)
    states = _states(weights, content.get("optimizer") or {}, path)
    arguments = content.get("args")
    return PublishedFile(
        weights=weights,
        averages=averages | {name: state["ema"] for name, state in states.items() if "ema" in state},
        states=states,
        arguments=_plain_arguments(arguments),
        epoch=content.get("epoch"),
        step=content.get("global_step"),
    )


def is_published_content(content: Any) -> bool:
    """Whether an object read from a file is the content of LFM's content.pth."""
    return isinstance(content, dict) and "model_dict" in content


def condition_stage_path(path: str | Path) -> Path:
    """Path of a model's label-map embedding: cond_stage_model_<epoch>.pth next to model_<epoch>.pth."""
    return Path(path).with_name(f"cond_stage_{Path(path).name}")


def read_condition_stage(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a model's label-map embedding; empty if the model has no such file."""
    stage = condition_stage_path(path)
    return read_published(stage).weights if stage.exists() else {}


def newest_condition_stage(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the label-map embedding with the highest epoch in a run folder; empty if there is none."""
    found = {
        int(match[1]): path for path in folder.glob("cond_stage_model_*.pth") if (match := STAGE_FILE.match(path.name))
    }
    return read_published(found[max(found)]).weights if found else {}


def read_sampled(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights to start from, including an LFM checkpoint's label-map embedding if there is one."""
    return read_published(path).sampled | read_condition_stage(path)


def _plain_arguments(arguments: Any) -> dict[str, Any]:
    """A run's arguments as a dictionary, without those that could not be read."""
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return {name: value for name, value in given.items() if not isinstance(value, Unread)}


def _unpack(content: Mapping[Any, Any], path: str | Path) -> PublishedFile:
    """The weights in a state dict, or in a container such as {"model": ..., "ema": ..., "step": ...}."""
    entry, inside = "", {str(name): value for name, value in content.items() if _is_state_dict(value)}
    if _is_state_dict(content):
        inside = {}
    elif len(inside) == 1:
        entry = next(iter(inside))
    elif inside:
        averaged = [name for name in inside if "ema" in re.split("[^a-z]", name.lower())]
        if len(averaged) != 1:
            return PublishedFile(*_weights(content, path), {}, {})  # raises
        entry = averaged[0]
        others = [name for name in inside if name != entry]
        note(f"{path}: the weights in its entry {entry} are used, not those in {list_names(others)}")
    held = inside.get(entry, content)
    weights, averages = _weights(held, path)
    if len(inside) > 1:
        weights, averages = averages or weights, {}
    return PublishedFile(
        weights,
        averages,
        {},
        {},
        entries=tuple(inside),
        entry=entry,
        prefix=common_wrappers(held),
        run=_plain_arguments(content.get("args")),
    )


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())
    )


def _weights(content: Any, path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The entries of a state dict without wrappers' prefixes, and EMA weights if it holds both."""
    if not _is_state_dict(content):
        listed = (
            f" with the entries {list_names(map(str, content))}" if isinstance(content, Mapping) and content else ""
        )
        raise UsageError(
            f"{path}: expected a state dict that maps names to tensors, but found a {type(content).__name__}{listed}"
        )
    return split_averages(content, path)


def _states(weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The optimizer state by parameter name; the optimizer numbers parameters in the order of the state dict."""
    if not optimizer:
        return {}
    names = [name for name in weights if name.rpartition(".")[2] not in BUFFERS]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    states = {name: optimizer["state"].get(n) for name, n in zip(names, numbers, strict=False)}
    found = {name: state for name, state in states.items() if state}
    like_weights = [
        (name, value.shape)
        for name, state in found.items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    if len(names) != len(numbers) or any(weights[name].shape != shape for name, shape in like_weights):
        raise UsageError(f"{path}: the optimizer state does not match the {len(names)} parameters in model_dict")
    return found
