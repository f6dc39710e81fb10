"""Samples, completions, previews, likelihoods, features, statistics and scores that are not finite (NaN or infinity).

Public reports: huggingface/diffusers#6815, instantX-research/InstantStyle-Plus#2 (black pictures, exit code 0).
"""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import latent_flow
from checkpoints.files import save_weights
from command_line import parse_options
from datasets_prep.datasets import DatasetFacts
from evaluation.metrics import METRICS, Metric, compute_metrics, frechet_distance
from evaluation.reconstruction import reconstruct
from evaluation.reference import summarise
from evaluation.sources import open_source
from evaluation.statistics import Statistics, load_statistics
from evaluation.summary import Summary
from flow.likelihood import log_likelihood
from flow.objectives import FlowMatching
from flow.solvers import SOLVERS, SolverOptions, solve
from models.autoencoders.pixels import PixelSpace, decode_images, pixels_to_images
from models.dit import DiTOptions
from models.registry import build_network
from options import DivergedError, UsageError
from runtime.distributed import Processes
from runtime.finite import FiniteTally, finite_rows
from runtime.precision import Machine
from sampling.sampler import Sampler, generate
from sampling.script import mode_groups, run_modes
from tests.fake_features import Pixels
from tests.headers import header_of
from tests.training.test_loop import new_run
from training.loop import train
from training.nan_guard import check_loss

SIDE = 8
NETWORK = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1)
FACTS = DatasetFacts("folder", SIDE, 3, None, True, ("cat", "dog"))
WORDS = r"samples are not finite \(NaN or infinity\): index "
FIXED = {"num_steps": 4}


class Overflowing:
    """A velocity -x, which is multiplied by `factor` for the samples whose class is 1."""

    def __init__(self, factor, labels=None):
        self.factor, self.labels = factor, labels

    def __call__(self, t, x, condition=None, until=None):
        labels = self.labels if condition is None else condition.labels
        scale = torch.where(labels == 1, torch.tensor(self.factor, dtype=x.dtype), torch.tensor(1.0, dtype=x.dtype))
        return -x * scale.view(-1, 1, 1, 1)

    def select_rows(self, rows):
        return Overflowing(self.factor, self.labels[rows])


def new_sampler(method, factor, classes=2, **settings):
    solver = SolverOptions(method, **FIXED, **settings)
    machine = Machine(torch.device("cpu"), "fp32")
    return Sampler(Overflowing(factor), PixelSpace(3), FACTS, (3, SIDE, SIDE), classes, solver, machine, seed=5)


def only(*broken):
    """Labels that are 1 for the samples `broken`, which overflow."""
    return lambda indices, classes: torch.tensor([int(index in broken) for index in indices])


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("factor", [1e38, math.nan])
def test_every_solver_names_the_samples_and_keeps_the_others(method, factor):
    sampler = new_sampler(method, factor)
    (broken,) = generate(sampler, range(10, 16), labels=only(12, 15))
    assert broken.not_finite == (12, 15)
    (sound,) = generate(sampler, range(10, 16), labels=only())
    assert sound.not_finite == ()
    kept = [0, 1, 3, 4]
    assert (broken.images[kept].int() - sound.images[kept].int()).abs().max() <= 1


@pytest.mark.parametrize("method", [name for name, method in SOLVERS.items() if method.reversible])
def test_a_likelihood_of_such_a_velocity_is_not_finite(method):
    data = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    velocity = Overflowing(math.nan, torch.tensor([0, 1, 0]))
    found = log_likelihood(velocity, data, SolverOptions(method, **FIXED), torch.ones_like(data))
    assert found.log_density.isfinite().tolist() == [True, False, True]


