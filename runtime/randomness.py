"""Named random streams: each random draw depends only on a seed and its purpose, never on earlier draws."""

import hashlib
from collections.abc import Sequence

import torch

__all__ = ["StepDraws", "generator_for", "seed_for"]


def seed_for(*keys: int | str) -> int:
    """A 63-bit seed that depends on all `keys`, such as (seed, "noise", step)."""
    plain = tuple(key if isinstance(key, str) else int(key) for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `seed_for(*keys)`."""
    return torch.Generator(device).manual_seed(seed_for(*keys))


class StepDraws:
    """The random numbers of one training step: functions of the seed, the step, the purpose and the index in the global batch.

    Numbers are drawn for the global batch, and each process gets its own rows. They do not depend on the number of processes
    or on earlier draws, so no random state is saved.

    Args:
        seed: the run's seed.
        step: number of the step, from 0.
        rows: the process's own rows.
        count: N, samples in the global batch.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, rows: slice, count: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._keys = seed, step
        self._rows = rows
        self._count = count

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Standard normal numbers [B, *shape] for the process's own rows."""
        return torch.randn(self._count, *shape, generator=self._own(purpose), device=self.device)[self._rows]

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Uniform numbers [B, *shape] in [0, 1) for the process's own rows."""
        return torch.rand(self._count, *shape, generator=self._own(purpose), device=self.device)[self._rows]

    def shared(self, purpose: str) -> torch.Generator:
        """A generator on the CPU, alike in all processes, for choices that concern the whole step."""
        return generator_for(*self._keys, "shared", purpose)

    def _own(self, purpose: str) -> torch.Generator:
        return generator_for(*self._keys, "step", purpose, device=self.device)
