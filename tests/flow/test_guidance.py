from typing import NamedTuple

import pytest
import torch

from flow.guidance import GuidanceOptions, GuidedVelocity
from options import UsageError


class Request(NamedTuple):
    labels: torch.Tensor
    dense: torch.Tensor | None = None


class Recorder:
    """A network that mixes time, point and condition nonlinearly for each sample, and records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, t, x, condition):
        self.calls.append((t, x, condition))
        mixed = torch.sin(x + t.view(-1, 1, 1, 1)) * (1 + condition.labels.view(-1, 1, 1, 1))
        return mixed if condition.dense is None else mixed + condition.dense


X = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor(0.3, dtype=torch.float64)
LABELS, NULL = torch.arange(4), torch.full((4,), 9)


def both(scale, asked=Request(LABELS), null=Request(NULL), t=T, **others):  # noqa: B008
    network = Recorder()
    return GuidedVelocity(network, asked, null, GuidanceOptions(scale, **others))(t, X), network


def test_scale_one_evaluates_only_the_condition():
    velocity, network = both(1.0)
    assert torch.equal(velocity, Recorder()(T.expand(4), X, Request(LABELS)))
    (call,) = network.calls
    assert call[1].shape[0] == 4
    assert torch.equal(call[2].labels, LABELS)


def test_scale_zero_is_the_null_condition():
    torch.testing.assert_close(both(0.0)[0], Recorder()(T.expand(4), X, Request(NULL)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_velocity_is_linear_in_the_scale(scale):
    null, conditional = both(0.0)[0], both(1.0)[0]
    torch.testing.assert_close(both(scale)[0], (1 - scale) * null + scale * conditional, rtol=0, atol=1e-12)


def test_batched_halves_equal_separate_evaluations():
    maps = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked, null = Request(LABELS, maps), Request(NULL, torch.zeros_like(maps))
    velocity, network = both(2.0, asked, null)
    (call,) = network.calls  # both halves in one batch
    assert torch.equal(call[0], T.expand(8))
    assert isinstance(call[2], Request)
    conditional, unconditional = (Recorder()(T.expand(4), X, condition) for condition in (asked, null))
    torch.testing.assert_close(velocity, unconditional + 2 * (conditional - unconditional), rtol=0, atol=1e-14)


def test_scale_has_no_effect_where_the_condition_is_null():
    velocity, _ = both(5.0, Request(NULL), Request(NULL))
    torch.testing.assert_close(velocity, both(1.0, Request(NULL), Request(NULL))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.2, True), (0.3, True), (0.8, True), (0.81, False)])
def test_outside_the_interval_only_the_condition_is_evaluated(t, guided):
    t = torch.tensor(t, dtype=torch.float64)
    velocity, network = both(2.0, t=t, cfg_interval=(0.2, 0.8))
    assert len(network.calls[0][1]) == (8 if guided else 4)
    assert torch.equal(velocity, both(2.0 if guided else 1.0, t=t)[0])


def test_one_batch_may_have_samples_inside_and_outside_the_interval():
    t = torch.tensor([0.9, 0.5, 0.1, 0.4], dtype=torch.float64)
    velocity, network = both(3.0, t=t, cfg_interval=(0.3, 0.6))
    ((times, points, condition),) = network.calls
    assert torch.equal(times, t[[0, 1, 2, 3, 1, 3]])
    assert torch.equal(points, X[[0, 1, 2, 3, 1, 3]])
    assert condition.labels.tolist() == [0, 1, 2, 3, 9, 9]
    plain, everywhere = both(1.0, t=t)[0], both(3.0, t=t)[0]
    assert torch.equal(velocity[[0, 2]], plain[[0, 2]])
    assert torch.equal(velocity[[1, 3]], everywhere[[1, 3]])


@pytest.mark.parametrize("interval", [(0.5,), (0.6, 0.2), (0.0, 1.5), (0.0, 0.5, 1.0)])
def test_invalid_intervals_are_refused(interval):
    for name in ("cfg_interval", "internal_guidance_interval"):
        with pytest.raises(UsageError, match=f"--{name}: expected two times 0 <= LOW <= HIGH <= 1, but"):
            GuidanceOptions(2.0, **{name: interval})


def test_a_guided_velocity_in_closed_form():
    """For classes N(m_k, s^2) and their mixture, the guided velocity is the velocity of the densities p_k^w p^(1 - w)."""
    means, spread, scale = torch.tensor([-1.0, 2.0], dtype=torch.float64), 0.5, 2.5

    def class_velocity(t, x, mean):
        variance = (1 - t) ** 2 * spread**2 + t**2
        return (t - (1 - t) * spread**2) / variance * (x - (1 - t) * mean) - mean

    def shares(t, x):
        variance = (1 - t) ** 2 * spread**2 + t**2
        return torch.softmax(-((x[..., None] - (1 - t[..., None]) * means) ** 2) / (2 * variance[..., None]), -1)

    def network(t, x, condition):
        t = t.view(-1, 1, 1, 1).expand_as(x)
        each = torch.stack([class_velocity(t, x, mean) for mean in means], -1)
        mixture = (shares(t, x) * each).sum(-1)
        labels = condition.labels.view(-1, 1, 1, 1)
        return torch.where(labels == 9, mixture, torch.where(labels == 0, each[..., 0], each[..., 1]))

    labels = torch.tensor([0, 1, 0, 1])
    velocity = GuidedVelocity(network, Request(labels), Request(NULL), GuidanceOptions(scale))(T, X)
    # In terms of scores, v = -(x + t s) / (1 - t). The guided score is the gradient of log p_k + (w - 1) (log p_k - log p).
    x = X.clone().requires_grad_()
    variance = (1 - T) ** 2 * spread**2 + T**2
    densities = -((x[..., None] - (1 - T) * means) ** 2) / (2 * variance)
    asked = densities.gather(-1, labels.view(-1, 1, 1, 1, 1).expand(*x.shape, 1))[..., 0]
    mixture = torch.logsumexp(densities, -1)
    (score,) = torch.autograd.grad((asked + (scale - 1) * (asked - mixture)).sum(), x)
    torch.testing.assert_close(velocity, -(X + T * score) / (1 - T), rtol=0, atol=1e-10)


def test_cfg_channels_limits_guidance_to_the_first_channels():
    velocity, _ = both(3.0, cfg_channels=1)
    assert torch.equal(velocity[:, :1], both(3.0)[0][:, :1])
    assert torch.equal(velocity[:, 1:], both(1.0)[0][:, 1:])
    assert torch.equal(both(3.0, cfg_channels=2)[0], both(3.0)[0])


def test_autoguidance_uses_a_weaker_network_with_the_same_condition():
    network, guide = Recorder(), Recorder()
    t = torch.tensor([0.9, 0.5, 0.1, 0.4], dtype=torch.float64)
    options = GuidanceOptions(2.0, cfg_interval=(0.3, 0.6))
    velocity = GuidedVelocity(network, Request(LABELS), Request(NULL), options, lambda *a: 0.5 * guide(*a))(t, X)
    assert len(network.calls[0][1]) == 4
    assert guide.calls[0][2].labels.tolist() == [1, 3]
    plain = both(1.0, t=t)[0]
    torch.testing.assert_close(velocity[[0, 2]], plain[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(velocity[[1, 3]], 1.5 * plain[[1, 3]], rtol=0, atol=1e-14)


def test_network_evaluations_are_counted():
    network = Recorder()
    velocity = GuidedVelocity(network, Request(LABELS), Request(NULL), GuidanceOptions(3.0, cfg_interval=(0.3, 0.6)))
    velocity(torch.tensor([0.9, 0.5, 0.1, 0.4], dtype=torch.float64), X)
    rows = torch.tensor([1, 2])
    velocity.select_rows(rows)(torch.tensor([0.5, 0.2], dtype=torch.float64), X[rows])
    velocity.select_rows(rows).select_rows(torch.tensor([1]))(T, X[2:3])
    assert velocity.evaluations(4).tolist() == [1, 2 + 2, 1 + 1 + 2, 2]
    assert sum(len(call[1]) for call in network.calls) == velocity.evaluations(4).sum()


def test_select_rows_equals_rows_of_the_whole():
    rows = torch.tensor([3, 1])
    maps = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = GuidedVelocity(Recorder(), Request(LABELS, maps), Request(NULL, 0 * maps), GuidanceOptions(2.0))
    assert torch.equal(whole.select_rows(rows)(T, X[rows]), whole(T, X)[rows])
