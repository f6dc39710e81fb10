"""Convert a checkpoint of LFM or another project to this project's self-describing format, or back.

    python -m checkpoints.convert model_475.pth model.safetensors --args_file test_args/celeb256_dit.txt [flags]
    python -m checkpoints.convert model.safetensors model_475.pth [--module_prefix]
    python -m checkpoints.convert SiT-XL-2-256.pt model.safetensors
    python -m checkpoints.convert model.safetensors SiT-XL-2-256.pt [--project SiT]

The label-map embedding of a semantic-synthesis model (cond_stage_<name>.pth in the same folder) is converted as well. The
EMA weights are used if the file has them, as content.pth does. docs/published.md lists the other projects.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from checkpoints.conversion import FORMATS, from_published, to_published
from checkpoints.files import describes_network
from checkpoints.lfm_request import described_by
from command_line import help_flags, parse_options
from exits import exit_cleanly
from options import UsageError, option
from runtime.messages import show
from runtime.outputs import check_file
from sampling.request import IGNORED_SAMPLING_FLAGS
from sampling.script import mode_groups


@dataclass(frozen=True)
class ConversionOptions:
    """Conversion. Sampling flags, which LFM's arguments files contain, have no effect."""

    module_prefix: bool = option(
        False, "when writing .pth or .pt: prefix names with 'module.', as data parallelism does"
    )
    project: str = option(
        "",
        "when writing .pth or .pt: the project whose code will read it; default: the one that the file came from, else LFM",
        choices=("", *FORMATS),
    )


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
        from_published(source, target, options.given)
    else:
        own = options[ConversionOptions]
        to_published(source, target, own.project, module_prefix=own.module_prefix)
    show(f"{source} -> {target}")


def _split_paths(arguments: list[str]) -> tuple[list[Path], list[str]]:
    if wanted := help_flags(arguments):
        return [], wanted
    paths, flags = arguments[:2], arguments[2:]
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError("expected IN OUT [flags], where one file is a .pth or .pt and the other a .safetensors")
    return [Path(path) for path in paths], flags


if __name__ == "__main__":
    exit_cleanly(main)
