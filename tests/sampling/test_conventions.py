"""Checks of other projects' files, with the exact velocity of Gaussian latents.

The latents are constant in blocks of 4 x 4, plus white noise. The velocity explains 45 %, and a multiple of x_t 14 %, as
for Fashion-MNIST. Images are the latents themselves, quantized.
"""

from pathlib import Path

import pytest
import torch

from checkpoints.files import save_weights
from datasets_prep.image_dataset import DatasetFacts, ImageDataset
from datasets_prep.images import BadImageError
from models.autoencoders.pixels import PixelSpace, images_to_pixels
from models.dit import DiTOptions
from models.registry import build_network
from runtime.distributed import Processes
from runtime.precision import MachineOptions, choose_machine
from sampling import conventions
from sampling.conventions import Subject, find_fault
from sampling.loading import load_sampler
from sampling.request import SamplerRequest, SourceOptions
from sampling.sampler import Sampler
from tests.headers import header_of
from training.network import warn_of_other_conventions

SHAPE = (4, 8, 8)
BLOCK, WHITE = 0.8, 0.6  # standard deviations
REACH = 5  # latents lie in [-REACH, REACH]


class LatentImages:
    """An autoencoder whose latents are the images, times a factor; `normalizes`: its encoder always returns unit scale.

    The second kind stands for real autoencoders, whose decoders saturate and whose encoders return latents as in training.
    """

    is_pixel_space = False

    def __init__(self, factor=1.0, normalizes=False):
        self.factor, self.normalizes = factor, normalizes

    def encode(self, images):
        latents = images_to_pixels(images) * REACH
        return latents / latents.std() if self.normalizes else latents

    def sample(self, moments):
        return self.factor * moments

    def decode(self, latents):
        return latents / self.factor / REACH


def draw_latents(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, SHAPE[0], 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return BLOCK * blocks + WHITE * torch.randn(count, *SHAPE, generator=generator)


def exact(t, x, condition=None):
    """The velocity of these latents: in each eigenspace of their covariance, a multiple of x."""
    t = t.view(-1, 1, 1, 1)
    smooth = torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    parts = ((smooth, 16 * BLOCK**2 + WHITE**2), (x - smooth, WHITE**2))
    return sum((t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2) * part for part, variance in parts)


WRONG = {  # the networks of files that are read by a wrong convention
    "sign": lambda t, x, condition: -exact(t, x),
    "time": lambda t, x, condition: exact(1 - t, x),
    "both": lambda t, x, condition: -exact(1 - t, x),
}


def dataset_of(latents):
    images = ((latents / REACH).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    facts = DatasetFacts("tiny", 8, 4, None, False, ())
    return ImageDataset(facts, "validation", torch.arange(len(images)).numpy() % 3, images.__getitem__, "")


IMAGES = dataset_of(draw_latents(40))


def fault_of(velocity=exact, dataset=IMAGES, **autoencoder):
    return find_fault(Subject(velocity, LatentImages(**autoencoder), SHAPE, 3, torch.device("cpu")), dataset)


@pytest.mark.parametrize("dataset", [IMAGES, None], ids=["images", "no images"])
def test_the_right_network_is_silent(dataset):
    assert fault_of(dataset=dataset) == ""
    assert fault_of(dataset=dataset, normalizes=True) == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_direction_is_named(name):
    fault = fault_of(WRONG[name])
    assert f"% {conventions.DIRECTIONS[name]}. The file follows another convention" in fault
    assert "give the --model_type of the project that it comes from" in fault


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_direction_is_noticed_without_images(name):
    assert "on its own samples, the network's velocities explain" in fault_of(WRONG[name], None)


@pytest.mark.parametrize("factor", [1 / 5.5, 5.5])
def test_latents_in_a_wrong_scale(factor):
    """5.5 = 1 / 0.18215 is the factor of Stable Diffusion's autoencoder."""
    fault = fault_of(factor=factor)
    assert f"8 images have the standard deviation {'0.18' if factor < 1 else '5.'}" in fault
    assert "check that the network was trained with this autoencoder" in fault
    assert "when they are decoded and encoded: check that" in fault_of(dataset=None, factor=factor, normalizes=True)


def test_latents_far_from_zero():
    assert "and the mean 2" in fault_of(dataset=dataset_of(draw_latents(40) + 2))


@pytest.mark.parametrize(
    "latents",
    [
        torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1)),
        0.45 * draw_latents(40),
    ],
    ids=["another autoencoder", "half the scale"],
)
def test_latents_that_the_network_was_not_trained_on(latents):
    assert "on the latents of 8 images, the network's velocities explain" in fault_of(dataset=dataset_of(latents))


