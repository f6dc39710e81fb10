import math
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch

from flow.paths import PathOptions
from flow.times import dimension_shift, shift_times, training_times, with_time_shift
from options import UsageError, make_options

UNIFORM = torch.tensor([0.61, 0.0, 0.25, 0.5, 0.999, 0.8, 0.1])


def test_uniform_times_equal_their_random_numbers():
    assert torch.equal(training_times(UNIFORM, PathOptions()), UNIFORM)


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 2.0)])
def test_quantiles_of_logit_normal_times(location, scale):
    """The p-quantile of sigmoid(N(location, scale^2)) is sigmoid(location + scale * q), where q is the normal's p-quantile."""
    p = torch.linspace(0.001, 0.999, 37, dtype=torch.float64)
    normal = torch.tensor([NormalDist().inv_cdf(q) for q in p.tolist()], dtype=torch.float64)
    expected = 1 / (1 + torch.exp(-(location + scale * normal)))
    options = PathOptions(time_sampling="logit_normal", time_location=location, time_scale=scale)
    torch.testing.assert_close(training_times(p, options).double(), expected, rtol=0, atol=2e-7)


def test_a_positive_location_means_more_noise():
    options = PathOptions(time_sampling="logit_normal", time_location=0.5)
    later = training_times(UNIFORM, options)
    assert (later > training_times(UNIFORM, PathOptions(time_sampling="logit_normal"))).all()


def test_logit_normal_times_are_finite_for_extreme_numbers():
    ends = torch.tensor([0.0, 1.0])
    t = training_times(ends, PathOptions(time_sampling="logit_normal", time_scale=3.0))
    assert 0 <= t[0] < 1e-3
    assert 1 - 1e-3 < t[1] <= 1


def test_u_shaped_times_have_the_density_of_a_hyperbolic_cosine():
    """The share of times below t is (sinh(a (t - 1/2)) + sinh(a/2)) / (2 sinh(a/2)), with a = 4 (arXiv:2405.20320)."""
    p = torch.linspace(0, 1, 41, dtype=torch.float64)
    t = training_times(p, PathOptions(time_sampling="u_shaped")).double()
    share = (torch.sinh(4 * (t - 0.5)) + math.sinh(2)) / (2 * math.sinh(2))
    torch.testing.assert_close(share, p, rtol=0, atol=1e-6)
    assert (t[[0, 20, 40]] == torch.tensor([0.0, 0.5, 1.0])).all()
    assert (t < 0.25).float().mean() > 0.3


def test_stratified_times_cover_the_interval_evenly_with_one_offset():
    options = PathOptions(time_sampling="stratified")
    for batch in (1, 7, 128):
        t = training_times(UNIFORM[:1].expand(batch), options).sort().values
        assert ((t >= 0) & (t <= 1)).all()
        gaps = torch.diff(torch.cat([t, t[:1] + 1]))  # on a circle
        torch.testing.assert_close(gaps, torch.full((batch,), 1 / batch), rtol=0, atol=1e-6)
    other = torch.cat([UNIFORM[:1], torch.zeros(6)])
    assert torch.equal(training_times(other, options), training_times(UNIFORM, options))
    assert training_times(UNIFORM, options)[0] == UNIFORM[0]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("offset", [0.0, 0.25, 0.984375])  # exact in binary
def test_stratified_times_follow_the_formula(batch, offset):
    """(u + i / B) mod 1, computed in fractions. The reversed times use 1 - u instead of u."""
    uniform = torch.full((batch,), offset)
    t = training_times(uniform, PathOptions(time_sampling="stratified"))
    exact = [(Fraction(offset) + Fraction(i, batch)) % 1 for i in range(batch)]
    assert t.tolist() == [pytest.approx(float(value), abs=1e-7) for value in exact]
    reversed_exact = {(1 - value) % 1 for value in exact}
    assert reversed_exact == {(1 - Fraction(offset) + Fraction(i, batch)) % 1 for i in range(batch)}


def test_stratified_times_have_one_in_every_stratum():
    for offset in torch.rand(20, generator=torch.Generator().manual_seed(0)):
        t = training_times(offset.expand(32), PathOptions(time_sampling="stratified"))
        assert sorted((t * 32).long().tolist()) == list(range(32))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stratified"])
def test_a_shift_multiplies_the_noise_to_data_ratio_and_one_changes_no_bit(sampling):
    plain = training_times(UNIFORM, PathOptions(sampling))
    assert torch.equal(training_times(UNIFORM, PathOptions(sampling, training_time_shift=1.0)), plain)
    shifted = training_times(UNIFORM, PathOptions(sampling, training_time_shift=2.5))
    torch.testing.assert_close(shifted / (1 - shifted), 2.5 * plain / (1 - plain), rtol=1e-3, atol=1e-6)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_times(ends, 6.93), ends)


def test_a_shift_of_logit_normal_times_moves_their_location():
    shifted = training_times(UNIFORM, PathOptions("logit_normal", training_time_shift=3.0))
    located = training_times(UNIFORM, PathOptions("logit_normal", time_location=math.log(3)))
    torch.testing.assert_close(shifted, located, rtol=1e-5, atol=1e-6)


def test_the_automatic_shift_follows_the_dimension_and_leaves_small_latents_alone():
    known = {
        4 * 32**2: 1,
        32 * 16**2: 1.41,
        16 * 32**2: 2,
        32 * 32**2: 2.83,
        768 * 16**2: 6.93,
        32 * 8**2: 1,
        4 * 8**2: 1,
    }
    assert {d: round(dimension_shift(d), 2) for d in known} == known
    auto = make_options(PathOptions, {"training_time_shift": "auto"})
    assert with_time_shift(auto, 16 * 32**2).training_time_shift == 2
    assert with_time_shift(PathOptions(training_time_shift=0.25), 16 * 32**2).training_time_shift == 0.25
    with pytest.raises(UsageError, match="training_time_shift"):
        make_options(PathOptions, {"training_time_shift": "automatic"})
