"""Token routing: tokens come back to their places, and only those that are kept pass the routed blocks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.dit import DiTOptions
from models.routing import choose_tokens, gather_tokens, scatter_tokens
from tests.models.test_taps import PLAIN, arguments, moved

ROUTED = replace(PLAIN, route_blocks=(2, 4), route_rate=0.5)
NUMBERS = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 16), (0.25, 12), (0.5, 8), (0.9, 2), (0.99, 1)])
def test_gather_then_scatter_is_the_identity_and_the_share_is_kept(rate, kept):
    tokens, numbers = torch.randn(3, 16, 5), torch.rand(3, 16)
    chosen = choose_tokens(numbers, rate)
    assert chosen.shape == (3, kept)
    assert all(len(set(row)) == kept for row in chosen.tolist())
    gathered = gather_tokens(tokens, chosen)
    assert torch.equal(scatter_tokens(tokens, chosen, gathered), tokens)
    changed = scatter_tokens(tokens, chosen, gathered + 1)
    assert (changed != tokens).any(2).sum(1).tolist() == [kept] * 3


def test_every_token_is_equally_likely():
    counts = torch.zeros(16)
    counts.index_add_(0, choose_tokens(torch.rand(2000, 16), 0.5).flatten(), torch.ones(16000))
    assert (counts / 1000 - 1).abs().max() < 0.1


def test_positions_travel_with_their_tokens():
    positions = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3)
    tokens = torch.arange(16.0).view(1, 16, 1).expand(4, 16, 3)
    chosen = choose_tokens(torch.rand(4, 16), 0.5)
    assert torch.equal(gather_tokens(positions, chosen), gather_tokens(tokens, chosen))


def test_an_empty_middle_gives_the_same_velocity_with_and_without_routing():
    network = moved(ROUTED)
    for index in (2, 3):  # after block 2 and until block 4
        for parameter in network.blocks[index].adaLN_modulation.parameters():
            nn.init.zeros_(parameter)  # closes both gates, so that the block is the identity
    assert torch.equal(network(*arguments()), network(*arguments(), routing=NUMBERS))


def test_only_kept_tokens_pass_the_routed_blocks_and_all_come_back():
    network, inputs, outputs = moved(ROUTED), [], []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, given: inputs.append(given[0]))
        block.register_forward_hook(lambda block, given, result: outputs.append(result[0]))
    routed = network(*arguments(), routing=NUMBERS)
    assert [tokens.shape[1] for tokens in inputs] == [16, 16, 8, 8, 16, 16]
    chosen = choose_tokens(NUMBERS[:, ::2, ::2].flatten(1), 0.5)
    assert torch.equal(inputs[2], gather_tokens(outputs[1], chosen))
    assert torch.equal(inputs[4], scatter_tokens(outputs[1], chosen, outputs[3]))
    assert not torch.equal(routed, network(*arguments()))


def test_sampling_and_validation_route_nothing():
    one, other = moved(PLAIN), moved(ROUTED)
    assert torch.equal(one(*arguments()), other(*arguments()))


@pytest.mark.parametrize("blocks", [(0, 6), (0, 1), (5, 6)])
def test_any_range_of_blocks_can_be_routed(blocks):
    network = moved(replace(ROUTED, route_blocks=blocks, tap_block=blocks[1]))
    output = network(*arguments(), routing=NUMBERS, tapped=True)
    assert output.tapped.tokens.shape == (3, 16, 128)
    output.velocity.square().mean().backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)


def test_a_rate_of_zero_is_the_default():
    assert DiTOptions().route_rate == 0
