"""Claim (docs/theory.md): the exact velocity of 60,000 latents of 256 numbers at 1,000 points takes less than a minute.

    python -m benchmarks.exact_velocity

Times one call of flow.empirical.EmpiricalVelocity for 1,000 points at 32 shared times, as the excess loss uses it, at one time,
as a solver with fixed steps does, and at 1,000 different times. Latents are random, with posteriors and ten classes.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks._timing import compare, markdown_table
from flow.empirical import Components, EmpiricalVelocity

LATENTS, SHAPE, CLASSES, POINTS, PART = 60_000, (4, 8, 8), 10, 1000, 8192


class Labels(NamedTuple):
    """The condition of the points."""

    labels: torch.Tensor


def new_mixture() -> EmpiricalVelocity:
    """A mixture of random components, in parts as they come from a latent cache."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(LATENTS, *SHAPE, generator=generator).half()
    std = 0.1 + 0.1 * torch.rand(LATENTS, *SHAPE, generator=generator).half()
    labels = torch.arange(LATENTS) % CLASSES

    def parts() -> Iterator[Components]:
        for chosen in torch.arange(LATENTS).split(PART):
            yield Components(mean[chosen].float(), std[chosen].float(), labels[chosen])

    return EmpiricalVelocity(parts, classes=CLASSES)


def main() -> None:
    """Print the seconds of one call for each number of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--points", type=int, default=POINTS, help="points per call")
    arguments = parser.parse_args()
    velocity = new_mixture()
    points = torch.randn(arguments.points, *SHAPE, generator=torch.Generator().manual_seed(1))
    condition = Labels(torch.arange(arguments.points) % CLASSES)
    sides = {}
    for times in (1, 32, arguments.points):
        t = (torch.arange(arguments.points) % times + 0.5) / times
        sides[f"{times:,} times"] = partial(velocity, t, points, condition)
    seconds = compare(sides, arguments.rounds)
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    print(markdown_table([f"{arguments.points:,} points at", "seconds"], rows))


if __name__ == "__main__":
    main()
