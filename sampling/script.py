"""What the test script can do with a checkpoint: one dictionary."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from models.registry import IGNORED_NETWORK_FLAGS
from options import Options, UsageError, option
from runtime.distributed import Processes
from sampling.cost import TimingOptions, count_evaluations, measure_time
from sampling.latent_paths import PictureOptions, interpolate, invert, trajectory
from sampling.likelihood import LikelihoodOptions, compute_nll
from sampling.sample_and_score import SAMPLING_GROUPS, SamplingOptions, sample_and_score

__all__ = ["IGNORED_FLAGS", "MODES", "MODE_GROUPS", "ModeOptions", "run_modes"]

MODES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "invert": invert,
    "interpolate": interpolate,
    "trajectory": trajectory,
    "compute_nfe": count_evaluations,
    "measure_time": measure_time,
    "compute_nll": compute_nll,
}
SAMPLE = "sample"  # alone among the modes, it can be shared by several processes
SWITCHES = ("compute_nfe", "measure_time", "compute_nll")


@dataclass(frozen=True)
class ModeOptions:
    """What to do."""

    mode: str = option(
        "sample",
        "sample; invert (held-out images to noise and back); interpolate (between two seeds); trajectory (noise to data)",
        choices=(SAMPLE, *(name for name in MODES if name not in SWITCHES)),
    )
    compute_nfe: bool = option(False, "only count the evaluations that --n_sample samples take")
    measure_time: bool = option(False, "only time the network, and the whole way from noise to image")
    compute_nll: bool = option(
        False, "only the likelihood of up to --n_sample held-out images, in bits per latent dimension"
    )


# Published flags without an effect, here or there.
IGNORED_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "use_karras_samplers": "see --time_grid edm",
    "perturb": "it changed nothing that is sampled here",
}
MODE_GROUPS = (ModeOptions, *SAMPLING_GROUPS, TimingOptions, PictureOptions, LikelihoodOptions)


def run_modes(options: Options, processes: Processes = Processes()) -> Iterator[dict[str, Any]]:  # noqa: B008
    """The result of each measurement that was asked for, or else of the mode.

    Raises:
        UsageError: several processes for anything but samples, or one file for several results.
    """
    asked = [name for name in SWITCHES if options.values[name]] or [options[ModeOptions].mode]
    if processes.count > 1 and asked != [SAMPLE]:
        raise UsageError(f"{', '.join(asked)}: is done by one process, but there are {processes.count}")
    if len(asked) > 1 and options[SamplingOptions].output_json:
        raise UsageError(f"--output_json takes one result, but {', '.join(asked)} make {len(asked)}")
    for name in asked:
        yield sample_and_score(options, processes) if name == SAMPLE else MODES[name](options)
