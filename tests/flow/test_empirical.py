"""The closed-form velocity agrees with Gaussian flows, brute-force expectations, and its own density."""

from typing import NamedTuple

import pytest
import torch

from flow.empirical import Components, EmpiricalVelocity
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.likelihood import log_likelihood
from flow.ode import SolverOptions
from flow.paths import straight_path
from flow.solvers import solve

SHAPE = (2, 1, 2)


class Given(NamedTuple):
    labels: torch.Tensor


def mixture(count: int = 7, std: float = 0.0, parts: int = 3, seed: int = 0) -> tuple[Components, EmpiricalVelocity]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, *SHAPE, generator=generator)
    deviations = std * (0.5 + torch.rand(count, *SHAPE, generator=generator))
    whole = Components(mean, deviations, torch.arange(count) % 2)
    split = [Components(*each) for each in zip(*(field.tensor_split(parts) for field in whole), strict=True)]
    return whole, EmpiricalVelocity(lambda: split, classes=2, sigma_min=1e-3)


def normal_points(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_component_gives_the_flow_of_a_normal_distribution() -> None:
    mean, std = 0.7, 0.4
    part = Components(torch.full((1, *SHAPE), mean), torch.full((1, *SHAPE), std), torch.tensor([0]))
    velocity = EmpiricalVelocity(lambda: [part], sigma_min=0)
    x = normal_points(5)
    for time in (0.1, 0.5, 1.0):
        sigma = ((1 - time) ** 2 * std**2 + time**2) ** 0.5
        slope = (time - (1 - time) * std**2) / sigma
        expected = slope / sigma * (x - (1 - time) * mean) - mean
        torch.testing.assert_close(velocity(torch.tensor(time, dtype=torch.float64), x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_it_is_the_expected_velocity_given_the_point(std: float) -> None:
    # The expectation of the velocity over a region of x_t, by simulation of the path in one dimension.
    values, deviations = torch.tensor([-1.0, 0.2, 1.5]), std * torch.tensor([1.0, 0.5, 2.0])
    part = Components(values.view(3, 1, 1, 1), deviations.view(3, 1, 1, 1), torch.zeros(3))
    empirical = EmpiricalVelocity(lambda: [part], sigma_min=0.01)
    generator = torch.Generator().manual_seed(0)
    count = 1_000_000
    chosen = torch.randint(3, (count,), generator=generator)
    data = (values[chosen] + deviations[chosen] * torch.randn(count, generator=generator)).view(-1, 1, 1, 1)
    noise = torch.randn(count, 1, 1, 1, generator=generator)
    for time in (0.2, 0.6):
        x_t, velocity = straight_path(torch.full((count,), time), data, noise, 0.01)
        for low in (-0.5, 0.1, 0.6):
            inside = (x_t > low) & (x_t < low + 0.05)
            center = x_t[inside].mean().view(1, 1, 1, 1)
            found = empirical(torch.tensor(time), center).item()
            error = 4 * velocity[inside].std().item() / int(inside.sum()) ** 0.5 + 0.01
            assert found == pytest.approx(velocity[inside].mean().item(), abs=error)


def test_parts_and_shared_times_do_not_change_the_result() -> None:
    whole, velocity = mixture(std=0.2)
    at_once = EmpiricalVelocity(lambda: [whole], classes=2, sigma_min=1e-3)
    x, times = normal_points(6), torch.tensor([0.3, 0.9, 0.3, 0.05, 0.9, 0.3], dtype=torch.float64)
    given = Given(torch.tensor([0, 1, 2, 2, 0, 1]))
    expected = torch.cat([at_once(times[i], x[i : i + 1], Given(given.labels[i : i + 1])) for i in range(len(x))])
    torch.testing.assert_close(velocity(times, x, given), expected, atol=1e-12, rtol=1e-12)


def test_labels_select_components_and_the_null_class_selects_all() -> None:
    whole, velocity = mixture()
    x, time = normal_points(4), torch.tensor(0.4, dtype=torch.float64)
    odd = Components(*(field[1::2] for field in whole))
    of_odd = EmpiricalVelocity(lambda: [odd], sigma_min=1e-3)
    torch.testing.assert_close(velocity(time, x, Given(torch.ones(4))), of_odd(time, x))
    torch.testing.assert_close(velocity(time, x, Given(torch.full((4,), 2))), velocity(time, x))
    without_odd = EmpiricalVelocity(lambda: [Components(*(field[::2] for field in whole))], classes=2)
    with pytest.raises(ValueError, match="no component has the label 1"):
        without_odd(time, x, Given(torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize("method", ["euler", "dpm", "heun", "dopri5"])
def test_samples_of_points_are_those_points(method: str) -> None:
    whole, velocity = mixture()
    noise = normal_points(12).float()
    given = Given(torch.arange(12) % 3)
    options = SolverOptions(method=method, num_steps=60)
    found = solve(GuidedVelocity(velocity, given, given, GuidanceOptions()), noise, options).x
    distance = torch.cdist(found.flatten(1), whole.mean.flatten(1))
    # sigma_min leaves noise of 1e-3 per coordinate. Euler's last steps contract the distance to the data, but not to it.
    assert (distance.amin(1) < 0.02).all()
    nearest = whole.labels[distance.argmin(1)]
    assert ((given.labels == 2) | (nearest == given.labels)).all()


def test_the_likelihood_of_its_flow_is_the_density_of_the_mixture() -> None:
    _, velocity = mixture(std=0.5)
    given = Given(torch.tensor([0, 1, 2, 2]))
    x = normal_points(4)
    guided = GuidedVelocity(velocity, given, given, GuidanceOptions())
    options = SolverOptions(method="dopri5", atol=1e-9, rtol=1e-9)
    # At t = 1, x_t is noise exactly, so the change of variables gives the density at t = 0 exactly.
    found = log_likelihood(guided, x, options).log_density
    expected = velocity.log_density(torch.tensor(0.0, dtype=torch.float64), x, given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_guidance_of_the_closed_form_extrapolates_from_all_classes() -> None:
    _, velocity = mixture()
    x, time = normal_points(3), torch.tensor(0.5, dtype=torch.float64)
    given, null = Given(torch.tensor([0, 1, 1])), Given(torch.full((3,), 2))
    guided = GuidedVelocity(velocity, given, null, GuidanceOptions(cfg_scale=3))(time, x)
    unconditional = velocity(time, x)
    torch.testing.assert_close(guided, unconditional + 3 * (velocity(time, x, given) - unconditional))


def test_the_bandwidth_widens_every_component() -> None:
    whole, _ = mixture(std=0.3)
    wide = Components(whole.mean, (whole.std.square() + 0.25).sqrt(), whole.labels)
    x, time = normal_points(4), torch.tensor(0.3, dtype=torch.float64)
    found = EmpiricalVelocity(lambda: [whole], bandwidth=0.5)(time, x)
    torch.testing.assert_close(found, EmpiricalVelocity(lambda: [wide])(time, x), atol=1e-6, rtol=1e-6)


def test_log_weights_do_not_overflow_near_data() -> None:
    whole, velocity = mixture()
    x = whole.mean.double() + 1e-6
    found = velocity(torch.tensor(0.0, dtype=torch.float64), x)
    assert found.isfinite().all()
    torch.testing.assert_close(found, (1 - 1e-3) * 1e-6 / 1e-3 - whole.mean.double(), atol=1e-6, rtol=1e-6)
