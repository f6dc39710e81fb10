"""The sampling protocols of other projects, from their files in test_args/, against the formulas of their papers.

The network is a nonlinear function of time, point and label, so a wrong time, sign, guidance or noise would change the sample.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SolverOptions, solve
from sampling.request import SamplingOptions, SourceOptions
from tests.test_experiments import parse_file

SHAPE = (2, 5, 2, 3)  # five channels, of which some protocols guide three
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Labels(NamedTuple):
    labels: torch.Tensor


def network(t, x, condition, until=None):
    """A velocity towards noise at time t, or its average over [until, t]; 1 is noise."""
    t = (t if until is None else (t + 2 * until) / 3).view(-1, 1, 1, 1)
    return (1.3 * t - 0.4) * x + (1 - 0.5 * t) * torch.sin(2 * x + condition.labels.view(-1, 1, 1, 1))


def weaker(t, x, condition):
    return 0.8 * network(t, x, condition) + 0.1


def v(t, x, label):
    return network(torch.full((len(x),), t, dtype=x.dtype), x, Labels(torch.full((len(x),), label)))


def draw(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1 + step), dtype=torch.float64)


def sample_by(name, guide=None, **changed):
    """Samples of label 1 (null class 7) with the options of a file in test_args/, and the network evaluations of each."""
    options = parse_file("test", name)
    solver = options[SolverOptions]
    guided = GuidedVelocity(
        network, Labels(torch.ones(2)), Labels(torch.full((2,), 7.0)), options[GuidanceOptions], guide
    )
    solver = SolverOptions(**{**vars(solver), **changed})
    return solve(guided, NOISE, solver, draw=draw).x, guided.evaluations(2).tolist()


def sde(x, guided_velocity):
    """SiT's SDE in 250 evaluations: diffusion w = t, score s = -(x + (1 - t) v) / t, and a last step of 0.04 without noise."""
    times = [1 - 0.96 * number / 249 for number in range(250)]
    for step, t in enumerate(times):
        velocity = guided_velocity(t, x)
        score = -(x + (1 - t) * velocity) / t
        drift = velocity - t * score
        if step == 249:
            return x - 0.04 * drift
        h = 0.96 / 249
        x = x - h * drift + math.sqrt(2 * t * h) * draw(step)
    raise AssertionError


def test_sit():
    def guided(t, x):
        velocity = v(t, x, 1)
        velocity[:, :3] = v(t, x, 7)[:, :3] + 1.5 * (velocity - v(t, x, 7))[:, :3]
        return velocity

    found, evaluations = sample_by("imnet_sit")
    torch.testing.assert_close(found, sde(NOISE, guided), rtol=0, atol=1e-9)
    assert evaluations == [500, 500]


def test_repa():
    def guided(t, x):
        return v(t, x, 7) + 1.8 * (v(t, x, 1) - v(t, x, 7)) if t <= 0.7 else v(t, x, 1)

    found, evaluations = sample_by("imnet_repa")
    torch.testing.assert_close(found, sde(NOISE, guided), rtol=0, atol=1e-9)
    assert evaluations == [250 + sum(1 - 0.96 * number / 249 <= 0.7 for number in range(250))] * 2


@pytest.mark.parametrize(
    ("scale", "start", "changed"), [(6.7, 0.125, {}), (10, 0.11, {"cfg_scale": 10.0, "cfg_interval": (0, 0.89)})]
)
def test_lightningdit(scale, start, changed):
    """In its own convention: time s = 1 - t from noise to data, and velocity data - noise."""
    x = NOISE
    even = [number / 249 for number in range(250)]
    grid = [0.3 * s / (1 + (0.3 - 1) * s) for s in even]
    for s, end in pairwise(grid):
        towards_data, null = -v(1 - s, x, 1), -v(1 - s, x, 7)
        if s >= start:
            towards_data[:, :3] = (null + scale * (towards_data - null))[:, :3]
        x = x + (end - s) * towards_data
    options = parse_file("test", "imnet_lightningdit")
    guidance = GuidanceOptions(**{**vars(options[GuidanceOptions]), **changed})
    guided = GuidedVelocity(network, Labels(torch.ones(2)), Labels(torch.full((2,), 7.0)), guidance)
    torch.testing.assert_close(solve(guided, NOISE, options[SolverOptions]).x, x, rtol=0, atol=1e-9)
    assert guided.evaluations(2).tolist() == [249 + sum(s >= start for s in grid[:-1])] * 2


@pytest.mark.parametrize("steps", [1, 2])
def test_meanflow(steps):
    x = NOISE
    for t, r in [(1.0, 0.0)] if steps == 1 else [(1.0, 0.5), (0.5, 0.0)]:
        times = (torch.full((2,), time, dtype=x.dtype) for time in (t, r))
        now, until = times
        x = x - (t - r) * network(now, x, Labels(torch.ones(2)), until)
    found, evaluations = sample_by("imnet_meanflow", num_steps=steps)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert evaluations == [steps, steps]


def test_rae():
    """The shift belongs to latents of 196,608 numbers; here, it is given as a number."""
    shift = math.sqrt(196608 / 4096)
    even = [1 - 0.999 * number / 49 for number in range(50)]
    grid = [shift * t / (1 + (shift - 1) * t) for t in even]
    x = NOISE
    for t, end in pairwise(grid):
        bad = 0.8 * v(t, x, 1) + 0.1
        x = x + (end - t) * (bad + 1.42 * (v(t, x, 1) - bad))
    assert parse_file("test", "imnet_rae")[SolverOptions].time_shift == 0  # auto
    found, evaluations = sample_by("imnet_rae", guide=weaker, time_shift=shift)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)
    assert evaluations == [98, 98]


def test_raes_shift_is_that_of_its_latents():
    seen = []
    latents = torch.zeros(1, 768, 16, 16, dtype=torch.float64)
    solver = parse_file("test", "imnet_rae")[SolverOptions]
    solve(lambda t, x: seen.append(t.item()) or 0 * x, latents, solver)
    shift, even = math.sqrt(48), 1 - 0.999 / 49
    assert seen[1] == pytest.approx(shift * even / (1 + (shift - 1) * even), abs=1e-12)
    assert len(seen) == 49


@pytest.mark.parametrize("name", ["imnet_sit", "imnet_repa", "imnet_lightningdit", "imnet_meanflow", "imnet_rae"])
def test_scores_are_computed_as_published(name):
    """50,000 samples against ADM's statistics; only RAE balances the classes."""
    options = parse_file("test", name)
    sampling = options[SamplingOptions]
    assert (sampling.n_sample, sampling.compute_fid) == (50000, True)
    assert sampling.real_img_dir.endswith("VIRTUAL_imagenet256_labeled.npz")
    assert sampling.labels == ("balanced" if name == "imnet_rae" else "random")
    assert bool(options[SourceOptions].guide_checkpoint) == (name == "imnet_rae")
