"""Question: do memory, file handles and threads stay level? Monitors training, then sampling, for --minutes each.

    python -m benchmarks.soak [--minutes 30] [--training FLAGS] [--sampling FLAGS] [--phases training sampling]

FLAGS are quoted flags for train_flow_latent.py and test_flow_latent.py. By default, the default experiment is trained,
then sampled from. A script still running after --minutes receives Ctrl-C.

Measures the whole process tree once per second (Linux only) and compares the medians of the second and the last quarter.
Writes docs/soak.png. Exits with code 1 if a quantity has grown.
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
from exits import INTERRUPTED
from runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
QUANTITIES = {"memory": "resident memory, MiB", "handles": "open file handles", "threads": "threads"}
MAX_RATIO = {"memory": 1.05, "handles": 1.0, "threads": 1.0}  # last quarter relative to the second
LEAST_ROWS = 60
SLACK = {"memory": 16, "handles": 2, "threads": 2}  # absolute growth allowed in addition, for small numbers
SCRIPTS = {"training": "train_flow_latent.py", "sampling": "test_flow_latent.py"}
DEFAULTS = {
    "training": "--args_file train_args/fashion_mnist_dit.txt --exp soak --overwrite --max_steps 1000000",
    "sampling": "--args_file test_args/fashion_mnist_dit.txt --exp soak --n_sample 1000000",
}
Row = dict[str, float]


def watch(command: Sequence[str], minutes: float) -> list[Row]:
    """Run a command for at most `minutes`, then interrupt it. Returns its process tree's resources, one row per second.

    Raises:
        SystemExit: the command failed, or ended within LEAST_ROWS seconds.
    """
    rows: list[Row] = []
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        _record(process, rows, started, minutes)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    if process.returncode not in (0, INTERRUPTED):
        sys.exit(f"error: {shlex.join(command)} failed with exit code {process.returncode}")
    if len(rows) < LEAST_ROWS:
        sys.exit(
            f"error: {shlex.join(command)} ended after {len(rows)} seconds; measuring growth takes at least {LEAST_ROWS}"
        )
    return rows


def _record(process: subprocess.Popen, rows: list[Row], started: float, minutes: float) -> None:
    """Append a row every second until the process ends or `minutes` have passed."""
    while process.poll() is None:
        passed = time.monotonic() - started
        if passed > 60 * minutes:
            return
        tree = [used for pid in process_tree(process.pid) if (used := resources_of(pid))]
        if tree:
            rows.append({"minute": passed / 60} | {name: sum(used[name] for used in tree) for name in QUANTITIES})
        time.sleep(1)


def process_tree(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:  # the process has just ended
        return []
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def resources_of(pid: int) -> Row | None:
    """A process's memory in MiB, open file handles and threads; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return {"memory": int(status["VmRSS"].split()[0]) / 1024, "handles": handles, "threads": int(status["Threads"])}
    except (OSError, KeyError):
        return None


def growth(rows: Sequence[Row], quantity: str) -> tuple[float, float]:
    """Medians of a quantity in the second and in the last quarter."""
    quarter = len(rows) // 4
    values = [row[quantity] for row in rows]
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def has_grown(quantity: str, before: float, after: float) -> bool:
    return after > before * MAX_RATIO[quantity] + SLACK[quantity]


def draw_picture(phases: dict[str, list[Row]], path: Path) -> None:
    """Plot each quantity over time, one row of panels per phase."""
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
    """Run the phases, print the table and plot it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="duration of each phase; default: 30")
    parser.add_argument("--phases", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    for phase, flags in DEFAULTS.items():
        parser.add_argument(f"--{phase}", default=flags, metavar="FLAGS")
    parser.add_argument("--keep", type=Path, default=ROOT / "saved_info/benchmarks", help="folder for the rows as JSON")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/soak.png", help="picture to write")
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
            verdict = "grown" if has_grown(quantity, before, after) else "level"
            table.append([phase, f"{rows[-1]['minute']:.1f}", name, f"{before:.0f}", f"{after:.0f}", verdict])
    print(markdown_table(["phase", "minutes", "quantity", "second quarter", "last quarter", "verdict"], table))
    draw_picture(phases, options.output)
    sys.exit(grown)


if __name__ == "__main__":
    main()
