"""How a run looks at itself: validation loss, score and sample grid of the averaged network."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from datasets_prep.datasets import ImageDataset
from datasets_prep.moments import MomentSource
from evaluation.features.protocol import FeatureNetwork
from evaluation.score import reference_statistics, score_images
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.protocol import Autoencoder
from runtime.distributed import Processes
from runtime.pictures import GridOptions, Sheet, side_by_side
from runtime.precision import Machine
from sampling.sampler import GeneratedBatch, Sampler, first_images, generate
from tasks.conditioned_images import ConditionedImages
from training.validation_loss import validation_loss

__all__ = ["Review"]

PREVIEWED = 24  # held-out images whose dense conditions are sampled


@dataclass(frozen=True)
class Review:
    """What is needed to judge a network: held-out moments, real images, a solver, and the scoring network if any.

    A network with a dense condition is judged on the `conditioned` held-out images, and may know the null map, as one
    with labels may know the null class. Samples are drawn in float32 if `precise`. The `processes` share the work, and all
    get the result; each must call the methods.
    """

    dataset: ImageDataset
    held_out: MomentSource
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    num_classes: int
    solver: SolverOptions
    guidance: GuidanceOptions
    seed: int
    machine: Machine
    sigma_min: float
    derived: str | Path
    samples: int
    features: FeatureNetwork | None
    grid: GridOptions = GridOptions()  # noqa: RUF009
    processes: Processes = Processes()  # noqa: RUF009
    conditioned: ConditionedImages | None = None
    drops_labels: bool = True
    drops_dense: bool = False
    precise: bool = False

    @property
    def objective(self) -> str:
        """What the objective is, with all that its value depends on."""
        if self.features is None:
            return "validation loss"
        return f"{self.features.label} of {self.samples} samples, {self.solver}, {self.guidance}"

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Values to record; "objective" is the score where samples are scored, else the validation loss."""
        condition = self.conditioned.condition if self.conditioned else None
        values = validation_loss(
            network, self.held_out, self.autoencoder, self.machine, self.sigma_min, self.processes, condition
        )
        values["objective"] = values["loss"]
        if self.features is not None:
            reference = reference_statistics(self.dataset, self.features, self.derived, processes=self.processes)
            samples = self._draw(network, self.samples)
            result = score_images(samples, self.features, reference, processes=self.processes)
            values |= {"objective": result["value"], result["metric"]: result["value"]}
        return values

    def preview(self, network: nn.Module) -> Sheet:
        """Samples with fixed noise and labels in turn, or each beside the image that it was made for and its condition."""
        count, columns = self.grid.count(self.num_classes), self.grid.columns(self.num_classes)
        if self.conditioned is not None:
            count = min(self.grid.grid_samples or PREVIEWED, len(self.conditioned.images))
        samples = first_images(self._draw(network, count), count, self.processes)
        if self.conditioned is None or not self.processes.is_main:
            return Sheet(samples, columns)
        places = torch.arange(count)
        return side_by_side([self.conditioned.originals(places), self.conditioned.shown(places), samples])

    def _draw(self, network: nn.Module, count: int) -> Iterator[GeneratedBatch]:
        sampler = Sampler(
            network=network,
            autoencoder=self.autoencoder,
            facts=self.dataset.facts,
            latent_shape=self.latent_shape,
            num_classes=self.num_classes,
            solver=self.solver,
            machine=replace(self.machine, precision="fp32") if self.precise else self.machine,
            seed=self.seed,
            guidance=self.guidance,
            drops_labels=self.drops_labels,
            drops_dense=self.drops_dense,
        )
        if self.conditioned is None:
            return generate(sampler, range(count), processes=self.processes)
        labels, dense = self.conditioned.labels(), self.conditioned.dense(sampler)
        return generate(sampler, range(count), labels=labels, dense=dense, processes=self.processes)
