"""The certified Lipschitz constant of a decoder exceeds its Jacobians' norms, layer by layer and as a whole."""

import diffusers
import pytest
import torch
from torch import nn

from flow.lipschitz import jacobian_norm
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.lipschitz import convolution_norm, decoder_bound
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder


def with_attention() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
    )


@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (4, 2, 1, 1), (1, 6, 3, 3), (6, 1, 3, 3)])
def test_a_convolution_s_norm_is_bounded_closely(shape: tuple[int, int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = torch.eye(shape[1] * 36, dtype=torch.float64).view(-1, shape[1], 6, 6)
    dense = nn.functional.conv2d(inputs, weight, padding=shape[2] // 2).flatten(1)
    exact = torch.linalg.matrix_norm(dense, 2).item()
    assert exact <= convolution_norm(weight) * (1 + 1e-9)
    assert convolution_norm(weight) <= 4 * exact


@pytest.mark.parametrize("network", [lambda: new_autoencoder_kl(1, (8, 16), 2, 16, {}), with_attention])
def test_no_jacobian_exceeds_the_certified_constant(network) -> None:
    torch.manual_seed(0)
    autoencoder = PretrainedAutoencoder(network(), "toy", scale_factor=0.5)
    # Small latents, where normalizations have their steepest slopes, and large ones.
    x = torch.randn(6, 2, 4, 4) * torch.tensor([1e-3, 1e-2, 0.1, 1, 3, 10]).view(-1, 1, 1, 1)
    norms = jacobian_norm(autoencoder.decode, x, torch.randn_like(x), steps=8)
    bound = autoencoder.lipschitz_bound(side=4)
    assert bound is not None
    assert norms.max() < bound


def test_the_scale_of_latents_counts() -> None:
    torch.manual_seed(0)
    network = new_autoencoder_kl(1, (8, 16), 2, 16, {})
    once, twice = (
        PretrainedAutoencoder(network, "toy", scale_factor=factor).lipschitz_bound(4) for factor in (1.0, 0.5)
    )
    assert twice == pytest.approx(2 * once)


def test_an_unknown_layer_has_no_constant() -> None:
    network = new_autoencoder_kl(1, (8, 16), 2, 16, {})
    network.decoder.conv_act = nn.Mish()
    assert decoder_bound(network, 4, 1.0) is None


def test_pixels_have_the_constant_one() -> None:
    assert PixelSpace(3).lipschitz_bound(8) == 1
