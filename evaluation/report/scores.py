"""The table of scores, each with the settings that produced it."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.report.chart import format_number
from evaluation.report.markup import card, duration, run_card, table
from evaluation.report.pictures import embed_picture
from evaluation.report.run_record import RunRecord, Score
from evaluation.report.sections import score_text

__all__ = ["scores"]


def scores(runs: Sequence[RunRecord]) -> str:
    """All scores, then the sampled pictures and the complete results."""
    several = len(runs) > 1
    head = (["Run"] if several else []) + ["Metric", "Score", "Samples", "How it was made"]
    rows = [
        ([run.name] if several else []) + [score.metric, score_text(score), _count(score), describe_result(score)]
        for run in runs
        for score in run.scores
    ]
    if not rows:
        return ""
    cards = []
    for index, run in enumerate(runs):
        results = {score.source: score.result for score in run.scores}
        content = "".join(_result(path, result, run, opened=len(results) == 1) for path, result in results.items())
        cards += [run_card(index, run, content, several)] if content else []
    note = '<p class="soft">Compare scores only if samples, features and reference are the same. ± is a standard deviation.</p>'
    return card(note + table(head, rows, stacked=True)) + f'<div class="cards">{"".join(cards)}</div>'


def describe_result(score: Score) -> str:
    """The settings of a result, as one line."""
    result = score.result
    parts = [
        _checkpoint(result),
        _solver(result.get("solver")),
        _guidance(result.get("guidance")),
        f"seed {result['seed']}" if "seed" in result else "",
        f"{format_number(result['network_evaluations'])} network evaluations per sample"
        if isinstance(result.get("network_evaluations"), int | float)
        else "",
        str(result.get("precision") or ""),
        f"features {result['features']}" if result.get("features") else "",
        _reference(result.get("reference")),
        f"as {result['image_format']}" if result.get("image_format") not in (None, "png") else "",
        duration(result["seconds"]) if isinstance(result.get("seconds"), int | float) else "",
        *(f"warning: {text}" for text in result.get("warnings") or ()),
    ]
    return "; ".join(filter(None, parts))


def _result(path: Path, result: dict[str, Any], run: RunRecord, opened: bool) -> str:
    """The picture of a result's samples, and all its entries."""
    grid, picture = result.get("grid"), ""
    if isinstance(grid, str) and (path.parent / Path(grid).name).exists():
        picture = embed_picture(path.parent / Path(grid).name, f"Samples of {run.name}, {path.stem}", run)
    entries = escape(json.dumps(result, indent=2))
    return (
        f"<details{' open' if opened else ''}><summary>{escape(path.stem)}</summary>{picture}"
        f"<details><summary>All entries of {escape(path.name)}</summary><pre tabindex='0'>{entries}</pre></details></details>"
    )


def _count(score: Score) -> str:
    count = score.result.get("samples", score.result.get("images"))
    return f"{count:,}" if isinstance(count, int) else "not recorded"


def _checkpoint(result: dict[str, Any]) -> str:
    step, digest = result.get("step"), result.get("weights_sha256")
    name = Path(str(result.get("checkpoint", ""))).name
    at = f" at step {step:,}" if isinstance(step, int) else ""
    return f"{name}{at}{f' (weights {str(digest)[:12]})' if digest else ''}"


def _solver(solver: Any) -> str:
    if not isinstance(solver, dict):
        return ""
    steps = f"step size {solver['step_size']}" if solver.get("step_size") else _steps(solver.get("num_steps"))
    shift = f", time shift {solver['time_shift']:g}" if solver.get("time_shift", 1.0) != 1.0 else ""
    return f"{solver.get('method')} with {steps} on a {solver.get('time_grid')} grid{shift}"


def _steps(count: Any) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _guidance(guidance: Any) -> str:
    if not isinstance(guidance, dict) or guidance.get("cfg_scale") in (None, 1.0):
        return "no classifier-free guidance" if isinstance(guidance, dict) else ""
    low, high = guidance.get("cfg_interval") or (0.0, 1.0)
    where = "" if (low, high) == (0.0, 1.0) else f" for t from {low:g} to {high:g}"
    return f"guidance {guidance['cfg_scale']:g}{where}"


def _reference(reference: Any) -> str:
    if not isinstance(reference, dict):
        return ""
    place = reference.get("dataset") or reference.get("folder") or reference.get("file") or reference.get("lmdb")
    name = " ".join(filter(None, (str(place or ""), str(reference.get("split") or ""))))
    images = reference.get("images")
    return f"against {images:,} images of {name}" if isinstance(images, int) else f"against {name}"
