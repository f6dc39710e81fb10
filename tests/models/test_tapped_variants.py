"""The tap and token routing of DiT with its other options: context tokens, rotary positions, value residuals, second stages."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.dit import DiTOptions
from models.dit_blocks import BlockInputs
from models.rope import RotaryPositions, Rotation, rotate
from models.routing import choose_tokens
from options import UsageError
from tests.models.test_dit_variants import DEPTH, VARIANTS, WIDTH, build, inputs, random_dit

HEADS = {
    "tap_block": 1, "auxiliary_velocity": 0.5, "align_latents": 1.0, "align_features": 0.5, "align_width": 5, "align_hidden": 6,
}  # fmt: skip
ROUTING = {"route_blocks": (1, 2), "route_rate": 0.5}
CONTEXT = {"class_tokens": 2, "time_tokens": 1, "rope": True, "value_residual": True, "norm": "rms_affine"}
DDT = {"ddt_blocks": 2, "ddt_width": 48}
NUMBERS = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(7))
each_variant = pytest.mark.parametrize("name", VARIANTS)


def tap_of(**options):
    return random_dit(**HEADS | options)(*inputs(), tapped=True).tapped


@each_variant
def test_heads_change_neither_initial_weights_nor_velocity(name):
    torch.manual_seed(0)
    plain = build(**VARIANTS[name]).state_dict()
    torch.manual_seed(0)
    tapped = build(**VARIANTS[name], **HEADS).state_dict()
    assert all(torch.equal(value, tapped[entry]) for entry, value in plain.items())
    assert {entry.split(".")[0] for entry in tapped.keys() - plain.keys()} == {"auxiliary_head", "projectors"}
    one, other = random_dit(**VARIANTS[name]), random_dit(**VARIANTS[name], **HEADS)
    one.load_state_dict({entry: value for entry, value in other.state_dict().items() if entry in plain})
    assert torch.equal(one(*inputs()), other(*inputs()))
    assert torch.equal(one(*inputs()), other(*inputs(), tapped=True).velocity)


@each_variant
def test_every_weight_learns_with_heads_and_routing_and_checkpointing_changes_no_gradient(name):
    network, gradients = random_dit(**VARIANTS[name], **HEADS, **ROUTING).train(), []
    for use in (False, True):
        network.options = replace(network.options, use_grad_checkpointing=use)
        network.zero_grad()
        output = network(*inputs(), tapped=True, routing=NUMBERS)
        sum(each.square().mean() for each in (output.velocity, *output.tapped)).backward()
        trained = {entry: p for entry, p in network.named_parameters() if p.requires_grad}
        assert [entry for entry, p in trained.items() if p.grad is None] == []
        gradients.append([p.grad for p in trained.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["fine_with_all", "ddt_with_all"])
def test_a_compiler_traces_one_graph_with_heads_and_routing(name):
    network, graphs = random_dit(**VARIANTS[name], **HEADS, **ROUTING).requires_grad_(False), []
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    found, expected = (each(*inputs(), tapped=True, routing=NUMBERS) for each in (compiled, network))
    torch.testing.assert_close(found.velocity, expected.velocity)
    torch.testing.assert_close(found.tapped, expected.tapped)
    assert len(graphs) == 1


def test_a_new_head_learns_with_every_norm():
    """Its linear maps start at zero, but its norm does not, or no gradient would ever reach the maps."""
    for norm in ("layer", "rms", "rms_affine"):
        network = build(tap_block=1, auxiliary_velocity=0.5, norm=norm)
        output = network(*inputs(), tapped=True)
        assert not output.tapped.velocity.any()
        output.tapped.velocity.sum().backward()
        assert network.auxiliary_head.linear.weight.grad.abs().max() > 0.1


@torch.no_grad()
def test_heads_read_no_context_tokens():
    network, found = random_dit(**HEADS, **CONTEXT), {}
    network.blocks[0].register_forward_hook(lambda block, given, output: found.update(tokens=output[0]))
    t, x, condition = inputs()
    tapped = network(t, x, condition, tapped=True).tapped
    assert found["tokens"].shape == (2, 3 + 16, WIDTH)
    assert torch.equal(tapped.tokens, found["tokens"][:, 3:])
    embedding = network.t_embedder(t) + network.y_embedder(condition.labels)
    patches = network.auxiliary_head(found["tokens"][:, 3:], embedding)
    assert torch.equal(tapped.velocity, network._unpatchify(patches, x, 2))
    assert tapped.features.shape == (2, 5, 4, 4)


@pytest.mark.parametrize(
    ("stage", "block", "tokens", "width", "grid"),
    [
        ({"fine_blocks": 2}, 2, 4, WIDTH, 2),
        ({"fine_blocks": 2, **CONTEXT}, 1, 4, WIDTH, 2),
        ({"fine_blocks": 2, **CONTEXT}, 3, 16, WIDTH, 4),
        (DDT, 2, 16, WIDTH, 4),
        ({**DDT, **CONTEXT}, 2, 16, WIDTH, 4),
        ({**DDT, **CONTEXT}, 3, 16, 48, 4),
    ],
)
def test_heads_have_the_patches_and_the_width_of_their_stage(stage, block, tokens, width, grid):
    tapped = tap_of(**stage, tap_block=block)
    assert tapped.tokens.shape == (2, tokens, width)
    assert tapped.velocity.shape == tapped.latents.shape == (2, 4, 8, 8)
    assert tapped.features.shape == (2, 5, grid, grid)


def test_heads_before_the_second_stage_train_the_first_stage_alone():
    for stage in ({"fine_blocks": 2}, DDT):
        network = random_dit(**HEADS | {"tap_block": 2}, **stage)
        sum(each.square().mean() for each in network(*inputs(), tapped=True).tapped).backward()
        assert [block.mlp.fc1.weight.grad is not None for block in network.blocks] == [True, True, False, False]
        assert all(parameter.grad is None for parameter in network.second_stage.parameters())


@torch.no_grad()
def test_a_coarse_head_changes_its_own_coarse_patch_alone():
    network = random_dit(**HEADS, fine_blocks=2)
    nn.init.zeros_(network.blocks[0].adaLN_modulation[1].weight)
    nn.init.zeros_(network.blocks[0].adaLN_modulation[1].bias)
    t, x, condition = inputs()
    changed = x.clone()
    changed[:, :, 1, 6] += 1
    before, after = (network(t, each, condition, tapped=True).tapped.velocity for each in (x, changed))
    moved = (before - after).abs().amax((0, 1)) > 1e-5
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("blocks", [(1, 3), (2, 4)])
@torch.no_grad()
def test_routed_blocks_see_each_samples_kept_tokens_with_their_positions_and_first_values(blocks):
    """The routed velocity is that of one sample after the other, whose tables and values are selected by plain indices."""
    network = random_dit(**CONTEXT, route_blocks=blocks, route_rate=0.5)
    t, x, condition = inputs()
    found = network(t, x, condition, routing=NUMBERS)
    numbers = NUMBERS[:, ::2, ::2].flatten(1)
    conditioning = network._conditioning(t, t, None, condition)
    everything = network._first_inputs(conditioning, x, condition.labels)
    for sample in range(2):
        tokens, embedding = everything.tokens[sample, None], everything.embedding[sample, None]
        rows = [0, 1, 2, *(3 + index for index in numbers[sample].argsort()[:8].tolist())]
        part = Rotation(everything.rotation.cos[rows], everything.rotation.sin[rows])
        values = None
        for number, block in enumerate(network.blocks):
            if blocks[0] <= number < blocks[1]:
                tokens[:, rows] = block(tokens[:, rows], embedding, part, values[:, :, rows])[0]
            else:
                tokens, own = block(tokens, embedding, everything.rotation, values)
                values = own if values is None else values
        velocity = network._unpatchify(network.final_layer(tokens[:, 3:], embedding), x[:1], 2)
        torch.testing.assert_close(found[sample, None], velocity, atol=1e-5, rtol=1e-4)
    assert (found - network(t, x, condition)).abs().max() > 1e-3


def test_gathered_rotations_are_those_of_the_kept_tokens():
    rotation, kept = RotaryPositions(4, 8)(4, 4, context=2), torch.tensor([[0, 1, 9, 4], [0, 1, 17, 2]])
    x = torch.randn(2, 3, 18, 8)
    embedding, values = torch.randn(2, 18, 5), torch.randn(2, 3, 18, 8)
    part = BlockInputs(torch.randn(2, 18, 24), embedding, rotation, values).of_tokens(kept)
    for sample in range(2):
        rows = kept[sample]
        turned = rotate(x[:, :, rows], Rotation(part.rotation.cos[sample], part.rotation.sin[sample]))
        assert torch.equal(turned, rotate(x, rotation)[:, :, rows])
        assert torch.equal(part.first_values[sample], values[sample][:, rows])
        assert torch.equal(part.embedding[sample], embedding[sample, rows])


def test_context_tokens_are_always_kept_and_do_not_count():
    numbers = torch.rand(50, 16)
    chosen, without = choose_tokens(numbers, 0.75, context=3), choose_tokens(numbers, 0.75)
    assert torch.equal(chosen[:, :3], torch.arange(3).expand(50, -1))
    assert torch.equal(chosen[:, 3:], without + 3)
    assert chosen.shape == (50, 3 + 4)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (CONTEXT, (1, 3)),
        ({**VARIANTS["fine_with_all"], "fine_blocks": 2}, (1, 2)),
        ({**VARIANTS["fine_with_all"], "fine_blocks": 2}, (3, 4)),
        ({"ddt_blocks": 2, **CONTEXT}, (3, 4)),
    ],
)
@torch.no_grad()
def test_an_empty_middle_gives_the_same_velocity_with_and_without_routing(options, blocks):
    network = random_dit(**options, route_blocks=blocks, route_rate=0.5)
    for block in network.blocks[slice(*blocks)]:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
        last = list(block.mlp.children())[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    assert torch.equal(network(*inputs()), network(*inputs(), routing=NUMBERS))


@pytest.mark.parametrize("blocks", [(0, 2), (2, 4)])
@pytest.mark.parametrize(("stage", "whole"), [({"fine_blocks": 2}, [4, 4, 16, 16]), (DDT, [16] * 4)])
def test_a_stage_can_be_routed(stage, whole, blocks):
    network, lengths = random_dit(**stage, route_blocks=blocks, route_rate=0.5), []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, given: lengths.append(given[0].shape[1]))
    network(*inputs(), routing=NUMBERS)
    assert lengths == [n // 2 if blocks[0] <= index < blocks[1] else n for index, n in enumerate(whole)]


@pytest.mark.parametrize(
    ("options", "blocks", "message"),
    [
        (
            {"fine_blocks": 2},
            (1, 3),
            "--route_blocks 1 3: --fine_blocks or --ddt_blocks change the tokens after block 2",
        ),
        ({"ddt_blocks": 1}, (0, 4), "choose I and J up to 3, or from 3"),
        ({"value_residual": True}, (0, 2), "--route_blocks 0 2 would skip the block whose values .* choose I from 1"),
        ({"value_residual": True, "fine_blocks": 2}, (2, 4), "choose I from 3"),
    ],
)
def test_routing_that_does_not_fit_the_stages_is_refused(options, blocks, message):
    with pytest.raises(UsageError, match=message):
        DiTOptions(**options, route_blocks=blocks, route_rate=0.5).check(DEPTH)
    DiTOptions(**options, route_blocks=blocks).check(DEPTH)  # without a rate, there is no routing
