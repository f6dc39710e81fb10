"""Samples of a trained network as a stream of batches: nothing passes through the disk.

Sample i is a function of (seed, i), the label and the solver; the batch size only decides how many are drawn at a time.
Several processes draw whole batches in turn, so that each batch is what it would be in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from datasets_prep.datasets import DatasetFacts, crop_padding
from flow.guidance import guided_velocity
from flow.solvers import SolverOptions, solve
from models.autoencoder import Autoencoder, PixelSpace
from models.conditions import Condition
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.randomness import NOISE_SOURCES

__all__ = ["GeneratedBatch", "balanced_labels", "check_guidance", "first_images", "generate"]


class GeneratedBatch(NamedTuple):
    """Images uint8 [B, C, H, W] of sample indices, their labels, and the velocity evaluations each took."""

    indices: Sequence[int]
    images: torch.Tensor
    labels: torch.Tensor
    evaluations: int


def balanced_labels(indices: Sequence[int], num_classes: int) -> torch.Tensor:
    """Class ids [B] in turn, so that every class is as frequent as the others: label i = i mod K."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.long)


def check_guidance(network_options: dict[str, Any], scale: float) -> None:
    """Refuse a guidance scale that the network cannot follow.

    Raises:
        UsageError: a scale other than 1 without a null class.
    """
    if scale != 1 and not network_options.get("label_dropout"):
        raise UsageError(
            f"--cfg_scale {scale} needs a network with a null class (trained with --label_dropout above 0); "
            "this one has none: use --cfg_scale 1"
        )


def generate(
    network: Callable[..., torch.Tensor] | nn.Module,
    autoencoder: Autoencoder | PixelSpace,
    facts: DatasetFacts,
    latent_shape: Sequence[int],
    num_classes: int,
    indices: Sequence[int],
    solver: SolverOptions,
    machine: Machine,
    *,
    seed: int,
    cfg_scale: float = 1.0,
    batch_size: int = 200,
    generator: str = "determ-indiv",
    labels: Callable[[Sequence[int], int], torch.Tensor] = balanced_labels,
    processes: Processes = Processes(),  # noqa: B008
) -> Iterator[GeneratedBatch]:
    """Draw the samples `indices` in batches.

    Args:
        network: velocity network(t, x, condition) in evaluation mode, on the machine's device.
        autoencoder: decodes the latents.
        facts: of the dataset; its padding is cropped off.
        latent_shape: (c, h, w).
        num_classes: K; 1 means unconditional.
        indices: sample numbers, any non-negative integers.
        solver: method and steps.
        machine: device and precision of the network; latents stay float32.
        seed: of the noise.
        cfg_scale: guidance scale, 1: none.
        batch_size: samples drawn at a time.
        generator: key of NOISE_SOURCES; by default every sample has a stream of its own.
        labels: class ids of given indices.
        processes: this process draws its share of the batches.
    """
    noise_source = NOISE_SOURCES[generator](seed)
    for start in processes.share(range(0, len(indices), batch_size)):
        chosen = indices[start : start + batch_size]
        noise = noise_source(chosen, latent_shape).to(machine.device)
        ids = labels(chosen, num_classes).to(machine.device)
        condition, null = Condition(ids), Condition(torch.full_like(ids, num_classes))

        def evaluate(t: torch.Tensor, x: torch.Tensor, condition: Condition) -> torch.Tensor:
            with machine.autocast():
                return network(t, x, condition).float()

        solution = solve(guided_velocity(evaluate, condition, null, cfg_scale), noise, solver)
        images = crop_padding(autoencoder.decode(solution.x), facts)
        yield GeneratedBatch(chosen, images.cpu(), ids.cpu(), solution.evaluations)


def first_images(batches: Iterable[GeneratedBatch], count: int, processes: Processes) -> torch.Tensor:
    """Consume `batches`; images uint8 [N, C, H, W] of the `count` lowest indices that any process drew, in order.

    They come to the main process; elsewhere the result is empty.
    """
    images = {
        index: image
        for batch in batches
        for index, image in zip(batch.indices, batch.images, strict=True)
        if index < count
    }
    drawn = {index: image for part in processes.gather(images) for index, image in part.items()}
    return torch.stack([drawn[index] for index in sorted(drawn)]) if drawn else torch.empty(0)
