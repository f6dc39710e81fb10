"""Draw what the page's tabs show. Each function yields its state while it works, and then the result."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoints.tasks import GENERATE
from datasets_prep.conditions import MaskedImages, class_shares
from datasets_prep.image_dataset import ImageDataset
from demo_page.abilities import Abilities
from demo_page.pictures import pad_like
from demo_page.settings import Limits, Settings
from demo_page.watch import Watch, Watched
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions, solve
from latent_flow import Flow
from options import UsageError
from runtime.finite import require_finite
from sampling.latent_paths import Recorder, spherical
from sampling.loading import LoadedSampler
from sampling.sampler import GeneratedBatch, Sampler, generate
from tasks.conditioned_images import ConditionedImages
from tasks.hole_scores import paste_known
from tasks.training_free_inpainting import training_free_draw

__all__ = ["DemoModel", "Drawing", "SamplePaths"]

FRAMES = 17  # times of a recorded path, at most


class SamplePaths(NamedTuple):
    """Samples on their way from noise to data.

    `points` and `data` are latents [F, N, c, h, w] on the CPU: the points x_t, and the data that the network predicts there.
    """

    points: torch.Tensor
    data: torch.Tensor


class Drawing(NamedTuple):
    """Images uint8 [N, C, H, W] on the CPU, if there are new ones; a line of text; at the end, the samples' paths."""

    images: torch.Tensor | None
    status: str
    paths: SamplePaths | None = None


