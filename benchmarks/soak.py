"""Do memory, file handles and threads stay level? Watches a training, then a sampling, for --minutes each.

    python -m benchmarks.soak [--minutes 30] [--training FLAGS] [--sampling FLAGS] [--phases training sampling]

FLAGS are those of train_flow_latent.py and test_flow_latent.py, in quotes; without them a run of the embedded default is
trained, then sampled from. Ctrl-C is sent to what has not ended by then. Measures the whole process tree once a second
(Linux only) and compares the medians of the second and of the last quarter. Draws docs/soak.png; exit code 1 where
something has grown.
"""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._timing import markdown_table
from options import INTERRUPTED
from runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
QUANTITIES = {"memory": "resident memory, MiB", "handles": "open file handles", "threads": "threads"}
ADMITTED = {"memory": 1.05, "handles": 1.0, "threads": 1.0}  # last quarter over second
LEAST_ROWS = 60
SPARE = {"memory": 16, "handles": 2, "threads": 2}  # what small numbers may grow by besides
SCRIPTS = {"training": "train_flow_latent.py", "sampling": "test_flow_latent.py"}
DEFAULTS = {
    "training": "--args_file train_args/fashion_mnist_dit.txt --exp soak --overwrite --max_steps 1000000",
    "sampling": "--args_file test_args/fashion_mnist_dit.txt --exp soak --n_sample 1000000",
}
Row = dict[str, float]


def watch(command: Sequence[str], minutes: float) -> list[Row]:
    """Run a command for at most so many minutes, then interrupt it; what its process tree held, second by second.

    Raises:
        SystemExit: the command failed.
    """
    rows: list[Row] = []
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        _look(process, rows, started, minutes)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    if process.returncode not in (0, INTERRUPTED):
        sys.exit(f"error: {shlex.join(command)} ended with exit code {process.returncode}")
    if len(rows) < LEAST_ROWS:
        sys.exit(f"error: {shlex.join(command)} ended after {len(rows)} seconds: nothing can be said of growth")
    return rows


def _look(process: subprocess.Popen, rows: list[Row], started: float, minutes: float) -> None:
    """Add a row every second until the process ends or its time is up."""
    while process.poll() is None:
        passed = time.monotonic() - started
        if passed > 60 * minutes:
            return
        tree = [held for pid in process_tree(process.pid) if (held := held_by(pid))]
        if tree:
            rows.append({"minute": passed / 60} | {name: sum(held[name] for held in tree) for name in QUANTITIES})
        time.sleep(1)


def process_tree(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:  # it has just ended
        return []
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def held_by(pid: int) -> Row | None:
    """What one process holds; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return {"memory": int(status["VmRSS"].split()[0]) / 1024, "handles": handles, "threads": int(status["Threads"])}
    except (OSError, KeyError):
        return None


def growth(rows: Sequence[Row], quantity: str) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = len(rows) // 4
    values = [row[quantity] for row in rows]
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def has_grown(quantity: str, before: float, after: float) -> bool:
    return after > before * ADMITTED[quantity] + SPARE[quantity]


def draw_picture(phases: dict[str, list[Row]], path: Path) -> None:
    """A row of panels for each phase."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(phases), len(QUANTITIES), figsize=(12, 2.6 * len(phases)), layout="constrained", squeeze=False
    )
    for line, (phase, rows) in zip(panels, phases.items(), strict=True):
        for panel, (quantity, name) in zip(line, QUANTITIES.items(), strict=True):
            values = [row[quantity] for row in rows]
            panel.plot([row["minute"] for row in rows], values, linewidth=1)
            panel.set(title=f"{phase}: {name}", xlabel="minutes", ylim=(0, 1.1 * max(values)))
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the phases, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--phases", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    for phase, flags in DEFAULTS.items():
        parser.add_argument(f"--{phase}", default=flags, metavar="FLAGS")
    parser.add_argument("--keep", type=Path, default=ROOT / "saved_info/benchmarks", help="folder for the rows as JSON")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/soak.png")
    options = parser.parse_args()
    for phase in options.phases:
        words = f"{SCRIPTS[phase]} {getattr(options, phase)}"
        rows = watch([sys.executable, *shlex.split(words)], options.minutes)
        write_json(options.keep / f"soak_{phase}.json", {"command": words, "rows": rows})
    kept = {phase: options.keep / f"soak_{phase}.json" for phase in options.phases}
    phases = {phase: json.loads(path.read_text())["rows"] for phase, path in kept.items() if path.exists()}
    table, grown = [], False
    for phase, rows in phases.items():
        for quantity, name in QUANTITIES.items():
            before, after = growth(rows, quantity)
            grown |= has_grown(quantity, before, after)
            told = [f"{before:.0f}", f"{after:.0f}", "grown" if has_grown(quantity, before, after) else "level"]
            table.append([phase, f"{rows[-1]['minute']:.1f}", name, *told])
    print(markdown_table(["phase", "minutes", "quantity", "second quarter", "last quarter", "verdict"], table))
    draw_picture(phases, options.output)
    sys.exit(grown)


if __name__ == "__main__":
    main()