def test_untrained_weights():
    for dataset in (IMAGES, None):
        assert "explain nothing of noise - data" in fault_of(lambda t, x, condition: 0 * x, dataset)
    assert "explain nothing" in fault_of(lambda t, x, condition: x / 0)


def test_white_latents_whose_best_velocity_is_a_multiple_of_x_are_silent():
    white = dataset_of(torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(2)))
    assert fault_of(lambda t, x, condition: ((2 * t - 1) / (t**2 + (1 - t) ** 2)).view(-1, 1, 1, 1) * x, white) == ""


def test_pixels_have_no_scale_to_check():
    network = Subject(exact, PixelSpace(4), SHAPE, 3, torch.device("cpu"))
    assert "standard deviation" not in find_fault(network, IMAGES)  # of pixels, here 0.2
    assert find_fault(network, None) == ""


def test_unreadable_images_are_replaced_by_samples():
    broken = ImageDataset(IMAGES.facts, "validation", IMAGES.labels.numpy(), _refuse, "")
    assert fault_of(dataset=broken) == ""
    assert "on its own samples" in fault_of(WRONG["both"], broken)


def _refuse(index):
    raise BadImageError(f"{index}.png", "truncated")


def test_labels_are_those_of_the_images():
    seen = []

    def network(t, x, condition):
        seen.append(condition.labels.tolist())
        return exact(t, x)

    fault_of(network)
    chosen = [IMAGES.labels[5 * number].item() for number in range(8)]
    assert seen == [chosen * 2]


OPTIONS = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2)
MACHINE = choose_machine(MachineOptions(device="cpu", precision="fp32", compile=False), Processes())


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(published_file)` writes a network with random weights."""

    def write(published_file):
        path = tmp_path / "model_1.safetensors"
        network = build_network("DiT-Mi/4", 8, OPTIONS)
        save_weights(path, network.state_dict(), header_of(OPTIONS, "DiT-Mi/4", 8, published_file=published_file))
        return path

    return write


@pytest.mark.parametrize(
    ("published_file", "asked", "checked"),
    [("sit.pt", "auto", True), (None, "auto", False), (None, "on", True), ("sit.pt", "off", False)],
)
def test_other_projects_files_are_checked_before_sampling(published_file, asked, checked, checkpoint, capsys):
    path = checkpoint(published_file)
    machine = MachineOptions(device="cpu", precision="fp32", compile=False)
    load_sampler(SamplerRequest(SourceOptions(str(path), check_conventions=asked), machine=machine))
    assert (f"warning: {path}: on its own samples, the network's velocities" in capsys.readouterr().err) == checked


def test_images_of_the_given_directory_are_used(checkpoint, monkeypatch):
    found = []
    monkeypatch.setattr(conventions, "open_dataset", lambda data, split: found.append((data, split)) or IMAGES)
    monkeypatch.setattr(conventions, "warn_of_conventions", lambda source, subject, dataset: found.append(dataset))
    machine = MachineOptions(device="cpu", precision="fp32", compile=False)
    source = SourceOptions(str(checkpoint("sit.pt")))
    load_sampler(SamplerRequest(source, machine=machine))
    load_sampler(SamplerRequest(source, machine=machine, given={"datadir": "pictures"}))
    none, (data, split), images = found
    assert (none, data.dataset, data.datadir, data.image_size, split) == (None, "tiny", "pictures", 8, "validation")
    assert images is IMAGES


def test_the_check_draws_from_no_generator_that_samples_use(checkpoint):
    def noise(asked):
        torch.manual_seed(3)
        source = SourceOptions(str(checkpoint("sit.pt")), check_conventions=asked)
        machine = MachineOptions(device="cpu", precision="fp32", compile=False)
        loaded = load_sampler(SamplerRequest(source, machine=machine))
        assert isinstance(loaded.sampler, Sampler)
        return torch.randn(4)

    assert torch.equal(noise("auto"), noise("off"))


@pytest.mark.parametrize("published_file", ["sit.pt", None])
def test_training_from_other_projects_files_is_checked(published_file, checkpoint, capsys):
    path = checkpoint(published_file)
    network, header = build_network("DiT-Mi/4", 8, OPTIONS), header_of(OPTIONS, "DiT-Mi/4", 8)
    images = torch.full((16, 3, 8, 8), 90, dtype=torch.uint8)
    held_out = ImageDataset(header.dataset, "validation", torch.zeros(16).numpy(), images.__getitem__, "")
    before = [parameter.clone() for parameter in network.parameters()]
    warn_of_other_conventions(Path(path), network, header, held_out, PixelSpace(3), MACHINE)
    warned = f"warning: --init_from {path}: on the latents of 8 images" in capsys.readouterr().err
    assert warned == (published_file is not None)
    assert network.training
    assert all(map(torch.equal, before, network.parameters()))
