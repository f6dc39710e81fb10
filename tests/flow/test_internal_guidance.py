"""Internal guidance: v_k + w (v - v_k) from one forward pass, alone and together with classifier-free guidance."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from flow.guidance import GuidanceOptions, GuidedVelocity, VelocityNetwork
from flow.losses.contrast import Correction
from flow.losses.options import FlowMatchingOptions
from flow.objectives import FlowMatching
from flow.solvers import SOLVERS, SolverOptions, solve
from options import as_json

NULL = 9


class Request(NamedTuple):
    labels: torch.Tensor


class Tapped(NamedTuple):
    velocity: torch.Tensor


class Output(NamedTuple):
    velocity: torch.Tensor
    tapped: Tapped


class TappedNetwork:
    """A network with an auxiliary head, which records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, t, x, condition, tapped=False):
        self.calls.append((len(x), tapped))
        velocity = torch.sin(x + t.view(-1, 1, 1, 1)) * (1 + condition.labels.view(-1, 1, 1, 1))
        return Output(velocity, Tapped(head(t, x, condition))) if tapped else velocity


def head(t, x, condition):
    return 0.5 * x + t.view(-1, 1, 1, 1) * condition.labels.view(-1, 1, 1, 1)


X = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
TIMES, LABELS = torch.tensor([0.9, 0.5, 0.1, 0.4]), torch.arange(4)


def guided(read=lambda network: network, **options):
    network = TappedNetwork()
    own = VelocityNetwork(network, read)
    options = GuidanceOptions(**options)
    nulls = torch.full((4,), NULL)
    return GuidedVelocity(own, Request(LABELS), Request(nulls), options, internal=own.internally_guided), network


def plain(labels=LABELS, t=TIMES):
    return TappedNetwork()(t, X, Request(labels))


def extrapolated(scale, labels=LABELS, t=TIMES):
    worse = head(t, X, Request(labels))
    return worse + scale * (plain(labels, t) - worse)


def test_scale_one_is_the_plain_network_bit_for_bit():
    velocity, network = guided(internal_guidance=1.0)
    assert torch.equal(velocity(TIMES, X), plain())
    assert network.calls == [(4, False)]
    own = VelocityNetwork(TappedNetwork(), lambda network: network)
    assert torch.equal(own.internally_guided(torch.ones(4))(TIMES, X, Request(LABELS)), plain())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.9])
def test_one_forward_pass_extrapolates_from_the_head(scale):
    velocity, network = guided(internal_guidance=scale)
    torch.testing.assert_close(velocity(TIMES, X), extrapolated(scale))
    assert network.calls == [(4, True)]
    assert velocity.evaluations(4).tolist() == [1, 1, 1, 1]


def test_outside_the_interval_the_velocity_is_the_networks():
    velocity, _ = guided(internal_guidance=1.9, internal_guidance_interval=(0.3, 0.6))
    found = velocity(TIMES, X)
    assert torch.equal(found[[0, 2]], plain()[[0, 2]])
    torch.testing.assert_close(found[[1, 3]], extrapolated(1.9)[[1, 3]])


def test_with_classifier_free_guidance_it_applies_to_the_conditional_velocity():
    velocity, network = guided(cfg_scale=3.0, internal_guidance=1.9)
    nulls = torch.full((4,), NULL)
    expected = plain(nulls) + 3 * (extrapolated(1.9) - plain(nulls))
    torch.testing.assert_close(velocity(TIMES, X), expected, rtol=1e-5, atol=1e-4)
    assert network.calls == [(8, True)]


def test_each_kind_of_guidance_has_its_own_interval():
    intervals = {"cfg_interval": (0.2, 0.45), "internal_guidance_interval": (0.3, 1.0)}
    found = guided(cfg_scale=3.0, internal_guidance=1.9, **intervals)[0](TIMES, X)
    torch.testing.assert_close(found[:2], extrapolated(1.9)[:2])  # 0.9, 0.5: internal guidance alone
    torch.testing.assert_close(found[2], plain()[2])  # 0.1: neither
    null = plain(torch.full((4,), NULL))[3]
    torch.testing.assert_close(found[3], null + 3 * (extrapolated(1.9)[3] - null), rtol=1e-5, atol=1e-4)  # 0.4: both


def test_autoguidances_guide_has_no_internal_guidance():
    own = VelocityNetwork(TappedNetwork(), lambda network: network)
    options = GuidanceOptions(2.0, internal_guidance=1.9)
    guide = TappedNetwork()
    velocity = GuidedVelocity(own, Request(LABELS), Request(LABELS), options, guide, internal=own.internally_guided)
    torch.testing.assert_close(velocity(TIMES, X), plain() + 2 * (extrapolated(1.9) - plain()))
    assert guide.calls == [(4, False)]


def test_selected_rows_equal_rows_of_the_whole():
    rows = torch.tensor([3, 1])
    velocity, _ = guided(cfg_scale=2.0, internal_guidance=1.9, internal_guidance_interval=(0.3, 0.6))
    assert torch.equal(velocity.select_rows(rows)(TIMES[rows], X[rows]), velocity(TIMES, X)[rows])


def test_breakpoints_are_the_ends_of_the_intervals_that_act():
    both = {"cfg_interval": (0.2, 0.7), "internal_guidance_interval": (0.3, 1.0)}
    assert set(guided(cfg_scale=2.0, internal_guidance=1.5, **both)[0].breakpoints) == {0.2, 0.3, 0.7}
    assert set(guided(internal_guidance=1.5, **both)[0].breakpoints) == {0.3}
    assert set(guided(cfg_scale=2.0, **both)[0].breakpoints) == {0.2, 0.7}
    same = {"cfg_interval": (0.2, 0.7), "internal_guidance_interval": (0.2, 0.7)}
    assert len(guided(cfg_scale=2.0, internal_guidance=1.5, **same)[0].breakpoints) == 2


