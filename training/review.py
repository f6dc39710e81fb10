"""How a run looks at itself: validation loss, score and sample grid of the averaged network."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from datasets_prep.datasets import ImageDataset
from datasets_prep.moments import MomentSource
from evaluation.features import FeatureNetwork
from evaluation.generate import GeneratedBatch, Sampler, first_images, generate
from evaluation.pictures import grid_count
from evaluation.score import reference_statistics, score_samples
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoder import Autoencoder, PixelSpace
from runtime.distributed import Processes
from runtime.precision import Machine
from training.validation import validation_loss

__all__ = ["Review"]


@dataclass(frozen=True)
class Review:
    """What is needed to judge a network: held-out moments, real images, a solver, and the scoring network if any.

    The `processes` share the work, and all get the result; each must call the methods.
    """

    dataset: ImageDataset
    held_out: MomentSource
    autoencoder: Autoencoder | PixelSpace
    latent_shape: tuple[int, int, int]
    num_classes: int
    solver: SolverOptions
    guidance: GuidanceOptions
    seed: int
    machine: Machine
    sigma_min: float
    datadir: str
    samples: int
    features: FeatureNetwork | None
    processes: Processes = Processes()  # noqa: RUF009

    @property
    def objective(self) -> str:
        """What the objective is, with all that its value depends on."""
        if self.features is None:
            return "validation loss"
        return f"{self.features.label} of {self.samples} samples, {self.solver}, {self.guidance}"

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Values to record; "objective" is the score where samples are scored, else the validation loss."""
        values = validation_loss(network, self.held_out, self.autoencoder, self.machine, self.sigma_min, self.processes)
        values["objective"] = values["loss"]
        if self.features is not None:
            reference = reference_statistics(self.dataset, self.features, self.datadir, processes=self.processes)
            samples = self._draw(network, self.samples)
            result = score_samples(samples, self.features, reference, processes=self.processes)
            values |= {"objective": result["value"], result["metric"]: result["value"]}
        return values

    def preview(self, network: nn.Module) -> torch.Tensor:
        """Samples uint8 [B, C, H, W] with fixed noise and labels, for a sheet with one class a column."""
        batches = self._draw(network, grid_count(self.num_classes))
        return first_images(batches, grid_count(self.num_classes), self.processes)

    def _draw(self, network: nn.Module, count: int) -> Iterator[GeneratedBatch]:
        sampler = Sampler(
            network=network,
            autoencoder=self.autoencoder,
            facts=self.dataset.facts,
            latent_shape=self.latent_shape,
            num_classes=self.num_classes,
            solver=self.solver,
            machine=self.machine,
            seed=self.seed,
            guidance=self.guidance,
        )
        return generate(sampler, range(count), processes=self.processes)
