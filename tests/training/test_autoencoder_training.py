import dataclasses
import json

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from models.autoencoders.kl import KLAutoencoder, new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import images_to_pixels
from options import DivergedError, UsageError
from runtime.precision import Machine
from training import autoencoder as module
from training.autoencoder import (
    AutoencoderTrainingOptions,
    posterior_statistics,
    save_autoencoder,
    train_autoencoder,
)

CPU = Machine(torch.device("cpu"), "fp32")
TINY = AutoencoderTrainingOptions(widths=(8, 16), latent_channels=2, batch_size=16, max_steps=2)


def dataset_of(images, flips=False, crop=None):
    facts = DatasetFacts("folder", images.shape[-1], images.shape[1], crop, flips, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, "fingerprint")


def blobs(count, side=8):
    """Bright spots at random positions on black: uint8 [count, 1, side, side]."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(count, 2, 1, 1, generator=generator) * side
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = (x - center[:, 0]) ** 2 + (y - center[:, 1]) ** 2
    return (255 * (-distance / 6).exp()).round().byte()[:, None]


def tiny_network(channels=1):
    torch.manual_seed(0)
    return new_autoencoder_kl(channels, (8, 16), 2, 8, {})


def test_training_learns_to_reconstruct():
    images = blobs(128)
    settings = dataclasses.replace(TINY, max_steps=250, lr=1e-2, ema_decay=0.9)
    autoencoder = KLAutoencoder(train_autoencoder(dataset_of(images), settings, CPU), "x")
    restored = autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
    pixels = images_to_pixels(images)
    error = (restored - pixels).square().mean()
    best_constant = (pixels - pixels.mean(0)).square().mean()  # the best a network could do while ignoring its input
    assert error < best_constant / 4


def test_weights_depend_only_on_the_seed():
    dataset = dataset_of(blobs(64))
    torch.manual_seed(1)
    first = train_autoencoder(dataset, TINY, CPU).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = train_autoencoder(dataset, TINY, CPU).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = train_autoencoder(dataset, dataclasses.replace(TINY, seed=1), CPU).state_dict()
    assert not torch.equal(other["encoder.conv_in.weight"], first["encoder.conv_in.weight"])


def test_divergence_equals_torch_distributions():
    network, pixels = tiny_network(), images_to_pixels(blobs(5))
    _, divergence = module._losses(network, pixels, 0, torch.Generator().manual_seed(0))
    mean, logvar = module.encode_moments(network, pixels).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(divergence, expected)


def test_padding_is_not_reconstructed(monkeypatch):
    decoded = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    monkeypatch.setattr(module, "decode_pixels", lambda network, z: decoded)
    pixels = images_to_pixels(blobs(5))
    error, _ = module._losses(tiny_network(), pixels, 2, torch.Generator().manual_seed(0))
    error.backward()
    expected = torch.zeros_like(pixels)
    expected[..., 2:6, 2:6] = (2 * (decoded - pixels) / (5 * 4 * 4)).detach()[..., 2:6, 2:6]
    torch.testing.assert_close(decoded.grad, expected)


def test_decoded_latents_are_posterior_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "decode_pixels", lambda network, z: seen.append(z) or torch.zeros(5, 1, 8, 8))
    network, pixels = tiny_network(), images_to_pixels(blobs(5))
    module._losses(network, pixels, 0, torch.Generator().manual_seed(3))
    mean, logvar = module.encode_moments(network, pixels).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(seen[0], mean + (0.5 * logvar).exp() * noise)


def test_every_epoch_is_a_different_permutation_of_all_images():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 1, 8, 8)
    batches = module._shuffled_batches(dataset_of(images), 5, 0, torch.device("cpu"))
    epochs = [torch.cat([next(batches)[:, 0, 0, 0] for _ in range(2)]) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, images_to_pixels(images)[:, 0, 0, 0])
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


@pytest.mark.parametrize("flips", [False, True])
def test_images_are_mirrored_only_if_the_dataset_flips(flips):
    image = blobs(1)
    assert not torch.equal(image, image.flip(3))
    dataset = dataset_of(image.expand(100, -1, -1, -1), flips)
    batch = next(module._shuffled_batches(dataset, 100, 0, torch.device("cpu")))
    pixels = images_to_pixels(image)
    plain, mirrored = ((batch == other).flatten(1).all(1) for other in (pixels, pixels.flip(3)))
    assert (plain | mirrored).all()
    assert (25 < mirrored.sum() < 75) if flips else (mirrored.sum() == 0)


def test_latent_statistics_include_the_posteriors_variance():
    """Uses more images than one batch of 512, and a posterior with about as much variance as its means."""
    network, images = tiny_network(), blobs(600)
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.tensor([0.7, -0.3, -1.0, 0.5]))
    statistics = posterior_statistics(network, dataset_of(images), CPU)
    autoencoder = KLAutoencoder(network, "x", scale_factor=1.0)
    moments = autoencoder.encode(images)
    mean = moments[:, :2]
    noise = torch.randn(20, *mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([autoencoder.sample(moments, one) for one in noise]).double()
    np.testing.assert_allclose(statistics["latents_mean"], drawn.mean((0, 1, 3, 4)), atol=0.01)
    np.testing.assert_allclose(statistics["latents_std"], drawn.std((0, 1, 3, 4)), rtol=0.01)
    assert (drawn.std((0, 1, 3, 4)) > 1.05 * mean.double().std((0, 2, 3))).all()  # the means alone would not be enough


def test_an_unused_channel_is_not_scaled_up():
    network = tiny_network()
    with torch.no_grad():
        network.quant_conv.weight[[1, 3]] = 0  # mean and log-variance of channel 1
        network.quant_conv.bias[[1, 3]] = 0
    statistics = posterior_statistics(network, dataset_of(blobs(20)), CPU)
    assert statistics["latents_mean"][1] == 0
    assert statistics["latents_std"][1] == pytest.approx(1)


@pytest.mark.parametrize("half_weights", [False, True])
def test_saved_autoencoder_has_latents_of_unit_scale(tmp_path, half_weights):
    images = blobs(300)
    network = tiny_network()
    settings = dataclasses.replace(TINY, half_weights=half_weights)
    save_autoencoder(network, tmp_path / "ae", posterior_statistics(network, dataset_of(images), CPU), settings)
    options = AutoencoderOptions(pretrained_autoencoder_ckpt=str(tmp_path / "ae"))
    autoencoder = load_autoencoder(options, channels=1)
    moments = autoencoder.encode(images)
    noise = torch.randn(moments[:, :2].shape, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.sample(moments, noise).double()
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=0.05)
    assert json.loads((tmp_path / "ae" / "training.json").read_text())["widths"] == [8, 16]
    config = json.loads((tmp_path / "ae" / "config.json").read_text())
    assert config["scaling_factor"] == 1.0  # diffusers' pipelines apply it next to the statistics
    size = (tmp_path / "ae" / "diffusion_pytorch_model.safetensors").stat().st_size
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 1 <= size / parameters / (2 if half_weights else 4) < 1.5


def test_a_size_that_cannot_be_halved_is_refused():
    settings = dataclasses.replace(TINY, widths=(8, 8, 8, 8, 8))
    with pytest.raises(UsageError, match="--image_size 8 cannot be halved 4 times, as the 5 --widths require"):
        train_autoencoder(dataset_of(blobs(20)), settings, CPU)


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(UsageError, match="--batch_size 16 is larger than the dataset of 15 images"):
        train_autoencoder(dataset_of(blobs(15)), TINY, CPU)


@pytest.mark.parametrize("image_channels", [None, 1, 3])
def test_gray_images_are_repeated_for_a_color_autoencoder(image_channels):
    dataset = dataset_of(blobs(32))
    network = train_autoencoder(dataset, dataclasses.replace(TINY, image_channels=image_channels), CPU)
    assert network.config.in_channels == network.config.out_channels == (image_channels or 1)
    autoencoder = KLAutoencoder(network, "x")
    assert autoencoder.decode(autoencoder.sample(autoencoder.encode(blobs(2)))).shape[1] == (image_channels or 1)
    assert len(posterior_statistics(network, dataset, CPU)["latents_mean"]) == 2


@pytest.mark.parametrize(("channels", "image_channels"), [(1, 2), (3, 1), (3, 4)])
def test_impossible_channels_are_refused(channels, image_channels):
    dataset = dataset_of(blobs(32).expand(-1, channels, -1, -1))
    with pytest.raises(UsageError, match=f"--image_channels {image_channels} does not fit images with {channels}"):
        train_autoencoder(dataset, dataclasses.replace(TINY, image_channels=image_channels), CPU)


def test_weights_that_are_not_finite_do_not_replace_a_snapshot(tmp_path):
    network, folder = tiny_network(), tmp_path / "ae"
    save_autoencoder(network, folder, {}, TINY)
    before = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    for value in (1e6, float("nan")):  # the first overflows in the file's float16
        with torch.no_grad():
            network.decoder.conv_in.bias[0] = value
        with pytest.raises(DivergedError, match=r"autoencoder are not finite.*: decoder\.conv_in\.bias\. Start again"):
            save_autoencoder(network, folder, {}, TINY)
        assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before
    with torch.no_grad():
        network.decoder.conv_in.bias[0] = 1e6
    save_autoencoder(network, folder, {}, dataclasses.replace(TINY, half_weights=False))
