#!/usr/bin/env python
"""Sample from a trained latent flow, and score the samples. Everything about the network comes from its checkpoint."""

from evaluation.sampling import SAMPLING_GROUPS, SamplingOptions, sample_and_score
from evaluation.score import result_line
from models.registry import IGNORED_NETWORK_FLAGS
from options import Options
from runtime.distributed import Processes
from runtime.files import append_line
from runtime.launch import run_script

# Published flags without an effect, here or there.
IGNORED = {
    **IGNORED_NETWORK_FLAGS,
    "use_karras_samplers": "choose a solver with --method",
    "perturb": "it changed nothing that is sampled here",
    "compute_nfe": "the number of evaluations is always reported",
    "measure_time": "the time is always reported",
}


def main(options: Options, processes: Processes) -> None:
    """Sample, and print the result in one line."""
    print(options.describe("those that differ from the defaults; the others: --help"))
    result = sample_and_score(options, processes)
    score = f"{result_line(result)}, " if "value" in result else ""
    recognised = f"{100 * result['recognised']:.1f} % recognised as their class, " if "recognised" in result else ""
    line = (
        f"{score}{recognised}{result['samples']} samples, {result['nfe']:g} evaluations each, "
        f"{result['seconds']:g} s; grid: {result['grid']}"
    )
    print(line)
    if options[SamplingOptions].output_log and processes.is_main:
        append_line(options[SamplingOptions].output_log, line)


if __name__ == "__main__":
    run_script(main, str(__doc__), SAMPLING_GROUPS, ignored=IGNORED)
