"""The tap of DiT: what a network without a tap does is unchanged, and heads change nothing but their own output."""

import hashlib
from dataclasses import replace

import pytest
import torch

from checkpoints.state_dicts import load_weights
from models.conditions import Condition, DenseInput
from models.dit import DiT, DiTOptions, hidden_matrices
from models.registry import Architecture, build_network
from models.taps import weights_for_sampling
from options import UsageError

# Of DiT-Mi/2's initial weights for seed 0, recorded before there was a tap.
INITIAL = "f37a15cd5f3855d1a21b185fbeb51ce96b507c99672b4e9952300aa54322cab6"
PLAIN = DiTOptions(num_classes=10, label_dropout=0.1)
HEADS = replace(
    PLAIN, tap_block=2, auxiliary_velocity=0.5, align_latents=1.0, align_features=0.5, align_hidden=24, align_width=7
)


def initial(options, dense=None):
    torch.manual_seed(0)
    return build_network("DiT-Mi/2", 8, options, dense)


def moved(options, dense=None):
    """A network whose weights differ from their initial values, where many are zero."""
    network = initial(options, dense)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def arguments(count=3, channels=4):
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(count, channels, 8, 8, generator=generator), torch.rand(count, generator=generator)
    return t, x, Condition(torch.arange(count))


def gradients(network, *inputs):
    network(*inputs).square().mean().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_initial_weights_without_a_tap_are_unchanged():
    digest = hashlib.sha256()
    for name, value in initial(PLAIN).state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest() == INITIAL


@pytest.mark.parametrize("options", [PLAIN, replace(PLAIN, tap_block=2)])
def test_a_plain_call_applies_all_blocks_in_turn(options):
    network = moved(options)
    t, x, condition = arguments()
    embedding = network.t_embedder(t) + network.y_embedder(condition.labels)
    tokens = network.x_embedder(x) + network.pos_embed
    for block in network.blocks:
        tokens, _ = block(tokens, embedding)
    patches = network.final_layer(tokens, embedding)
    assert torch.equal(network(t, x, condition), network._unpatchify(patches, x, 2))


def test_heads_change_neither_initial_weights_nor_velocity_nor_gradients():
    plain, tapped = initial(PLAIN), initial(HEADS)
    own = tapped.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items())
    assert len(own) > len(plain.state_dict()) + 10
    inputs = arguments()
    plain, tapped = moved(PLAIN), moved(HEADS)
    tapped.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(*inputs), tapped(*inputs))
    assert torch.equal(plain(*inputs), tapped(*inputs, tapped=True).velocity)
    pairs = zip(gradients(plain, *inputs), gradients(tapped, *inputs), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_tapped_tokens_are_those_after_the_block(number):
    network, found = moved(replace(PLAIN, tap_block=number)), {}
    for index, block in enumerate(network.blocks, start=1):
        block.register_forward_hook(lambda block, inputs, output, index=index: found.update({index: output[0]}))
    network.x_embedder.register_forward_hook(lambda m, a, tokens: found.update({0: tokens + network.pos_embed}))
    assert torch.equal(network(*arguments(), tapped=True).tapped.tokens, found[number])


def test_shapes_and_initial_values_of_the_heads():
    tapped = initial(HEADS)(*arguments(), tapped=True).tapped
    assert tapped.tokens.shape == (3, 16, 128)
    assert tapped.features.shape == (3, 7, 4, 4)
    assert tapped.latents.shape == tapped.velocity.shape == (3, 4, 8, 8)
    assert tapped.velocity.abs().max() == 0 < tapped.latents.abs().max()
    none = initial(replace(PLAIN, tap_block=2))(*arguments(), tapped=True).tapped
    assert none[1:] == (None, None, None)


def test_heads_read_the_tapped_block_alone():
    """Later blocks get no gradient from the heads, and earlier ones do."""
    network = moved(HEADS)
    tapped = network(*arguments(), tapped=True).tapped
    sum(each.square().mean() for each in tapped).backward()
    reached = [block.mlp.fc1.weight.grad is not None for block in network.blocks]
    assert reached == [True, True, False, False, False, False]
    assert network.final_layer.linear.weight.grad is None


def test_features_of_the_convolution_see_neighboring_tokens():
    network = moved(replace(HEADS, align_projector="conv"))
    tokens = torch.randn(1, 16, 128)
    changed = tokens.clone()
    changed[0, 5] += 1  # row 1, column 1
    projector = network.projectors["features"]
    differs = (projector(tokens, 4, 4) != projector(changed, 4, 4)).any(1)[0]
    assert differs.nonzero().tolist() == [[row, column] for row in range(3) for column in range(3)]


def test_gradient_checkpointing_gives_the_same_tap():
    one, other = moved(HEADS), moved(replace(HEADS, use_grad_checkpointing=True))
    results = []
    for network in (one, other):
        output = network.train()(*arguments(), tapped=True)
        (output.velocity.mean() + output.tapped.velocity.mean() + output.tapped.features.mean()).backward()
        results.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert len(results[0]) > 60
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_dense_condition_passes_through():
    network = moved(replace(HEADS, num_in_channels=6), DenseInput(2))
    t, x, condition = arguments()
    output = network(t, x, condition._replace(dense=torch.ones(3, 2, 8, 8)), tapped=True)
    assert output.tapped.velocity.shape == x.shape


def test_networks_for_sampling_have_no_projectors_and_need_no_weights_of_them():
    weights, architecture = moved(HEADS).state_dict(), Architecture("DiT-Mi/2", 8, HEADS)
    kept = weights_for_sampling(weights)
    assert {name.split(".")[0] for name in weights.keys() - kept.keys()} == {"projectors"}
    network = build_network(*architecture.for_sampling())
    load_weights(network, kept, "file", architecture.for_sampling())
    assert network.state_dict().keys() == kept.keys()
    whole, part = moved(HEADS)(*arguments(), tapped=True), network(*arguments(), tapped=True)
    assert torch.equal(whole.velocity, part.velocity)
    assert torch.equal(whole.tapped.velocity, part.tapped.velocity)
    plain = moved(PLAIN).state_dict()
    assert weights_for_sampling(plain) is plain


def test_muon_does_not_train_the_heads():
    assert len(hidden_matrices(initial(HEADS))) == len(hidden_matrices(initial(PLAIN))) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap_block": 7}, "--tap_block 7: expected a block from 1 to 6"),
        ({"tap_block": 0}, "--align_features needs --tap_block K, a block from 1 to 6"),
        ({"route_rate": 0.5}, "--route_rate 0.5 needs --route_blocks I J with 0 <= I < J <= 6, but nothing was given"),
        ({"route_rate": 0.5, "route_blocks": (3, 7)}, "with 0 <= I < J <= 6, but 3 7 was given"),
        ({"route_rate": 0.5, "route_blocks": (3, 3)}, "with 0 <= I < J <= 6, but 3 3 was given"),
        ({"route_rate": 1.0, "route_blocks": (2, 4)}, "must be below 1"),
        ({"route_rate": 0.5, "route_blocks": (1, 4)}, "--tap_block 2 lies between the --route_blocks 1 4"),
    ],
)
def test_options_that_do_not_fit_the_network_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        DiT(8, 2, 128, 6, 4, replace(HEADS, **changes))
