"""A sample is a function of its seed and index: bit for bit in the same batch, and up to rounding in any other."""

import pytest
import torch

from datasets_prep.datasets import DatasetFacts
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions, solve
from models.autoencoders.pixels import PixelSpace
from models.dit import DiTOptions
from models.registry import build_network
from runtime.precision import Machine
from sampling.sampler import Sampler, balanced_labels, generate

FACTS = DatasetFacts("folder", 8, 3, None, True, ("cat", "dog"))
SOLVERS = [
    SolverOptions("heun", 4, churn=2.0),
    SolverOptions("stochastic", 6, diffusion="kl"),
    SolverOptions("ab4", 6),
    SolverOptions("dopri5", atol=1e-5, rtol=1e-5),
]


def new_sampler(solver):
    options = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("DiT-Mi/4", 8, options).eval()
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    machine = Machine(torch.device("cpu"), "fp32")
    return Sampler(network, PixelSpace(3), FACTS, (3, 8, 8), 2, solver, machine, seed=5, guidance=GuidanceOptions(2.0))


def latents(sampler, indices):
    velocity = sampler.velocity(balanced_labels(indices, 2))
    return solve(velocity, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices)).x


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda options: options.method)
def test_latents_do_not_depend_on_the_batch(solver):
    sampler = new_sampler(solver)
    together = latents(sampler, range(5))
    assert torch.equal(latents(sampler, range(5)), together)
    torch.testing.assert_close(latents(sampler, [3, 1]), together[[3, 1]], rtol=0, atol=1e-3)
    torch.testing.assert_close(latents(sampler, [4]), together[[4]], rtol=0, atol=1e-3)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_stochastic_solvers_draw_new_noise_for_every_step_and_sample():
    draw = new_sampler(SOLVERS[1]).draw([0, 1])
    values = torch.cat([draw(0), draw(1)]).flatten(1)
    assert torch.equal(draw(1).flatten(1), values[2:])
    assert (torch.corrcoef(values) - torch.eye(4)).abs().max() < 0.3


def test_batches_of_a_stream():
    batches = list(generate(new_sampler(SolverOptions("euler", 3)), [7, 2, 5], batch_size=2))
    assert [list(batch.indices) for batch in batches] == [[7, 2], [5]]
    assert [batch.labels.tolist() for batch in batches] == [[1, 0], [1]]
    assert [batch.evaluations.tolist() for batch in batches] == [[3, 3], [3]]
    assert [batch.network_evaluations.tolist() for batch in batches] == [[6, 6], [6]]
