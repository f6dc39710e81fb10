"""The work of test_flow_latent.py: one dictionary of the modes that it has, and the loop over those that were asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from datasets_prep.datasets import DatasetOptions
from evaluation.features.registry import FeatureOptions
from evaluation.score import ScoreOptions
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.files import append_line
from runtime.messages import one_line, show, show_result
from runtime.pictures import GridOptions
from sampling.cost import TimingOptions, count_evaluations, measure_time
from sampling.latent_paths import PictureOptions, interpolate, invert, trajectory
from sampling.likelihood import LikelihoodOptions, compute_nll
from sampling.loading import load_sampler
from sampling.request import SamplingOptions, sampler_request, sampling_groups
from sampling.sample_and_score import sample_and_score, summary_of_samples

__all__ = ["MODES", "Mode", "ModeOptions", "mode_groups", "run", "run_modes"]


class Mode(NamedTuple):
    """Something to do with a sampler.

    Args:
        run: run(loaded sampler, *options) returns a result in JSON's types. Its "summary" is the line to print.
        options: the option dataclasses that `run` takes.
        parallel: whether several processes can share the work; `run` then also takes `processes`.
    """

    run: Callable[..., dict[str, Any]]
    options: tuple[type, ...]
    parallel: bool = False


SAMPLE = "sample"
# Keys are the values of --mode. A new mode is one entry; its options become flags.
MODES = {
    SAMPLE: Mode(
        sample_and_score, (SamplingOptions, GridOptions, ScoreOptions, FeatureOptions, DatasetOptions), parallel=True
    ),
    "invert": Mode(invert, (SamplingOptions, DatasetOptions, PictureOptions)),
    "interpolate": Mode(interpolate, (SamplingOptions, PictureOptions)),
    "trajectory": Mode(trajectory, (SamplingOptions, PictureOptions)),
    "compute_nfe": Mode(count_evaluations, (SamplingOptions,)),
    "measure_time": Mode(measure_time, (SamplingOptions, TimingOptions)),
    "compute_nll": Mode(compute_nll, (SamplingOptions, DatasetOptions, LikelihoodOptions)),
}


@dataclass(frozen=True)
class ModeOptions:
    """What to do."""

    mode: str = option(
        SAMPLE,
        "sample; invert (held-out images to noise and back); interpolate (between two seeds); trajectory (noise to data); "
        "compute_nfe, measure_time, compute_nll: as the next three flags",
        choices=MODES,
        common=True,
    )
    compute_nfe: bool = option(False, "only count the evaluations that --n_sample samples take")
    measure_time: bool = option(False, "only time the network, and the whole way from noise to image")
    compute_nll: bool = option(
        False, "only the likelihood of up to --n_sample held-out images, in bits per latent dimension"
    )

    @property
    def chosen(self) -> list[str]:
        """Keys of MODES: those whose own flags are on, or else --mode."""
        return [name for name in MODES if getattr(self, name, False)] or [self.mode]


def mode_groups() -> tuple[type, ...]:
    """The option dataclasses of test_flow_latent.py, in the order of `--help`."""
    own = (group for mode in MODES.values() for group in mode.options)
    return tuple(dict.fromkeys((ModeOptions, *sampling_groups(), *own)))


def run(options: Options, processes: Processes) -> None:
    """Run the chosen modes, print a summary of each result, and append it to --output_log as one line."""
    show(options.describe("--print_config has all"))
    log = options[SamplingOptions].output_log
    for result in run_modes(options, processes):
        summary, warnings = result.get("summary") or summary_of_samples(result), result.get("warnings", [])
        show_result(summary, warnings)
        if log and processes.is_main:
            append_line(log, one_line(summary, warnings))


def run_modes(options: Options, processes: Processes = Processes()) -> Iterator[dict[str, Any]]:  # noqa: B008
    """Load the sampler once and yield the result of each mode that the flags (of `mode_groups`) ask for.

    Raises:
        UsageError: several processes for a mode that one process does, or one output file for several results.
    """
    chosen, sampling = options[ModeOptions].chosen, options[SamplingOptions]
    if processes.count > 1 and not all(MODES[name].parallel for name in chosen):
        raise UsageError(f"{', '.join(chosen)}: is done by one process, but there are {processes.count}")
    if len(chosen) > 1 and sampling.output_json:
        raise UsageError(f"--output_json takes one result, but {', '.join(chosen)} make {len(chosen)}")
    batches = sampling.n_sample / sampling.batch_size / processes.count if chosen == [SAMPLE] else 0
    loaded = load_sampler(sampler_request(options), processes, batches=batches)
    for name in chosen:
        mode = MODES[name]
        shared = {"processes": processes} if mode.parallel else {}
        fresh = replace(loaded, sampler=replace(loaded.sampler))  # torch's global generator begins anew for each mode
        yield mode.run(fresh, *(options[group] for group in mode.options), **shared)
