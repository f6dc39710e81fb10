"""Random streams by name: every draw is a function of a seed and of what it is for, never of what was drawn before."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

__all__ = ["NOISE_SOURCES", "NoiseSource", "generator_for", "noise_for_indices", "seed_for"]

NoiseSource = Callable[[Sequence[int], Sequence[int]], torch.Tensor]  # (indices, shape) -> noise [len(indices), *shape]


def seed_for(*keys: int | str) -> int:
    """A 63-bit seed that depends on all `keys`, for instance (seed, "noise", step)."""
    plain = tuple(key if isinstance(key, str) else int(key) for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `seed_for(*keys)`."""
    return torch.Generator(device).manual_seed(seed_for(*keys))


def noise_for_indices(seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "noise") -> torch.Tensor:
    """Standard normal float32 [len(indices), *shape] on the CPU; row i depends on (seed, stream, indices[i]) alone."""
    rows = [torch.randn(*shape, generator=generator_for(seed, stream, int(index))) for index in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _own_streams(seed: int) -> NoiseSource:
    return partial(noise_for_indices, seed)


def _global_generator(seed: int) -> NoiseSource:
    """Noise of torch's global generator, in the order of the calls."""
    seeded = False

    def draw(indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        nonlocal seeded
        if not seeded:  # processes share the samples: each begins at another index, and so with other noise
            torch.manual_seed(seed + indices[0])
            seeded = True
        return torch.randn(len(indices), *shape)

    return draw


# By the names of `--generator`: each makes the source of the samples' noise from a seed.
NOISE_SOURCES: dict[str, Callable[[int], NoiseSource]] = {
    "dummy": _global_generator,
    "determ": _own_streams,
    "determ-indiv": _own_streams,
}
