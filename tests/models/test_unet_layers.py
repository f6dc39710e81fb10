"""The U-Nets' layers equal torch's, in the input's dtype."""

import torch
from torch import nn

from models.edm_layers import Convolution
from models.unet_layers import Double, GroupNorm


def test_group_norm_equals_torchs_bit_for_bit():
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 8, 8)
    assert torch.equal(norm(x), nn.GroupNorm(4, 16)(x))


def test_upsampling_repeats_every_value():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    value, slope = Double()(x), torch.randn(2, 3, 8, 10)
    assert torch.equal(value, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    (gradient,) = torch.autograd.grad(value, x, slope)
    torch.testing.assert_close(gradient, slope.unfold(2, 2, 2).unfold(3, 2, 2).sum((-2, -1)))


def test_downsampling_averages_blocks_of_2_x_2():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Convolution(1, 1, 0, down=True)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
