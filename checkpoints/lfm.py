"""Files of the published LFM code, which know their weights but not what they are of.

- `model_<epoch>.pth`: a bare state dict, its names behind `module.` where it was written under data parallelism;
- `content.pth`: epoch, step, arguments, weights and optimizer, whose state of parameter p, in the order of
  `network.parameters()`, also holds its moving average;
- `cond_stage_model_<epoch>.pth`: beside a model of semantic synthesis, the weight of its stage of label maps.

Flags say what the network is; what they leave open, the arguments in content.pth say, then the published defaults.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoints.header import Header
from checkpoints.state_dicts import TYPICAL_LABEL_DROPOUT, load_weights
from datasets_prep.image_dataset import DatasetFacts
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.protocol import Autoencoder, AutoencoderFacts
from models.conditions import DenseInput
from models.edm_unet import EdmUNetOptions
from models.family import FamilyOptions
from models.registry import FAMILY_OPTIONS, NETWORKS, Architecture, NetworkOptions, build_network
from options import Options, UsageError
from runtime.torch_files import read_torch_file, weights_hash

__all__ = [
    "ALLOWED_CLASSES",
    "PREFIX",
    "STAGE_WEIGHT",
    "Published",
    "autoencoder_options",
    "build_published",
    "condition_stage_beside",
    "condition_stage_path",
    "is_published_content",
    "newest_condition_stage",
    "parse_published",
    "read_published",
    "read_sampled",
    "with_arguments",
]

ALLOWED_CLASSES = (argparse.Namespace,)  # of the objects in content.pth
PREFIX = "module."
STAGE_WEIGHT = "channel_mapper.weight"
STAGE_FILE = re.compile(r"cond_stage_model_(\d+)\.pth")
BUFFERS = ("resample_filter", "freqs")  # last names of the entries that are no parameters
SCALE_FACTOR, FACTOR, LATENT_CHANNELS = 0.18215, 8, 4  # of stabilityai/sd-vae-ft-mse, the published autoencoder
OTHER_SPELLINGS = {"attn_resolution": "attn_resolutions"}
# Which of a published run's arguments describe its network, its data and its latents.
ARGUMENTS = {
    field.name for group in (NetworkOptions, AutoencoderOptions, *FAMILY_OPTIONS) for field in fields(group)
} | {
    "dataset",
    "image_size",
}


class Published(NamedTuple):
    """What a published file holds.

    `weights` are those that training goes on with, `averages` their moving averages (empty: there are none), `states` the
    optimizer's, all by the name of the parameter. `epoch` is the next one. `ours`: it is a content.pth of this project.
    """

    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    states: dict[str, dict[str, Any]]
    arguments: dict[str, Any]
    epoch: int | None = None
    step: int | None = None
    ours: bool = False

    @property
    def sampled(self) -> dict[str, torch.Tensor]:
        """The weights to sample with: averages where there are any, what has none (buffers, frozen weights) as it is."""
        return self.weights | self.averages


def read_published(path: str | Path, device: torch.device | str = "cpu") -> Published:
    """Read a published file of any kind, or content.pth of this project.

    Raises:
        UsageError: an unreadable file, one that holds code, or one of another kind.
    """
    published = parse_published(read_torch_file(path, device, ALLOWED_CLASSES), path)
    match = re.fullmatch(r"(?:cond_stage_)?model_(\d+)", Path(path).stem)
    return published._replace(epoch=int(match[1])) if match and published.epoch is None else published


def parse_published(content: Any, path: str | Path) -> Published:
    """What `read_torch_file` read, sorted.

    Raises:
        UsageError: no state dict and no content.pth.
    """
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected a state dict or the dict of content.pth, but it holds a {type(content).__name__}"
        )
    if {"network", "ema"} <= content.keys():  # our own content.pth
        weights = _weights(content["network"], path)
        return Published(
            weights, _weights(content["ema"]["weights"], path), {}, {}, step=content.get("step"), ours=True
        )
    if not is_published_content(content):
        return Published(_weights(content, path), {}, {}, {})
    weights = _weights(content["model_dict"], path)
    states = _states(weights, content.get("optimizer") or {}, path)
    averages = {name: state["ema"] for name, state in states.items() if "ema" in state}
    arguments = content.get("args")
    return Published(
        weights,
        averages,
        states,
        vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        content.get("epoch"),
        content.get("global_step"),
    )


def is_published_content(content: Any) -> bool:
    """Whether what was read from a file is the published content.pth."""
    return isinstance(content, dict) and "model_dict" in content


def condition_stage_path(path: str | Path) -> Path:
    """Where the stage of label maps of a model lies: cond_stage_model_<epoch>.pth beside model_<epoch>.pth."""
    return Path(path).with_name(f"cond_stage_{Path(path).name}")


def condition_stage_beside(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the stage beside a model; empty where there is no such file."""
    beside = condition_stage_path(path)
    return read_published(beside).weights if beside.exists() else {}


