"""Reads a run folder for the report. Missing and damaged files are listed as problems, not errors."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from checkpoints.files import read_header
from checkpoints.header import Header
from options import UsageError
from runtime.files import read_json

__all__ = ["Checkpoint", "Grid", "RunRecord", "Score", "is_number", "read_runs"]

EVIDENCE = ("metrics.jsonl", "config.json", "samples", "*.safetensors")  # a run folder has at least one of them
SCORES = ("value", "bits_per_dimension", "psnr_db")  # entries of a result without "scores"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's name and header."""

    name: str
    header: Header


@dataclass(frozen=True)
class Grid:
    """A sample grid that training drew at a step."""

    step: int
    path: Path


@dataclass(frozen=True)
class Score:
    """One score in a file of results.

    Args:
        source: the file.
        metric: the metric's title, with the features.
        value, error: the score and its standard deviation (None: not estimated).
        result: all entries of the file.
    """

    source: Path
    metric: str
    value: float
    error: float | None
    result: dict[str, Any]

    @property
    def step(self) -> int | None:
        """The training step of the scored checkpoint, if it is recorded."""
        step = self.result.get("step")
        return step if isinstance(step, int) else None


@dataclass
class RunRecord:
    """The contents of a run folder.

    Args:
        folder: the folder.
        name: a name that distinguishes the runs of one report.
        entries: lines of metrics.jsonl.
        config: config.json, or empty.
        checkpoints: checkpoints with readable headers.
        grids: sample grids, ordered by step.
        scores: scores of the results in samples/.
        problems: what could not be read.
    """

    folder: Path
    name: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """The options and facts in config.json, by name."""
        options = self.config.get("options")
        return options if isinstance(options, dict) else {}

    @property
    def header(self) -> Header | None:
        """The header of the latest checkpoint."""
        found = sorted(self.checkpoints, key=lambda each: each.header.step or 0)
        return found[-1].header if found else None

    @property
    def last_step(self) -> int:
        """The last step that anything in the folder records; 0 without any."""
        steps = [entry["step"] for entry in self.entries] + [grid.step for grid in self.grids]
        return max([*steps, *(each.header.step or 0 for each in self.checkpoints), 0])

    def series(self, kind: str, name: str) -> list[tuple[int, float]]:
        """The recorded (step, value) pairs of a metric, which may include NaN."""
        return [
            (entry["step"], float(entry[name]))
            for entry in self.entries
            if entry.get("kind") == kind and is_number(entry.get(name))
        ]

    def metrics(self) -> list[tuple[str, str]]:
        """The (kind, name) of each numeric metric, in the order of first appearance."""
        found = {
            (str(entry.get("kind")), name): None
            for entry in self.entries
            for name, value in entry.items()
            if name not in ("step", "kind") and is_number(value)
        }
        return list(found)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders, and name each by the shortest end of its path that no other one shares.

    Raises:
        UsageError: a folder does not exist, is given twice, or contains no part of a run.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if not path.is_dir() or not any(any(path.glob(name)) for name in EVIDENCE):
            raise UsageError(
                f"{path}{'' if path.exists() else ' does not exist'}: expected the folder of a run, which contains "
                "metrics.jsonl and config.json, such as saved_info/latent_flow/DATASET/EXP"
            )
        if resolved.count(place) > 1:
            raise UsageError(f"{path} is given twice: give each run once")
    return [_read_run(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths by which all of them differ."""
    most = max(len(path.parts) for path in paths)
    for count in range(1, most + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> RunRecord:
    run = RunRecord(folder, name)
    try:
        run.config = read_json(folder / "config.json")
    except UsageError as error:
        run.problems.append(str(error))
    run.entries = _read_metrics(folder / "metrics.jsonl", run.problems)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            run.checkpoints.append(Checkpoint(path.name, read_header(path)))
        except UsageError as error:
            run.problems.append(str(error))
    run.grids = _grids(folder / "samples")
    for path in sorted((folder / "samples").glob("*.json")):
        if path.stem not in ("reconstructions", "nearest"):
            run.scores += _read_scores(path, run.problems)
    return run


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, ordered by step."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
        return []
    entries, bad = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
            entries.append(entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            bad += 1
    if bad:
        problems.append(f"{path}: {bad} of {len(lines)} lines could not be read")
    return sorted(entries, key=lambda entry: entry["step"])


def _grids(folder: Path) -> list[Grid]:
    """The sample grids step_<step>.png of training."""
    matches: Iterable[tuple[Path, re.Match[str] | None]] = (
        (path, re.fullmatch(r"step_(\d+)\.png", path.name)) for path in folder.glob("step_*.png")
    )
    return sorted((Grid(int(match[1]), path) for path, match in matches if match), key=lambda grid: grid.step)


def _read_scores(path: Path, problems: list[str]) -> list[Score]:
    """The scores in a file of results; none in results without scores, such as trajectories."""
    try:
        result = read_json(path)
    except UsageError as error:
        problems.append(str(error))
        return []
    stored = result.get("scores")
    listed = list(stored.values()) if isinstance(stored, dict) else []
    listed = listed or [
        {"metric": name if name != "value" else result.get("metric", "score"), "value": result[name]}
        | {"error": result.get("error", result.get("standard_error"))}
        for name in SCORES
        if name in result
    ]
    return [
        Score(path, str(each.get("metric", "score")), float(each["value"]), _error_of(each), result)
        for each in listed
        if isinstance(each, dict) and is_number(each.get("value"))
    ]


def _error_of(score: dict[str, Any]) -> float | None:
    error = score.get("error")
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None