def test_samples_that_are_not_finite_at_some_times_only():
    class Later(Overflowing):
        def __call__(self, t, x, condition=None):
            inside = (t < 0.5).expand(len(x)).view(-1, 1, 1, 1)
            return torch.where(inside, super().__call__(t, x), -x)

        def select_rows(self, rows):
            return Later(self.factor, self.labels[rows])

    for method in ("dopri5", "bosh3"):
        found = solve(Later(math.nan, torch.tensor([0, 1])), torch.ones(2, 1, 2, 2), SolverOptions(method)).x
        assert finite_rows(found).tolist() == [True, False]
        torch.testing.assert_close(found[0], torch.full((1, 2, 2), math.e), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("bad", "seen", "total", "refused"),
    [
        (0, 4, 4, False), (1, 4, 4, False), (2, 4, 4, True), (1, 1, 1, True), (1, 1, 4, False), (2, 2, 900, True),
        (9, 900, 900, False), (10, 900, 900, True), (9, 10, 900, False), (9, 9, 900, True),
    ],
)  # fmt: skip
def test_more_than_a_few_are_more_than_one_and_more_than_one_percent_or_all(bad, seen, total, refused):
    tally = FiniteTally(total)
    tally.add(range(seen), range(bad))
    assert tally.gather(Processes()).too_many == tally.too_many == refused
    assert bool(tally.describe()) == (bad > 0)
    if refused:
        with pytest.raises(UsageError, match=rf"^{bad} of {seen} {WORDS}0.*--precision fp32.*check the checkpoint"):
            tally.check()


