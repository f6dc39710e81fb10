"""Options of DiT: what each computes, and that every network with them trains, samples and runs on other grids."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.conditions import Condition
from models.dit import DiT, DiTOptions, hidden_matrices
from models.positions import with_own_positions
from models.registry import build_network
from options import UsageError
from runtime.cpu.kernels import attention, with_cpu_kernels

LIGHTNING = {"norm": "rms_affine", "mlp": "swiglu", "qk_norm": True, "rope": True}
VARIANTS = {
    "plain": {},
    "rms": {"norm": "rms"},
    "qk_layer_norm": {"qk_norm": True},
    "lightning": LIGHTNING,
    "value_residual": {"value_residual": True},
    "shared_adaln": {"shared_adaln": True},
    "context": {"class_tokens": 2, "time_tokens": 1, "adaln_labels": False, "rope": True},
    "fine": {"fine_blocks": 2, "time_embedding": "fourier"},
    "fine_with_all": {
        **LIGHTNING, "fine_blocks": 2, "class_tokens": 2, "value_residual": True, "shared_adaln": True,
    },
    "ddt": {"ddt_blocks": 2},
    "published": {"rope": True, "pos_embed": False, "adaln_shift": False, "learn_sigma": True, "reversed_time": True},
    "ddt_with_all": {
        **LIGHTNING, "ddt_blocks": 2, "ddt_width": 48, "time_tokens": 2, "value_residual": True, "shared_adaln": True,
    },
}  # fmt: skip
WIDTH, DEPTH, HEADS = 32, 4, 4
each_variant = pytest.mark.parametrize("name", VARIANTS)


def build(size=8, patch=2, **options):
    return DiT(size, patch, WIDTH, DEPTH, HEADS, DiTOptions(num_classes=3, label_dropout=0.1, **options))


def random_dit(**options):
    """A network in eval mode whose weights are all nonzero."""
    torch.manual_seed(0)
    network = build(**options).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(height=8, width=8):
    torch.manual_seed(3)
    return torch.tensor([0.2, 0.7]), torch.randn(2, 4, height, width), Condition(torch.tensor([0, 2]))


@each_variant
def test_an_untrained_network_returns_zero(name):
    assert not build(**VARIANTS[name])(*inputs()).any()


@each_variant
@torch.no_grad()
def test_labels_times_and_other_grids_have_an_effect(name):
    network = random_dit(**VARIANTS[name])
    t, x, condition = inputs()
    velocity = network(t, x, condition)
    assert (velocity - network(t, x, Condition(torch.tensor([1, 1])))).abs().max() > 1e-3
    assert (velocity - network(t + 0.2, x, condition)).abs().max() > 1e-5
    assert torch.equal(network(t, x), network(t, x, Condition(torch.tensor([3, 3]))))  # the null class
    alone = network(t[:1], x[:1], Condition(condition.labels[:1]))
    torch.testing.assert_close(velocity[:1], alone, atol=1e-5, rtol=1e-4)
    for height, width in ((8, 12), (16, 16), (4, 4)):
        t, x, condition = inputs(height, width)
        velocity = network(t, x, condition)
        assert velocity.shape == x.shape
        assert velocity.isfinite().all()


@each_variant
def test_every_weight_learns_and_checkpointing_changes_no_gradient(name):
    """DistributedDataParallel refuses weights that no loss depends on."""
    network, gradients = random_dit(**VARIANTS[name]).train(), []
    for use in (False, True):
        network.options = replace(network.options, use_grad_checkpointing=use)
        network.zero_grad()
        network(*inputs()).square().mean().backward()
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        assert [n for n, p in trained.items() if p.grad is None] == []
        gradients.append([p.grad for p in trained.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


@each_variant
def test_shapes_on_the_meta_device_and_no_scalar_weights(name):
    network = build(**VARIANTS[name])
    with torch.device("meta"):
        meta = build(**VARIANTS[name])
        with FlopCounterMode(display=False) as counter:
            meta.requires_grad_(False)(torch.rand(1), torch.rand(1, 4, 8, 8))
    assert counter.get_total_flops() > 1e5
    assert {n: v.shape for n, v in meta.state_dict().items()} == {n: v.shape for n, v in network.state_dict().items()}
    assert all(value.device.type == "meta" for value in meta.state_dict().values())
    assert all(parameter.ndim for parameter in network.parameters())  # FSDP2 cannot shard scalars


@each_variant
@torch.no_grad()
def test_low_precision_and_cpu_kernels(name):
    network, arguments = random_dit(**VARIANTS[name]), inputs()
    exact = network(*arguments)
    swapped = with_cpu_kernels(network)
    assert {block.attn.attention for block in swapped.blocks} == {attention}
    assert torch.equal(swapped(*arguments), exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = swapped(*arguments).float()
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["fine_with_all", "ddt_with_all"])
def test_a_compiler_traces_one_graph(name):
    network, graphs = random_dit(**VARIANTS[name]).requires_grad_(False), []
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), network(*inputs()))
    assert len(graphs) == 1


def test_muon_trains_the_maps_between_hidden_layers():
    def others(name):
        network = random_dit(**VARIANTS[name])
        mine = {id(parameter) for parameter in hidden_matrices(network)}
        named = {n: p for n, p in network.named_parameters() if p.ndim == 2}
        assert all(id(p) in mine for n, p in named.items() if n.startswith("blocks."))
        return {n for n, p in named.items() if id(p) in mine and not n.startswith("blocks.")}

    assert others("lightning") == others("value_residual") == others("context") == set()
    upsampler = {f"second_stage.upsampler.{layer}.weight" for layer in ("expand", "project")}
    assert others("fine") == upsampler
    assert others("fine_with_all") == upsampler | {"shared_adaLN.1.weight"}
    assert others("ddt_with_all") == {"second_stage.projector.weight", "shared_adaLN.1.weight"}


def same_weights(network, other):
    """Copy the weights of `other` that have the same name."""
    network.load_state_dict({n: v for n, v in other.state_dict().items() if n in network.state_dict()}, strict=False)
    return network


@torch.no_grad()
def test_a_value_residual_of_share_zero_is_none():
    plain, mixing = random_dit(), random_dit(value_residual=True)
    same_weights(mixing, plain)
    mixes = [block.attn.value_mix for block in mixing.blocks]
    assert mixes[0] is None
    assert not torch.allclose(mixing(*inputs()), plain(*inputs()), atol=1e-4)
    for mix in mixes[1:]:
        mix.zero_()
    assert torch.equal(mixing(*inputs()), plain(*inputs()))


@torch.no_grad()
def test_a_value_residual_of_share_one_uses_the_first_blocks_values():
    network = random_dit(value_residual=True)
    for block in network.blocks[1:]:
        block.attn.value_mix.fill_(1)
    before = network(*inputs())
    for block in network.blocks[1:]:  # their own values do not matter
        block.attn.qkv.weight[2 * WIDTH :].normal_()
    torch.testing.assert_close(network(*inputs()), before)
    network.blocks[0].attn.qkv.weight[2 * WIDTH :].normal_()
    assert not torch.allclose(network(*inputs()), before, atol=1e-2)


@torch.no_grad()
def test_a_shared_modulation_equals_equal_modulations():
    plain, shared = random_dit(), random_dit(shared_adaln=True)
    same_weights(shared, plain)
    torch.manual_seed(4)
    for layer, number in ((shared.shared_adaLN[1], n) for n in range(DEPTH)):
        own = plain.blocks[number].adaLN_modulation[1]
        own.weight.copy_(layer.weight)
        own.bias.copy_(layer.bias + shared.blocks[number].adaLN_offset)
    torch.testing.assert_close(shared(*inputs()), plain(*inputs()))


@torch.no_grad()
def test_identical_blocks_make_the_output_of_a_patch_local():
    """With gates of zero, an output patch depends only on its own patch, or on its coarse patch."""
    for options, reach in (({}, 2), ({"fine_blocks": 1}, 4), ({"ddt_blocks": 1}, 2)):
        network = random_dit(**options)
        for block in network.blocks:
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
        t, x, condition = inputs()
        changed = x.clone()
        changed[:, :, 4, 7] += 1  # row 4, column 7
        moved = (network(t, changed, condition) - network(t, x, condition)).abs().amax((0, 1)) > 1e-5
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[4 : 4 + reach, 8 - reach :] = True
        assert torch.equal(moved, expected), options


def test_context_tokens_add_to_the_parameters_only_what_they_hold():
    plain, network = build(), build(class_tokens=3, time_tokens=2)
    extra = {n: tuple(v.shape) for n, v in network.state_dict().items() if n not in plain.state_dict()}
    assert extra == {"context.y_embedder.embedding_table.weight": (4, 3 * WIDTH), "context.positions": (5, WIDTH)}
    assert "y_embedder.embedding_table.weight" not in build(class_tokens=3, adaln_labels=False).state_dict()


def test_position_tables_of_another_grid_are_replaced():
    small, large = build(**VARIANTS["fine_with_all"]), build(size=16, **VARIANTS["fine_with_all"])
    fitted = with_own_positions(large.state_dict(), small.state_dict())
    large.load_state_dict(fitted)
    replaced = {name for name, value in fitted.items() if value is not small.state_dict()[name]}
    tables = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    changed = {name for name in replaced if fitted[name].shape != small.state_dict()[name].shape}
    assert changed == tables | {f"second_stage.{name}" for name in tables}
    assert with_own_positions(small.state_dict(), weights := small.state_dict()) is weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fine_blocks": 1, "ddt_blocks": 1}, "--fine_blocks and --ddt_blocks cannot be combined"),
        ({"fine_blocks": 4}, "--fine_blocks 4: .* expected at most 3"),
        ({"ddt_blocks": 9}, "--ddt_blocks 9: .* expected at most 3"),
        ({"ddt_width": 64}, "--ddt_width has no effect without --ddt_blocks"),
        ({"ddt_heads": 2}, "--ddt_heads has no effect without --ddt_blocks"),
        (
            {"ddt_blocks": 1, "ddt_width": 44},
            "--ddt_width 44 cannot be divided into attention heads of the model's width 8",
        ),
        ({"ddt_blocks": 1, "ddt_heads": 3}, "a width of 32 cannot be divided among 3 attention heads"),
        ({"ddt_blocks": 1, "ddt_heads": 16, "rope": True}, "--rope needs .* multiple of 4, but theirs is 2"),
        ({"adaln_labels": False}, "--no-adaln_labels needs --class_tokens"),
        ({"pos_embed": False}, "--no-pos_embed needs --rope"),
        ({"pos_embed": False, "rope": True, "fine_blocks": 1}, "--no-pos_embed needs --rope and no --fine_blocks"),
        ({"size": 6, "fine_blocks": 1}, "latents of side 6 cannot be divided into patches of side 4"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        build(**options)


@torch.no_grad()
def test_a_modulation_without_shifts_equals_one_whose_shifts_are_zero():
    for shared in (False, True):
        plain, other = random_dit(shared_adaln=shared), random_dit(shared_adaln=shared, adaln_shift=False)
        weights = other.state_dict()
        for name, value in plain.state_dict().items():
            if value.shape == weights[name].shape:
                weights[name].copy_(value)
            elif value.shape[0] == 6 * WIDTH:  # shift, scale and gate of attention, then of the MLP
                value.view(2, 3, -1)[:, 0] = 0
                weights[name].copy_(value.view(2, 3, -1)[:, 1:].reshape(weights[name].shape))
        assert {name for name in weights if weights[name].shape[0] == 4 * WIDTH}
        torch.testing.assert_close(other(*inputs()), plain(*inputs()), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_network_of_reversed_time_is_the_negative_at_the_other_time():
    plain, reverse = random_dit(), random_dit(reversed_time=True)
    t, x, condition = inputs()
    assert torch.equal(reverse(t, x, condition), -plain(1 - t, x, condition))
    plain, reverse = (random_dit(until_embedding="interval", reversed_time=value) for value in (False, True))
    for network in (plain, reverse):
        network.r_embedder.mlp[2].weight.normal_(generator=torch.Generator().manual_seed(5))
    average = reverse(t, x, condition, until=t - 0.1)
    expected = -plain(1 - t, x, condition, until=1 - t - 0.1)  # the interval has the same length
    torch.testing.assert_close(average, expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(average, reverse(t, x, condition))


@torch.no_grad()
def test_the_first_half_of_the_channels_is_the_velocity_of_a_network_that_learns_sigma():
    network, plain = random_dit(learn_sigma=True), random_dit()
    kept = [8 * position + channel for position in range(4) for channel in range(4)]  # patch positions, then channels
    same_weights(plain.final_layer.linear, nn.Linear(WIDTH, 16))
    weights = network.state_dict()
    assert weights["final_layer.linear.weight"].shape == (32, WIDTH)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][kept]
    plain.load_state_dict(weights)
    torch.testing.assert_close(network(*inputs()), plain(*inputs()), rtol=0, atol=1e-6)
    assert network(*inputs()).is_contiguous()


@torch.no_grad()
def test_a_network_without_a_position_table_is_one_whose_table_is_zero(capsys):
    network, plain = random_dit(rope=True, pos_embed=False), random_dit(rope=True)
    same_weights(plain, network)
    plain.pos_embed.zero_()
    assert torch.equal(network(*inputs()), plain(*inputs()))
    network(*inputs(16, 16))
    assert "pos_embed" not in network.state_dict()
    assert capsys.readouterr().err == ""


def test_published_norms_of_queries_and_keys():
    """LightningDiT's: RMSNorm with weight if its tokens have that, else layer norm with weight and bias."""
    for norm, names, eps in (("layer", {"weight", "bias"}, 1e-5), ("rms_affine", {"weight"}, 1e-6)):
        attention = build(norm=norm, qk_norm=True).blocks[0].attn
        assert {*attention.q_norm.state_dict()} == {*attention.k_norm.state_dict()} == names
        assert attention.q_norm.eps == eps
        assert build(norm=norm, qk_norm=True).blocks[0].norm1.eps == 1e-6


def test_a_size_of_its_own():
    options = DiTOptions(model_width=48, model_depth=3, model_heads=2)
    network = build_network("DiT/4", 8, options)
    assert (len(network.blocks), network.blocks[0].attn.num_heads, network.patch_size) == (3, 2, 4)
    assert network.x_embedder.proj.weight.shape[0] == 48
    with pytest.raises(
        UsageError, match=r"names no size: give --model_depth \(number of blocks\), --model_heads \(number of"
    ):
        build_network("DiT/4", 8, DiTOptions(model_width=48))
    with pytest.raises(UsageError, match="--model_width, --model_depth, --model_heads have no effect on the size Mi"):
        build_network("DiT-Mi/4", 8, options)
