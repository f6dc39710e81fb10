import math
from pathlib import Path

import pytest

from evaluation.report.curves import MOST_POINTS, curve_panels
from evaluation.report.run_record import RunRecord, Score


def run_of(entries, name="a", scores=()):
    return RunRecord(
        Path(name),
        name,
        [{"step": step, "kind": kind, **values} for step, kind, values in entries],
        scores=list(scores),
    )


def panels_of(*runs):
    return {panel.title: panel for panel in curve_panels(runs)}


def test_training_and_validation_loss_share_a_panel():
    panel = panels_of(
        run_of([(1, "train", {"loss": 3.0}), (2, "train", {"loss": 2.0}), (2, "validation", {"loss": 1.0})])
    )["Loss"]
    assert [(series.kind, [tuple(point)[:2] for point in series.points]) for series in panel.series] == [
        ("training", [(1, 3.0), (2, 2.0)]),
        ("validation", [(2, 1.0)]),
    ]
    assert panel.metrics == ("train/loss", "validation/loss")


def test_unknown_metrics_get_panels_of_their_own():
    found = panels_of(
        run_of([(1, "train", {"dispersive": 1.0}), (1, "spike", {"loss": 9.0, "note": "text", "flag": True})])
    )
    assert list(found) == ["dispersive", "spike: loss"]
    assert [found[name].minor for name in found] == [False, True]


def test_values_that_are_not_finite_are_counted_and_left_out():
    series = panels_of(
        run_of([(1, "train", {"lr": math.nan}), (2, "train", {"lr": 1.0}), (3, "train", {"lr": math.inf})])
    )
    (series,) = series["Learning rate"].series
    assert ([point.step for point in series.points], series.missing) == ([2], 2)


def test_many_values_are_averaged_in_groups():
    count = 3 * MOST_POINTS
    (series,) = panels_of(run_of([(step, "train", {"lr": float(step)}) for step in range(count)]))[
        "Learning rate"
    ].series
    assert (len(series.points), series.averaged) == (MOST_POINTS, 3)
    assert tuple(series.points[1])[:2] == (4.0, 4.0)  # the mean of 3, 4 and 5


def test_scores_of_samples_have_error_bars_next_to_those_of_validation():
    score = Score(Path("x.json"), "FD (x)", 0.5, 0.1, {"step": 20})
    unplaced = Score(Path("y.json"), "FD (x)", 0.7, 0.1, {})
    run = run_of([(10, "validation", {"FD (x)": 0.6})], scores=[score, unplaced])
    panel = panels_of(run)["FD (x)"]
    assert [[tuple(point) for point in series.points] for series in panel.series] == [
        [(10, 0.6, None)],
        [(20, 0.5, 0.1)],
    ]


def test_curves_of_several_runs_are_named_after_them():
    runs = [run_of([(1, "train", {"lr": 1.0})], name) for name in ("a", "b")]
    assert [(series.run, series.label) for series in panels_of(*runs)["Learning rate"].series] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("entries", [[], [(1, "train", {"note": "text"})]])
def test_no_numbers_give_no_panels(entries):
    assert panels_of(run_of(entries)) == {}
