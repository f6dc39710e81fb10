"""Export a checkpoint as a folder that diffusers loads and samples from without this project.

    python -m checkpoints.export CHECKPOINT DIR --args_file test_args/fashion_mnist_dit.txt
    python -m checkpoints.export CHECKPOINT DIR --method dpm --num_steps 20 --license mit --push_to_hub me/my-flow

Flags of solver and guidance become the pipeline's defaults. Other flags of test_flow_latent.py describe another project's
checkpoint, or have no effect. docs/export.md explains the folder.
"""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from checkpoints.lfm_request import described_by
from command_line import help_flags, parse_options
from diffusers_export.hub import check_login, push
from diffusers_export.writer import check_target, export
from exits import exit_cleanly
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from options import UsageError, option
from runtime.messages import fact, show
from sampling.request import IGNORED_SAMPLING_FLAGS
from sampling.script import mode_groups

DEFAULTS = {"method": "dpm", "num_steps": 20}


@dataclass(frozen=True)
class ExportOptions:
    """Export."""

    license: str = option(
        "", "license of the weights for the model card, as the hub names it, such as mit", common=True
    )
    push_to_hub: str = option(
        "", "also send the folder to this repository on Hugging Face's hub, owner/name", common=True
    )
    public: bool = option(False, "with --push_to_hub: create a public repository, and not a private one", common=True)


def main() -> None:
    """Write the folder, and send it to the hub if asked to."""
    paths, flags = _split_paths(sys.argv[1:])
    shown = {field.name for group in (SolverOptions, GuidanceOptions) for field in fields(group)} | described_by()
    options = parse_options(
        str(__doc__).splitlines()[0],
        [ExportOptions, *mode_groups()],
        flags,
        defaults=DEFAULTS,
        ignored=IGNORED_SAMPLING_FLAGS,
        positional="CHECKPOINT DIR",
        silent={field.name for group in mode_groups() for field in fields(group)} - shown,
    )
    own, (checkpoint, folder) = options[ExportOptions], paths
    if own.public and not own.push_to_hub:
        raise UsageError("--public has no effect without --push_to_hub owner/name: add it, or leave --public out")
    check_target(folder)
    if own.push_to_hub:
        check_login(own.push_to_hub)
    result = export(
        checkpoint,
        folder,
        options[SolverOptions],
        options[GuidanceOptions],
        given=options.given,
        license_name=own.license,
        command=shlex.join(["python", "-m", "checkpoints.export", checkpoint.name, folder.name, *map(_public, flags)]),
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    fact("folder", f"{folder}, {size / 1e6:.1f} MB, weights {str(result.header.weights_sha256)[:12]}")
    if own.push_to_hub:
        fact("hub", push(folder, own.push_to_hub, public=own.public))
    name = own.push_to_hub or str(folder)
    show(
        f'load it with DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True) or latent_flow.load("{name}")'
    )


def _public(word: str) -> str:
    """A word of the command for the model card: an absolute path is cut to its name."""
    return Path(word).name if Path(word).is_absolute() else word


def _split_paths(arguments: list[str]) -> tuple[list[Path], list[str]]:
    if wanted := help_flags(arguments):
        return [Path(), Path()], wanted
    paths, flags = arguments[:2], arguments[2:]
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError("expected CHECKPOINT DIR [flags]: a checkpoint and a new folder")
    return [Path(path) for path in paths], flags


if __name__ == "__main__":
    exit_cleanly(main)
