"""Damages files like an accident or an attacker would, with a fixed seed."""

from collections.abc import Iterator

import numpy as np

__all__ = ["damaged", "mutated"]


def mutated(originals: dict[str, bytes], count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield `count` pairs of an original's name and its damaged bytes. The first two of each original are empty and noise."""
    generator = np.random.default_rng(seed)
    names = sorted(originals)
    for number in range(count):
        name = names[number % len(names)]
        data = originals[name]
        if number < len(names):
            yield name, b""
        elif number < 2 * len(names):
            yield name, generator.bytes(len(data))
        else:
            yield name, damaged(data, generator)


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes after one to three random cuts, repetitions, overwritten spans or flipped bits."""
    for _ in range(generator.integers(1, 4)):
        # Half of the damage is near the ends, where file formats keep their headers.
        reach = len(data) if generator.random() < 0.5 else min(len(data), 200)
        start = int(generator.integers(0, max(1, reach)))
        start = len(data) - 1 - start if generator.random() < 0.3 else start
        length = int(generator.integers(1, 40))
        before, span, after = data[:start], data[start : start + length], data[start + length :]
        match generator.integers(0, 7):
            case 0:
                data = before
            case 1:
                data = before + after
            case 2:
                data = before + span + span + after
            case 3:
                data = before + generator.bytes(len(span)) + after
            case 4:
                data = before + bytes(len(span)) + after
            case 5:
                data = before + b"\xff" * len(span) + after
            case _:
                flipped = bytearray(data)
                if flipped:
                    flipped[min(start, len(flipped) - 1)] ^= 1 << int(generator.integers(0, 8))
                data = bytes(flipped)
    return data
