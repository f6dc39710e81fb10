import math

import pytest
import torch
from torch.nn import functional

from models.autoencoders import training_loss as module
from models.autoencoders.kl import decode_pixels, encode_moments, new_autoencoder_kl
from models.autoencoders.training_loss import (
    AutoencoderLossOptions,
    LossStreams,
    add_latent_noise,
    autoencoder_losses,
    rotate_and_reduce,
)
from runtime.randomness import generator_for

OPTIONAL = {  # option: a value that switches it on
    "l1_weight": 0.5,
    "edge_weight": 0.5,
    "latent_noise": 0.3,
    "equivariance": 1.0,
    "standardize_weight": 0.1,
}


def tiny_network():
    torch.manual_seed(0)
    return new_autoencoder_kl(1, (8, 16), 2, 8, {})


def random_pixels(count=5, side=8):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses(network, pixels, border=0, seed=3, **options):
    streams = LossStreams.from_seed(seed, "cpu")
    return autoencoder_losses(network, pixels, border, AutoencoderLossOptions(**options), streams)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def test_without_options_the_loss_and_its_gradient_are_the_vaes_bit_for_bit():
    """The formula, operation by operation, and the random stream of the first version."""
    network, pixels = tiny_network(), random_pixels()
    mean, logvar = encode_moments(network, pixels).chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    noise = torch.randn(mean.shape, generator=generator_for(3, "posterior"))
    decoded = decode_pixels(network, mean + (0.5 * logvar).exp() * noise)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    expected = functional.mse_loss(decoded[..., 1:7, 1:7], pixels[..., 1:7, 1:7]) + 1e-3 * divergence
    loss = losses(network, pixels, border=1, kl_weight=1e-3).total
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients(network, loss), gradients(network, expected)))


@pytest.mark.parametrize(("name", "value"), OPTIONAL.items())
def test_every_option_changes_the_gradient_and_is_off_at_zero(name, value):
    network, pixels = tiny_network(), random_pixels()
    plain, off, on = (
        gradients(network, losses(network, pixels, **options).total) for options in ({}, {name: 0.0}, {name: value})
    )
    assert all(map(torch.equal, plain, off))
    assert not all(map(torch.equal, plain, on))
    assert all(gradient.isfinite().all() for gradient in on)


def test_divergence_equals_torch_distributions():
    network, pixels = tiny_network(), random_pixels()
    mean, logvar = encode_moments(network, pixels).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(losses(network, pixels).divergence, expected)


def test_padding_is_not_reconstructed(monkeypatch):
    decoded = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    monkeypatch.setattr(module, "decode_pixels", lambda network, z: decoded)
    pixels = random_pixels()
    losses(tiny_network(), pixels, border=2).error.backward()
    expected = torch.zeros_like(pixels)
    expected[..., 2:6, 2:6] = (2 * (decoded - pixels) / (5 * 4 * 4)).detach()[..., 2:6, 2:6]
    torch.testing.assert_close(decoded.grad, expected)


def test_decoded_latents_are_posterior_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "decode_pixels", lambda network, z: seen.append(z) or torch.zeros(5, 1, 8, 8))
    network, pixels = tiny_network(), random_pixels()
    losses(network, pixels)
    mean, logvar = encode_moments(network, pixels).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator_for(3, "posterior"))
    torch.testing.assert_close(seen[0], mean + (0.5 * logvar).exp() * noise)


def test_absolute_errors_of_pixels_and_of_their_differences(monkeypatch):
    pixels = random_pixels()
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(5, 1, 8, 8)  # differs from its right neighbor by 1
    monkeypatch.setattr(module, "decode_pixels", lambda network, z: pixels + 0.1 * ramp)
    network = tiny_network()
    plain, l1, edges = (
        losses(network, pixels, **options).total.item() for options in ({}, {"l1_weight": 2}, {"edge_weight": 2})
    )
    assert l1 - plain == pytest.approx(2 * 0.1 * 3.5, rel=1e-5)
    assert edges - plain == pytest.approx(
        2 * (0.1 + 0) / 2, rel=1e-5
    )  # the mean of horizontal and vertical differences


def test_latent_noise_has_a_random_level_per_image_in_units_of_each_channel():
    z = torch.randn(4000, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0]).view(2, 1, 1)
    noise = add_latent_noise(z, 0.3, torch.Generator().manual_seed(1)) - z
    levels = noise.square().mean((2, 3)).sqrt()  # per image and channel
    assert levels[:, 1].mean() / levels[:, 0].mean() == pytest.approx(5, rel=0.03)
    assert noise[:, 0].square().mean().sqrt() == pytest.approx(0.3, rel=0.05)  # E sigma^2 = tau^2
    assert torch.corrcoef(levels.T)[0, 1] > 0.9  # the channels of an image share sigma
    assert levels[:, 0].quantile(0.1) < 0.06 < 0.4 < levels[:, 0].quantile(0.9)


def test_larger_latents_do_not_outgrow_their_noise():
    z = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    small, large = (add_latent_noise(c * z, 0.3, torch.Generator().manual_seed(1)) for c in (1.0, 10.0))
    torch.testing.assert_close(large, 10 * small)


@pytest.mark.parametrize("seed", range(6))
def test_transforms_move_latents_and_images_alike(seed):
    """Images that are their latents, enlarged four times, stay so."""
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z = functional.interpolate(z[..., :2, :2], size=(8, 8), mode="bilinear")  # smooth, so that reductions alias little
    pixels = functional.interpolate(z, scale_factor=4, mode="bilinear")
    moved, images, border = rotate_and_reduce(z, pixels, 2, torch.Generator().manual_seed(seed))
    assert images.shape[2:] == (4 * moved.shape[2], 4 * moved.shape[3])
    assert border == math.ceil(2 * moved.shape[2] / 8)
    enlarged = functional.interpolate(moved, scale_factor=4, mode="bilinear")
    assert (enlarged - images).abs().mean() < 0.15 * z.std()


def test_transforms_include_all_rotations_and_sizes():
    z = torch.zeros(1, 1, 8, 8)
    z[0, 0, :4, :4] = 1  # the bright corner shows the rotation
    pixels, generator = functional.interpolate(z, scale_factor=2), torch.Generator().manual_seed(0)
    moved = [rotate_and_reduce(z, pixels, 0, generator)[0] for _ in range(300)]
    assert {each.shape[2] for each in moved} == set(range(2, 9))
    corners = {int(each[0, 0][[0, 0, -1, -1], [0, -1, 0, -1]].argmax()) for each in moved}
    assert corners == {0, 1, 2, 3}


def test_equivariance_uses_its_probability():
    network, pixels = tiny_network(), random_pixels()
    streams = LossStreams.from_seed(0, "cpu")
    sides = []
    network.decoder.register_forward_hook(lambda layer, inputs, output: sides.append(inputs[0].shape[2]))
    for _ in range(60):
        autoencoder_losses(network, pixels[:1], 0, AutoencoderLossOptions(equivariance=0.5), streams)
    changed = sum(side != 4 for side in sides)
    assert 10 < changed < 40  # of 60 x 1/2 x 3/4: sides are 1 to 4


def test_standardization_is_zero_for_latents_of_mean_0_and_mean_square_1():
    z = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean((0, 2, 3), keepdim=True)
    z = z / z.square().mean((0, 2, 3), keepdim=True).sqrt()
    assert module._distance_from_standard(z) == pytest.approx(0, abs=1e-12)
    assert module._distance_from_standard(2 * z) == pytest.approx(2 * 9)
    assert module._distance_from_standard(z + 1) == pytest.approx(2 * (1 + 1))
