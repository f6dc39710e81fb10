"""The flags of sampling, and the request for a sampler that they amount to: checkpoint, solver, guidance and machine."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets_prep.datasets import DatasetOptions
from evaluation.features.registry import FeatureOptions
from evaluation.score import ScoreOptions
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.loading import AutoencoderOptions
from models.registry import IGNORED_NETWORK_FLAGS, NetworkOptions, network_groups
from options import Options, option
from runtime.messages import note
from runtime.pictures import GridOptions
from runtime.precision import MachineOptions
from sampling.noise import NOISE_SOURCES
from sampling.writer import FORMATS

__all__ = [
    "IGNORED_SAMPLING_FLAGS",
    "SamplerRequest",
    "SamplingOptions",
    "SourceOptions",
    "checkpoint_groups",
    "note_unused",
    "sampler_request",
    "sampling_groups",
]


@dataclass(frozen=True)
class SourceOptions:
    """What to sample from."""

    checkpoint: str = option(
        "",
        "checkpoint, ours or a published .pth; default: the newest of the experiment",
        flags=("--model_ckpt",),
        common=True,
    )
    exp: str = option("experiment", "name of the experiment", common=True)
    save_root: str = option("saved_info", "folder of all experiments", common=True)
    epoch_id: int | None = option(None, "epoch of the experiment's checkpoint; default: the newest")
    guide_checkpoint: str = option(
        "", "autoguidance: checkpoint of a weaker network, which --cfg_scale leads away from in the null class's place"
    )
    seed: int = option(42, "seed of the noise; sample i depends on (seed, i) alone", minimum=0, common=True)
    generator: str = option(
        "determ-indiv",
        "source of the noise: a stream per sample (determ, determ-indiv), or torch's global generator (dummy)",
        choices=NOISE_SOURCES,
    )


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling."""

    n_sample: int = option(50000, "number of samples", minimum=1, common=True)
    batch_size: int = option(
        200, "samples drawn at a time; only torchdiffeq's adaptive solvers see it", minimum=1, common=True
    )
    labels: str = option(
        "balanced", "classes asked for: balanced (in turn), random, or a file of one class id a line", common=True
    )
    compute_fid: bool = option(False, "score the samples against the dataset's training images", common=True)
    real_img_dir: str = option(
        "", "score against these images, or this statistics file (.npz, .npy), instead", common=True
    )
    output_dir: str = option(
        "",
        "folder for samples (and the grid, unless they are png or jpg); default: samples/ beside the checkpoint",
        common=True,
    )
    save_images: str | None = option(
        None,
        "also write every sample, in this format; samples that the folder holds are not drawn again",
        choices=FORMATS,
        common=True,
    )
    output_json: str = option("", "file for the result; default: beside the grid")
    output_log: str = option("", "also append the result's line to this file")


def sampling_groups() -> tuple[type, ...]:
    """The option dataclasses of `sampler_request` and of plain sampling, in the order of `--help`."""
    return (
        SourceOptions,
        SamplingOptions,
        GridOptions,
        SolverOptions,
        GuidanceOptions,
        ScoreOptions,
        FeatureOptions,
        DatasetOptions,
        *checkpoint_groups(),
        MachineOptions,
    )


def checkpoint_groups() -> tuple[type, ...]:
    """The option dataclasses that our checkpoints record; only LFM's published files need them as flags."""
    return AutoencoderOptions, NetworkOptions, *network_groups()


# Published flags of the samplers without an effect, there or here.
IGNORED_SAMPLING_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "use_karras_samplers": "see --time_grid edm",
    "perturb": "it changed nothing that is sampled here",
}


@dataclass(frozen=True)
class SamplerRequest:
    """A network to sample from, and how.

    Args:
        source: where the checkpoint is, and the seed.
        solver: method and steps.
        guidance: scale, interval and channels.
        machine: device and precision.
        autoencoder: where the autoencoder is, if --pretrained_autoencoder_ckpt was given.
        network: the network's name, if it was given.
        dataset: name of the dataset, which is part of an experiment's path.
        given: values of the flags that the user gave, by name. They must agree with a checkpoint that has a header, and
            describe the network in a published file.
    """

    source: SourceOptions
    solver: SolverOptions = SolverOptions()  # noqa: RUF009
    guidance: GuidanceOptions = GuidanceOptions()  # noqa: RUF009
    machine: MachineOptions = MachineOptions()  # noqa: RUF009
    autoencoder: AutoencoderOptions = AutoencoderOptions()  # noqa: RUF009
    network: NetworkOptions = NetworkOptions()  # noqa: RUF009
    dataset: str = DatasetOptions.dataset
    given: Mapping[str, Any] = field(default_factory=dict)


def sampler_request(options: Options) -> SamplerRequest:
    """Collect the request from the parsed flags of a script."""
    return SamplerRequest(
        source=options[SourceOptions],
        solver=options[SolverOptions],
        guidance=options[GuidanceOptions],
        machine=options[MachineOptions],
        autoencoder=options[AutoencoderOptions],
        network=options[NetworkOptions],
        dataset=options[DatasetOptions].dataset,
        given=options.given,
    )


def note_unused(given: Collection[str], names: Iterable[str], reason: str) -> None:
    """Print which of the flags `names` the user gave although they have no effect, for example `without --compute_fid`."""
    if unused := [f"--{name}" for name in names if name in given]:
        note(f"{', '.join(unused)} has no effect {reason}")
