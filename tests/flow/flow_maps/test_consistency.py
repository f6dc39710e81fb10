import pytest
import torch

from flow.flow_maps.consistency import Consistency, ConsistencyOptions
from tests.flow.flow_maps.gaussian import Streams, bias, draws_of, exact, gradients, opposite_pairs, wide

OPTIONS = ConsistencyOptions(sigma_min=0.0)


def pairs_at(ratio):
    draws = draws_of(ratio)
    return opposite_pairs(draws._replace(until=torch.zeros_like(draws.t)))


def relative_bias(gap, network=exact):
    gradient = gradients(Consistency(OPTIONS), pairs_at(1 - gap), network)
    return bias(gradient) / gradient.abs().max().item()


def test_the_gradient_at_the_exact_flow_map_vanishes_with_the_gap():
    """The target is f at a point r of the same pair, whose mean is a Euler step away: an error of second order in t - r.

    The errors of single pairs are of first order.
    """
    biases = [relative_bias(gap) for gap in (0.04, 0.02, 0.01)]
    assert biases[0] < 0.05
    assert biases[1] == pytest.approx(biases[0] / 2, rel=0.3)
    assert biases[2] == pytest.approx(biases[1] / 2, rel=0.3)
    assert relative_bias(0.01, lambda *args, **named: 1.1 * exact(*args, **named)) > 5 * biases[2]


def test_the_first_stage_trains_a_denoiser():
    """With r = 0, the target is the data: the loss is the distance of x_t - t u from it, divided by t."""
    pairs = pairs_at(0.0)
    t = wide(pairs.draws.t)
    x_t = (1 - t) * pairs.data + t * pairs.noise
    losses = Consistency(OPTIONS).loss(exact, pairs.data, pairs.noise, pairs.draws, None)
    end = x_t - t * exact(pairs.draws.t, x_t, until=torch.zeros_like(pairs.draws.t))
    c = 0.00054 * 8**0.5
    expected = (((end - pairs.data).square().sum((1, 2, 3)) + c**2).sqrt() - c) / pairs.draws.t
    torch.testing.assert_close(losses, expected)


def test_the_gap_shrinks_from_stage_to_stage():
    options = ConsistencyOptions(consistency_stages=4, consistency_ratio=2.0)
    ratios = [Consistency(options).draw(Streams(step=step, last_step=8)).fraction[0].item() for step in range(9)]
    assert ratios == [0, 0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 0.875]


def test_intervals_end_at_the_data():
    draws = Consistency(OPTIONS).draw(Streams())
    assert draws.until.tolist() == [0] * 6
    assert draws.t.min() >= 1e-3
