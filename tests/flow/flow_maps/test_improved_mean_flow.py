import pytest
import torch

from flow.auxiliary.objective import training_losses
from flow.flow_maps.improved_mean_flow import ImprovedMeanFlow, ImprovedMeanFlowOptions
from flow.flow_maps.mean_flow import MeanFlow, MeanFlowOptions
from flow.flow_maps.networks import StepNetwork
from options import UsageError
from tests.flow.flow_maps.gaussian import Condition, Streams, draws_of, exact, gradients, opposite_pairs

SETTINGS = {"sigma_min": 0.0, "adaptive_power": 0.0}


def test_the_noise_of_a_pair_enters_once():
    """MeanFlow's gradients at the exact average velocity scatter more, because the pair's velocity is also the tangent."""
    pairs = opposite_pairs(draws_of())
    improved = gradients(ImprovedMeanFlow(ImprovedMeanFlowOptions(**SETTINGS)), pairs)
    plain = gradients(MeanFlow(MeanFlowOptions(**SETTINGS)), pairs)
    x_t = (1 - pairs.draws.t.view(-1, 1, 1, 1)) * pairs.data + pairs.draws.t.view(-1, 1, 1, 1) * pairs.noise
    deviation = exact(pairs.draws.t, x_t) - (pairs.noise - pairs.data)
    torch.testing.assert_close(improved, 2 * deviation)
    assert (plain - 2 * deviation).abs().max() > 0.1


def test_guidance_scales_are_drawn_evenly_in_their_logarithm():
    options = ImprovedMeanFlowOptions(largest_guidance=8.0)
    for share in (0.0, 1.0):
        draws = ImprovedMeanFlow(options).draw(Streams(number=share / 2, count=4000))
        scales = draws.guidance
        assert scales.min() >= 1
        assert scales.max() <= 8
        assert scales.log().mean() == pytest.approx(torch.tensor(8.0).log().item() / 2, rel=0.05)
    assert ImprovedMeanFlow(ImprovedMeanFlowOptions()).draw(Streams()).guidance is None


def test_the_network_gets_the_scale_unless_the_condition_was_dropped():
    seen = []

    def network(t, x, condition, until=None, guidance=None):
        seen.append((condition.labels[0].item(), guidance))
        return exact(t, x, condition, until)

    objective = ImprovedMeanFlow(ImprovedMeanFlowOptions(**SETTINGS, largest_guidance=8.0))
    pairs = opposite_pairs(draws_of())
    scales = torch.linspace(2, 7, 12, dtype=torch.float64)
    kept = torch.arange(12) % 2 == 0
    null = Condition(torch.full((12,), 9))
    draws = pairs.draws._replace(guidance=scales, kept=kept, null=null)
    training_losses(objective, network, pairs.data, pairs.noise, draws, Condition(torch.zeros(12)))
    given = [guidance for label, guidance in seen if label == 0]
    assert len(given) == 4  # the conditional velocity, the tangent, the derivative and the prediction
    for guidance in given:
        assert torch.equal(guidance, torch.where(kept, scales, 1.0))
    assert [guidance for label, guidance in seen if label == 9] == [None]


def test_the_exact_guided_network_has_no_gradient():
    """Its velocity at scale w is w v + (1 - w) v_null, here for a null class with another mean."""

    def velocity_of(t, x, condition, until, guidance):
        null, own = exact(t, x, condition, t, mean=-0.4), exact(t, x, condition, t)
        return own if guidance is None else null + guidance.view(-1, 1, 1, 1) * (own - null)

    def network(t, x, condition, until=None, guidance=None):
        if condition.labels[0] == 9:
            return exact(t, x, condition, until, mean=-0.4)
        return velocity_of(t, x, condition, until, guidance)

    objective = ImprovedMeanFlow(ImprovedMeanFlowOptions(**SETTINGS, largest_guidance=8.0))
    draws = draws_of()._replace(until=None)
    pairs = opposite_pairs(draws)
    count = len(pairs.data)
    scales = torch.linspace(2, 7, count // 2, dtype=torch.float64).repeat(2)
    draws = pairs.draws._replace(
        guidance=scales, kept=torch.ones(count, dtype=torch.bool), null=Condition(torch.full((count,), 9))
    )
    offset = torch.zeros_like(pairs.data, requires_grad=True)
    step_network = StepNetwork(lambda *args, **inputs: network(*args, **inputs) + offset, network, network)
    losses = objective.loss(step_network, pairs.data, pairs.noise, draws, Condition(torch.zeros(count)))
    (gradient,) = torch.autograd.grad(losses.sum(), offset)
    first, second = gradient.chunk(2)
    assert (first + second).abs().max() < 1e-9 < 0.1 < first.abs().max()


def test_a_range_of_scales_excludes_a_fixed_one():
    assert ImprovedMeanFlowOptions(largest_guidance=2.0).guides
    assert not ImprovedMeanFlowOptions().guides
    with pytest.raises(UsageError, match="--largest_guidance trains a range"):
        ImprovedMeanFlowOptions(largest_guidance=2.0, target_kappa=0.5)
