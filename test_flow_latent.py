#!/usr/bin/env python
"""Sample from a trained latent flow, and score the samples. Everything about the network comes from its checkpoint."""

from evaluation.sampling import SAMPLING_GROUPS, sample_and_score
from options import exit_cleanly, parse_options

IGNORED = {
    "use_karras_samplers": "choose a solver with --method",
    "num_timesteps": "flow matching has continuous time",
    "perturb": "it changed nothing that is sampled here",
    "generator": "sample i always has a stream of its own, as with determ-indiv",
    "compute_nfe": "the number of evaluations is always reported",
    "measure_time": "the time is always reported",
    "output_log": "see --output_json",
    "real_img_dir": "samples are scored against the dataset's training images",
}


def main() -> None:
    """Parse the flags, sample, and print the result in one line."""
    result = sample_and_score(parse_options(str(__doc__), SAMPLING_GROUPS, ignored=IGNORED))
    score = f"{result['metric']} {result['value']:.3f}, " if "value" in result else ""
    recognised = f"{100 * result['recognised']:.1f} % recognised as their class, " if "recognised" in result else ""
    print(
        f"{score}{recognised}{result['samples']} samples, {result['nfe']:g} evaluations each, "
        f"{result['seconds']:g} s; grid: {result['grid']}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
