"""What an image teaches: validation loss of the embedded default after the same steps (400, or as given) by optimizer."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 400
RUNS = {
    "AdamW, 1e-3": ["--optimizer", "adamw", "--lr", "1e-3"],
    "AdamW, 2e-3": ["--optimizer", "adamw", "--lr", "2e-3"],
    "AdamW, 4e-3": ["--optimizer", "adamw", "--lr", "4e-3"],
    "Muon, 0.02, and AdamW, 1e-3": ["--optimizer", "muon", "--lr", "1e-3", "--muon_lr", "0.02"],
}


def main(steps: int = STEPS) -> None:
    print(f"| optimizer, learning rate | validation loss after {steps} steps | images/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(RUNS.items()):
            command = [sys.executable, "train_flow_latent.py", "--args_file", "train_args/fashion_mnist_dit.txt"]
            command += ["--save_root", folder, "--exp", f"run{number}", "--max_steps", str(steps), *flags]
            command += ["--log_every", str(max(1, steps // 8))]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            record = Path(folder, "latent_flow", "fashion_mnist", f"run{number}", "metrics.jsonl")
            entries = [json.loads(line) for line in record.read_text().splitlines()]
            loss = next(entry["loss"] for entry in reversed(entries) if entry["kind"] == "validation")
            rates = sorted(entry["images_per_s"] for entry in entries if entry["kind"] == "train")
            print(f"| {name} | {loss:.4f} | {rates[len(rates) // 2]:.0f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
