"""Question: what does training in bfloat16, compiled, change in the score of the embedded default?

    python -m benchmarks.training_precision [--steps 1000] [--seeds 4] [--first_seed 0]

Each seed is trained in float32 and in bfloat16 (compiled, as it is chosen where bfloat16 is native), for the same steps, of
the same images, noises and times; both networks are sampled in float32, from the same noises. What is told is the mean over
the seeds of the difference of scores and of validation losses, with its standard error.
"""

import argparse
import statistics
import tempfile

from benchmarks._runs import records_of, run_default, score_default
from benchmarks._timing import markdown_table

SIDES = {"float32": ["--precision", "fp32"], "bfloat16": ["--precision", "bf16", "--compile"]}


def main() -> None:
    """Print a row for each seed, and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=4, help="how many")
    parser.add_argument("--first_seed", type=int, default=0, help="they count on from it; for more seeds after a run")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: expected at least 2, since their spread makes the error")
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            values = [_train_and_score(folder, name, seed, options.steps) for name in SIDES]
            rows.append([str(seed), *(f"{value:.4f}" for pair in values for value in pair)])
            differences.append([low - full for full, low in zip(*values, strict=True)])
            print(rows[-1], flush=True)
    header = ["seed", *(f"{what} in {name}" for name in SIDES for what in ("FD", "validation loss"))]
    print(f"\n{markdown_table(header, rows)}\n")
    for what, values in zip(("FD", "validation loss"), zip(*differences, strict=True), strict=True):
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"{what}, bfloat16 less float32: {statistics.mean(values):+.4f} ± {error:.4f}")


def _train_and_score(folder: str, name: str, seed: int, steps: int) -> tuple[float, float]:
    """FD and validation loss."""
    experiment = f"{name}{seed}"
    run = run_default(folder, experiment, "--seed", str(seed), "--max_steps", str(steps), *SIDES[name])
    result = score_default(folder, experiment, "--precision", "fp32")
    return result["value"], records_of(run, "validation")[-1]["loss"]


if __name__ == "__main__":
    main()
