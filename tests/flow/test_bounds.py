"""Bounds hold for normal distributions and mixtures, where flows, errors, rates and distances are known."""

import itertools
import math

import pytest
import torch

from flow.bounds import decoded_bound, flow_bound, lfm_bound, young_bound
from flow.empirical import Components, EmpiricalVelocity
from flow.lipschitz import logarithmic_norm

DIMENSIONS, INTERVALS = 3, 400
WIDTHS = torch.full((INTERVALS,), 1 / INTERVALS, dtype=torch.float64)
TIMES = WIDTHS.cumsum(0) - WIDTHS / 2


def slope(std: float) -> torch.Tensor:
    """dv/dx of the flow to N(mean, std^2), at TIMES."""
    return (TIMES - (1 - TIMES) * std**2) / ((1 - TIMES) ** 2 * std**2 + TIMES**2)


def normal_case(
    mean: float, std: float, other_mean: float, other_std: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Errors and rates of the flow to N(other_mean, other_std^2) against data N(mean, std^2), and their W2."""
    a, b = slope(std), slope(other_std)
    shift = lambda c, m: -c * (1 - TIMES) * m - m  # noqa: E731 - v = c x + shift
    center = (a - b) * (1 - TIMES) * mean + shift(a, mean) - shift(b, other_mean)
    spread = (a - b).square() * ((1 - TIMES) ** 2 * std**2 + TIMES**2)
    errors = (DIMENSIONS * (center.square() + spread)).sqrt()
    return errors, -b, math.sqrt(DIMENSIONS * ((mean - other_mean) ** 2 + (std - other_std) ** 2))


CASES = list(itertools.product((0.0, 1.0), (0.3, 1.0), (0.0, -0.5), (0.2, 0.9, 1.5)))


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_above_the_distance_of_normal_distributions(case: tuple[float, float, float, float]) -> None:
    errors, rates, distance = normal_case(*case)
    bound = flow_bound(errors, rates, WIDTHS).item()
    assert bound >= distance * (1 - 1e-3)
    # The Cauchy-Schwarz inequality makes the bound smaller than the others by these factors.
    assert young_bound(errors, rates, WIDTHS).item() >= bound / math.sqrt(1 - math.exp(-1))
    lipschitz = slope(case[3]).abs().max().item()
    assert lfm_bound(0.0, 1.0, errors, lipschitz, WIDTHS) >= bound * math.sqrt(math.e)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_bound_is_exact_for_a_shift(std: float) -> None:
    # Flows to two normal distributions with the same spread: the error has one direction, and all paths spread alike.
    errors, rates, distance = normal_case(0.0, std, 0.7, std)
    assert flow_bound(errors, rates, WIDTHS).item() == pytest.approx(distance, rel=1e-3)


def test_a_constant_rate_gives_the_known_integral() -> None:
    errors = torch.ones(INTERVALS, dtype=torch.float64)
    assert flow_bound(errors, 2 * errors, WIDTHS).item() == pytest.approx((math.exp(2) - 1) / 2, rel=1e-4)
    assert young_bound(errors, errors, WIDTHS).item() == pytest.approx(math.sqrt((math.exp(3) - 1) / 3), rel=1e-4)


def test_paths_are_bounded_one_by_one() -> None:
    errors, rates = torch.rand(INTERVALS, 2), torch.randn(INTERVALS, 2)
    both = flow_bound(errors, rates, WIDTHS)
    for path in range(2):
        torch.testing.assert_close(both[path], flow_bound(errors[:, path], rates[:, path], WIDTHS))


def test_pixels_add_the_reconstruction_error() -> None:
    assert decoded_bound(0.5, 2.0, 3.0) == 6.5
    errors = torch.full((INTERVALS,), 3.0)
    assert lfm_bound(0.5, 2.0, errors, -0.5, WIDTHS) == pytest.approx(math.hypot(0.5, 6.0))
    assert lfm_bound(0.0, 1.0, errors, 1000.0, WIDTHS) == math.inf


def test_lfm_s_form_is_too_small_by_17_percent_for_shifts_in_one_direction() -> None:
    # The autoencoder shifts images by `a`, the flow shifts latents by `c`, and distances are sums of both shifts.
    c, decoder = 0.4, 1.5
    a = math.e * decoder * c
    errors = torch.full((INTERVALS,), c, dtype=torch.float64)
    distance = a + decoder * c
    assert decoded_bound(a, decoder, flow_bound(errors, 0 * errors, WIDTHS).item()) == pytest.approx(distance)
    assert lfm_bound(a, decoder, errors, 0.0, WIDTHS) == pytest.approx(distance / math.sqrt(1 + 1 / math.e))


@pytest.mark.parametrize("seed", range(30))
def test_lfm_s_form_is_never_too_small_by_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors, rates = torch.rand(2, INTERVALS, generator=generator, dtype=torch.float64)
    rates = rates * 4 - 2
    for share in (0.1, 1.0, 3.0):
        bound = flow_bound(errors, rates, WIDTHS).item()
        lfm = lfm_bound(share * bound, 1.0, errors, rates.abs().max().item(), WIDTHS)
        assert decoded_bound(share * bound, 1.0, bound) <= lfm * math.sqrt(1 + 1 / math.e)


def random_covariance(size: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T / size + 0.05 * torch.eye(size, dtype=torch.float64)


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def normal_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other: torch.Tensor
) -> float:
    """W2 of two normal distributions (Gelbrich's formula)."""
    root = square_root(covariance)
    spread = covariance.trace() + other.trace() - 2 * square_root(root @ other @ root).trace()
    return math.sqrt((mean - other_mean).square().sum().item() + max(0.0, spread.item()))


@pytest.mark.parametrize("seed", range(12))
def test_the_decoded_bound_is_above_the_distance_of_random_normal_distributions(seed: int) -> None:
    # Images in 5 dimensions are encoded to 3 by a projection; the decoder is linear, and both flows are linear in x.
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mean, covariance = draw(5), random_covariance(5, generator)
    encoder = torch.linalg.qr(draw(5, 3)).Q.T
    decoder = encoder.T + 0.3 * draw(5, 3)
    data, data_covariance = encoder @ mean, encoder @ covariance @ encoder.T
    shift = draw(1).item()
    model, model_covariance = data + shift * draw(3), (data_covariance + random_covariance(3, generator)) / 2
    identity = torch.eye(3, dtype=torch.float64)
    errors, rates, norms = [], [], []
    for t in TIMES.tolist():
        at_data = (1 - t) ** 2 * data_covariance + t**2 * identity  # covariance of x_t
        at_model = (1 - t) ** 2 * model_covariance + t**2 * identity
        # v = A (x - (1 - t) mean) - mean, with A = cov(velocity, x_t) cov(x_t)^-1
        exact = (t * identity - (1 - t) * data_covariance) @ at_data.inverse()
        network = (t * identity - (1 - t) * model_covariance) @ at_model.inverse()
        gap = exact - network
        offset = -data - network @ ((1 - t) * (data - model)) + model  # of v* - v at the mean of x_t
        errors.append((offset.square().sum() + (gap @ at_data @ gap.T).trace()).sqrt())
        rates.append(torch.linalg.eigvalsh(-(network + network.T) / 2)[-1])
        norms.append(torch.linalg.matrix_norm(network, 2))
    latent = flow_bound(torch.stack(errors), torch.stack(rates), WIDTHS).item()
    assert latent >= normal_distance(data, data_covariance, model, model_covariance) * (1 - 1e-3)

    lost = torch.eye(5, dtype=torch.float64) - decoder @ encoder
    reconstruction = math.sqrt((lost @ mean).square().sum().item() + (lost @ covariance @ lost.T).trace().item())
    lipschitz = torch.linalg.matrix_norm(decoder, 2).item()
    distance = normal_distance(mean, covariance, decoder @ model, decoder @ model_covariance @ decoder.T)
    assert decoded_bound(reconstruction, lipschitz, latent) >= distance
    young = young_bound(torch.stack(errors), torch.stack(rates), WIDTHS).item()
    assert young >= latent
    assert lfm_bound(0.0, 1.0, torch.stack(errors), torch.stack(norms).max().item(), WIDTHS) >= young


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_is_above_the_distance_of_random_mixtures_on_a_line(seed: int) -> None:
    # All factors by quadrature: the largest rate over an interval, the error over the density of x_t, and W2 by quantiles.
    generator = torch.Generator().manual_seed(seed)
    line = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    flows, quantiles = [], []
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for _ in range(2):
        mean = 1.5 * torch.randn(3, 1, 1, 1, generator=generator, dtype=torch.float64)
        std = 0.3 + 0.5 * torch.rand(3, 1, 1, 1, generator=generator, dtype=torch.float64)
        part = Components(mean, std, torch.zeros(3))
        flows.append(EmpiricalVelocity(lambda part=part: [part], sigma_min=0.0))
        cumulative = torch.special.ndtr((line[:, None] - mean.flatten()) / std.flatten()).mean(1)
        quantiles.append(line[torch.searchsorted(cumulative, levels).clamp(max=len(line) - 1)])
    distance = (quantiles[0] - quantiles[1]).square().mean().sqrt().item()
    exact, network = flows
    count = 100
    errors, rates, points = [], [], line.view(-1, 1, 1, 1)
    for time in (torch.arange(count, dtype=torch.float64) + 0.5) / count:
        x = points.clone().requires_grad_()
        velocity = network(time, x)
        slopes = torch.autograd.grad(velocity.sum(), x)[0]
        density = exact.log_density(time, points).exp()
        gap = (exact(time, points) - velocity.detach()).flatten()
        errors.append(((gap.square() * density).sum() / density.sum()).sqrt())
        rates.append(-slopes.min())
    widths = torch.full((count,), 1 / count, dtype=torch.float64)
    bound = flow_bound(torch.stack(errors), torch.stack(rates), widths).item()
    assert bound >= distance * 0.99
    assert young_bound(torch.stack(errors), torch.stack(rates), widths).item() > bound


def test_the_bound_along_paths_holds_for_mixtures() -> None:
    # Flows of two mixtures from the same noise end at most the bound apart, path by path.
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64)
    exact = EmpiricalVelocity(lambda: [Components(mean, torch.full_like(mean, 0.4), torch.zeros(4))])
    moved = mean + 0.3 * torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64)
    network = EmpiricalVelocity(lambda: [Components(moved, torch.full_like(mean, 0.5), torch.zeros(4))])
    count = 50
    widths = torch.full((count,), 1 / count, dtype=torch.float64)
    z = other = torch.randn(16, 2, 1, 1, generator=generator, dtype=torch.float64)
    errors, rates = [], []
    for step in range(count):
        start, middle, end = (1 - (step + part) / count for part in (0, 0.5, 1))
        both = []
        for velocity, x in ((exact, z), (network, other)):
            half = x + (middle - start) * velocity(torch.tensor(start, dtype=torch.float64), x)
            both.append((x + (end - start) * velocity(torch.tensor(middle, dtype=torch.float64), half), half))
        (z, at), (other, beside) = both
        time = torch.tensor(middle, dtype=torch.float64)
        errors.append((exact(time, at) - network(time, at)).flatten(1).norm(dim=1))
        between = torch.stack(
            [
                logarithmic_norm(
                    lambda x, time=time: network(time, x), at + share * (beside - at), torch.ones_like(at), 2
                )
                for share in torch.linspace(0, 1, 5).tolist()
            ]
        )
        rates.append(between.amax(0))
    bound = flow_bound(torch.stack(errors[::-1]), torch.stack(rates[::-1]), widths)
    apart = (z - other).flatten(1).norm(dim=1)
    assert (bound >= 0.98 * apart).all()
    assert (bound < 5 * apart).any()  # and it says something
