#!/usr/bin/env python
"""Sample from a trained latent flow, and score the samples. Everything about the network comes from its checkpoint."""

from collections.abc import Mapping
from typing import Any

from checkpoints.tasks import GENERATE
from evaluation.score import result_line
from options import Options
from runtime.distributed import Processes
from runtime.files import append_line
from runtime.launch import run_script
from sampling.sample_and_score import SamplingOptions
from sampling.script import IGNORED_FLAGS, MODE_GROUPS, run_modes


def main(options: Options, processes: Processes) -> None:
    """Do what the flags ask for, and say what came out."""
    print(options.describe("those that differ from the defaults; the others: --help"))
    log = options[SamplingOptions].output_log
    for result in run_modes(options, processes):
        line = result.get("summary") or summary_of_samples(result)
        print(line)
        if log and processes.is_main:
            append_line(log, line)


def summary_of_samples(result: Mapping[str, Any]) -> str:
    """One line about samples and their score."""
    score = f"{result_line(result)}, " if "value" in result else ""
    recognised = f"{100 * result['recognised']:.1f} % recognised as their class, " if "recognised" in result else ""
    return (
        f"{score}{recognised}{result['samples']} samples, {result['nfe']:g} evaluations each, "
        f"{result['seconds']:g} s; grid: {result['grid']}"
    )


if __name__ == "__main__":
    run_script(main, str(__doc__), MODE_GROUPS, ignored=IGNORED_FLAGS, task=GENERATE.name)
