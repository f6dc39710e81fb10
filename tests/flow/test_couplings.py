from itertools import permutations

import pytest
import torch

from flow.couplings import COUPLINGS, optimal_transport

DATA, NOISE = torch.randn(2, 12, 2, 2, 2, generator=torch.Generator().manual_seed(0))


def cost(data, noise):
    return (data - noise).square().sum().item()


def test_the_assignment_of_an_unconditional_batch_is_the_cheapest_permutation():
    data, noise = DATA[:6], NOISE[:6]
    chosen = optimal_transport(data, noise, torch.zeros(6, dtype=torch.long))
    least = min(cost(data, noise[list(order)]) for order in permutations(range(6)))
    assert cost(data, noise[chosen]) == pytest.approx(least)


@pytest.mark.parametrize("classes", [1, 2, 4, 12])
def test_noise_is_exchanged_within_classes_and_never_costs_more(classes):
    labels = torch.arange(12) % classes
    chosen = optimal_transport(DATA, NOISE, labels)
    assert torch.equal(chosen.sort().values, torch.arange(12))
    assert torch.equal(labels[chosen], labels)  # every class keeps its noise
    assert cost(DATA, NOISE[chosen]) <= cost(DATA, NOISE) + 1e-4
    for label in range(classes):
        rows = labels == label
        assert cost(DATA[rows], NOISE[chosen][rows]) <= cost(DATA[rows], NOISE[rows]) + 1e-4
    assert (classes == 12) == torch.equal(chosen, torch.arange(12))


def test_the_assignment_does_not_depend_on_the_order_of_the_noise():
    labels = torch.arange(12) % 3
    order = torch.cat([torch.arange(label, 12, 3)[torch.tensor([2, 0, 3, 1])] for label in range(3)])
    shuffled = torch.empty_like(NOISE)
    shuffled[torch.cat([torch.arange(label, 12, 3) for label in range(3)])] = NOISE[order]
    one, other = (noise[optimal_transport(DATA, noise, labels)] for noise in (NOISE, shuffled))
    assert torch.equal(one, other)


def test_independent_coupling_does_nothing():
    assert COUPLINGS["independent"] is None
