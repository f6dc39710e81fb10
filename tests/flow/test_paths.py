import pytest
import torch

from flow.paths import PathOptions, straight_path


@pytest.fixture
def ends():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 2, 3, 3, generator=generator, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 1e-3, 0.3])
def test_velocity_is_the_finite_difference_of_the_path(sigma_min, ends):
    path, h = straight_path, 1e-6
    t = torch.tensor([0.01, 0.2, 0.5, 0.75, 0.99], dtype=torch.float64)
    difference = (path(t + h, *ends, sigma_min).x_t - path(t - h, *ends, sigma_min).x_t) / (2 * h)
    torch.testing.assert_close(path(t, *ends, sigma_min).velocity, difference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-3, 0.3])
def test_the_path_starts_near_data_and_ends_at_noise(sigma_min, ends):
    data, noise = ends
    start, end = (
        straight_path(torch.full((5,), t, dtype=torch.float64), data, noise, sigma_min).x_t for t in (0.0, 1.0)
    )
    torch.testing.assert_close(start, data + sigma_min * noise, rtol=0, atol=1e-14)
    torch.testing.assert_close(end, noise, rtol=0, atol=1e-14)


def test_every_sample_has_its_own_time(ends):
    data, noise = ends
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    together = straight_path(t, data, noise)
    for i in range(5):
        alone = straight_path(t[i : i + 1], data[i : i + 1], noise[i : i + 1])
        assert torch.equal(together.x_t[i], alone.x_t[0])


def test_the_default_sigma_min_is_lfms(ends):
    data, noise = ends
    t = torch.zeros(5, dtype=torch.float64)
    assert PathOptions().sigma_min == 1e-5
    assert torch.equal(straight_path(t, data, noise).x_t, straight_path(t, data, noise, 1e-5).x_t)
    torch.testing.assert_close(straight_path(t, data, noise).velocity, (1 - 1e-5) * noise - data, rtol=0, atol=0)


@pytest.mark.parametrize("sigma_min", [1e-3, 1e-5])
def test_the_path_is_the_optimal_transport_path_in_reversed_time(sigma_min, ends):
    """In the opposite time t' = 1 - t, the path is (1 - (1 - s) t') noise + t' data with velocity data - (1 - s) noise."""
    data, noise = ends
    t = torch.tensor([0.0, 0.2, 0.5, 0.75, 1.0], dtype=torch.float64)
    forward = (1 - t).view(-1, 1, 1, 1)
    sample = straight_path(t, data, noise, sigma_min)
    expected = (1 - (1 - sigma_min) * forward) * noise + forward * data
    torch.testing.assert_close(sample.x_t, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(-sample.velocity, data - (1 - sigma_min) * noise, rtol=0, atol=1e-14)
