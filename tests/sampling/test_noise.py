"""A sample's noise is a function of seed and index, or comes from torch's global generator."""

import pytest
import torch

from sampling.noise import NOISE_SOURCES, noise_for_indices


def test_a_row_depends_only_on_seed_and_index():
    rows = noise_for_indices(3, range(8), (2, 4, 4))
    shuffled = noise_for_indices(3, [5, 0, 7], (2, 4, 4))
    assert torch.equal(shuffled, rows[[5, 0, 7]])
    parts = [noise_for_indices(3, part, (2, 4, 4)) for part in ([0, 1, 2], [3], [4, 5, 6, 7])]
    assert torch.equal(torch.cat(parts), rows)


def test_rows_seeds_and_streams_differ():
    draws = [
        *noise_for_indices(0, range(50), (4,)),
        *noise_for_indices(1, range(50), (4,)),
        *noise_for_indices(0, range(50), (4,), stream="posterior"),
    ]
    assert len({tuple(row.tolist()) for row in draws}) == 150


def test_noise_is_standard_normal():
    noise = noise_for_indices(0, range(2000), (50,)).double()  # 100,000 values
    assert abs(noise.mean()) < 4 / 100_000**0.5
    assert abs(noise.var() - 1) < 4 * (2 / 100_000) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / 100_000) ** 0.5
    across = torch.corrcoef(noise[:, :20].T) - torch.eye(20)
    assert across.abs().max() < 5 / 2000**0.5  # rows of adjacent indices are independent


def test_no_rows():
    assert noise_for_indices(0, [], (4, 8, 8)).shape == (0, 4, 8, 8)


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = noise_for_indices(1, [2], (3,))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(noise_for_indices(1, [2], (3,)), first)


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
def test_a_stream_per_sample(name):
    assert torch.equal(NOISE_SOURCES[name](3)([5, 2], (4,)), noise_for_indices(3, [5, 2], (4,)))


def test_noise_of_the_global_generator():
    source = NOISE_SOURCES["dummy"](42)
    drawn = [source([0, 1], (3,)), source([2, 3], (3,))]
    other = NOISE_SOURCES["dummy"](42)([5], (3,))  # a process whose share begins at sample 5
    torch.manual_seed(42)
    assert all(torch.equal(noise, torch.randn(2, 3)) for noise in drawn)
    torch.manual_seed(47)
    assert torch.equal(other, torch.randn(1, 3))
