import pytest
import torch

from flow.losses.options import FlowMatchingOptions
from flow.losses.terms import TrainingDraws
from flow.losses.weightings import WEIGHTINGS
from flow.objectives import FlowMatching

T = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_mean_weight_over_uniform_times_is_one(name):
    weights = WEIGHTINGS[name](T)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert (weights >= 0).all()


def test_data_and_noise_weights_are_mirror_images():
    torch.testing.assert_close(WEIGHTINGS["data"](T), WEIGHTINGS["noise"](1 - T))


def test_min_snr_weights_the_loss_of_the_data_by_the_clipped_signal_to_noise_ratio():
    weights = WEIGHTINGS["min_snr"](T) / T**2  # the velocity's error is the data's divided by t
    expected = ((1 - T) / T).square().clamp(max=5)
    torch.testing.assert_close(weights / weights[10_000], expected / expected[10_000])


def test_the_weight_multiplies_the_training_loss_and_not_the_validation_loss():
    path = FlowMatchingOptions(loss_weighting="data")
    objective = FlowMatching(path, path)
    data, noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    class Streams:
        def uniform(self, purpose):
            return torch.tensor([0.1, 0.4, 0.7, 0.9])

    draws = objective.draw(Streams())
    assert isinstance(draws, TrainingDraws)
    plain = objective.loss(lambda t, x, c: 0.3 * x, data, noise, objective.at(draws.t), None)
    assert torch.equal(objective.loss(lambda t, x, c: 0.3 * x, data, noise, draws, None), 3 * draws.t**2 * plain)