@dataclass(frozen=True)
class DemoModel:
    """A checkpoint that draws for the page, one request at a time.

    Args:
        flow: the network and its autoencoder.
        path: the checkpoint.
        limits: what one request may ask for.
        executor: has one thread, which runs the network.
    """

    flow: Flow
    path: Path
    limits: Limits
    executor: ThreadPoolExecutor

    @property
    def abilities(self) -> Abilities:
        """The abilities of the network."""
        return Abilities(self.flow.header)

    def sample(self, labels: Sequence[int], count: int, settings: Settings) -> Iterator[Drawing]:
        """Draw samples of the classes `labels` in turn (none: of all), and show the predicted data on the way.

        Raises:
            UsageError: an option is invalid, the request exceeds a limit, or the network cannot sample without a condition.
        """
        self._check("samples", count, settings)
        watch, sampler = self._watched(settings, settings.solver())
        ids = self._labels(labels, count)
        recorder = Recorder(sampler.velocity(ids), count)
        integrate = partial(
            solve, recorder, sampler.noise(range(count)), sampler.solver, draw=sampler.draw(range(count))
        )
        work, seen = Watched(self.executor, watch, integrate), 0
        for _ in work:
            if recorder.evaluations > seen:
                seen = recorder.evaluations
                predicted = torch.stack([recorder.nearest(row, [0.0])[0][1] for row in range(count)])
                yield Drawing(sampler.decode_batch(predicted, range(count))[0], watch.describe())
        last = work.result.x
        yield Drawing(sampler.decode(last), watch.describe(), _paths(recorder, last))

    def show(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [N, c, h, w], noisy or not, to images uint8 [N, C, H, W]."""
        sampler = self.flow.sampler(SolverOptions(), GuidanceOptions(), seed=0)
        decode = torch.no_grad()(sampler.decode_batch)
        return self.executor.submit(decode, latents.to(self.flow.device), range(len(latents))).result()[0]

    def interpolate(self, label: int | None, other_seed: int, count: int, settings: Settings) -> Iterator[Drawing]:
        """Draw `count` samples from noise on the great circle between sample 0 of two seeds.

        Raises:
            UsageError: see `sample`.
        """
        self._check("interpolation", count, settings)
        watch, sampler = self._watched(settings, settings.solver())
        first, last = (replace(sampler, seed=int(seed)).noise([0]) for seed in (settings.seed, other_seed))
        noise = torch.cat([spherical(first, last, share) for share in torch.linspace(0, 1, count).tolist()])
        velocity = sampler.velocity(self._labels([] if label is None else [label], count, alike=True))
        integrate = partial(solve, velocity, noise, sampler.solver, draw=sampler.draw([0] * count))
        work = Watched(self.executor, watch, lambda: sampler.decode(integrate().x))
        yield from self._until_done(work, watch)

    def inpaint(
        self,
        image: torch.Tensor,
        hole: torch.Tensor,
        label: int | None,
        count: int,
        resamplings: int,
        settings: Settings,
    ) -> Iterator[Drawing]:
        """Fill the hole, bool [H, W], in an image, uint8 [C, H, W] without padding, `count` times.

        A network trained for generation restores the known latents at each of its Euler steps, which it takes `resamplings`
        times (RePaint).

        Raises:
            UsageError: see `sample`.
        """
        free = self.flow.header.task == GENERATE.name
        self._check("inpainting", count, settings, resamplings if free else 1)
        watch, sampler = self._watched(settings, settings.solver(**({"method": "euler"} if free else {})))
        conditioned = self._masked(sampler, image, hole, self._labels([] if label is None else [label], 1, alike=True))
        if free:
            loaded = LoadedSampler(sampler, self.path, self.flow.header, {})
            batches = partial(training_free_draw(loaded, conditioned, int(resamplings)), sampler, range(count))
        else:
            dense = conditioned.dense(sampler)
            batches = partial(
                generate, sampler, range(count), batch_size=count, labels=conditioned.labels(), dense=dense
            )

        def finish() -> torch.Tensor:
            return paste_known(_images(batches()), image.expand(count, -1, -1, -1), hole.expand(count, 1, -1, -1))

        yield from self._until_done(Watched(self.executor, watch, finish), watch)

    def draw_map(self, label_map: torch.Tensor, label: int | None, count: int, settings: Settings) -> Iterator[Drawing]:
        """Draw `count` samples for a label map, uint8 [H, W] without padding.

        Raises:
            UsageError: see `sample`.
        """
        self._check("map", count, settings)
        watch, sampler = self._watched(settings, settings.solver())
        classes, factor = self.flow.header.dense.classes, self.flow.autoencoder.factor  # type: ignore[union-attr]
        padded = pad_like(label_map, self.flow.header.dataset)
        dense = class_shares(padded[None].to(self.flow.device), int(classes or 0), factor).expand(count, -1, -1, -1)
        ids = self._labels([] if label is None else [label], count, alike=True)
        batches = partial(
            generate,
            sampler,
            range(count),
            batch_size=count,
            labels=lambda indices, classes: ids,
            dense=lambda indices: dense,
        )
        yield from self._until_done(Watched(self.executor, watch, lambda: _images(batches())), watch)

    def _check(self, tab: str, count: int, settings: Settings, repetitions: int = 1) -> None:
        if reason := self.abilities.missing.get(tab):
            raise UsageError(reason)
        self.limits.check(count, 1 if settings.adaptive else settings.steps)
        if repetitions < 1:
            raise UsageError(f"expected at least one repetition of each step, but {repetitions} were asked for")

    def _watched(self, settings: Settings, solver: SolverOptions) -> tuple[Watch, Sampler]:
        watch = Watch(self.limits.seconds)
        return watch, watch.watched(self.flow.sampler(solver, settings.guidance(), int(settings.seed)))

    def _labels(self, chosen: Sequence[int], count: int, *, alike: bool = False) -> torch.Tensor:
        """Class ids [count]: the chosen ones in turn, by default all classes; `alike`: by default the null class or class 0."""
        header = self.flow.header
        default = [header.num_classes if header.drops_labels and header.num_classes > 1 else 0]
        known = [number for _, number in self.abilities.classes]
        if wrong := set(chosen) - set(known):
            raise UsageError(f"expected class ids in {known[:1]} to {known[-1:]}, but got {sorted(wrong)}")
        options = [*chosen] or (default if alike else [*range(header.num_classes)])
        return torch.tensor([options[index % len(options)] for index in range(count)])

    def _masked(
        self, sampler: Sampler, image: torch.Tensor, hole: torch.Tensor, labels: torch.Tensor
    ) -> ConditionedImages:
        """A dataset of one image with its hole."""
        facts = self.flow.header.dataset
        padded = pad_like(image, facts)
        dataset = ImageDataset(facts, "validation", labels.numpy().astype(np.int64), lambda index: padded, "")
        masked = MaskedImages(dataset, self.flow.autoencoder, lambda draw: hole, sampler.machine.for_encoding)
        return ConditionedImages(dataset, masked)

    def _until_done(self, work: Watched[torch.Tensor], watch: Watch) -> Iterator[Drawing]:
        for _ in work:
            yield Drawing(None, watch.describe())
        yield Drawing(work.result, watch.describe())


def _paths(recorder: Recorder, last: torch.Tensor) -> SamplePaths:
    """The recorded paths at evenly spaced times, at most as many as there were evaluations, and the samples `last`."""
    frames = min(FRAMES, recorder.evaluations + 1)
    times = torch.linspace(1, 0, frames).tolist()[:-1]
    pairs = [[*recorder.nearest(row, times), (x, x)] for row, x in enumerate(last)]
    points, data = (
        torch.stack([torch.stack([pair[kind] for pair in path]) for path in pairs], dim=1) for kind in (0, 1)
    )
    return SamplePaths(points.cpu(), data.cpu())


def _images(batches: Iterable[GeneratedBatch]) -> torch.Tensor:
    """The images of all batches.

    Raises:
        UsageError: more than a few are not finite.
    """
    drawn = [*batches]
    good = [index not in batch.not_finite for batch in drawn for index in batch.indices]
    require_finite(torch.tensor(good), "samples")
    return torch.cat([batch.images for batch in drawn])
