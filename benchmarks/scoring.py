"""Claims: compared with pip's pytorch_fid, Inception features are 1.5x and the Fréchet distance 5x as fast, with equal values.

Code: evaluation/features/inception.py and evaluation/metrics.py. Both sides use the same images and the same random weights.
Features and distance are also computed with --feature_precision bf16.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks._timing import compare, markdown_table, parse_no_options
from evaluation.features.inception import InceptionFeatures
from evaluation.metrics import frechet_distance
from evaluation.statistics import RunningMoments, Statistics
from pytorch_fid import fid_score, inception

BATCH = 50  # pytorch_fid's default
IMAGES = 100  # in each of the two sets whose distance is compared, at 64 features
DIMS = 2048
ROWS = 5000  # random features; enough for covariances of full rank


def main() -> None:
    """Time features and distance, and compare their values."""
    parse_no_options(__doc__)
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pth")
        torch.save(random_weights(), weights)
        print(f"{torch.get_num_threads()} threads, AMX: {torch.cpu._is_amx_tile_supported()}\n")
        time_features(weights)
        compare_values(weights)
    time_distance()


def random_weights() -> dict[str, torch.Tensor]:
    """Random weights for pytorch_fid's InceptionV3 that keep activations of order one."""
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.nn.functional.interpolate(torch.rand(8, 3, 20, 20), (139, 139)) * 2 - 1)
    return network.state_dict()


def pip_network(weights: str, dims: int) -> torch.nn.Module:
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=torch.load(weights, weights_only=True)):
        return inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


def time_features(weights: str) -> None:
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    theirs = pip_network(weights, DIMS)
    ours = {name: InceptionFeatures(weights, "cpu", DIMS, name) for name in ("fp32", "bf16")}

    @torch.no_grad()
    def pip() -> torch.Tensor:
        return theirs(images / 255)[0].flatten(1)

    def side(name: str) -> Callable[[], torch.Tensor]:
        return lambda: ours[name](images, {"features"})["features"]

    sides = {"pip pytorch_fid": pip, "fp32": side("fp32"), "bf16": side("bf16")}
    seconds = compare(sides, rounds=3)
    expected = pip()
    rows = []
    for name, run in sides.items():
        difference = float((run() - expected).norm() / expected.norm())
        speed = seconds["pip pytorch_fid"] / seconds[name]
        rows.append([name, f"{BATCH / seconds[name]:.2f}", f"{speed:.2f}", f"{difference:.1e}"])
    print(markdown_table(["2048 features", "images/s", "speed", "relative difference"], rows), "\n")


def compare_values(weights: str) -> None:
    low, high = (0, 60), (256, 200)
    sets = [torch.randint(a, b, (IMAGES, 3, 32, 32), dtype=torch.uint8) for a, b in zip(low, high, strict=True)]
    theirs = pip_network(weights, 64)
    networks = {name: InceptionFeatures(weights, "cpu", 64, name) for name in ("fp32", "bf16")}
    values = {"pip pytorch_fid": fid_score.calculate_frechet_distance(*_pip_statistics(theirs, sets))}
    for name, network in networks.items():
        values[name] = frechet_distance(*(_statistics(network, images) for images in sets))
    exact = values["pip pytorch_fid"]
    rows = [[name, f"{value:.6f}", f"{abs(value / exact - 1):.1e}"] for name, value in values.items()]
    print(markdown_table([f"distance at 64 features, {IMAGES} images", "value", "relative difference"], rows), "\n")


@torch.no_grad()
def _pip_statistics(network: torch.nn.Module, sets: list[torch.Tensor]) -> list[np.ndarray]:
    statistics = []
    for images in sets:
        rows = torch.cat([network(batch / 255)[0].mean((2, 3)) for batch in images.split(BATCH)]).double().numpy()
        statistics += [rows.mean(0), np.cov(rows, rowvar=False)]
    return statistics


def _statistics(network: InceptionFeatures, images: torch.Tensor) -> Statistics:
    running = RunningMoments(network.outputs["features"])
    for batch in images.split(BATCH):
        running.update(network(batch, {"features"})["features"])
    return running.statistics()


def time_distance() -> None:
    decay = torch.logspace(0, -4, DIMS, dtype=torch.float64)
    both = []
    for _ in range(2):
        rows = torch.randn(ROWS, DIMS, dtype=torch.float64) @ (
            torch.randn(DIMS, DIMS, dtype=torch.float64) / 45 * decay
        )
        both.append(Statistics(rows.mean(0).numpy(), torch.cov(rows.T).numpy(), ROWS))
    arrays = [array for s in both for array in (s.mean, s.covariance)]
    sides = {
        "pip pytorch_fid": lambda: fid_score.calculate_frechet_distance(*arrays),
        "ours": lambda: frechet_distance(*both),
    }
    seconds, values = compare(sides, rounds=1), {name: run() for name, run in sides.items()}
    table = []
    for name, value in values.items():
        difference = abs(value / values["pip pytorch_fid"] - 1)
        speed = seconds["pip pytorch_fid"] / seconds[name]
        table.append([name, f"{seconds[name]:.1f}", f"{speed:.1f}", f"{difference:.1e}"])
    print(markdown_table([f"distance at {DIMS} features", "seconds", "speed", "relative difference"], table))


if __name__ == "__main__":
    main()
