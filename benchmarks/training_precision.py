"""Question: how does training in compiled bfloat16 change the default experiment's scores?

    python -m benchmarks.training_precision [--steps 1000] [--seeds 4] [--first_seed 0]

Each seed is trained once in float32 and once in bfloat16 for equal steps, with the same images, noise and times. bfloat16 is
compiled, which is the default on processors that support it natively. Both networks are sampled in float32 from the same
noise. The benchmark prints the mean differences in FD and validation loss over the seeds, with standard errors.
"""

import argparse
import statistics
import tempfile

from benchmarks._runs import records_of, run_default, score_default
from benchmarks._timing import markdown_table

SIDES = {"float32": ["--precision", "fp32"], "bfloat16": ["--precision", "bf16", "--compile"]}


def main() -> None:
    """Print a row per seed, and the mean differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps per run; default: 1000")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds, at least 2; default: 4")
    parser.add_argument(
        "--first_seed", type=int, default=0, help="first seed, to add seeds to an earlier run; default: 0"
    )
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: expected at least 2; the standard error is computed from their spread")
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            values = [_train_and_score(folder, name, seed, options.steps) for name in SIDES]
            rows.append([str(seed), *(f"{value:.4f}" for pair in values for value in pair)])
            differences.append([low - full for full, low in zip(*values, strict=True)])
            print(rows[-1], flush=True)
    header = ["seed", *(f"{metric} in {name}" for name in SIDES for metric in ("FD", "validation loss"))]
    print(f"\n{markdown_table(header, rows)}\n")
    for metric, values in zip(("FD", "validation loss"), zip(*differences, strict=True), strict=True):
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"{metric}, bfloat16 minus float32: {statistics.mean(values):+.4f} ± {error:.4f}")


def _train_and_score(folder: str, name: str, seed: int, steps: int) -> tuple[float, float]:
    """Train and score one run. Returns FD and validation loss."""
    experiment = f"{name}{seed}"
    run = run_default(folder, experiment, "--seed", str(seed), "--max_steps", str(steps), *SIDES[name])
    result = score_default(folder, experiment, "--precision", "fp32")
    return result["value"], records_of(run, "validation")[-1]["loss"]


if __name__ == "__main__":
    main()
