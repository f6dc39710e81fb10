"""The common part of the inpainting and semantic synthesis test scripts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from checkpoints.tasks import Task
from datasets_prep.datasets import DatasetOptions
from evaluation.features.registry import FeatureOptions
from evaluation.pair_comparison import PairOptions
from evaluation.score import ScoreOptions, result_line
from options import Options
from runtime.distributed import Processes
from runtime.files import append_line
from runtime.messages import labeled, one_line, show, show_result
from runtime.outputs import check_file, raise_unwritten
from runtime.processes.launch import run_script
from sampling.request import checkpoint_groups, sampler_request
from tasks.conditioned_request import IGNORED_FLAGS, ConditionedOptions, ConditionedRequest, conditioned_groups

# Names and units of a task's own scores. Keys are entries of results.
NAMES = {
    "recognised": "recognized samples",
    "recognised_originals": "recognized originals",
    "psnr_hole": "PSNR in holes",
    "psnr_hole_mean_colour": "PSNR of holes in the mean color",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "foreground_iou": "foreground IoU",
}
UNITS = {"psnr_hole": " dB", "psnr_hole_mean_colour": " dB"}

__all__ = ["run_conditioned_script", "sample_conditioned", "summary_of_pairs"]


def run_conditioned_script(
    task: Task, sample: Callable[..., dict[str, Any]], groups: tuple[type, ...], description: str
) -> None:
    """Run a test script: parse the command line, start the processes, sample and exit.

    Args:
        task: the script's task.
        sample: called as sample(ConditionedRequest, *options, processes=processes); returns the result.
        groups: the dataclasses of `options`, which the script has in addition to `conditioned_groups`.
        description: first paragraph of `--help`.
    """
    main = partial(_run, sample, groups)
    every = (*conditioned_groups(), *groups)
    run_script(main, description, every, ignored=IGNORED_FLAGS, task=task.name, rare=checkpoint_groups())


def _run(
    sample: Callable[..., dict[str, Any]], groups: tuple[type, ...], options: Options, processes: Processes
) -> None:
    """Sample, print a summary of the result, and append it to --output_log as one line."""
    show(options.describe("--print_config shows all"))
    conditioned = options[ConditionedOptions]
    if processes.is_main:
        check_file(conditioned.output_json, "--output_json")
        check_file(conditioned.output_log, "--output_log", appended=True)
    result = sample_conditioned(sample, groups, options, processes)
    summary, warnings = summary_of_pairs(result), result.get("warnings", [])
    show_result(summary, warnings)
    if conditioned.output_log and processes.is_main:
        append_line(conditioned.output_log, one_line(summary, warnings))
    raise_unwritten(result)


def sample_conditioned(
    sample: Callable[..., dict[str, Any]], groups: tuple[type, ...], options: Options, processes: Processes
) -> dict[str, Any]:
    """Call `sample` with the request and the options that `run_conditioned_script` describes."""
    request = ConditionedRequest(
        sampler=sampler_request(options),
        conditioned=options[ConditionedOptions],
        data=options[DatasetOptions],
        scores=options[ScoreOptions],
        pairs=options[PairOptions],
        features=options[FeatureOptions],
    )
    return sample(request, *(options[group] for group in groups), processes=processes)


def summary_of_pairs(result: dict[str, Any]) -> str:
    """The scores, if there are any, the cost and the picture, one line each."""
    scores = [result_line(result)] if "value" in result else []
    scores += [f"{NAMES.get(key, key)} {result[key]:.4g}{UNITS.get(key, '')}" for key in result.get("extra_scores", ())]
    holes = f", mean hole ratio {result['hole_ratio']:.3f}" if "hole_ratio" in result else ""
    lines = [labeled("score", ", ".join(scores))] if scores else []
    lines.append(labeled("samples", f"{result['samples']} in {result['seconds']:g} s, NFE {result['nfe']:g}{holes}"))
    lines.append(labeled("picture", result["sheet"]))
    return "\n".join(lines)
