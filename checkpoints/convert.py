"""Convert an LFM checkpoint to this project's self-describing format, or back.

    python -m checkpoints.convert model_475.pth model.safetensors --args_file test_args/celeb256_dit.txt [flags]
    python -m checkpoints.convert model.safetensors model_475.pth [--module_prefix]

The label-map embedding of a semantic-synthesis model (cond_stage_<name>.pth in the same folder) is converted as well. The
EMA weights are used if the file has them, as content.pth does.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from checkpoints.files import describes_network, read_weights, save_weights
from checkpoints.lfm import build_published, refuse_newer_networks, refuse_training_state
from checkpoints.lfm_files import PREFIX, STAGE_WEIGHT, condition_stage_path, read_published
from checkpoints.lfm_request import described_by, request_network
from command_line import help_flags, parse_options
from exits import exit_cleanly
from models.autoencoders.loading import is_hub_id, load_autoencoder
from models.autoencoders.protocol import Autoencoder
from options import UsageError, option
from runtime.messages import note, show
from runtime.outputs import check_file
from runtime.torch_files import save_content
from sampling.request import IGNORED_SAMPLING_FLAGS
from sampling.script import mode_groups


@dataclass(frozen=True)
class ConversionOptions:
    """Conversion. Sampling flags, which LFM's arguments files contain, have no effect."""

    module_prefix: bool = option(False, "when writing .pth: prefix names with 'module.', as data parallelism does")


def main() -> None:
    """Convert in the direction given by the first file's format."""
    paths, flags = _split_paths(sys.argv[1:])
    sampling = {field.name for group in mode_groups() for field in fields(group)} - described_by()
    options = parse_options(
        str(__doc__).splitlines()[0],
        [ConversionOptions, *mode_groups()],
        flags,
        ignored=IGNORED_SAMPLING_FLAGS,
        positional="IN OUT",
        silent=sampling,
    )
    source, target = paths
    check_file(target, "OUT")
    if not describes_network(source):
        _from_published(source, target, options.given)
    else:
        _to_published(source, target, options[ConversionOptions].module_prefix)
    show(f"{source} -> {target}")


def _from_published(source: Path, target: Path, given: Mapping[str, Any]) -> None:
    """Convert an LFM checkpoint, which the flags `given` describe, to this project's format."""
    _check_suffix(target, ".safetensors", f"{source} does not describe its network")
    file = read_published(source)
    refuse_training_state(file, source)
    request = request_network(given, file.arguments)
    name = request.autoencoder.pretrained_autoencoder_ckpt
    autoencoder: Autoencoder | None = None
    if is_hub_id(name):
        note(f"the autoencoder {name} is not downloaded, so {target} records its id and scale but no hash")
    else:
        autoencoder = load_autoencoder(request.autoencoder, request.dataset.channels)
        if "scale_factor" not in given:
            scale = request.autoencoder.scale_factor
            note(f"assuming that latents are scaled by {scale}, as in LFM's checkpoints; otherwise, set --scale_factor")
    network, header = build_published(file, source, request, autoencoder)
    save_weights(target, network.state_dict(), header)


def _to_published(source: Path, target: Path, module_prefix: bool) -> None:
    """Convert a checkpoint of this project to LFM's format."""
    _check_suffix(target, ".pth", f"{source} describes its network")
    weights, header = read_weights(source)
    refuse_newer_networks(header, source)
    if header.contrast_means:
        note("LFM's code does not correct the velocities of contrastive flow matching where guidance acts: guide less")
    prefix = PREFIX if module_prefix else ""
    stage = {name: weights.pop(name) for name in (STAGE_WEIGHT,) if name in weights}
    for path, part in ((target, weights), (condition_stage_path(target), stage)):
        if part:
            save_content(path, {prefix + name: value for name, value in part.items()})
    if header.autoencoder.latents_std and header.autoencoder.scale_factor is None:
        note(
            "these latents are normalized with the autoencoder's statistics, which LFM's --scale_factor cannot express"
        )


def _check_suffix(target: Path, suffix: str, reason: str) -> None:
    if target.suffix != suffix:
        raise UsageError(f"{target}: expected a name ending in {suffix}, because {reason}")


def _split_paths(arguments: list[str]) -> tuple[list[Path], list[str]]:
    if wanted := help_flags(arguments):
        return [], wanted
    paths, flags = arguments[:2], arguments[2:]
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError("expected IN OUT [flags], where one file is a .pth and the other a .safetensors")
    return [Path(path) for path in paths], flags


if __name__ == "__main__":
    exit_cleanly(main)
