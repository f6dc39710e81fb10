from typing import NamedTuple

import pytest
import torch

from flow.guidance import guided_velocity


class Ask(NamedTuple):
    labels: torch.Tensor
    dense: torch.Tensor | None = None


class Recorder:
    """A network that mixes time, point and condition non-linearly, sample by sample, and remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, t, x, condition):
        self.calls.append((t, x, condition))
        mixed = torch.sin(x + t.view(-1, 1, 1, 1)) * (1 + condition.labels.view(-1, 1, 1, 1))
        return mixed if condition.dense is None else mixed + condition.dense


X = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor(0.3, dtype=torch.float64)
LABELS, NULL = torch.arange(4), torch.full((4,), 9)


def both(scale, asked=Ask(LABELS), null=Ask(NULL)):  # noqa: B008
    network = Recorder()
    return guided_velocity(network, asked, null, scale)(T, X), network


def test_scale_one_is_the_condition_alone_and_does_not_evaluate_null():
    velocity, network = both(1.0)
    assert torch.equal(velocity, Recorder()(T.expand(4), X, Ask(LABELS)))
    (call,) = network.calls
    assert call[1].shape[0] == 4
    assert torch.equal(call[2].labels, LABELS)


def test_scale_zero_is_the_null_condition():
    torch.testing.assert_close(both(0.0)[0], Recorder()(T.expand(4), X, Ask(NULL)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_velocity_is_linear_in_the_scale(scale):
    null, conditional = both(0.0)[0], both(1.0)[0]
    torch.testing.assert_close(both(scale)[0], (1 - scale) * null + scale * conditional, rtol=0, atol=1e-12)


def test_batched_halves_equal_separate_evaluations():
    maps = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked, null = Ask(LABELS, maps), Ask(NULL, torch.zeros_like(maps))
    velocity, network = both(2.0, asked, null)
    (call,) = network.calls  # one batch of both
    assert torch.equal(call[0], T.expand(8))
    assert isinstance(call[2], Ask)
    conditional, unconditional = (Recorder()(T.expand(4), X, condition) for condition in (asked, null))
    torch.testing.assert_close(velocity, unconditional + 2 * (conditional - unconditional), rtol=0, atol=1e-14)


def test_scale_has_no_effect_where_the_condition_is_null():
    velocity, _ = both(5.0, Ask(NULL), Ask(NULL))
    torch.testing.assert_close(velocity, both(1.0, Ask(NULL), Ask(NULL))[0], rtol=0, atol=1e-12)
