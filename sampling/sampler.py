"""Samples of a trained network as a stream of batches: nothing passes through the disk.

Sample i is a function of (seed, i), the label and the solver; the batch size only decides how many are drawn at a time.
Several processes draw whole batches in turn, so that each batch is what it would be in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn

from datasets_prep.datasets import DatasetFacts, like_originals
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.ode import Draw
from flow.solvers import SolverOptions, solve
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition, DenseInput
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from sampling.noise import NOISE_SOURCES, NoiseSource, noise_for_indices

__all__ = [
    "Dense",
    "GeneratedBatch",
    "Labels",
    "Sampler",
    "balanced_labels",
    "check_guidance",
    "first_images",
    "generate",
]

Labels = Callable[[Sequence[int], int], torch.Tensor]  # class ids [B] of sample indices, given the number of classes
Dense = Callable[[Sequence[int]], torch.Tensor]  # dense maps [B, K, h, w] of sample indices, on the sampler's device


class GeneratedBatch(NamedTuple):
    """Images uint8 [B, C, H, W] of sample indices, their labels, and what each took, all [B] on the CPU.

    `evaluations` are those of the velocity, `network_evaluations` those of networks, where guidance counts two.
    """

    indices: Sequence[int]
    images: torch.Tensor
    labels: torch.Tensor
    evaluations: torch.Tensor
    network_evaluations: torch.Tensor


@dataclass(frozen=True)
class Sampler:
    """All that turns a seed and a sample's index into an image.

    Args:
        network: velocity network(t, x, condition) in evaluation mode, on the machine's device.
        autoencoder: decodes the latents.
        facts: of the dataset; its padding is cropped off, and where it is grey, so are the images.
        latent_shape: (c, h, w).
        num_classes: K; 1 means unconditional.
        solver: method and steps.
        machine: device and precision of the network; latents stay float32.
        seed: of the noise.
        guidance: its scale, interval and channels.
        guide: a weaker network, for autoguidance.
        generator: key of NOISE_SOURCES, for the noise to start from; by default a stream per sample.
        drops_labels: whether the network knows the null class, so that guidance leads away from it.
        drops_dense: whether it knows the null map, zeros, so that guidance leads away from it.
    """

    network: Callable[..., torch.Tensor] | nn.Module
    autoencoder: Autoencoder
    facts: DatasetFacts
    latent_shape: tuple[int, int, int]
    num_classes: int
    solver: SolverOptions
    machine: Machine
    seed: int
    guidance: GuidanceOptions = GuidanceOptions()  # noqa: RUF009
    guide: Callable[..., torch.Tensor] | nn.Module | None = None
    generator: str = "determ-indiv"
    drops_labels: bool = True
    drops_dense: bool = False

    def noise(self, indices: Sequence[int]) -> torch.Tensor:
        """Standard normal latents [B, c, h, w] of sample indices, where the solver starts."""
        return self._source(indices, self.latent_shape).to(self.machine.device)

    def other_noise(self, indices: Sequence[int], stream: str) -> torch.Tensor:
        """As `noise`, of another stream, which is a function of (seed, index) whatever the generator."""
        return noise_for_indices(self.seed, indices, self.latent_shape, stream).to(self.machine.device)

    def draw(self, indices: Sequence[int]) -> Draw:
        """The noise that a stochastic solver adds to these samples, a function of (seed, index, step)."""
        return lambda step: self.other_noise(indices, f"solver step {step}")

    def velocity(self, labels: torch.Tensor, dense: torch.Tensor | None = None) -> GuidedVelocity:
        """The guided velocity under class ids [B] and a dense map [B, K, h, w] for networks that take one."""
        ids = labels.to(self.machine.device)
        null_ids = torch.full_like(ids, self.num_classes) if self.drops_labels else ids
        null_dense = torch.zeros_like(dense) if dense is not None and self.drops_dense else dense
        condition, null = Condition(ids, dense), Condition(null_ids, null_dense)
        guide = None if self.guide is None else partial(self._evaluate, self.guide)
        return GuidedVelocity(partial(self._evaluate, self.network), condition, null, self.guidance, guide)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] of latents as the dataset has them, on the CPU."""
        return like_originals(self.autoencoder.decode(latents), self.facts).cpu()

    @cached_property
    def _source(self) -> NoiseSource:
        return NOISE_SOURCES[self.generator](self.seed)

    def _evaluate(
        self, network: Callable[..., torch.Tensor], t: torch.Tensor, x: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        with self.machine.autocast():
            return network(t, x, condition).float()


def balanced_labels(indices: Sequence[int], num_classes: int) -> torch.Tensor:
    """Class ids [B] in turn, so that every class is as frequent as the others: label i = i mod K."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.long)


def check_guidance(label_dropout: float, dense: DenseInput | None, scale: float) -> None:
    """Refuse a guidance scale for a network that was trained with neither a null class nor a null map.

    Raises:
        UsageError: a scale other than 1 without a null class or null map.
    """
    if scale != 1 and not label_dropout and not (dense and dense.dropout):
        how = "--label_dropout" if dense is None else "--label_dropout or --condition_dropout"
        raise UsageError(
            f"--cfg_scale {scale} needs a network with a null class (trained with {how} above 0); "
            "this one has none: use --cfg_scale 1"
        )


def generate(
    sampler: Sampler,
    indices: Sequence[int],
    *,
    batch_size: int = 200,
    labels: Labels = balanced_labels,
    dense: Dense | None = None,
    processes: Processes = Processes(),  # noqa: B008
) -> Iterator[GeneratedBatch]:
    """Draw the samples `indices` (any non-negative integers), `batch_size` at a time; this process its share of them.

    `labels` and `dense` say what is asked for.
    """
    for start in processes.share(range(0, len(indices), batch_size)):
        chosen = indices[start : start + batch_size]
        ids = labels(chosen, sampler.num_classes)
        velocity = sampler.velocity(ids, dense(chosen) if dense else None)
        solution = solve(velocity, sampler.noise(chosen), sampler.solver, draw=sampler.draw(chosen))
        counts = solution.evaluations.cpu(), velocity.evaluations(len(chosen))
        yield GeneratedBatch(chosen, sampler.decode(solution.x), ids, *counts)


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
