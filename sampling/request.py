"""Options of the sampling scripts, and the request that selects a checkpoint, solver, guidance and machine."""

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
    """Checkpoint and noise."""

    checkpoint: str = option(
        "",
        "checkpoint, this project's or LFM's (.pth); default: the experiment's newest",
        flags=("--model_ckpt",),
        common=True,
    )
    exp: str = option("experiment", "name of the experiment", common=True)
    save_root: str = option("saved_info", "folder of all experiments", common=True)
    epoch_id: int | None = option(None, "epoch of the experiment's checkpoint; default: the newest")
    guide_checkpoint: str = option(
        "", "checkpoint of a weaker network for autoguidance, which replaces classifier-free guidance"
    )
    check_conventions: str = option(
        "auto",
        "at the start, check that velocities and latents have the direction and scale of this project: auto (files of other "
        "projects), on, or off",
        choices=("auto", "on", "off"),
    )
    seed: int = option(42, "seed of the noise; the noise of sample i depends only on (seed, i)", minimum=0, common=True)
    generator: str = option(
        "determ-indiv",
        "noise source: one stream per sample (determ, determ-indiv), or torch's global generator (dummy)",
        choices=NOISE_SOURCES,
    )


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling."""

    n_sample: int = option(50000, "number of samples", minimum=1, common=True)
    batch_size: int = option(
        200, "samples per batch; changes results only with torchdiffeq's adaptive solvers", minimum=1, common=True
    )
    labels: str = option(
        "balanced", "class labels: balanced (in turn), random, or a file with one class id per line", common=True
    )
    compute_fid: bool = option(False, "score the samples against the dataset's training images", common=True)
    real_img_dir: str = option(
        "", "image folder or statistics file (.npz, .npy) to score against, instead of the training images", common=True
    )
    output_dir: str = option(
        "",
        "folder for the samples, and for the grid unless samples are png or jpg; default: samples/ next to the checkpoint",
        common=True,
    )
    save_images: str | None = option(
        None,
        "also write every sample in this format; samples that are already in the folder are not drawn again",
        choices=FORMATS,
        common=True,
    )
    output_json: str = option("", "file for the result; default: next to the grid")
    output_log: str = option("", "log file to which the result is also appended, as one line")


def sampling_groups() -> tuple[type, ...]:
    """The option dataclasses of `sampler_request` and of the mode `sample`, in the order of `--help`."""
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
    """The option dataclasses that this project's checkpoints record. Only LFM's checkpoints need the flags."""
    return AutoencoderOptions, NetworkOptions, *network_groups()


# Sampling flags of LFM's published code that have no effect, and the reason.
IGNORED_SAMPLING_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "use_karras_samplers": "see --time_grid edm",
    "perturb": "it does not affect samples",
}


@dataclass(frozen=True)
class SamplerRequest:
    """A request for a sampler.

    Args:
        source: the checkpoint and the noise.
        solver: method and steps.
        guidance: scale, interval and channels.
        machine: device and precision.
        autoencoder: the location of the autoencoder, if --pretrained_autoencoder_ckpt was given.
        network: the model type, if it was given.
        dataset: name of the dataset, which is part of an experiment's path.
        given: values of the flags that the user gave, by name. They must agree with the header of this
            project's checkpoint. For an LFM checkpoint, they describe the network.
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
    """Create the request from the options of a script."""
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
    """Print a note about given flags among `names` that have no effect. A reason is, for example, `without --compute_fid`."""
    if unused := [f"--{name}" for name in names if name in given]:
        note(f"{', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect {reason}")
