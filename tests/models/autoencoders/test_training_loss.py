import math

import pytest
import torch
from torch.nn import functional

from models.autoencoders.architectures import ArchitectureOptions, new_autoencoder, settle_shape
from models.autoencoders.coding import Coder, encode_pixels
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.training_loss import (
    AutoencoderLossOptions,
    Reconstruction,
    absolute_error,
    add_latent_noise,
    divergence,
    edge_error,
    imbalance,
    reconstruct,
    rotate_and_reduce,
    squared_error,
)
from runtime.randomness import StepDraws


def tiny_network():
    torch.manual_seed(0)
    return new_autoencoder_kl(1, (8, 16), 2, 8, {})


def random_pixels(count=5, side=8):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draws(count=5, step=0):
    return StepDraws(3, step, slice(0, count), count)


def found(network, pixels, border=0, step=0, **options):
    given = AutoencoderLossOptions(**options)
    return reconstruct(Coder(network), pixels, border, given, draws(len(pixels), step))


def test_decoded_latents_are_posterior_samples():
    network, pixels = tiny_network(), random_pixels()
    mean, logvar = encode_pixels(network, pixels).chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * draws().normal("posterior", mean.shape[1:])
    reconstruction = found(network, pixels)
    assert torch.equal(reconstruction.z, z)
    assert torch.equal(reconstruction.decoded, network.decode(z).sample)
    assert torch.equal(reconstruction.target, pixels)


def test_a_deterministic_code_is_decoded_as_it_is():
    torch.manual_seed(0)
    network = new_autoencoder("dc", settle_shape(ArchitectureOptions(architecture="dc", widths=(8, 8)), 1, 8))
    reconstruction = found(network, random_pixels())
    assert reconstruction.logvar is None
    assert torch.equal(reconstruction.z, network.encode(random_pixels()).latent)
    with pytest.raises(ValueError, match="no posterior"):
        divergence(reconstruction)


def test_divergence_equals_torch_distributions():
    network, pixels = tiny_network(), random_pixels()
    mean, logvar = encode_pixels(network, pixels).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(divergence(found(network, pixels)), expected)


def test_padding_is_not_reconstructed():
    network, pixels = tiny_network(), random_pixels()
    whole, inside = found(network, pixels), found(network, pixels, border=2)
    assert torch.equal(inside.decoded, whole.decoded[..., 2:6, 2:6])
    expected = functional.mse_loss(whole.decoded[..., 2:6, 2:6], pixels[..., 2:6, 2:6])
    assert torch.equal(squared_error(inside), expected)


def test_absolute_errors_of_pixels_and_of_their_differences():
    pixels = random_pixels()
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(5, 1, 8, 8)  # differs from its right neighbor by 1
    reconstruction = Reconstruction(pixels, pixels + 0.1 * ramp, pixels, None, pixels)
    assert absolute_error(reconstruction).item() == pytest.approx(0.1 * 3.5, rel=1e-5)
    assert edge_error(reconstruction).item() == pytest.approx((0.1 + 0) / 2, rel=1e-5)  # horizontal and vertical


def test_options_at_zero_change_nothing_and_others_do():
    network, pixels = tiny_network(), random_pixels()
    plain = found(network, pixels).decoded
    for name in ("latent_noise", "equivariance"):
        assert torch.equal(found(network, pixels, **{name: 0.0}).decoded, plain)
        others = [found(network, pixels, step=step, **{name: 1.0}).decoded for step in range(5)]
        assert not all(other.shape == plain.shape and torch.equal(other, plain) for other in others)


def test_latent_noise_has_a_random_level_per_image_in_units_of_each_channel():
    z = torch.randn(4000, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0]).view(2, 1, 1)
    noise = add_latent_noise(z, 0.3, draws(4000)) - z
    levels = noise.square().mean((2, 3)).sqrt()  # per image and channel
    assert levels[:, 1].mean() / levels[:, 0].mean() == pytest.approx(5, rel=0.03)
    assert noise[:, 0].square().mean().sqrt() == pytest.approx(0.3, rel=0.05)  # E sigma^2 = tau^2
    assert torch.corrcoef(levels.T)[0, 1] > 0.9  # the channels of an image share sigma
    assert levels[:, 0].quantile(0.1) < 0.06 < 0.4 < levels[:, 0].quantile(0.9)


def test_larger_latents_do_not_outgrow_their_noise():
    z = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    small, large = (add_latent_noise(c * z, 0.3, draws(8)) for c in (1.0, 10.0))
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
    network, pixels = tiny_network(), random_pixels(1)
    sides = [found(network, pixels, step=step, equivariance=0.5).decoded.shape[2] for step in range(60)]
    changed = sum(side != 8 for side in sides)
    assert 10 < changed < 40  # of 60 x 1/2 x 3/4: the latents' sides are 1 to 4


def test_standardization_is_zero_for_latents_of_mean_0_and_mean_square_1():
    z = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean((0, 2, 3), keepdim=True)
    z = z / z.square().mean((0, 2, 3), keepdim=True).sqrt()
    assert imbalance(Reconstruction(z, z, z, None, z)) == pytest.approx(0, abs=1e-12)
    assert imbalance(Reconstruction(z, z, z, None, 2 * z)) == pytest.approx(2 * 9)
    assert imbalance(Reconstruction(z, z, z, None, z + 1)) == pytest.approx(2 * (1 + 1))
