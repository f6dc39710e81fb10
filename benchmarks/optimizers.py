"""Question: which optimizer learns the most per image? Compares the default experiment's validation loss after equal steps.

    python -m benchmarks.optimizers [--steps 400]

Each row is a separate run of the training script, which also reports images per second.
"""

import argparse
import tempfile

from benchmarks._runs import records_of, run_default

RUNS = {
    "AdamW, 1e-3": ["--optimizer", "adamw", "--lr", "1e-3"],
    "AdamW, 2e-3": ["--optimizer", "adamw", "--lr", "2e-3"],
    "AdamW, 4e-3": ["--optimizer", "adamw", "--lr", "4e-3"],
    "Muon, 0.02, and AdamW, 1e-3": ["--optimizer", "muon", "--lr", "1e-3", "--muon_lr", "0.02"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps per run (there are four runs); default: 400")
    steps = parser.parse_args().steps
    print(f"| optimizer, learning rate | validation loss after {steps} steps | images/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(RUNS.items()):
            own = ["--max_steps", str(steps), "--log_every", str(max(1, steps // 8))]
            run = run_default(folder, f"run{number}", *own, *flags)
            loss = records_of(run, "validation")[-1]["loss"]
            rates = sorted(entry["images_per_s"] for entry in records_of(run, "train"))
            print(f"| {name} | {loss:.4f} | {rates[len(rates) // 2]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
