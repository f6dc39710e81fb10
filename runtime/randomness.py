"""Random streams by name: every draw is a function of a seed and of what it is for, never of what was drawn before."""

import hashlib

import torch

__all__ = ["generator_for", "seed_for"]


def seed_for(*keys: int | str) -> int:
    """A 63-bit seed that depends on all `keys`, for instance (seed, "noise", step)."""
    plain = tuple(key if isinstance(key, str) else int(key) for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `seed_for(*keys)`."""
    return torch.Generator(device).manual_seed(seed_for(*keys))
