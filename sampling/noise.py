"""Initial noise of samples: a function of (seed, sample index), or drawn from torch's global generator."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from runtime.randomness import generator_for

__all__ = ["NOISE_SOURCES", "NoiseSource", "noise_for_indices"]

NoiseSource = Callable[[Sequence[int], Sequence[int]], torch.Tensor]  # (indices, shape) -> noise [len(indices), *shape]


def noise_for_indices(seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "noise") -> torch.Tensor:
    """Standard normal float32 [N, *shape] on the CPU, for N indices; row i is a function of (seed, stream, indices[i])."""
    rows = [torch.randn(*shape, generator=generator_for(seed, stream, int(index))) for index in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _own_streams(seed: int) -> NoiseSource:
    return partial(noise_for_indices, seed)


def _global_generator(seed: int) -> NoiseSource:
    """Noise drawn from torch's global generator in the order of the calls."""
    seeded = False

    def draw(indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        nonlocal seeded
        if not seeded:  # processes start at different indices, so their noise differs
            torch.manual_seed(seed + indices[0])
            seeded = True
        return torch.randn(len(indices), *shape)

    return draw


# Keys are the values of `--generator`. Each value creates a noise source from a seed.
NOISE_SOURCES: dict[str, Callable[[int], NoiseSource]] = {
    "dummy": _global_generator,
    "determ": _own_streams,
    "determ-indiv": _own_streams,
}