def write_checkpoint(path, factor=1.0):
    """A tiny network in pixel space, whose last layer is multiplied by `factor`: its samples overflow at 1e38."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("DiT-Mi/4", SIDE, NETWORK)
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    network.final_layer.linear.weight.data.mul_(factor)
    network.final_layer.linear.bias.data.mul_(factor)
    save_weights(path, network.state_dict(), header_of(NETWORK, "DiT-Mi/4", SIDE, dataset=FACTS, step=7))
    return path


def call(tmp_path, checkpoint, *flags):
    fixed = ["--checkpoint", checkpoint, "--precision", "fp32", "--output_dir", tmp_path / "out", "--batch_size", 2]
    return list(run_modes(parse_options("", mode_groups(), [*map(str, fixed), *map(str, flags)])))


MODES = {
    "sample": ("--n_sample", 6),
    "sample npz": ("--n_sample", 6, "--save_images", "npz"),
    "interpolate": ("--mode", "interpolate", "--pictured", 2, "--frames", 2),
    "trajectory": ("--mode", "trajectory", "--pictured", 2, "--frames", 2),
    "compute_nfe": ("--compute_nfe", "--n_sample", 6),
    "invert": ("--mode", "invert", "--pictured", 3),
    "compute_nll": ("--compute_nll", "--n_sample", 3),
}


@pytest.mark.parametrize("method", ["euler", "dopri5", "bosh3"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_refuses_a_network_that_overflows(mode, method, tmp_path, photo_dir):
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors", 1e38)
    with pytest.raises(
        UsageError, match=r"^\d+ of \d+ .* are not finite \(NaN or infinity\): index 0[,;].*check the chec"
    ):
        call(tmp_path, checkpoint, *MODES[mode], "--method", method, "--num_steps", 3, "--datadir", photo_dir)


@pytest.fixture
def held_out_dir(photo_dir):
    """A folder with a training split and eleven held-out images."""
    (photo_dir / "cat").rename(photo_dir / "train")
    (photo_dir / "dog").rename(photo_dir / "val")
    return photo_dir


def test_one_likelihood_that_is_not_finite_is_left_out_of_the_mean(tmp_path, held_out_dir, monkeypatch, capsys):
    def with_nan(*arguments):
        found = log_likelihood(*arguments)
        found.log_density[-1] = math.nan
        return found

    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors")
    flags = ("--compute_nll", "--n_sample", 3, "--datadir", held_out_dir, "--method", "euler", "--num_steps", 2)
    (whole,) = call(tmp_path, checkpoint, *flags, "--batch_size", 3)
    monkeypatch.setattr("sampling.likelihood.log_likelihood", with_nan)
    (part,) = call(tmp_path, checkpoint, *flags, "--batch_size", 3)
    assert "1 of 3 likelihoods of images are not finite (NaN or infinity): index 2" in capsys.readouterr().err
    assert (whole["images"], part["images"]) == (3, 2)
    assert math.isfinite(part["bits_per_dimension"])
    assert "of 2 held-out images" in part["summary"]


def test_one_inverted_image_that_is_not_finite_is_left_out_of_the_statistics(
    tmp_path, held_out_dir, monkeypatch, capsys
):
    def with_nan(*arguments, backwards=False, **rest):
        solution = solve(*arguments, backwards=backwards, **rest)
        if backwards:
            solution.x[1] = math.nan
        return solution

    monkeypatch.setattr("sampling.latent_paths.solve", with_nan)
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors")
    flags = ("--mode", "invert", "--pictured", 3, "--datadir", held_out_dir, "--method", "euler", "--num_steps", 2)
    (result,) = call(tmp_path, checkpoint, *flags)
    assert "1 of 3 inverted images are not finite (NaN or infinity): index 1" in capsys.readouterr().err
    assert all(math.isfinite(result[name]) for name in ("noise_mean", "noise_std", "latent_rms_error"))


def test_one_sample_of_many_is_a_warning_in_the_result(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors")
    noise = Sampler.noise

    def with_one_huge(self, indices):
        factors = torch.tensor([3e38 if index == 3 else 1.0 for index in indices])
        return noise(self, indices) * factors.view(-1, 1, 1, 1)

    monkeypatch.setattr(Sampler, "noise", with_one_huge)
    flags = ["--n_sample", 5, "--method", "euler", "--num_steps", 2, "--save_images", "npz"]
    expected = rf"^1 of 5 {WORDS}3; try --precision fp32"
    (result,) = call(tmp_path, checkpoint, *flags)
    assert len(result["warnings"]) == 1
    assert re.match(expected, result["warnings"][0])
    (written,) = (tmp_path / "out").glob("model*.json")
    assert json.loads(written.read_text())["warnings"] == result["warnings"]
    monkeypatch.undo()  # samples that are read again are named as well
    (again,) = call(tmp_path, checkpoint, *flags)
    assert again["warnings"] == result["warnings"]
    with np.load(tmp_path / "out" / "samples.npz") as table:
        assert table["finite"].tolist() == [True, True, True, False, True]


def test_files_of_finite_samples_have_no_further_column(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors")
    (result,) = call(tmp_path, checkpoint, "--n_sample", 3, "--method", "euler", "--save_images", "npz")
    assert "warnings" not in result
    with np.load(tmp_path / "out" / "samples.npz") as table:
        assert "finite" not in table.files


def test_the_python_interface(tmp_path, capsys):
    flow = latent_flow.load(write_checkpoint(tmp_path / "broken.safetensors", 1e38), precision="fp32")
    images = torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8)
    for method in ("dpm", "dopri5", "torchdiffeq_dopri5"):
        with pytest.raises(UsageError, match=rf"^4 of 4 {WORDS}0, 1, 2, 3"):
            flow.sample(count=4, method=method)
    with pytest.raises(UsageError, match="3 of 3 inverted images are not finite"):
        flow.invert(images)
    flow = latent_flow.load(write_checkpoint(tmp_path / "sound.safetensors"), precision="fp32")
    assert flow.sample(count=4).shape == (4, 3, SIDE, SIDE)
    assert capsys.readouterr().err == ""
    latents = torch.zeros(4, 3, SIDE, SIDE)
    latents[2, 0, 0, 0] = math.nan
    flow.decode(latents)
    assert re.search(rf"warning: 1 of 4 {WORDS}2;", " ".join(capsys.readouterr().err.split()))


class HalfBroken(PixelSpace):
    """Decodes bright latents to infinity, in two chunks."""

    def decode(self, latents):
        parts = latents.split(2)
        return torch.cat([torch.where(part > 0.5, torch.inf, part) for part in parts])


def test_pixels_count_as_well_as_latents():
    latents = torch.zeros(3, 1, 2, 2)
    latents[1], latents[2, 0, 0, 0] = 0.9, math.nan
    images, finite = decode_images(HalfBroken(1), latents)
    assert finite.tolist() == [True, False, False]
    assert torch.equal(images, pixels_to_images(HalfBroken(1).decode(latents)))
    with pytest.raises(UsageError, match="2 of 2 reconstructions of a batch are not finite"):
        reconstruct(HalfBroken(1), torch.full((2, 1, 2, 2), 255, dtype=torch.uint8))


class BrokenSampling(FlowMatching):
    """Flow matching with a sound loss, whose velocity for samplers is not finite."""

    def loss(self, *arguments):
        return FlowMatching(self.options).loss(*arguments)

    def velocity(self, network):
        return lambda t, x, condition: x * math.nan


def test_a_preview_warns_and_the_training_goes_on(tmp_path, capsys):
    run = new_run(tmp_path / "run")
    broken = replace(run.validation, objective=BrokenSampling(run.objective.options))
    assert train(replace(run, validation=broken), resume=False)
    assert (tmp_path / "run" / "samples" / "step_0000014.png").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"warning: sample grid: \d+ of \d+ {WORDS}0, 1", said)


def test_statistics_name_the_features(tmp_path):
    mean, covariance = np.zeros(5), np.eye(5)
    covariance[3, :] = covariance[:, 3] = np.nan
    mean[1] = np.inf
    np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance)
    expected = r"2 of 5 features have a mean or covariance that are not finite \(NaN or infinity\): index 1, 3;"
    with pytest.raises(UsageError, match=rf"s\.npz: {expected}"):
        load_statistics(tmp_path / "s.npz")
    with pytest.raises(UsageError, match=rf"cannot compute a Fréchet distance: {expected}"):
        frechet_distance(Statistics(np.zeros(5), np.eye(5), 9), Statistics(mean, covariance, 9))
    covariance = np.eye(5)
    covariance[0, 4] = covariance[4, 0] = np.inf
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=covariance)
    with pytest.raises(UsageError, match="2 of 5 features .*: index 0, 4;"):
        load_statistics(tmp_path / "s.npz")


def test_cached_features_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    source = open_source(tmp_path / "set.npz")
    summarise(source, Pixels(), ("rows",), tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npz")
    with np.load(path) as table:
        rows, metadata = table["rows"].copy(), table["metadata"]
    rows[1] = np.nan
    np.savez(path, rows=rows, metadata=metadata)
    with pytest.raises(
        UsageError, match="1 of 3 images have features that are not finite .*: index 1; delete the file"
    ):
        summarise(source, Pixels(), ("rows",), tmp_path / "cache")


def test_a_score_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setitem(METRICS, "broken", Metric("Broken", "moments", lambda a, b: {"broken": math.nan}))
    with pytest.raises(UsageError, match=r"--metrics broken: the score is not finite \(NaN or infinity\)"):
        compute_metrics(["broken"], Summary(9, {}), Summary(9, {}))


def test_a_validation_without_finite_samples_has_no_score(tmp_path, capsys, monkeypatch):
    """It is not the best one, and does not end the training."""
    run = new_run(tmp_path / "run")
    validation = replace(run.validation, features=Pixels(), samples=6, derived=tmp_path)
    found = []
    for factor in (1.0, math.nan):
        monkeypatch.setattr(type(run.objective), "velocity", lambda *_, by=factor: lambda t, x, condition: x * by)
        found.append(validation.evaluate(run.network))
    assert math.isfinite(found[0]["objective"])
    assert found[1]["objective"] == math.inf
    assert set(found[0]) - set(found[1]) == {"FD (pixels)"}
    assert re.search(rf"warning: validation: 6 of 6 {WORDS}0, 1", " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_loss_of_an_autoencoder_must_be_finite(loss):
    check_loss(1.0, 5)
    with pytest.raises(DivergedError, match=r"loss at step 5 is not finite \(NaN or infinity\): use a smaller --lr"):
        check_loss(loss, 5)
