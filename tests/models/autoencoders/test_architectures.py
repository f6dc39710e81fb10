import pytest
import torch
from torch import nn

from models.autoencoders.architectures import ARCHITECTURES, ArchitectureOptions, new_autoencoder, settle_shape
from models.autoencoders.coding import decode_latents, encode_pixels
from models.autoencoders.kl import new_autoencoder_kl
from options import UsageError


def build(size=32, **options):
    given = ArchitectureOptions(**options)
    torch.manual_seed(0)
    return new_autoencoder(given.architecture, settle_shape(given, 3, size))


def test_kl_without_options_is_the_first_versions_network_bit_for_bit():
    network = build()
    torch.manual_seed(0)
    expected = new_autoencoder_kl(3, (16, 32, 64), 4, 32, {})
    assert dict(network.config) == dict(expected.config)
    assert all(map(torch.equal, network.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factor", [4, 8, 16])
def test_default_widths_have_the_factor(architecture, factor):
    network, pixels = build(architecture=architecture, factor=factor, latent_channels=3), torch.zeros(1, 3, 32, 32)
    code = encode_pixels(network, pixels)
    assert code.shape[2:] == (32 // factor, 32 // factor)
    assert decode_latents(network, code[:, :3]).shape == pixels.shape


def test_dc_computes_little_at_full_resolution():
    """Only the first convolution, of a quarter of the width, sees the full side, and the last one writes it by shuffling."""
    network, sides = build(architecture="dc", widths=(16, 32), depths=(1, 2)), {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: sides.update({name: inputs[0].shape[2]})
            )
    network(torch.zeros(1, 3, 32, 32))
    assert [name for name, side in sides.items() if side == 32] == ["encoder.conv_in.conv"]
    assert network.encoder.conv_in.conv.out_channels == 4
    blocks = [len([b for b in level if type(b).__name__ == "ResBlock"]) for level in network.encoder.down_blocks]
    assert blocks == [0, 1, 2]


def test_depths_may_be_one_number():
    assert settle_shape(ArchitectureOptions(architecture="dc", factor=8, depths=(2,)), 3, 32).depths == (2, 2, 2)
    assert build(depths=(2,)).config.layers_per_block == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 5}, "--factor 5: expected one of 4, 8, 16"),
        ({"factor": 8, "widths": (8, 8)}, "--widths 8 8 contradict --factor 8: the architecture kl needs 4 widths"),
        ({"architecture": "dc", "factor": 8, "widths": (8, 8)}, "the architecture dc needs 3 widths"),
        ({"widths": (8, 12)}, "--widths 8 12: expected multiples of 8"),
        ({"depths": (1, 2)}, "--depths 1 2: expected one number, or as many as --widths 16 32 64 has"),
        ({"depths": (1, 1, 2)}, "kl has the same depth at every level"),
        ({"architecture": "dc", "widths": (16, 24)}, "24 does not divide 4 x 16"),
        ({"factor": 16, "size": 40}, "--image_size 40 cannot be halved 4 times"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)
