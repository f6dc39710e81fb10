"""Validation of the EMA network: loss on held-out images, scores of samples, and sample grids."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from checkpoints.header import Header
from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import HELD_OUT_IMAGES, ImageDataset
from datasets_prep.moments import MomentSource
from evaluation.features.protocol import FeatureNetwork
from evaluation.score import reference_statistics, score_images
from evaluation.trained_flow import ExactPoints
from flow.guidance import GuidanceOptions, VelocityNetwork
from flow.losses.contrast import correct
from flow.objectives import Objective
from flow.solvers import SolverOptions
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from runtime.distributed import Processes
from runtime.finite import FiniteTally, finite_or_warn
from runtime.pictures import GridOptions, Sheet, side_by_side
from runtime.precision import Machine
from runtime.randomness import generator_for
from sampling.sampler import GeneratedBatch, Sampler, first_images, generate
from sampling.tally import count_finite
from tasks.conditioned_images import ConditionedImages
from training.data import select_rows

__all__ = ["Validation", "images_per_pass", "validation_loss"]

PREVIEWED = 24  # held-out images on the sample grid of a network with dense conditions
IMAGES_PER_BATCH = 256  # whose random numbers are drawn together
LATENT_PIXELS_PER_PASS = IMAGES_PER_BATCH * 32 * 32  # so that large latents need no more memory than small ones
SAMPLES_PER_BATCH = 200
QUARTERS = 4


@dataclass(frozen=True)
class Validation:
    """Validation of a run's EMA network. Every process must call the methods and gets the results.

    Args:
        header: header of the run's checkpoints.
        dataset: training images, the reference for scores.
        held_out: posterior moments of the held-out images, for the loss.
        autoencoder: samples the posterior and decodes samples.
        objective: computes the loss.
        solver, guidance, seed, grid: how samples are drawn and shown.
        machine: device and precision.
        derived: folder that caches reference statistics.
        samples: number of samples to score.
        features: the feature network; None: samples are not scored.
        conditioned: held-out images with dense conditions, for networks that take one.
        processes: share the work.
        precise: draw samples in float32.
        exact: points with the exact velocity, to measure the excess loss; None: it is not measured.
        twin: decodes the samples of a grid instead of `autoencoder`; None: `autoencoder` does.
    """

    header: Header
    dataset: ImageDataset
    held_out: MomentSource
    autoencoder: Autoencoder
    objective: Objective
    solver: SolverOptions
    guidance: GuidanceOptions
    seed: int
    machine: Machine
    derived: str | Path
    samples: int
    features: FeatureNetwork | None
    grid: GridOptions = GridOptions()  # noqa: RUF009
    processes: Processes = Processes()  # noqa: RUF009
    conditioned: ConditionedImages | None = None
    precise: bool = False
    exact: ExactPoints | None = None
    twin: Autoencoder | None = None

    @property
    def criterion(self) -> str:
        """The name of the value that selects best.safetensors, with all settings that the value depends on."""
        if self.features is None:
            return "validation loss"
        return f"{self.features.label} of {self.samples} samples, {self.solver}, {self.guidance}"

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Compute the values to record, with "excess" if there are exact points.

        "objective" is the score if samples are scored, else the validation loss.

        If more than a few samples are not finite, there is no score, and the objective is infinite.
        """
        condition = self.conditioned.condition if self.conditioned else None
        values = validation_loss(
            network, self.objective, self.held_out, self.autoencoder, self.machine, self.processes, condition
        )
        values["objective"] = values["loss"]
        if self.exact is not None:
            correction = self.header.correction(self.machine.device)
            velocity = correct(self.machine.evaluating(self.objective.velocity(network)), correction)
            values["excess"] = self.exact.excess(velocity, self.processes)
        if self.features is not None:
            reference = reference_statistics(self.dataset, self.features, self.derived, processes=self.processes)
            tally = FiniteTally(self.samples)
            samples = count_finite(self._draw(network, self.samples), tally)
            result = score_images(samples, self.features, reference, processes=self.processes)
            usable = finite_or_warn(tally.gather(self.processes), "validation")
            values |= {"objective": result["value"] if usable else math.inf}
            values |= {result["metric"]: result["value"]} if usable else {}
        return values

    def preview(self, network: nn.Module) -> Sheet:
        """Draw a sample grid with fixed noise and balanced labels. Dense conditions are shown next to their samples.

        Samples that are not finite cause a warning.
        """
        classes = self.header.num_classes
        count, columns = self.grid.count(classes), self.grid.columns(classes)
        if self.conditioned is not None:
            count = min(self.grid.grid_samples or PREVIEWED, len(self.conditioned.images))
        tally = FiniteTally(count)
        drawn = self._draw(network, count, self.twin)
        samples = first_images(count_finite(drawn, tally), count, self.processes)
        finite_or_warn(tally.gather(self.processes), "sample grid")
        if self.conditioned is None or not self.processes.is_main:
            return Sheet(samples, columns)
        indices = torch.arange(count)
        return side_by_side([self.conditioned.originals(indices), self.conditioned.shown(indices), samples])

    def _draw(self, network: nn.Module, count: int, twin: Autoencoder | None = None) -> Iterator[GeneratedBatch]:
        sampler = Sampler(
            network=VelocityNetwork(network, self.objective.velocity),
            autoencoder=twin or self.autoencoder,
            facts=self.dataset.facts,
            latent_shape=self.header.latent_shape,
            num_classes=self.header.num_classes,
            solver=self.solver,
            machine=replace(self.machine, precision="fp32") if self.precise else self.machine,
            seed=self.seed,
            guidance=self.guidance,
            correction=self.header.correction(self.machine.device),
            drops_labels=self.header.drops_labels,
            drops_dense=self.header.drops_dense,
        )
        size = min(SAMPLES_PER_BATCH, images_per_pass(self.header.latent_shape[1:]))
        if self.conditioned is None:
            return generate(sampler, range(count), batch_size=size, processes=self.processes)
        labels, dense = self.conditioned.labels(), self.conditioned.dense(sampler)
        return generate(sampler, range(count), batch_size=size, labels=labels, dense=dense, processes=self.processes)


