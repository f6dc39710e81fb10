"""Inpainting with a network trained for generation. Every Euler step restores the known latents (RePaint, flow/repaint.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from flow.grids import time_grid
from flow.ode import breakpoints_of
from flow.repaint import replace_known
from sampling.loading import LoadedSampler
from sampling.sampler import GeneratedBatch, Sampler
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_sampling import Draw
from tasks.hole_scores import mean_colour

__all__ = ["training_free_draw", "with_euler_steps"]


def with_euler_steps(loaded: LoadedSampler) -> LoadedSampler:
    """Replace the sampler's solver with the Euler steps that this method needs, regardless of --method."""
    return loaded.changed(solver=replace(loaded.sampler.solver, method="euler", churn=0.0, reinject_noise=0.0))


def training_free_draw(loaded: LoadedSampler, conditioned: ConditionedImages, resamplings: int) -> Draw:
    """Create the function that draws completions with a network trained for generation.

    A latent pixel is known if none of the image pixels that it covers is in the hole. For encoding, the hole is filled with
    the known pixels' mean color.

    Args:
        loaded: the sampler, with Euler steps.
        conditioned: masked images.
        resamplings: how many times each step is taken.
    """
    sigma_min = loaded.header.path.sigma_min
    autoencoder = loaded.sampler.autoencoder

    def draw(sampler: Sampler, indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        raw = conditioned.raw(conditioned.image_indices(indices)).to(sampler.machine.device)
        images, holes = raw[:, :-1], raw[:, -1:] > 0
        filled = torch.where(holes, mean_colour(images, holes).round().to(torch.uint8), images)
        with sampler.machine.for_encoding.autocast():
            known = autoencoder.sample(autoencoder.encode(filled))
        hole = functional.max_pool2d(holes.float(), autoencoder.factor) > 0
        labels = conditioned.labels()(indices, sampler.num_classes)
        velocity, noise = sampler.velocity(labels), sampler.noise(indices)
        solution = replace_known(
            velocity,
            noise,
            time_grid(sampler.solver, breakpoints_of(velocity), noise[0].numel()),
            known,
            hole,
            sampler.draw(indices),
            resamplings=resamplings,
            sigma_min=sigma_min,
        )
        counts = solution.evaluations.cpu(), velocity.evaluations(len(indices))
        images, not_finite = sampler.decode_batch(solution.x, indices)
        yield GeneratedBatch(indices, images, labels, *counts, not_finite)

    return draw
