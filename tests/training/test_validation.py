from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from datasets_prep.moments import EncodedImages
from evaluation.trained_flow import ExactPoints
from flow.objectives import FlowMatching
from flow.paths import PathOptions
from models.autoencoders.pixels import PixelSpace
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.training.test_loop import metrics_of, new_run
from training import validation
from training.loop import train
from training.validation import validation_loss

MACHINE = Machine(torch.device("cpu"), "fp32")
COUNT = 48


class LinearVelocity(torch.nn.Module):
    """Returns weight * x + label, and records its calls."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.calls = []

    def forward(self, t, x, condition):
        self.calls.append((t, x, condition.labels))
        return self.weight * x + condition.labels.view(-1, 1, 1, 1)


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 1, 4, 4), generator=generator, dtype=torch.uint8)
    facts = DatasetFacts("tiny", 4, 1, None, True, ())
    dataset = ImageDataset(facts, "validation", np.arange(COUNT) % 3, images.__getitem__, "f")
    return EncodedImages(dataset, PixelSpace(1).encode, MACHINE, 1)


def loss_of(network, source, sigma_min=0.1):
    objective = FlowMatching(PathOptions(sigma_min=sigma_min))
    return validation_loss(network, objective, source, PixelSpace(1), MACHINE)


def test_losses_equal_values_computed_by_hand(source):
    """The noise follows from x_t = (1 - t) data + (s + (1 - s) t) noise, and with it the velocity and the error."""
    network, s = LinearVelocity(0.5), 0.1
    values = loss_of(network, source, s)
    t, x_t, labels = (torch.cat(parts).double() for parts in zip(*network.calls, strict=True))
    data = source.moments(torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)).double()
    wide = t.view(-1, 1, 1, 1)
    noise = (x_t - (1 - wide) * data) / (s + (1 - s) * wide)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert torch.equal(labels, source.labels.double())
    velocity = (1 - s) * noise - data
    errors = (0.5 * x_t + labels.view(-1, 1, 1, 1) - velocity).square().mean((1, 2, 3))
    assert values["loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
    for quarter in range(4):
        inside = (t >= quarter / 4) & (t < (quarter + 1) / 4)
        assert inside.sum() == COUNT // 4  # times are evenly spaced
        assert values[f"loss_q{quarter + 1}"] == pytest.approx(errors[inside].mean().item(), rel=1e-5)


def test_the_loss_does_not_depend_on_the_global_random_state(source):
    first = loss_of(LinearVelocity(0.5), source)
    torch.manual_seed(1)
    torch.randn(5)
    assert loss_of(LinearVelocity(0.5), source) == first
    assert loss_of(LinearVelocity(0.6), source) != first


def test_no_gradients_or_random_states_are_changed(source):
    network, state = LinearVelocity(0.5), torch.get_rng_state()
    loss_of(network, source)
    assert network.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_better_velocity_has_a_lower_loss(source):
    """For noise N(0, 1) and data of variance v around 0, the best linear velocity near t = 1/2 is (1 - v) / (1 + v) x."""
    source.labels.zero_()
    v = source.moments(torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)).var().item()
    best = 2 * (1 - v) / (1 + v)
    good, none, wrong = (loss_of(LinearVelocity(weight), source)["loss"] for weight in (best, 0.0, -best))
    assert good < none < wrong


def test_only_the_first_images_are_used(source, monkeypatch):
    monkeypatch.setattr(validation, "HELD_OUT_IMAGES", 16)
    monkeypatch.setattr(validation, "IMAGES_PER_BATCH", 6)
    network = LinearVelocity(0.5)
    loss_of(network, source)
    assert [len(call[0]) for call in network.calls] == [6, 6, 4]
    assert torch.cat([call[2] for call in network.calls]).tolist() == source.labels[:16].tolist()


def test_fewer_images_than_quarters(source):
    source._dataset = source._dataset.head(2)
    source.labels = source.labels[:2]
    assert loss_of(LinearVelocity(0.5), source).keys() == {"loss", "loss_q2", "loss_q4"}


def test_a_run_records_its_excess_loss(tmp_path):
    run = new_run(tmp_path / "run", experiment={"validate_excess": 12})
    exact = ExactPoints.draw(run.header, run.source, run.autoencoder, 12, run.machine.device, Processes())
    run = replace(run, validation=replace(run.validation, exact=exact))
    train(run, resume=False)
    values = [entry["excess"] for entry in metrics_of(tmp_path / "run") if "excess" in entry]
    assert len(values) > 1
    assert values[-1] < values[0]


def test_the_excess_loss_is_not_measured_by_default(tmp_path):
    train(new_run(tmp_path / "run"), resume=False)
    assert not any("excess" in entry for entry in metrics_of(tmp_path / "run"))


def test_large_latents_are_evaluated_in_parts(source, monkeypatch):
    """The loss keeps its times and noise, so it does not depend on the parts."""
    assert [validation.images_per_pass(sides) for sides in ((4, 4), (32, 32), (128, 128), (1024, 1024))] == [
        256,
        256,
        16,
        1,
    ]
    whole = loss_of(LinearVelocity(0.5), source)
    monkeypatch.setattr(validation, "LATENT_PIXELS_PER_PASS", 7 * 16)
    network = LinearVelocity(0.5)
    assert loss_of(network, source) == pytest.approx(whole, rel=1e-6)
    assert [len(t) for t, _, _ in network.calls] == [7] * 6 + [6]
