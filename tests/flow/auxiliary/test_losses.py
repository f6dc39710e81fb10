"""Auxiliary losses against their closed forms."""

import math
from typing import NamedTuple

import pytest
import torch

from flow.auxiliary.losses import TapBatch, dispersion, feature_loss, latent_loss, normalize_over_tokens, velocity_loss

GENERATOR = torch.Generator().manual_seed(0)
DATA, FEATURES = torch.randn(3, 2, 4, 4, generator=GENERATOR), torch.randn(3, 5, 2, 2, generator=GENERATOR)
TOKENS = torch.randn(3, 4, 6, generator=GENERATOR)


class Given(NamedTuple):
    tokens: torch.Tensor = TOKENS
    velocity: torch.Tensor = DATA
    latents: torch.Tensor = DATA
    features: torch.Tensor = FEATURES


def batch(**given):
    return TapBatch(Given(**given), DATA, FEATURES, lambda velocity: velocity.flatten(1).sum(1))


def test_features_that_agree_have_the_lowest_loss():
    torch.testing.assert_close(feature_loss(batch()), -torch.ones(3))
    torch.testing.assert_close(feature_loss(batch(features=3 * FEATURES)), -torch.ones(3))
    torch.testing.assert_close(feature_loss(batch(features=-FEATURES)), torch.ones(3))
    found = feature_loss(batch(features=torch.randn(3, 5, 2, 2, generator=GENERATOR)))
    assert (found.abs() < 1).all()


def test_the_cosine_is_over_the_channels_of_each_token():
    mixed = FEATURES.clone()
    mixed[:, :, 0, 0] *= -1  # one of four tokens
    torch.testing.assert_close(feature_loss(batch(features=mixed)), -torch.full((3,), 0.5))


def test_features_need_an_encoder():
    with pytest.raises(ValueError, match="image encoder"):
        feature_loss(batch()._replace(features=None))


def test_normalization_removes_the_mean_over_tokens():
    found = normalize_over_tokens(7 + 3 * FEATURES, 1.0)
    torch.testing.assert_close(found.mean((2, 3)), torch.zeros(3, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((2, 3), unbiased=False), torch.ones(3, 5), rtol=1e-4, atol=0)
    half = normalize_over_tokens(FEATURES, 0.5)
    deviation = FEATURES.std((2, 3), unbiased=False)
    torch.testing.assert_close(half.mean((2, 3)), 0.5 * FEATURES.mean((2, 3)) / deviation, rtol=1e-3, atol=1e-5)
    assert normalize_over_tokens(FEATURES, 0.0) is FEATURES
    assert (feature_loss(batch(features=normalize_over_tokens(FEATURES, 0.8)), 0.8) + 1).abs().max() < 1e-5


@pytest.mark.parametrize(("error", "loss"), [(0.0, 0.0), (0.02, 0.004), (-0.05, 0.025), (0.5, 0.475), (-2.0, 1.975)])
def test_latents_have_a_smooth_absolute_error(error, loss):
    torch.testing.assert_close(latent_loss(batch(latents=DATA + error)), torch.full((3,), loss), rtol=1e-3, atol=1e-6)


def test_velocities_have_the_objectives_loss():
    assert torch.equal(velocity_loss(batch()), DATA.flatten(1).sum(1))


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_dispersion_in_closed_form(tau):
    flat = TOKENS.double().flatten(1)
    terms = [math.exp(-(one - other).square().sum() / (tau * 24)) for one in flat for other in flat]
    found = dispersion(batch(), tau)
    torch.testing.assert_close(found, torch.full((3,), math.log(sum(terms) / 9)))
    assert found.max() < 0


def test_equal_samples_have_the_highest_dispersion_loss():
    torch.testing.assert_close(dispersion(batch(tokens=torch.ones(3, 4, 6)), 0.5), torch.zeros(3), rtol=0, atol=1e-5)
    far = torch.arange(3.0).view(3, 1, 1).expand(3, 4, 6) * 100
    torch.testing.assert_close(dispersion(batch(tokens=far), 0.5), torch.full((3,), -math.log(3)))


def test_dispersions_gradient_drives_samples_apart():
    tokens = TOKENS.clone().requires_grad_()
    dispersion(batch(tokens=tokens), 0.5).mean().backward()
    moved = tokens.detach() - 10 * tokens.grad
    assert torch.pdist(moved.flatten(1)).min() > torch.pdist(TOKENS.flatten(1)).min()