def test_a_restricted_velocity_decides_by_the_midpoint():
    velocity, network = guided(internal_guidance=1.9, internal_guidance_interval=(0.3, 0.6))
    torch.testing.assert_close(velocity.restrict(0.6, 0.3)(TIMES, X), extrapolated(1.9))
    assert torch.equal(velocity.restrict(0.3, 0.0)(TIMES, X), plain())
    assert network.calls == [(4, True), (4, False)]
    assert velocity.restrict(0.6, 0.3).breakpoints == ()


@pytest.mark.parametrize("method", ["euler", "heun", "dpm"])
def test_a_solver_integrates_piece_by_piece(method):
    """No step crosses an end of either interval: the result equals the pieces', each with a velocity that never jumps."""
    options = {"internal_guidance": 1.9, "internal_guidance_interval": (0.3, 1.0), "cfg_scale": 2.0}
    options |= {"cfg_interval": (0.2, 0.7)}
    found = solve(guided(**options)[0], X, SolverOptions(method, 10)).x
    x, ends = X, [1.0, 0.7, 0.3, 0.2, 0.0]
    for end, start in pairwise(ends):
        acting = {"internal_guidance": 1.9} if start >= 0.3 else {}
        acting |= {"cfg_scale": 2.0} if 0.2 <= start < 0.7 else {}
        times = [round(end - 0.1 * step, 10) for step in range(round((end - start) * 10) + 1)]
        piece = guided(**acting)[0]
        x = SOLVERS[method].run(piece, x, times, SolverOptions(method, 10), None)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_affine_readings_of_the_network_commute_with_it():
    """An objective that predicts data reads v = (x - data) / t. Guiding its outputs equals guiding its velocities."""

    def read(network):
        return lambda t, x, condition: (x - network(t, x, condition)) / t.view(-1, 1, 1, 1)

    velocity, worse = read(TappedNetwork())(TIMES, X, Request(LABELS)), read(head)(TIMES, X, Request(LABELS))
    found = guided(read, internal_guidance=1.9)[0](TIMES, X)
    torch.testing.assert_close(found, worse + 1.9 * (velocity - worse), rtol=1e-5, atol=1e-4)


def test_a_data_prediction_is_read_from_both_outputs():
    path = FlowMatchingOptions(prediction="data")
    read = FlowMatching(path, path).velocity
    velocity, worse = read(TappedNetwork())(TIMES, X, Request(LABELS)), read(head)(TIMES, X, Request(LABELS))
    found, network = guided(read, internal_guidance=1.9)
    torch.testing.assert_close(found(TIMES, X), worse + 1.9 * (velocity - worse), rtol=1e-5, atol=1e-4)
    assert network.calls == [(4, True)]


def test_a_contrastive_networks_internally_guided_velocity_is_corrected_where_classifier_free_guidance_acts():
    own = VelocityNetwork(TappedNetwork(), lambda network: network)
    correction = Correction(0.4, torch.randn(1, 2, 3, 3), null=NULL)
    options = GuidanceOptions(3.0, (0.3, 1.0), internal_guidance=1.9)
    nulls = torch.full((4,), NULL)
    parts = Request(LABELS), Request(nulls), options
    found = GuidedVelocity(own, *parts, correction=correction, internal=own.internally_guided)(TIMES, X)
    better = correction(extrapolated(1.9), Request(LABELS))
    expected = plain(nulls) + 3 * (better - plain(nulls))
    expected[2] = extrapolated(1.9)[2]  # 0.1 is outside the interval
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_the_better_half_of_two_gaussians():
    """With v and v_k the velocities of N(0, s^2) and N(0, s_k^2), the result is that of another linear field."""
    t, scale = torch.tensor(0.5), 1.9

    def field(t, x, spread):
        t = t.view(-1, 1, 1, 1)
        return (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2) * x

    def network(t, x, condition, tapped=False):
        return Output(field(t, x, 1.0), Tapped(field(t, x, 1.5))) if tapped else field(t, x, 1.0)

    own = VelocityNetwork(network, lambda network: network)
    options = GuidanceOptions(internal_guidance=scale)
    found = GuidedVelocity(own, Request(LABELS), Request(LABELS), options, internal=own.internally_guided)(t, X)
    slope = scale * 0.0 + (1 - scale) * (0.5 - 0.5 * 1.5**2) / (0.25 * 1.5**2 + 0.25)
    torch.testing.assert_close(found, slope * X)


def test_without_a_head_it_is_refused():
    with pytest.raises(ValueError, match="internal"):
        GuidedVelocity(TappedNetwork(), Request(LABELS), Request(LABELS), GuidanceOptions(internal_guidance=2.0))


def test_settings_of_samples_without_it_are_those_of_older_versions():
    assert as_json(GuidanceOptions(4.0)) == {"cfg_scale": 4.0, "cfg_interval": [0.0, 1.0], "cfg_channels": 0}
    assert as_json(GuidanceOptions(internal_guidance=1.9))["internal_guidance"] == 1.9
    assert repr(GuidanceOptions(4.0)) == "GuidanceOptions(cfg_scale=4.0, cfg_interval=(0.0, 1.0), cfg_channels=0)"
    assert "internal_guidance=1.9" in repr(GuidanceOptions(internal_guidance=1.9))
