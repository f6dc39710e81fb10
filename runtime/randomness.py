"""Named random streams: each random draw depends only on a seed and its purpose, never on earlier draws."""

import hashlib

import torch

__all__ = ["generator_for", "seed_for"]


def seed_for(*keys: int | str) -> int:
    """A 63-bit seed that depends on all `keys`, such as (seed, "noise", step)."""
    plain = tuple(key if isinstance(key, str) else int(key) for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `seed_for(*keys)`."""
    return torch.Generator(device).manual_seed(seed_for(*keys))