def newest_condition_stage(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the stage of the highest epoch in a run's folder; empty where there is none."""
    found = {
        int(match[1]): path for path in folder.glob("cond_stage_model_*.pth") if (match := STAGE_FILE.match(path.name))
    }
    return read_published(found[max(found)]).weights if found else {}


def read_sampled(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights to sample with in a published file, and those of the stage beside it."""
    return read_published(path).sampled | condition_stage_beside(path)


def with_arguments(options: Options, published: Published) -> Options:
    """`options`, completed by the arguments in content.pth where the user gave none."""
    named = {OTHER_SPELLINGS.get(name, name): value for name, value in published.arguments.items()}
    return options.completed(
        {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in named.items()
            if name in ARGUMENTS and value is not None
        }
    )


def autoencoder_options(options: Options) -> AutoencoderOptions:
    """The autoencoder of a published file: its latents are scaled by 0.18215 unless the user says otherwise."""
    chosen = options[AutoencoderOptions]
    return replace(chosen, scale_factor=chosen.scale_factor or SCALE_FACTOR)


def build_published(
    published: Published,
    path: str | Path,
    options: Options,
    autoencoder: Autoencoder | None,
    dataset: DatasetFacts,
) -> tuple[nn.Module, Header]:
    """The network of a published file with the weights to sample with, and the header that our own file would have.

    Args:
        published: what the file holds.
        path: the file, for messages.
        options: flags, with the file's own arguments.
        autoencoder: None if it is not at hand; the published one is assumed.
        dataset: facts, for the header.

    Raises:
        UsageError: names or shapes that are not those of the network which the options describe.
    """
    if published.ours:
        raise UsageError(
            f"{path} is for resuming a run: name the model_<epoch>.safetensors or best.safetensors beside it"
        )
    stage = condition_stage_beside(path)
    architecture = _architecture(options, autoencoder, stage)
    _check_condition(architecture, path)
    network = build_network(*architecture)
    sampled = published.sampled | stage
    load_weights(network, sampled, str(path), architecture)
    header = Header(
        model_type=architecture.model_type,
        network=architecture.options,
        latent_size=architecture.latent_size,
        autoencoder=autoencoder.describe() if autoencoder else _describe_unseen(options),
        dataset=dataset,
        task=_task(architecture.dense),
        dense=architecture.dense,
        step=published.step,
        epoch=published.epoch,
        published_file=Path(path).name,
        weights_sha256=weights_hash(sampled),
    )
    taken = f"moving averages of {len(published.averages)} of its" if published.averages else "its"
    print(f"{path}: {architecture.model_type} with {taken} {len(sampled)} weights")
    return network, header


def _check_condition(architecture: Architecture, path: str | Path) -> None:
    """Refuse a condition that is neither a masked image with its mask nor a map with its stage.

    Raises:
        UsageError: that.
    """
    dense, latents = architecture.dense, architecture.options.num_out_channels
    if dense is not None and dense.classes is None and dense.channels != latents + 1:
        raise UsageError(
            f"{path}: a network of {latents + dense.channels} input channels for latents of {latents} is one of semantic "
            f"synthesis, which needs {condition_stage_path(path).name} beside it; one of inpainting has {2 * latents + 1}"
        )


def _task(dense: DenseInput | None) -> str:
    """The published tasks differ in what the network sees beside x_t."""
    if dense is None:
        return "generate"
    return "inpaint" if dense.classes is None else "semantic"


def _architecture(options: Options, autoencoder: Autoencoder | None, stage: Mapping[str, torch.Tensor]) -> Architecture:
    """The architecture that flags describe; `stage` holds the weight of the label map's stage, if there is one."""
    model_type = options[NetworkOptions].resolve()
    network: FamilyOptions = options[NETWORKS[model_type].options]
    channels = autoencoder.latent_channels if autoencoder else LATENT_CHANNELS
    weight = stage.get(STAGE_WEIGHT)  # [c, K, 1, 1]
    mapped = 0 if weight is None else weight.shape[0]
    network = replace(
        network,
        num_in_channels=network.num_in_channels if "num_in_channels" in options.explicit else channels + mapped,
        num_out_channels=network.num_out_channels if "num_out_channels" in options.explicit else channels,
    )
    if isinstance(network, EdmUNetOptions) and network.label_dim:
        # The null class of these networks is a vector of zeros, so their weights do not tell whether labels were dropped.
        network = replace(network, label_dropout=network.label_dropout or TYPICAL_LABEL_DROPOUT)
    factor = autoencoder.factor if autoencoder else options[AutoencoderOptions].f or FACTOR
    size, remainder = divmod(options.values["image_size"], factor)
    if remainder or not size:
        raise UsageError(
            f"--image_size {options.values['image_size']} is no multiple of {factor}, the factor of the autoencoder"
        )
    beside = network.num_in_channels - network.num_out_channels
    dense = DenseInput(beside, None if weight is None else weight.shape[1]) if beside > 0 else None
    return Architecture(model_type, size, network, dense)


def _describe_unseen(options: Options) -> AutoencoderFacts:
    """What `Autoencoder.describe` would say of the published autoencoder, but for the hash."""
    source = autoencoder_options(options)
    assert source.scale_factor is not None
    return AutoencoderFacts(
        id=source.pretrained_autoencoder_ckpt,
        sha256=None,
        scale_factor=source.scale_factor,
        latents_mean=(0.0,) * LATENT_CHANNELS,
        latents_std=(1 / source.scale_factor,) * LATENT_CHANNELS,
    )


def _weights(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict's entries, without the prefix where there is one."""
    entries = content.items() if isinstance(content, Mapping) else ()
    if not entries or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in entries):
        raise UsageError(f"{path}: expected a state dict of names and tensors")
    weights = {name.removeprefix(PREFIX): value for name, value in entries}
    if len(weights) < len(entries):
        raise UsageError(f"{path}: some names stand there both with and without {PREFIX!r}")
    return weights


def _states(weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The optimizer's state of each parameter that has one; the optimizer numbers them in the order of the state dict."""
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
        raise UsageError(f"{path}: the optimizer's state is not that of the {len(names)} parameters in model_dict")
    return found
