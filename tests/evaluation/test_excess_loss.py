"""The excess loss of networks whose velocity is known, and both theory scripts from a checkpoint to files."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import read_weights, save_weights
from datasets_prep.datasets import DatasetFacts, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from evaluation import excess_loss, wasserstein_bound
from evaluation.excess_loss import ExcessOptions, choose_bandwidth, measure_errors, measure_excess
from evaluation.trained_flow import (
    DataFolderOptions,
    ExactPoints,
    TrainedFlow,
    exact_velocity,
    open_trained_flow,
    posterior,
)
from evaluation.wasserstein_bound import BoundOptions, measure_bound
from flow.flow_maps.consistency import ConsistencyOptions
from flow.flow_maps.mean_flow import MeanFlowOptions
from flow.losses.options import FlowMatchingOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.distributed import Processes
from tests.headers import header_of

SIDE = 4
NETWORK = DiTOptions(num_in_channels=1, num_out_channels=1, num_classes=2, label_dropout=0.1)
OPTIONS = ExcessOptions(times=4, points=64)


class Moments:
    """Posterior moments from memory, of pixels."""

    def __init__(self, moments: torch.Tensor, labels: torch.Tensor) -> None:
        self.stored, self.labels = moments, labels

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        chosen = self.stored[indices]
        return torch.where(mirrored.view(-1, 1, 1, 1), chosen.flip(3), chosen)


def source(count: int, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Moments(PixelSpace(1).encode(images), torch.arange(count) % 2)


def flow_with(network, flips: bool = False, classes: int = 2) -> TrainedFlow:
    header = header_of(replace(NETWORK, num_classes=classes), latent_size=SIDE)
    header = replace(header, dataset=replace(header.dataset, flips=flips, class_names=("even", "odd")))
    training = source(24, 0)
    images = ((training.stored + 1) * 127.5).round().to(torch.uint8)
    dataset = ImageDataset(header.dataset, "train", training.labels.numpy(), images.__getitem__, "f")
    return TrainedFlow("none", header, network, PixelSpace(1), dataset, training, source(24, 1), torch.device("cpu"))


def no_velocity(t: torch.Tensor, x: torch.Tensor, condition) -> torch.Tensor:
    return torch.zeros_like(x)


def test_the_exact_velocity_has_no_excess() -> None:
    flow = flow_with(None)
    exact = flow.exact()
    errors = measure_errors(replace(flow, network=exact), exact, flow.training, OPTIONS)
    assert errors.excess.abs().max() == 0
    assert torch.equal(errors.loss, errors.irreducible)


def test_loss_is_irreducible_loss_plus_excess() -> None:
    flow = flow_with(no_velocity)
    for conditional in (True, False):
        errors = measure_errors(flow, flow.exact(), flow.training, replace(OPTIONS, points=2000), conditional)
        gap = (
            errors.loss - errors.irreducible - errors.excess
        )  # its expectation is 0, because v* is the conditional mean
        assert gap.mean().abs() < 4 * gap.std() / gap.numel() ** 0.5
        assert errors.excess.mean() > 0.5


def test_mirror_images_are_components_if_training_uses_them() -> None:
    flow = flow_with(no_velocity, flips=True)
    count = sum(len(part.mean) for part in flow.exact().components())
    assert count == 2 * len(flow.training)
    latents = flow.draw(flow.training, 200, torch.Generator().manual_seed(0))
    mirrored = (latents.data.flatten(1) - flow.training.stored[latents.indices].flatten(1)).abs().amax(1) > 1e-6
    assert 0.3 < mirrored.double().mean() < 0.7
    assert torch.equal(mirrored, latents.mirrored)


def test_the_posterior_s_spread_is_that_of_its_samples() -> None:
    torch.manual_seed(0)
    autoencoder = PretrainedAutoencoder(new_autoencoder_kl(1, (8, 8), 2, 8, {}), "toy", scale_factor=0.5)
    moments = autoencoder.encode(torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8))
    mean, std = posterior(autoencoder, moments)
    samples = autoencoder.sample(moments.expand(20_000, -1, -1, -1), torch.randn(20_000, 2, 4, 4))
    torch.testing.assert_close(samples.mean(0), mean[0], atol=0.05, rtol=0.05)
    torch.testing.assert_close(samples.std(0), std[0], atol=0.03, rtol=0.03)


def test_the_bandwidth_has_the_highest_likelihood_of_held_out_points() -> None:
    flow = flow_with(no_velocity)
    points = flow.draw(flow.held_out, 24, torch.Generator().manual_seed(0))
    chosen = choose_bandwidth(flow, points)
    start, condition = torch.zeros(()), flow.condition(points.labels)
    best = flow.exact(chosen).log_density(start, points.data, condition).mean()
    for factor in (0.7, 1.4):
        assert best >= flow.exact(chosen * factor).log_density(start, points.data, condition).mean() - 0.3
    assert 0.2 < chosen < 1.5  # uniform pixels in [-1, 1] have the standard deviation 0.58


def test_results_have_classes_channels_and_held_out_losses() -> None:
    result = measure_excess(flow_with(no_velocity), OPTIONS)
    training, held_out = result["training"], result["held_out"]
    assert list(training["by_class"]) == ["even", "odd"]
    assert len(training["by_channel"]) == 1
    assert len(training["excess"]["by_time"]) == len(result["times"]) == 4
    assert result["training_without_labels"]["excess"]["value"] > 0
    # Near data, the exact velocity of the training images is wrong for others, and a smoothed one is better.
    assert held_out["exact"]["by_time"][0] > held_out["smoothed"]["by_time"][0]
    assert held_out["network"]["value"] == pytest.approx(training["loss"]["value"], rel=0.2)


def test_an_unconditional_network_has_an_excess_per_class_of_its_images() -> None:
    flow = flow_with(no_velocity, classes=1)
    errors = measure_errors(flow, flow.exact(), flow.training, OPTIONS)
    assert errors.labels.unique().tolist() == [0, 1]
    everything = replace(flow, header=replace(flow.header, network=NETWORK)).exact()
    x, null = torch.randn(3, 1, SIDE, SIDE), torch.full((3,), 2)
    found = flow.exact()(torch.tensor(0.5), x, flow.condition(torch.zeros(3, dtype=torch.long)))
    torch.testing.assert_close(found, everything(torch.tensor(0.5), x, flow.condition(null)))


def test_fixed_points_have_the_excess_of_a_direct_measurement_in_any_number_of_processes() -> None:
    flow = flow_with(no_velocity)
    exact = exact_velocity(flow.header, flow.training, flow.autoencoder, flow.device)
    points = ExactPoints.draw(flow.header, flow.training, flow.autoencoder, 20, flow.device, Processes())
    with_v = points.velocity.square().mean().item()
    assert points.excess(no_velocity, Processes()) == pytest.approx(with_v, rel=1e-5)
    torch.testing.assert_close(points.velocity, exact(points.times, points.x_t, flow.condition(points.labels)))
    assert points.excess(lambda t, x, condition: exact(t, x, condition), Processes()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("flips", [False, True])
def test_the_bound_of_the_exact_flow_is_the_autoencoder_s_error(flips: bool) -> None:
    flow = flow_with(None, flips)
    options = BoundOptions(times=6, points=16, paths=4, samples=16, lanczos_steps=4)
    result = measure_bound(replace(flow, network=flow.exact()), options)
    assert result["reconstruction"] == pytest.approx(0, abs=1e-3)
    assert result["decoder"]["largest"] == pytest.approx(1)
    for name in ("uniform", "along_paths", "coupling"):
        assert result["latents"]["bounds"][name] < 1e-3


def test_bounds_are_ordered_and_above_the_coupling() -> None:
    flow = flow_with(lambda t, x, condition: 0.5 * x)
    result = measure_bound(flow, BoundOptions(times=8, points=32, paths=8, samples=16, lanczos_steps=4))
    bounds = result["latents"]["bounds"]
    assert bounds["lfm"] >= bounds["young"] >= bounds["uniform"]
    # The network's rate is constant, so both bounds differ only in the points of their errors.
    assert bounds["along_paths"] == pytest.approx(bounds["uniform"], rel=0.3)
    assert bounds["along_paths"] >= bounds["coupling"] * 0.9
    assert all(norm >= rate for norm, rate in zip(*(result[key]["largest"] for key in ("norms", "rates")), strict=True))
    assert {"exact", "sliced", "sinkhorn"} == set(result["pixels"]["measured"])


def test_errors_are_euclidean_and_along_t() -> None:
    flow = flow_with(lambda t, x, condition: torch.zeros_like(x))
    exact, options = flow.exact(), BoundOptions(times=3, points=400, paths=400, samples=16, lanczos_steps=1)
    result = measure_bound(flow, options)
    for number, time in enumerate(result["times"]):
        latents = flow.draw(flow.training, 2000, torch.Generator().manual_seed(5))
        x_t = (1 - time) * latents.data + time * latents.noise
        size = exact(torch.tensor(time), x_t, flow.condition(latents.labels)).flatten(1).norm(dim=1)
        assert result["errors"][number] == pytest.approx(size.square().mean().sqrt().item(), rel=0.05)
    # Without spreading, the bound is the integral of the errors.
    assert result["latents"]["bounds"]["uniform"] == pytest.approx(sum(result["errors"]) / 3, rel=1e-3)


def test_a_bound_too_large_for_a_float_is_none(tmp_path) -> None:
    result = measure_bound(
        flow_with(lambda t, x, condition: 1000 * x), BoundOptions(2, 4, paths=2, samples=16, lanczos_steps=1)
    )
    assert result["latents"]["bounds"]["lfm"] is None
    assert "LFM's form: too large for a float" in wasserstein_bound.describe(result)
    wasserstein_bound.plot(result, tmp_path / "plot.png")


def test_a_missing_pot_is_noted_once_and_leaves_the_other_distances(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    result = measure_bound(flow_with(no_velocity), BoundOptions(2, 4, paths=2, samples=8, lanczos_steps=1))
    assert capsys.readouterr().err.count("POT is missing") == 1
    assert list(result["pixels"]["measured"]) == ["exact", "sliced"]
    assert "mean of 4 pairs of sets of 2" in wasserstein_bound.describe(result)


def test_other_images_differ_from_the_first_ones(capsys) -> None:
    result = measure_bound(flow_with(no_velocity), BoundOptions(2, 4, paths=2, samples=100, lanczos_steps=1))
    assert "24 images give only 12 pairs" in capsys.readouterr().err
    assert result["pixels"]["measured"]["exact"]["real"]["value"] > 1


@pytest.fixture
def checkpoint(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(12):
            values = np.random.default_rng([number, len(label)]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "data" / label / f"{number}.png")
    network = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1)
    facts = DatasetFacts("folder", SIDE, 3, None, True, ("cat", "dog"))
    torch.manual_seed(0)
    weights = build_network("DiT-Mi/2", SIDE, network).state_dict()
    path = tmp_path / "model_1.safetensors"
    save_weights(path, weights, header_of(network, latent_size=SIDE, dataset=facts))
    return path


def test_scripts_write_results_and_plots(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    shared = [str(checkpoint), "--datadir", str(tmp_path / "data"), "--times", "3", "--points", "8"]
    monkeypatch.setattr("sys.argv", ["excess_loss", *shared])
    excess_loss.main()
    monkeypatch.setattr("sys.argv", ["bound", *shared, "--paths", "3", "--samples", "16", "--lanczos_steps", "2"])
    wasserstein_bound.main()
    printed = capsys.readouterr().out
    for stem, words in (("excess", "of the loss"), ("bound", "bounds of W2 (estimates)")):
        result = json.loads((tmp_path / "samples" / f"model_1_{stem}.json").read_text())
        assert result["checkpoint"] == str(checkpoint)
        assert words in printed
        with Image.open(tmp_path / "samples" / f"model_1_{stem}.png") as picture:
            assert picture.width > 400
    assert result["decoder"]["product"] == 1


def test_images_of_other_classes_are_refused(checkpoint, tmp_path, monkeypatch) -> None:
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "bird")
    monkeypatch.setattr("sys.argv", ["excess_loss", str(checkpoint), "--datadir", str(tmp_path / "data")])
    with pytest.raises(UsageError, match="are bird, cat, but the checkpoint was trained on cat, dog"):
        excess_loss.main()


def test_a_network_with_a_dense_condition_is_refused(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(
        "evaluation.trained_flow.load_model",
        lambda *_: type("Model", (), {"header": type("Header", (), {"dense": 1, "task": "inpaint"})})(),
    )
    monkeypatch.setattr("sys.argv", ["excess_loss", str(checkpoint)])
    with pytest.raises(UsageError, match="was trained for inpaint"):
        excess_loss.main()


def test_a_checkpoint_of_another_coupling_is_refused(checkpoint, monkeypatch):
    weights, header = read_weights(checkpoint)
    save_weights(checkpoint, weights, replace(header, path=FlowMatchingOptions(coupling="optimal_transport")))
    monkeypatch.setattr("sys.argv", ["excess_loss", str(checkpoint)])
    with pytest.raises(
        UsageError, match="--coupling optimal_transport: the exact velocity is known for independent noise"
    ):
        excess_loss.main()


@pytest.mark.parametrize(
    ("objective", "path"), [("mean_flow", MeanFlowOptions(target_kappa=0.5)), ("consistency", ConsistencyOptions())]
)
def test_a_checkpoint_with_another_velocity_is_refused(checkpoint, monkeypatch, objective, path):
    weights, header = read_weights(checkpoint)
    save_weights(checkpoint, weights, replace(header, objective=objective, path=path))
    monkeypatch.setattr("sys.argv", ["excess_loss", str(checkpoint)])
    with pytest.raises(UsageError, match=f"--objective {objective}.*: its velocity is not the exact one"):
        excess_loss.main()


def test_the_velocity_of_other_targets_and_losses_is_read_correctly(checkpoint, tmp_path):
    """A data prediction is read as a velocity, and a contrastive network is corrected."""
    weights, header = read_weights(checkpoint)
    path = FlowMatchingOptions(prediction="data", contrastive_weight=0.2, velocity_direction=1.0)
    save_weights(checkpoint, weights, replace(header, path=path, contrast_means=(0.5,) * 2 * 48))
    folder = DataFolderOptions(str(tmp_path / "data"))
    flow = open_trained_flow(str(checkpoint), folder, LatentCacheOptions(), torch.device("cpu"))
    t, x = torch.tensor([0.5, 0.02]), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    learned = (1 - 1e-5) * x / (1e-5 + (1 - 1e-5) * t).clamp(min=0.05).view(2, 1, 1, 1)  # a new DiT predicts zero
    found = flow.network(t, x, flow.condition(torch.tensor([0, 2])))
    torch.testing.assert_close(found, torch.stack([0.8 * learned[0] - 0.1, learned[1]]))


@pytest.mark.parametrize("script", [excess_loss, wasserstein_bound])
def test_an_output_folder_that_cannot_be_written_is_refused_before_measuring(script, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{script.__name__}.measure_errors", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").touch()
    flags = ["--datadir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "file")]
    monkeypatch.setattr("sys.argv", [script.__name__, str(checkpoint), *flags])
    with pytest.raises(UsageError, match="cannot write into .*file .*--output_dir"):
        script.main()
