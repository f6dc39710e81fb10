"""Samples of many settings from the same noises, stored as features, so that an interrupted benchmark continues."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from command_line import parse_options
from datasets_prep.datasets import DatasetOptions
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.metrics import frechet_distance
from evaluation.score import reference_statistics
from evaluation.statistics import RunningMoments, Statistics
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from options import option
from runtime.files import atomic_path
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import SamplerRequest, SamplingOptions, sampler_request, sampling_groups
from sampling.sampler import generate

__all__ = ["Bench", "BenchmarkRequest", "DrawOptions", "Draws", "joined", "request_benchmark", "varied"]

T = TypeVar("T")

DEFAULT_FILE = "test_args/fashion_mnist_dit.txt"
GROUPS = 8  # of samples, for error bars: evaluation.metrics.error_bars tells how
CLASSES = 10  # of successive indices, which must not be torn apart


@dataclass(frozen=True)
class DrawOptions:
    """Benchmark."""

    keep: str = option("saved_info/benchmarks", "folder for the features of what was drawn, and for the rows as JSON")
    screened: int = option(2000, "samples of every setting", minimum=16)


@dataclass(frozen=True)
class Draws:
    """Of samples 0 to N - 1: features float32 [N, D], evaluations int64 [2, N] (of the velocity, of networks), seconds [N]."""

    features: torch.Tensor
    evaluations: torch.Tensor
    seconds: torch.Tensor

    def first(self, count: int) -> "Draws":
        """Those of the first samples."""
        return Draws(self.features[:count], self.evaluations[:, :count], self.seconds[:count])

    def costs(self) -> dict[str, float]:
        """Evaluations a sample, and the seconds from noises to images that all took."""
        nfe, networks = self.evaluations.double().mean(1).tolist()
        return {"nfe": nfe, "network_evaluations": networks, "seconds": self.seconds.double().sum().item()}


@dataclass(frozen=True)
class BenchmarkRequest(Generic[T]):
    """The flags of a benchmark: its own, and those of test_flow_latent.py that name network, data and feature network."""

    own: T
    sampler: SamplerRequest
    data: DatasetOptions
    features: FeatureOptions
    batch_size: int


def request_benchmark(description: str, own: type[T], *fixed: str) -> BenchmarkRequest[T]:
    """Parse a benchmark's flags: first run_test.sh's arguments file, then the command line, then the flags `fixed`."""
    words = ["--args_file", DEFAULT_FILE, *sys.argv[1:], *fixed]
    options = parse_options(description, (own, *sampling_groups()), words)
    return BenchmarkRequest(
        own=options[own],
        sampler=sampler_request(options),
        data=options[DatasetOptions],
        features=options[FeatureOptions],
        batch_size=options[SamplingOptions].batch_size,
    )


def varied(
    loaded: LoadedSampler,
    solver: SolverOptions | None = None,
    guidance: GuidanceOptions | None = None,
    scale: float | None = None,
) -> LoadedSampler:
    """The same network with another solver, guidance or guidance scale."""
    guidance = guidance or loaded.sampler.guidance
    if scale is not None:
        guidance = dataclasses.replace(guidance, cfg_scale=scale)
    return loaded.changed(solver, guidance)


class Bench:
    """Draws samples and scores them; samples drawn before are read from `folder`.

    Args:
        request: the network, and the dataset whose training images are the reference.
        folder: holds the features, one file per setting.
    """

    def __init__(self, request: BenchmarkRequest, folder: str | Path) -> None:
        self.loaded = load_sampler(request.sampler)
        self.folder = Path(folder)
        self._batch_size = request.batch_size
        name, machine = self.loaded.header.dataset.name, self.loaded.sampler.machine
        self._network: FeatureNetwork = choose_features(request.features, name, machine)
        real = self.loaded.real_images(request.data, "train")
        reference = reference_statistics(real, self._network, request.data.datadir).statistics
        assert reference is not None
        self._reference: Statistics = reference

    def draw(self, loaded: LoadedSampler, count: int) -> Draws:
        """Samples 0 to count - 1; those that are missing are drawn, and kept batch by batch."""
        path = self.folder / f"{self._key(loaded)}.npz"
        draws = _read(path) if path.exists() else None
        held = 0 if draws is None else len(draws.seconds)
        for start in range(held, count, self._batch_size):
            new = self.draw_batch(loaded, range(start, min(start + self._batch_size, count)))
            draws = new if draws is None else joined(draws, new)
            with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: value.numpy() for name, value in vars(draws).items()})
        assert draws is not None
        return draws.first(count)

    def draw_batch(self, loaded: LoadedSampler, indices: Sequence[int]) -> Draws:
        """These samples, in one batch, drawn now; the seconds are those from noises to images."""
        started = time.perf_counter()
        (batch,) = generate(loaded.sampler, indices, batch_size=len(indices))
        seconds = time.perf_counter() - started
        counts = torch.stack([batch.evaluations, batch.network_evaluations])
        return Draws(
            self._network(batch.images, {"features"})["features"].cpu(),
            counts,
            torch.full((len(indices),), seconds / len(indices)),
        )

    def call(self, loaded: LoadedSampler, count: int) -> Callable[[], object]:
        """Draws samples and keeps nothing: to be timed."""
        return lambda: list(generate(loaded.sampler, range(count), batch_size=min(count, self._batch_size)))

    def distance(self, features: torch.Tensor) -> float:
        """Fréchet distance of features [N, D] from the reference."""
        moments = RunningMoments(features.shape[1])
        moments.update(features)
        return frechet_distance(moments.statistics(), self._reference)

    def error_of_difference(self, ours: Draws, theirs: Draws | None = None) -> float:
        """Standard deviation of FD(ours) - FD(theirs) over noises that both share; of FD(ours) alone without the others."""
        groups = torch.arange(len(ours.seconds)) // CLASSES % GROUPS
        squares = 0.0
        for split in range(1, GROUPS):
            odd = torch.tensor([(group & split).bit_count() % 2 == 1 for group in range(GROUPS)])[groups]
            first, second = (self._difference(half, ours, theirs) for half in (odd, ~odd))
            squares += (first - second) ** 2 / (GROUPS - 1)
        return squares**0.5 / 2

    def _difference(self, half: torch.Tensor, ours: Draws, theirs: Draws | None) -> float:
        return self.distance(ours.features[half]) - (0.0 if theirs is None else self.distance(theirs.features[half]))

    def _key(self, loaded: LoadedSampler) -> str:
        told = json.dumps([loaded.settings, self._network.sha256], sort_keys=True)
        return f"{loaded.sampler.solver.method}_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _read(path: Path) -> Draws:
    with np.load(path, allow_pickle=False) as content:
        return Draws(**{name: torch.from_numpy(content[name]) for name in content})


def joined(a: Draws, b: Draws) -> Draws:
    """Both, one after the other."""
    return Draws(
        torch.cat([a.features, b.features]),
        torch.cat([a.evaluations, b.evaluations], dim=1),
        torch.cat([a.seconds, b.seconds]),
    )
