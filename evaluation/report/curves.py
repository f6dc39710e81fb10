"""The curves of a report: which metrics are drawn together, and their points."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from evaluation.report.run_record import RunRecord

__all__ = ["Panel", "Point", "Series", "curve_panels"]

MOST_POINTS = 300  # per series; a chart is about as many pixels wide
QUARTERS = ("0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1")
# Metrics with a panel of their own, in the order of the page: title and unit. Others have panels under their own names.
TITLES = {
    ("validation", "excess"): ("Excess loss", "validation"),
    ("train", "lr"): ("Learning rate", ""),
    ("train", "images_per_s"): ("Throughput", "images per second"),
    ("train", "grad_norm"): ("Gradient norm", ""),
}
MINOR = {  # rarely of interest
    ("validation", "objective"): ("Criterion of best.safetensors", ""),
    ("train", "seconds"): ("Time", "seconds"),
    ("train", "epoch"): ("Epoch", ""),
    ("train", "skipped"): ("Skipped steps", "per logged interval"),
}
LATER = "scored after training"
LINEAR = {("train", "lr"), ("train", "seconds"), ("train", "epoch")}  # never on a logarithmic axis
LOSS = {("train", "loss"): "training", ("validation", "loss"): "validation"}


class Point(NamedTuple):
    """A value at a step, with its standard deviation if there is one."""

    step: float
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        run: index of the run, which determines the color.
        label: its name in the text.
        kind: what distinguishes it from the run's other curves in the same panel; may be empty.
        points: finite points, ordered by step.
        marked: draw a marker at each point, because there are few.
        joined: connect the points by a line.
        averaged: the number of recorded values that one point averages.
        missing: the number of values that were not finite.
    """

    run: int
    label: str
    kind: str
    points: tuple[Point, ...]
    marked: bool = False
    joined: bool = True
    averaged: int = 1
    missing: int = 0


@dataclass(frozen=True)
class Panel:
    """Curves in one coordinate system.

    Args:
        title, unit: what the values are; the unit may be empty.
        series: the curves.
        metrics: the names of the metrics, as TensorBoard shows them.
        linear: never use a logarithmic axis.
        minor: rarely of interest.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    metrics: tuple[str, ...] = ()
    linear: bool = False
    minor: bool = False


def curve_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """All panels that have points. Each numeric metric of metrics.jsonl is in one of them."""
    quarters = {("validation", f"loss_q{number + 1}"): span for number, span in enumerate(QUARTERS)}
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.metrics()))
    events = [metric for metric in metrics if metric[0] not in ("train", "validation")]
    special = {*LOSS, *quarters, *TITLES, *MINOR, *events}
    others = [metric for metric in metrics if metric not in special]
    panels = [_panel(runs, "Loss", "", LOSS)]
    panels += [_panel(runs, f"Validation loss, t in {span}", "", {metric: ""}) for metric, span in quarters.items()]
    panels += _score_panels(runs, [metric for metric in others if metric[0] == "validation"])
    panels += [_panel(runs, *TITLES[metric], {metric: ""}) for metric in TITLES]
    panels += [_panel(runs, name, kind, {(kind, name): ""}) for kind, name in others if kind == "train"]
    minor = [_panel(runs, *MINOR[metric], {metric: ""}) for metric in MINOR]
    minor += [_panel(runs, f"{kind}: {name}", "", {(kind, name): ""}, joined=False) for kind, name in events]
    panels += [replace(panel, minor=True) for panel in minor]
    return [panel for panel in panels if panel.series]


def _panel(
    runs: Sequence[RunRecord], title: str, unit: str, metrics: dict[tuple[str, str], str], joined: bool = True
) -> Panel:
    """A panel of metrics, given as (kind, name) and the word that distinguishes their curves."""
    found = list[Series]()
    for index, run in enumerate(runs):
        for (kind, name), word in metrics.items():
            label = ", ".join(filter(None, (run.name if len(runs) > 1 or not word else "", word)))
            found += _series(Series(index, label, word, (), kind != "train", joined), run.series(kind, name))
    return Panel(
        title, unit, tuple(found), tuple(f"{kind}/{name}" for kind, name in metrics), bool(LINEAR & metrics.keys())
    )


def _series(empty: Series, recorded: Sequence[tuple[int, float]]) -> Iterator[Series]:
    """The curve `empty` with the recorded values, averaged in groups if there are many; none without values."""
    finite = [Point(step, value) for step, value in recorded if math.isfinite(value)]
    size = max(1, -(-len(finite) // MOST_POINTS))
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    points = tuple(
        Point(sum(p.step for p in group) / len(group), sum(p.value for p in group) / len(group)) for group in groups
    )
    if recorded:
        marked = empty.marked or len(points) == 1
        yield replace(empty, points=points, marked=marked, averaged=size, missing=len(recorded) - len(finite))


def _score_panels(runs: Sequence[RunRecord], validated: Sequence[tuple[str, str]]) -> list[Panel]:
    """Panels of the scores in validation, and of scores in samples/ that record their checkpoint's step."""
    measured = [(index, score) for index, run in enumerate(runs) for score in run.scores if score.step is not None]
    names = list(dict.fromkeys([*(name for _, name in validated), *(score.metric for _, score in measured)]))
    panels = []
    for name in names:
        panel = _panel(runs, name, "", {("validation", name): "during training"})
        series = list(panel.series)
        for index, run in enumerate(runs):
            points = sorted(
                Point(score.step or 0, score.value, score.error)
                for owner, score in measured
                if owner == index and score.metric == name and math.isfinite(score.value)
            )
            label = f"{run.name}, {LATER}" if len(runs) > 1 else LATER
            series += [Series(index, label, LATER, tuple(points), marked=True, joined=False)] if points else []
        metrics = panel.metrics if ("validation", name) in validated else ()
        panels.append(Panel(name, "", tuple(series), metrics))
    return panels
