"""Warnings about what a network can compute, but its objective did not train."""

import pytest

from flow.guidance import GuidanceOptions
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions
from models.dit import DiTOptions
from sampling.checks import warn_of_untrained
from tests.headers import header_of

MAP = DiTOptions(1, 1, until_embedding="interval")


@pytest.fixture
def warned(capsys):
    """`warned(objective, method, steps, ...)` is the warning about such samples; empty if there is none."""

    def warning(objective, method, steps=1, own=None, solver=None, published=None, **guidance):
        header = header_of(
            MAP, objective=objective, path=OBJECTIVES[objective].options(**(own or {})), published_file=published
        )
        warn_of_untrained(header, SolverOptions(method, steps, **(solver or {})), GuidanceOptions(**guidance))
        return capsys.readouterr().err

    return warning


@pytest.mark.parametrize("name", OBJECTIVES)
def test_average_velocities_need_an_objective_that_trains_them(name, warned):
    expected = f"--objective {name} trains velocities only, but --method flow_map uses average velocities"
    assert (expected in warned(name, "flow_map")) == (name in ("flow_matching", "reflow"))
    assert (warned(name, "dpm") == "") == (name != "consistency")


def test_other_projects_files_do_not_record_their_objective(warned):
    assert warned("flow_matching", "flow_map", published="meanflow.pt") == ""


def test_consistency_trains_steps_to_the_data_only(warned):
    assert "but --method dopri5 integrates the velocity: use --method flow_map" in warned("consistency", "dopri5")
    assert warned("consistency", "dopri5", own={"flow_share": 0.5}) == ""
    assert "but some of these 2 steps end before" in warned("consistency", "flow_map", 2)
    assert "some of these 2" in warned("consistency", "flow_map", 2, {"flow_share": 0.5}, {"reinject_noise": 0.5})
    assert warned("consistency", "flow_map", 1) == ""
    assert warned("consistency", "flow_map", 2, solver={"reinject_noise": 1.0}) == ""


def test_embedded_guidance_above_the_trained_scales(warned):
    own = {"largest_guidance": 8.0}
    assert "up to --largest_guidance 8, but --embedded_guidance 9 is larger" in warned(
        "improved_mean_flow", "flow_map", own=own, embedded_guidance=9.0
    )
    assert warned("improved_mean_flow", "flow_map", own=own, embedded_guidance=8.0) == ""
