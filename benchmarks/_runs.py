"""Train and score the default experiment, fashion_mnist_dit, with the project's scripts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["records_of", "run_default", "score_default"]

ROOT = Path(__file__).resolve().parents[1]


def run_default(folder: str, name: str, *flags: str) -> Path:
    """Train experiment `name` under `folder` with flags added to those in its arguments file. Returns the run folder."""
    _call("train_flow_latent.py", "train_args", folder, name, flags)
    return Path(folder, "latent_flow", "fashion_mnist", name)


def score_default(folder: str, name: str, *flags: str) -> dict[str, Any]:
    """Sample and score experiment `name` as run_test.sh does. Returns the scores."""
    _call("test_flow_latent.py", "test_args", folder, name, flags)
    (result,) = Path(folder, "latent_flow", "fashion_mnist", name, "samples").glob("model_*.json")
    return json.loads(result.read_text())


def records_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl whose "kind" is `kind`."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def _call(script: str, args: str, folder: str, name: str, flags: tuple[str, ...]) -> None:
    command = [sys.executable, script, "--args_file", f"{args}/fashion_mnist_dit.txt"]
    subprocess.run(
        [*command, "--save_root", folder, "--exp", name, *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
