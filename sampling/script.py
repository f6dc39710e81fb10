"""The modes of test_flow_latent.py, by name in MODES, and the loop over the chosen ones."""

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
from runtime.outputs import check_file, check_folder, raise_unwritten
from runtime.pictures import GridOptions
from sampling.cost import TimingOptions, count_evaluations, measure_time
from sampling.latent_paths import PictureOptions, interpolate, invert, trajectory
from sampling.likelihood import LikelihoodOptions, compute_nll
from sampling.loading import load_sampler
from sampling.request import SamplingOptions, sampler_request, sampling_groups
from sampling.sample_and_score import sample_and_score, summary_of_samples

__all__ = ["MODES", "Mode", "ModeOptions", "mode_groups", "run", "run_modes"]


class Mode(NamedTuple):
    """A mode of test_flow_latent.py.

    Args:
        run: run(loaded sampler, *options) returns a result in JSON's types. Its entry "summary", if there is one, is printed.
        options: the option dataclasses that `run` takes.
        parallel: whether several processes can share the work; `run` then also takes `processes`.
        pictures: whether it writes pictures next to the result. The mode `sample` checks itself where it can write.
    """

    run: Callable[..., dict[str, Any]]
    options: tuple[type, ...]
    parallel: bool = False
    pictures: bool = False


SAMPLE = "sample"
# Keys are the values of --mode. Adding an entry adds a mode, and the mode's options as flags.
MODES = {
    SAMPLE: Mode(
        sample_and_score, (SamplingOptions, GridOptions, ScoreOptions, FeatureOptions, DatasetOptions), parallel=True
    ),
    "invert": Mode(invert, (SamplingOptions, DatasetOptions, PictureOptions), pictures=True),
    "interpolate": Mode(interpolate, (SamplingOptions, PictureOptions), pictures=True),
    "trajectory": Mode(trajectory, (SamplingOptions, PictureOptions), pictures=True),
    "compute_nfe": Mode(count_evaluations, (SamplingOptions,)),
    "measure_time": Mode(measure_time, (SamplingOptions, TimingOptions)),
    "compute_nll": Mode(compute_nll, (SamplingOptions, DatasetOptions, LikelihoodOptions)),
}


@dataclass(frozen=True)
class ModeOptions:
    """Mode."""

    mode: str = option(
        SAMPLE,
        "sample; invert (held-out images to noise and back); interpolate (between two seeds); trajectory (noise to data); "
        "compute_nfe, measure_time, compute_nll: same as the flags of that name",
        choices=MODES,
        common=True,
    )
    compute_nfe: bool = option(False, "only count the network evaluations for --n_sample samples")
    measure_time: bool = option(False, "only time a network evaluation, and sampling from noise to image")
    compute_nll: bool = option(
        False, "only compute the likelihood of up to --n_sample held-out images, in bits per latent dimension"
    )

    @property
    def chosen(self) -> list[str]:
        """Keys of the chosen modes: all whose flags are on, else --mode."""
        return [name for name in MODES if getattr(self, name, False)] or [self.mode]


def mode_groups() -> tuple[type, ...]:
    """The option dataclasses of test_flow_latent.py, in the order of `--help`."""
    own = (group for mode in MODES.values() for group in mode.options)
    return tuple(dict.fromkeys((ModeOptions, *sampling_groups(), *own)))


def run(options: Options, processes: Processes) -> None:
    """Run the chosen modes, print a summary of each result, and append it to --output_log as one line."""
    show(options.describe("--print_config shows all"))
    log = options[SamplingOptions].output_log
    for result in run_modes(options, processes):
        summary, warnings = result.get("summary") or summary_of_samples(result), result.get("warnings", [])
        show_result(summary, warnings)
        if log and processes.is_main:
            append_line(log, one_line(summary, warnings))


def run_modes(options: Options, processes: Processes = Processes()) -> Iterator[dict[str, Any]]:  # noqa: B008
    """Load the sampler once and yield the result of each mode that the flags (of `mode_groups`) ask for.

    Raises:
        UsageError: several processes were started for a mode that needs one, --output_json was given for several results, or
            an output cannot be written. If writing fails after the work, the result is yielded first.
    """
    chosen, sampling = options[ModeOptions].chosen, options[SamplingOptions]
    if processes.count > 1 and not all(MODES[name].parallel for name in chosen):
        raise UsageError(
            f"{', '.join(chosen)}: expected one process, but {processes.count} were started; leave out "
            "--num_process_per_node"
        )
    if len(chosen) > 1 and sampling.output_json:
        raise UsageError(
            f"--output_json holds one result, but {', '.join(chosen)} produce {len(chosen)}: leave it out, or choose one mode"
        )
    if processes.is_main:
        check_file(sampling.output_json, "--output_json")
        check_file(sampling.output_log, "--output_log", appended=True)
    batches = sampling.n_sample / sampling.batch_size / processes.count if chosen == [SAMPLE] else 0
    loaded = load_sampler(sampler_request(options), processes, batches=batches)
    if any(MODES[name].pictures or (name != SAMPLE and not sampling.output_json) for name in chosen):
        check_folder(loaded.output_folder(sampling.output_dir), "--output_dir")
    for name in chosen:
        mode = MODES[name]
        shared = {"processes": processes} if mode.parallel else {}
        fresh = replace(loaded, sampler=replace(loaded.sampler))  # a new sampler seeds torch's global generator again
        result = mode.run(fresh, *(options[group] for group in mode.options), **shared)
        yield result
        raise_unwritten(result)
