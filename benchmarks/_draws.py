"""Samples of many settings from the same noises, kept as features, so that a benchmark that was cut off goes on."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from options import Options, as_json, option
from runtime.files import atomic_path
from sampling.sample_and_score import SAMPLING_GROUPS, SamplingOptions
from sampling.sampler import generate
from sampling.setup import Opened, open_sampler

__all__ = ["Bench", "DrawOptions", "Draws", "benchmark_options", "joined", "varied"]

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


def benchmark_options(description: str, own: type, *fixed: str) -> Options:
    """The flags of a benchmark, its own and those of test_flow_latent.py; run_test.sh's file comes first, `fixed` last."""
    words = ["--args_file", DEFAULT_FILE, *sys.argv[1:], *fixed]
    return parse_options(description, (own, *SAMPLING_GROUPS), words)


def varied(
    opened: Opened,
    solver: SolverOptions | None = None,
    guidance: GuidanceOptions | None = None,
    scale: float | None = None,
) -> Opened:
    """The same network with another solver or guidance."""
    sampler = opened.sampler
    solver, guidance = solver or sampler.solver, guidance or sampler.guidance
    if scale is not None:
        guidance = dataclasses.replace(guidance, cfg_scale=scale)
    settings = {**opened.settings, "solver": as_json(solver), "guidance": as_json(guidance)}
    return opened._replace(sampler=dataclasses.replace(sampler, solver=solver, guidance=guidance), settings=settings)


class Bench:
    """Draws samples and scores them; what was drawn before is read from `folder`.

    Args:
        options: of SAMPLING_GROUPS; the network is theirs, the reference the dataset's training images.
        folder: where features are kept, one file a setting.
    """

    def __init__(self, options: Options, folder: str | Path) -> None:
        self.opened = open_sampler(options)
        self.folder = Path(folder)
        self._batch_size = options[SamplingOptions].batch_size
        data, machine = options[DatasetOptions], self.opened.sampler.machine
        self._network: FeatureNetwork = choose_features(
            options[FeatureOptions], self.opened.header["dataset"]["name"], machine
        )
        real = self.opened.real_images(data, "train")
        reference = reference_statistics(real, self._network, data.datadir).statistics
        assert reference is not None
        self._reference: Statistics = reference

    def draw(self, opened: Opened, count: int) -> Draws:
        """Samples 0 to count - 1; those that are missing are drawn, and kept batch by batch."""
        path = self.folder / f"{self._key(opened)}.npz"
        draws = _read(path) if path.exists() else None
        held = 0 if draws is None else len(draws.seconds)
        for start in range(held, count, self._batch_size):
            new = self.draw_batch(opened, range(start, min(start + self._batch_size, count)))
            draws = new if draws is None else joined(draws, new)
            with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: value.numpy() for name, value in vars(draws).items()})
        assert draws is not None
        return draws.first(count)

    def draw_batch(self, opened: Opened, indices: Sequence[int]) -> Draws:
        """These samples, in one batch, drawn now; the seconds are those from noises to images."""
        started = time.perf_counter()
        (batch,) = generate(opened.sampler, indices, batch_size=len(indices))
        seconds = time.perf_counter() - started
        counts = torch.stack([batch.evaluations, batch.network_evaluations])
        return Draws(
            self._network(batch.images, {"features"})["features"].cpu(),
            counts,
            torch.full((len(indices),), seconds / len(indices)),
        )

    def call(self, opened: Opened, count: int) -> Callable[[], object]:
        """Draws samples and keeps nothing: to be timed."""
        return lambda: list(generate(opened.sampler, range(count), batch_size=min(count, self._batch_size)))

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

    def _key(self, opened: Opened) -> str:
        told = json.dumps([opened.settings, self._network.sha256], sort_keys=True)
        return f"{opened.sampler.solver.method}_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


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