@torch.no_grad()
def validation_loss(
    network: nn.Module,
    objective: Objective,
    source: MomentSource,
    autoencoder: Autoencoder,
    machine: Machine,
    processes: Processes = Processes(),  # noqa: B008
    condition: ConditionSource | None = None,
) -> dict[str, float]:
    """Compute the objective's mean loss on the first images of `source`, at fixed times and noise.

    Args:
        network: the velocity network.
        objective: computes the loss.
        source: posterior moments; the first HELD_OUT_IMAGES images count.
        autoencoder: samples the posterior.
        machine: device and precision.
        processes: share the batches, and all get the result.
        condition: dense conditions of the same images. Image i uses random draw i, such as mask i.

    Returns:
        "loss", and "loss_q1" .. "loss_q4" for t in [0, 1/4), ..., [3/4, 1].
    """
    count = min(len(source), HELD_OUT_IMAGES)
    generator = generator_for(0, "validation")
    times = (torch.randperm(count, generator=generator) + 0.5) / count
    unmirrored = torch.zeros(count, dtype=torch.bool)
    sides = source.moments(torch.tensor([0]), unmirrored[:1]).shape[2:]
    own = torch.zeros(count)  # losses of this process's batches
    for number, chosen in enumerate(torch.arange(count).split(IMAGES_PER_BATCH)):
        shape = (len(chosen), autoencoder.latent_channels, *sides)
        draws = 2 if condition is None else 3
        posterior, noise, *others = (torch.randn(shape, generator=generator).to(machine.device) for _ in range(draws))
        if number % processes.count != processes.rank:
            continue
        data = autoencoder.sample(source.moments(chosen, unmirrored[chosen]).to(machine.device), posterior)
        dense = None
        if condition is not None:
            dense = condition.encode(condition.read(chosen, unmirrored[chosen], chosen.tolist()), *others)
        given = Condition(source.labels[chosen].to(machine.device), dense)
        at = objective.at(times[chosen].to(machine.device))
        for part in _slices(len(chosen), images_per_pass(sides)):
            columns = data[part], noise[part], select_rows(at, part), select_rows(given, part)
            own[chosen[part]] = objective.loss(machine.evaluating(network), *columns).cpu()
    losses, quarter = processes.sum(own), (times * QUARTERS).long().clamp(max=QUARTERS - 1)
    by_quarter = {f"loss_q{q + 1}": losses[quarter == q].mean().item() for q in range(QUARTERS) if (quarter == q).any()}
    return {"loss": losses.mean().item(), **by_quarter}


def images_per_pass(sides: Sequence[int]) -> int:
    """The number of images with latents of these sides that are evaluated or drawn at once, at most IMAGES_PER_BATCH."""
    return max(1, min(IMAGES_PER_BATCH, LATENT_PIXELS_PER_PASS // math.prod(sides)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
