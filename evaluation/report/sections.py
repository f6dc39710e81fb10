"""The parts of the page that show what a run learned: overview, curves, sample grids and other pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.report.chart import draw_chart, format_number, run_legend
from evaluation.report.curves import curve_panels
from evaluation.report.markup import card, definitions, duration, run_card
from evaluation.report.pictures import embed_picture
from evaluation.report.run_record import Grid, RunRecord, Score
from options import UsageError
from runtime.files import read_json

__all__ = ["curves", "grids", "nearest", "overview", "reconstructions", "score_text"]

SMALL_DISTANCE = (
    "A model that copies its training images has much smaller distances for samples than for held-out images."
)


def overview(runs: Sequence[RunRecord]) -> str:
    """The main facts of each run."""
    cards = []
    for index, run in enumerate(runs):
        header, options = run.header, run.options
        losses = [loss for _, loss in run.series("validation", "loss")]
        seconds = [value for _, value in run.series("train", "seconds")]
        facts = {
            "Network": header.model_type if header else str(options.get("model_type") or ""),
            "Data": header.dataset.name if header else str(options.get("dataset", "")),
            "Objective": header.objective if header else str(options.get("objective", "")),
            "Steps": f"{run.last_step:,}" + ("" if header is None or header.ended else " (the run has not ended)"),
            "Training time": duration(seconds[-1]) if seconds else "",
            "Validation loss": _last_and_best(losses),
            **_scores_by_metric(run),
        }
        cards.append(run_card(index, run, definitions(facts), len(runs) > 1))
    return f'<div class="cards">{"".join(cards)}</div>'


def curves(runs: Sequence[RunRecord]) -> str:
    """Charts of all metrics, the minor ones in a closed details element."""
    last_step, charts = max(run.last_step for run in runs), {False: "", True: ""}
    for panel in curve_panels(runs):
        charts[panel.minor] += draw_chart(panel, len(runs) > 1, last_step)
    main, minor = (f'<div class="charts">{content}</div>' if content else "" for content in charts.values())
    legend = run_legend([run.name for run in runs]) if main and len(runs) > 1 else ""
    return legend + main + (f"<details><summary>More metrics</summary>{minor}</details>" if minor else "")


def grids(runs: Sequence[RunRecord], most: int) -> str:
    """Sample grids. A slider selects the step.

    Args:
        runs: the runs.
        most: grids to show per run; evenly spaced ones are chosen.
    """
    steps, cards = set[int](), []
    for index, run in enumerate(runs):
        frames = []
        for grid in _spread(run.grids, most):
            if picture := embed_picture(grid.path, f"Sample grid of {run.name} at step {grid.step:,}", run):
                steps.add(grid.step)
                caption = f'<figcaption class="soft">step {grid.step:,}</figcaption>'
                frames.append(f'<figure data-step="{grid.step}">{picture}{caption}</figure>')
        if frames:
            cards.append(run_card(index, run, f'<div class="frames">{"".join(frames)}</div>', len(runs) > 1))
    if not cards:
        return ""
    last = len(steps) - 1
    slider = (
        f'<div class="slider" data-steps="{json.dumps(sorted(steps))}"><label for="step">Training step</label>'
        f'<input id="step" type="range" min="0" max="{last}" value="{last}" step="1"><output for="step"></output></div>'
    )
    note = '<p class="soft">Noise and labels are the same at every step.</p>'
    return f'{note}{slider if last else ""}<div class="cards">{"".join(cards)}</div>'


def reconstructions(runs: Sequence[RunRecord]) -> str:
    """Held-out images above their reconstructions by the autoencoder."""

    def note(facts: Mapping[str, Any]) -> str:
        ratio = facts.get("psnr_db")
        text = f"PSNR {ratio:.2f} dB over the images shown. " if isinstance(ratio, float) else ""
        return f"{text}Above: held-out images. Below: encoded and decoded."

    return _pictures(runs, "reconstructions", "Held-out images above their reconstructions", note)


def nearest(runs: Sequence[RunRecord]) -> str:
    """Samples next to their nearest training images, if they have been searched for."""

    def note(facts: Mapping[str, Any]) -> str:
        described = ""
        if {"samples", "held_out"} <= facts.keys():
            described = (
                f"Median distance to the nearest of {facts.get('training_images', 0):,} training images: "
                f"{format_number(facts['samples'])} for samples, {format_number(facts['held_out'])} for held-out images "
                f"({facts.get('distance', '')}; samples from step {facts.get('step', 0):,}). "
            )
        if facts.get("memorized"):
            share, error = facts["memorized"]
            other, other_error = facts["memorized_held_out"]
            described += (
                f"Memorized: {share:.0%} ± {error:.0%} of the samples, {other:.0%} ± {other_error:.0%} of the held-out "
                "images. A memorized one is less than a third as far from its nearest training image as from its second "
                "nearest, so it is close to one image in particular. A model that copies nothing has about the share of the "
                "held-out images. "
            )
        return f"{described}First row: samples. Below each: its three nearest training images. {SMALL_DISTANCE}"

    found = _pictures(runs, "nearest", "Samples, each above its three nearest training images", note)
    return found or card(
        "<p class='soft'>Not computed. Add <code>--nearest 16</code> to the command of this report.</p>"
    )


def _pictures(runs: Sequence[RunRecord], name: str, text: str, note: Callable[[Mapping[str, Any]], str]) -> str:
    """The picture samples/NAME.png of each run that has it, with a note from the facts in NAME.json."""
    cards = []
    for index, run in enumerate(runs):
        path = run.folder / "samples" / f"{name}.png"
        if not path.exists():
            continue
        facts = _facts(run, f"{name}.json")
        if picture := embed_picture(path, f"{text}, {run.name}", run):
            content = f'<p class="soft">{note(facts)}</p><div class="wide">{picture}</div>'
            cards.append(run_card(index, run, content, len(runs) > 1))
    return "".join(cards)


def score_text(score: Score) -> str:
    """A score with its error bar."""
    error = "" if score.error is None else f" ± {score.error:.2g}"
    return f"{format_number(score.value)}{error}"


def _last_and_best(losses: Sequence[float]) -> str:
    """The last loss, and the lowest one if that is another."""
    if not losses:
        return ""
    return f"{losses[-1]:.4f}" + (f", {min(losses):.4f} at best" if min(losses) < losses[-1] else "")


def _scores_by_metric(run: RunRecord) -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    for score in run.scores:
        texts.setdefault(score.metric, []).append(score_text(score))
    return {metric: ", ".join(found) for metric, found in texts.items()}


def _facts(run: RunRecord, name: str) -> dict[str, Any]:
    try:
        return read_json(run.folder / "samples" / name)
    except UsageError as error:
        run.problems.append(str(error))
        return {}


def _spread(items: Sequence[Grid], most: int) -> list[Grid]:
    """At most `most` items, evenly spaced, with the last one and, if there is room, the first."""
    if len(items) <= most:
        return list(items)
    return (
        [items[(len(items) - 1) * (number + 1) // most] for number in range(most)]
        if most < 2
        else [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]
    )
