"""Samples of a trained network as a stream of batches in memory.

Sample i is a function of (seed, i), its label and condition, and the solver. The batch size determines only how many samples
are drawn at a time. Several processes take whole batches in turn, so each batch is the same as in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn

from datasets_prep.image_dataset import DatasetFacts, like_originals
from flow.guidance import GuidanceOptions, GuidedVelocity, Network, VelocityCorrection, VelocityNetwork
from flow.ode import Draw
from flow.solvers import SolverOptions, solve
from models.autoencoders.pixels import decode_images
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from runtime.distributed import Processes
from runtime.finite import require_finite
from runtime.precision import Machine
from sampling.noise import NOISE_SOURCES, NoiseSource, noise_for_indices

__all__ = [
    "Dense",
    "GeneratedBatch",
    "Labels",
    "Sampler",
    "balanced_labels",
    "first_images",
    "generate",
]

Labels = Callable[[Sequence[int], int], torch.Tensor]  # class ids [B] of sample indices, given the number of classes
Dense = Callable[[Sequence[int]], torch.Tensor]  # dense maps [B, K, h, w] of sample indices, on the sampler's device


class GeneratedBatch(NamedTuple):
    """A batch of samples, on the CPU.

    Args:
        indices: indices of the samples.
        images: uint8 [B, C, H, W].
        labels: class ids [B].
        evaluations: velocity evaluations that each sample took, int64 [B].
        network_evaluations: network evaluations that each sample took, int64 [B]; a guided velocity evaluation takes two.
        not_finite: indices of the samples whose latents or pixels had NaN or infinity.
    """

    indices: Sequence[int]
    images: torch.Tensor
    labels: torch.Tensor
    evaluations: torch.Tensor
    network_evaluations: torch.Tensor
    not_finite: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Network, solver and autoencoder, which turn a seed and a sample's index into an image.

    Args:
        network: velocity network(t, x, condition) in evaluation mode, on the machine's device. Internal guidance needs a
            `VelocityNetwork`; the solver `flow_map` needs a network that also takes `until`.
        autoencoder: decodes the latents.
        facts: facts about the dataset. Its padding is cropped from the samples, which are gray if the dataset is.
        latent_shape: (c, h, w).
        num_classes: K; 1 means unconditional.
        solver: method and steps.
        machine: device and precision of the network; latents stay float32.
        seed: seed of the noise.
        guidance: scale, interval and channels.
        guide: a weaker network, for autoguidance.
        correction: applies to the network's velocity where guidance acts; see flow/losses/contrast.py.
        generator: key of NOISE_SOURCES, for the initial noise; by default each sample has its own stream.
        drops_labels: whether the network was trained with the null class, so that guidance uses it.
        drops_dense: whether the network was trained with the null map (zeros), so that guidance uses it.
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
    correction: VelocityCorrection | None = None
    generator: str = "determ-indiv"
    drops_labels: bool = True
    drops_dense: bool = False

    def noise(self, indices: Sequence[int]) -> torch.Tensor:
        """Initial noise of samples: standard normal [B, c, h, w]."""
        return self._source(indices, self.latent_shape).to(self.machine.device)

    def other_noise(self, indices: Sequence[int], stream: str) -> torch.Tensor:
        """Standard normal [B, c, h, w] from a named stream, a function of (seed, stream, index) for every `generator`."""
        return noise_for_indices(self.seed, indices, self.latent_shape, stream).to(self.machine.device)

    def draw(self, indices: Sequence[int]) -> Draw:
        """The noise that a stochastic solver adds to samples, a function of (seed, index, step)."""
        return lambda step: self.other_noise(indices, f"solver step {step}")

    def velocity(self, labels: torch.Tensor, dense: torch.Tensor | None = None) -> GuidedVelocity:
        """The guided velocity for class ids [B] and, for networks that take one, a dense condition [B, K, h, w]."""
        ids = labels.to(self.machine.device)
        null_ids = torch.full_like(ids, self.num_classes) if self.drops_labels else ids
        null_dense = torch.zeros_like(dense) if dense is not None and self.drops_dense else dense
        condition, null = Condition(ids, dense), Condition(null_ids, null_dense)
        guide = None if self.guide is None else partial(self._evaluate, self.guide)
        network, internal = partial(self._evaluate, self.network), None
        if isinstance(self.network, VelocityNetwork):
            internal = partial(self._internally_guided, self.network)
        return GuidedVelocity(network, condition, null, self.guidance, guide, self.correction, internal)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, c, h, w] to images uint8 [B, C, H, W] in the size and channels of the dataset, on the CPU.

        Raises:
            UsageError: more than a few are not finite. A few cause a warning.
        """
        images, finite = self._decode(latents)
        require_finite(finite, "samples")
        return images

    def decode_batch(self, latents: torch.Tensor, indices: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Decode the latents of the samples `indices`; also return the indices of those that are not finite."""
        images, finite = self._decode(latents)
        return images, tuple(index for index, fine in zip(indices, finite.tolist(), strict=True) if not fine)

    def _decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, finite = decode_images(self.autoencoder, latents)
        return like_originals(images, self.facts).cpu(), finite.cpu()

    @cached_property
    def _source(self) -> NoiseSource:
        return NOISE_SOURCES[self.generator](self.seed)

    def _internally_guided(self, network: VelocityNetwork, scales: torch.Tensor) -> Network:
        return partial(self._evaluate, network.internally_guided(scales))

    def _evaluate(
        self,
        network: Callable[..., torch.Tensor],
        t: torch.Tensor,
        x: torch.Tensor,
        condition: Condition,
        **others: torch.Tensor,
    ) -> torch.Tensor:
        with self.machine.autocast():
            return network(t, x, condition, **others).float()


def balanced_labels(indices: Sequence[int], num_classes: int) -> torch.Tensor:
    """Class ids [B] in turn, so that all classes are equally frequent: label i = i mod K."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.long)


def generate(
    sampler: Sampler,
    indices: Sequence[int],
    *,
    batch_size: int = 200,
    labels: Labels = balanced_labels,
    dense: Dense | None = None,
    processes: Processes = Processes(),  # noqa: B008
) -> Iterator[GeneratedBatch]:
    """Draw samples, `batch_size` at a time.

    Args:
        sampler: network, solver and autoencoder.
        indices: any non-negative integers.
        batch_size: number of samples drawn at a time.
        labels: gives the class ids of sample indices.
        dense: gives the dense conditions of sample indices, for networks that take one.
        processes: each draws every `processes.count`-th batch.

    Raises:
        UsageError: the solver's.
    """
    for start in processes.share(range(0, len(indices), batch_size)):
        chosen = indices[start : start + batch_size]
        ids = labels(chosen, sampler.num_classes)
        velocity = sampler.velocity(ids, dense(chosen) if dense else None)
        solution = solve(velocity, sampler.noise(chosen), sampler.solver, draw=sampler.draw(chosen))
        counts = solution.evaluations.cpu(), velocity.evaluations(len(chosen))
        images, not_finite = sampler.decode_batch(solution.x, chosen)
        yield GeneratedBatch(chosen, images, ids, *counts, not_finite)


def first_images(batches: Iterable[GeneratedBatch], count: int, processes: Processes) -> torch.Tensor:
    """Consume `batches` and gather the images with indices below `count` from all processes.

    Returns:
        Images uint8 [N, C, H, W] in the order of their indices in the main process; an empty tensor in the others.
    """
    images = {
        index: image
        for batch in batches
        for index, image in zip(batch.indices, batch.images, strict=True)
        if index < count
    }
    drawn = {index: image for part in processes.gather(images) for index, image in part.items()}
    return torch.stack([drawn[index] for index in sorted(drawn)]) if drawn else torch.empty(0)
