"""The pixel-space U-Net compared with its description: parameter counts, time embedding, and every block."""

import math

import pytest
import torch
from torch.nn import functional

from models.conditions import Condition
from models.plain_unet import Attention, Block, PlainUNetOptions
from models.registry import build_network
from options import UsageError


def new_unet(size=28, **options):
    torch.manual_seed(0)
    return build_network("unet", size, PlainUNetOptions(**{"num_in_channels": 1, "num_out_channels": 1, **options}))


def linear(inputs, outputs):
    return inputs * outputs + outputs


def convolution(inputs, outputs, kernel):
    return kernel * kernel * inputs * outputs + outputs


def residual(inputs, outputs):
    """Parameters of two norms, two convolutions, the time embedding's linear layer, and the 1 x 1 skip convolution."""
    first = 2 * inputs + convolution(inputs, outputs, 3) + linear(128, outputs)
    return first + 2 * outputs + convolution(outputs, outputs, 3) + convolution(inputs, outputs, 1)


def attention(channels):
    return 2 * channels + linear(channels, 3 * channels) + linear(channels, channels)


def test_parameters_counted_by_hand():
    time = 2 * linear(128, 128)
    encoder = residual(32, 64) + residual(64, 128) + attention(128)
    down = convolution(64, 64, 4) + convolution(128, 128, 4)
    middle = residual(128, 64) + attention(64) + residual(64, 64)
    up = 2 * convolution(64, 64, 4)
    decoder = residual(64 + 128, 64) + attention(64) + residual(64 + 64, 32)
    ends = convolution(1, 32, 3) + 2 * 32 + convolution(32, 1, 3)
    expected = time + encoder + down + middle + up + decoder + ends
    assert sum(parameter.numel() for parameter in new_unet().parameters()) == expected == 1_342_817


def test_names_of_the_state_dict():
    block = ["norm1", "conv1", "affine", "norm2", "conv2", "skip"]
    attend = ["attend.norm", "attend.attention.qkv", "attend.attention.proj"]
    places = {
        "encoder.0": block, "encoder.1": block + attend, "middle.0": block + attend, "middle.1": block,
        "decoder.0": block + attend, "decoder.1": block,
    }  # fmt: skip
    modules = ["time.mlp.0", "time.mlp.2", "input", "down.0", "down.1", "up.0", "up.1", "output.0", "output.2"]
    modules += [f"{place}.{name}" for place, names in places.items() for name in names]
    assert set(new_unet().state_dict()) == {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    with_classes = set(new_unet(num_classes=10, label_dropout=0.1).state_dict())
    assert with_classes - set(new_unet().state_dict()) == {"labels.embedding_table.weight"}


@pytest.mark.parametrize(
    ("options", "rows"), [({"num_classes": 10}, 10), ({"num_classes": 10, "label_dropout": 0.1}, 11)]
)
def test_rows_of_the_label_table(options, rows):
    assert new_unet(**options).labels.embedding_table.weight.shape == (rows, 128)


def test_the_time_embedding_follows_the_formula():
    time = new_unet().time
    for t in (0.0, 0.3, 1.0):
        angles = [t / 10000 ** (i / 64) for i in range(64)]
        waves = torch.tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])
        expected = time.mlp[2](functional.silu(time.mlp[0](waves)))
        torch.testing.assert_close(time(torch.tensor([t]))[0], expected, atol=1e-6, rtol=1e-5)


def test_the_embedding_of_time_zero_is_zeros_then_ones():
    time = new_unet().time
    waves = torch.cat([torch.zeros(1, 64), torch.ones(1, 64)], dim=1)
    assert torch.equal(time(torch.zeros(1)), time.mlp[2](functional.silu(time.mlp[0](waves))))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (16, 24)])
def test_velocity_has_the_shape_of_the_images(height, width):
    network = new_unet(num_in_channels=3, num_out_channels=3).eval()
    with torch.no_grad():
        velocity = network(torch.rand(2), torch.randn(2, 3, height, width))
    assert velocity.shape == (2, 3, height, width)
    assert torch.isfinite(velocity).all()


def test_sides_of_the_levels():
    network, sides = new_unet().eval(), {}
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda m, args, y, name=name: sides.update({name: tuple(y.shape[1:])}))
    with torch.no_grad():
        network(torch.rand(1), torch.randn(1, 1, 28, 28))
    assert sides == {"encoder.1.attend": (128, 14, 14), "middle.0.attend": (64, 7, 7), "decoder.0.attend": (64, 14, 14)}


def test_a_block_follows_the_formula():
    torch.manual_seed(0)
    block, x, embedding = Block(16, 24), torch.randn(2, 16, 5, 5), torch.randn(2, 128)
    h = block.conv1(functional.silu(functional.group_norm(x, 8, block.norm1.weight, block.norm1.bias)))
    h = h + block.affine(functional.silu(embedding)).view(2, 24, 1, 1)
    h = block.conv2(functional.silu(functional.group_norm(h, 8, block.norm2.weight, block.norm2.bias)))
    torch.testing.assert_close(block(x, embedding), h + block.skip(x))


def test_attention_with_four_heads_follows_the_formula():
    torch.manual_seed(0)
    layer, x = Attention(16), torch.randn(2, 16, 3, 4)
    tokens = functional.group_norm(x, 8).flatten(2).mT  # a new norm neither scales nor shifts
    query, key, value = layer.attention.qkv(tokens).chunk(3, dim=-1)
    heads = []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[..., part] @ key[..., part].mT / 2).softmax(-1)
        heads.append(weights @ value[..., part])
    expected = x + layer.attention.proj(torch.cat(heads, dim=-1)).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_every_weight_gets_a_gradient():
    network = new_unet(num_classes=3, label_dropout=0.1)
    labels = torch.tensor([0, 1, 2, 3])
    network(torch.rand(4), torch.randn(4, 1, 28, 28), Condition(labels)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_side_that_cannot_be_halved_twice():
    with pytest.raises(
        UsageError, match="latents of side 30 cannot be halved 2 times, as the 3 levels of unet require"
    ):
        new_unet(30)
