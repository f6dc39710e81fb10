import dataclasses
import json

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from models.autoencoders.kl import decode_pixels, encode_moments, new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
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
    autoencoder = PretrainedAutoencoder(train_autoencoder(dataset_of(images), settings, CPU), "x")
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
    autoencoder = PretrainedAutoencoder(network, "x", scale_factor=1.0)
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
    autoencoder = PretrainedAutoencoder(network, "x")
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


def test_muon_trains_the_kernels_between_hidden_layers():
    network = tiny_network()
    (adamw,) = module._make_optimizers(network, TINY)
    assert len(adamw.param_groups[0]["params"]) == len(list(network.parameters()))
    others, muon = module._make_optimizers(network, dataclasses.replace(TINY, optimizer="muon", muon_lr=0.5))
    names = {id(weights): name for name, weights in network.named_parameters()}
    kernels, rest = ([names[id(p)] for p in o.param_groups[0]["params"]] for o in (muon, others))
    assert muon.defaults["lr"] == 0.5
    assert "decoder.mid_block.resnets.0.conv1.weight" in kernels
    assert not any(word in name for name in kernels for word in ("conv_in", "conv_out", "quant", "bias", "norm"))
    assert sorted(kernels + rest) == sorted(names.values())


def test_muon_trains_convolutions():
    images = blobs(128)
    settings = dataclasses.replace(TINY, max_steps=60, lr=1e-2, ema_decay=0.5, optimizer="muon", muon_lr=0.02)
    autoencoder = PretrainedAutoencoder(train_autoencoder(dataset_of(images), settings, CPU), "x")
    restored = autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
    pixels = images_to_pixels(images)
    assert (restored - pixels).square().mean() < (pixels - pixels.mean(0)).square().mean() / 4


def test_training_without_new_options_is_the_first_versions_bit_for_bit():
    """Two steps of the loop as it was before it had options, written out."""
    dataset, settings = dataset_of(blobs(64), crop=4), dataclasses.replace(TINY, half_weights=False)
    torch.manual_seed(0)
    network = new_autoencoder_kl(1, (8, 16), 2, 8, {}).to(memory_format=torch.channels_last)
    ema = module.Ema(network, 0.999)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    noise = module.generator_for(0, "posterior")
    batches = module._shuffled_batches(dataset, 16, 0, torch.device("cpu"))
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 2e-3 * (step + 1) / 100 * min(1, (1 - step / 2) / 0.4)
        pixels = next(batches)
        mean, logvar = encode_moments(network, pixels).chunk(2, dim=1)
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=noise)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        error = torch.nn.functional.mse_loss(decode_pixels(network, z)[..., 2:6, 2:6], pixels[..., 2:6, 2:6])
        optimizer.zero_grad()
        (error + 1e-6 * divergence).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network)
    trained = train_autoencoder(dataset, settings, CPU).state_dict()
    assert all(torch.equal(value, ema.weights[name]) for name, value in trained.items())


def saved(folder, network=None):
    save_autoencoder(network or tiny_network(), folder, {}, TINY)
    return str(folder)


def test_training_starts_from_the_weights_of_another_autoencoder(tmp_path):
    folder = saved(tmp_path / "ae")
    settings = dataclasses.replace(TINY, seed=5, lr=0.0, initial_weights=folder)
    trained = train_autoencoder(dataset_of(blobs(20)), settings, CPU).state_dict()
    expected = tiny_network().half().float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_encoder_keeps_the_latents(optimizer, tmp_path):
    settings = dataclasses.replace(
        TINY, initial_weights=saved(tmp_path / "ae"), freeze_encoder=True, optimizer=optimizer, equivariance=0.5
    )
    trained = train_autoencoder(dataset_of(blobs(20)), settings, CPU).state_dict()
    expected = tiny_network().half().float().state_dict()
    same = {name for name, value in trained.items() if torch.equal(value, expected[name])}
    encoder = {name for name in expected if name.startswith(("encoder.", "quant_conv."))}
    assert encoder <= same
    assert not any(name.endswith("conv1.weight") for name in same - encoder)


def test_initial_weights_that_do_not_fit_are_refused(tmp_path):
    folder, dataset = saved(tmp_path / "ae"), dataset_of(blobs(20))
    with pytest.raises(UsageError, match="does not fit --widths and --latent_channels; .*wrong shape"):
        train_autoencoder(dataset, dataclasses.replace(TINY, initial_weights=folder, widths=(8, 24)), CPU)
    with pytest.raises(UsageError, match="--initial_weights .*nowhere: expected the folder"):
        train_autoencoder(dataset, dataclasses.replace(TINY, initial_weights=str(tmp_path / "nowhere")), CPU)
    with pytest.raises(UsageError, match="--freeze_encoder needs --initial_weights"):
        train_autoencoder(dataset, dataclasses.replace(TINY, freeze_encoder=True), CPU)
