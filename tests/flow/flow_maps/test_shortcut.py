import pytest
import torch

from flow.flow_maps.objective import MapDraws
from flow.flow_maps.shortcut import Shortcut, ShortcutOptions
from options import UsageError
from tests.flow.flow_maps.gaussian import Streams, exact, gradients, opposite_pairs, transport, velocity, wide


def test_lengths_are_halves_of_one_and_times_are_their_multiples():
    draws = Shortcut(ShortcutOptions(shortcut_steps=8, flow_share=0.0)).draw(Streams(count=3000))
    lengths = (draws.t - draws.until).tolist()
    assert sorted(set(lengths)) == [1 / 4, 1 / 2, 1.0]
    assert all(800 < lengths.count(length) < 1200 for length in set(lengths))
    assert set(draws.t[draws.t - draws.until == 0.25].tolist()) == {0.25, 0.5, 0.75, 1.0}


def test_the_shortest_steps_are_two_steps_of_the_velocity():
    """With 8 steps, the target of a step of length 1/4 is two Euler steps of length 1/8."""
    t = torch.full((6,), 0.75, dtype=torch.float64)
    pairs = opposite_pairs(MapDraws(t, t - 0.25))
    x = (0.25 * pairs.data + 0.75 * pairs.noise)[:6]
    first = velocity(t, x)
    target = (first + velocity(t - 0.125, x - 0.125 * first)) / 2
    found = gradients(Shortcut(ShortcutOptions(sigma_min=0.0, shortcut_steps=8)), pairs)[:6]
    torch.testing.assert_close(found, 2 * (exact(t, x, until=t - 0.25) - target) / x[0].numel())


def test_half_steps_stay_within_four_standard_deviations():
    t = torch.ones(6, dtype=torch.float64)
    data, noise = torch.zeros(6, 2, 2, 2).double(), torch.full((6, 2, 2, 2), 5.0).double()
    seen = []

    def network(t, x, condition, until=None):
        seen.append(x)
        return exact(t, x, condition, until)

    Shortcut(ShortcutOptions(sigma_min=0.0)).loss(network, data, noise, MapDraws(t, t - 0.25), None)
    assert transport(seen[0], wide(t), wide(t - 0.125)).max() > 4
    assert seen[1].max() == 4


def test_another_number_of_steps_than_a_power_of_two_is_refused():
    with pytest.raises(UsageError, match="--shortcut_steps 12: expected a power of two"):
        ShortcutOptions(shortcut_steps=12)
