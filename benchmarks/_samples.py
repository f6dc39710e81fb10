"""Sample many settings from the same noise and store their features, so that an interrupted benchmark can resume."""

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
from runtime.outputs import check_folder
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import SamplerRequest, SamplingOptions, sampler_request, sampling_groups
from sampling.sampler import generate

__all__ = ["Bench", "BenchmarkOptions", "BenchmarkRequest", "Samples", "concatenate", "request_benchmark", "varied"]

T = TypeVar("T")

DEFAULT_FILE = "test_args/fashion_mnist_dit.txt"
GROUPS = 8  # balanced half-samples, explained in evaluation.metrics.error_bars
CLASSES = 10  # Consecutive indices cycle through the labels; each block of 10 stays in one group.


@dataclass(frozen=True)
class BenchmarkOptions:
    """Benchmark."""

    keep: str = option("saved_info/benchmarks", "folder for sample features and for the results as JSON")
    screened: int = option(2000, "samples per setting in the first pass", minimum=16)


@dataclass(frozen=True)
class Samples:
    """Features and costs of samples 0 to N - 1.

    Attributes:
        features: float32 [N, D].
        evaluations: int64 [2, N]: evaluations of the (guided) velocity, and network evaluations.
        seconds: [N], time per sample.
    """

    features: torch.Tensor
    evaluations: torch.Tensor
    seconds: torch.Tensor

    def first(self, count: int) -> "Samples":
        """The first `count` samples."""
        return Samples(self.features[:count], self.evaluations[:, :count], self.seconds[:count])

    def costs(self) -> dict[str, float]:
        """Mean evaluations per sample, and the total seconds from noise to images."""
        nfe, networks = self.evaluations.double().mean(1).tolist()
        return {"nfe": nfe, "network_evaluations": networks, "seconds": self.seconds.double().sum().item()}


@dataclass(frozen=True)
class BenchmarkRequest(Generic[T]):
    """A benchmark's own options, and the options of test_flow_latent.py that choose network, data and feature network."""

    own: T
    sampler: SamplerRequest
    data: DatasetOptions
    features: FeatureOptions
    batch_size: int


def request_benchmark(description: str, own: type[T], *fixed: str) -> BenchmarkRequest[T]:
    """Parse a benchmark's flags. Later ones take precedence: run_test.sh's arguments file, the command line, `fixed`."""
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
    """Generate samples and score them, reusing the features of earlier samples from `folder`.

    Args:
        request: the network, and the dataset whose training images are the reference.
        folder: where features are stored, one file per setting.
    """

    def __init__(self, request: BenchmarkRequest, folder: str | Path) -> None:
        self.loaded = load_sampler(request.sampler)
        self.folder = Path(folder)
        check_folder(self.folder, "--keep")
        self._batch_size = request.batch_size
        name, machine = self.loaded.header.dataset.name, self.loaded.sampler.machine
        self._network: FeatureNetwork = choose_features(request.features, name, machine)
        real = self.loaded.real_images(request.data, "train")
        reference = reference_statistics(real, self._network, request.data.datadir).statistics
        assert reference is not None
        self._reference: Statistics = reference

    def sample(self, loaded: LoadedSampler, count: int) -> Samples:
        """Return samples 0 to count - 1. Missing samples are generated and stored after each batch."""
        path = self.folder / f"{self._key(loaded)}.npz"
        samples = _read(path) if path.exists() else None
        stored = 0 if samples is None else len(samples.seconds)
        for start in range(stored, count, self._batch_size):
            new = self.sample_batch(loaded, range(start, min(start + self._batch_size, count)))
            samples = new if samples is None else concatenate(samples, new)
            with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: value.numpy() for name, value in vars(samples).items()})
        assert samples is not None
        return samples.first(count)

    def sample_batch(self, loaded: LoadedSampler, indices: Sequence[int]) -> Samples:
        """Generate the samples with these indices in one batch, ignoring stored ones; time it from noise to images."""
        started = time.perf_counter()
        (batch,) = generate(loaded.sampler, indices, batch_size=len(indices))
        seconds = time.perf_counter() - started
        counts = torch.stack([batch.evaluations, batch.network_evaluations])
        return Samples(
            self._network(batch.images, {"features"})["features"].cpu(),
            counts,
            torch.full((len(indices),), seconds / len(indices)),
        )

    def call(self, loaded: LoadedSampler, count: int) -> Callable[[], object]:
        """A function that generates `count` samples and discards them, for timing."""
        return lambda: list(generate(loaded.sampler, range(count), batch_size=min(count, self._batch_size)))

    def distance(self, features: torch.Tensor) -> float:
        """Fréchet distance between features [N, D] and the reference."""
        moments = RunningMoments(features.shape[1])
        moments.update(features)
        return frechet_distance(moments.statistics(), self._reference)

    def error_of_difference(self, ours: Samples, theirs: Samples | None = None) -> float:
        """Standard deviation of FD(ours) - FD(theirs), both sampled from the same noise; of FD(ours) if `theirs` is None."""
        groups = torch.arange(len(ours.seconds)) // CLASSES % GROUPS
        squares = 0.0
        for split in range(1, GROUPS):
            odd = torch.tensor([(group & split).bit_count() % 2 == 1 for group in range(GROUPS)])[groups]
            first, second = (self._difference(half, ours, theirs) for half in (odd, ~odd))
            squares += (first - second) ** 2 / (GROUPS - 1)
        return squares**0.5 / 2

    def _difference(self, half: torch.Tensor, ours: Samples, theirs: Samples | None) -> float:
        return self.distance(ours.features[half]) - (0.0 if theirs is None else self.distance(theirs.features[half]))

    def _key(self, loaded: LoadedSampler) -> str:
        identity = json.dumps([loaded.settings, self._network.sha256], sort_keys=True)
        return f"{loaded.sampler.solver.method}_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _read(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as arrays:
        return Samples(**{name: torch.from_numpy(arrays[name]) for name in arrays})


def concatenate(a: Samples, b: Samples) -> Samples:
    """Concatenate two sets of samples."""
    return Samples(
        torch.cat([a.features, b.features]),
        torch.cat([a.evaluations, b.evaluations], dim=1),
        torch.cat([a.seconds, b.seconds]),
    )
