"""Properties of every network of the families, for configurations without a golden case."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import AttentionBlock, GuidedUNetOptions
from models.plain_unet import PlainUNetOptions
from models.registry import NETWORKS, ORIGIN_ADM, build_network
from options import UsageError

SIDE = 8
KINDS = ("DiT", "adm", "ddpm++", "ncsn++", ORIGIN_ADM, "unet")


def random_options(kind, seed):
    """Random options of a small network, determined by `seed`."""
    draw = random.Random(f"{kind}{seed}")
    channels = {"num_in_channels": draw.choice([3, 4, 9]), "num_out_channels": draw.choice([3, 4])}
    classes = draw.choice([None, 3])
    dropout = draw.choice([0.0, 0.1]) if classes else 0.0
    if kind in ("DiT", "unet"):
        own = {"DiT": DiTOptions, "unet": PlainUNetOptions}[kind]
        return own(**channels, num_classes=classes, label_dropout=dropout)
    unet = {
        "nf": 32,
        "ch_mult": tuple(draw.choice([1, 2]) for _ in range(draw.choice([1, 2, 3]))),
        "num_res_blocks": draw.choice([1, 2]),
        "dropout": 0.3,
        "label_dropout": dropout,
        **channels,
    }
    if kind != ORIGIN_ADM:
        return EdmUNetOptions(**unet, attn_resolutions=tuple(draw.sample([8, 4, 2], 2)), label_dim=classes or 0)
    return GuidedUNetOptions(
        **unet,
        attn_resolutions=tuple(draw.sample([1, 2, 4], 2)),
        num_classes=classes,
        use_scale_shift_norm=draw.random() < 0.5,
        resblock_updown=draw.random() < 0.5,
        resamp_with_conv=draw.random() < 0.5,
        use_new_attention_order=draw.random() < 0.5,
        num_heads=draw.choice([1, 2, 4]),
        num_head_upsample=draw.choice([-1, 8]),
        num_head_channels=draw.choice([-1, 16]),
    )


def build(kind, options, size=SIDE):
    if kind == "DiT":
        return DiT(size, 2, 32, 2, 4, options)
    return build_network(kind, size, options)


def new_network(kind, options):
    """A network with random weights. An untrained one would return zero."""
    torch.manual_seed(0)
    network = build(kind, options)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(options, count=3, height=SIDE, width=SIDE):
    x = torch.randn(count, options.num_in_channels, height, width)
    return torch.rand(count), x, Condition(torch.arange(count) % options.classes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_any_configuration(kind, seed):
    options = random_options(kind, seed)
    network = new_network(kind, options)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build(kind, options).state_dict().items()}
    assert shapes == {name: value.shape for name, value in network.state_dict().items()}
    t, x, condition = inputs(options)
    with torch.no_grad():
        velocity = network(t, x, condition)
        assert velocity.shape == (3, options.num_out_channels, SIDE, SIDE)
        assert velocity.std() > 1e-3
        # Evaluate samples one at a time, with a scalar time.
        alone = torch.cat([network(t[i], x[i : i + 1], Condition(condition.labels[i : i + 1])) for i in range(3)])
        torch.testing.assert_close(velocity, alone, atol=1e-4, rtol=1e-3)
        scalar, vector = (network(time, x, condition) for time in (torch.tensor(0.3), torch.full((3,), 0.3)))
        assert torch.equal(scalar, vector)
        # Labels have an effect exactly if there are classes.
        other = network(t, x, Condition(torch.full((3,), (options.classes - 1))))
        assert torch.equal(other[2:], velocity[2:])  # its label is K - 1 in both cases
        assert (not torch.equal(other, velocity)) == (options.classes > 1)
    moved = network.train()(t, x, condition)
    assert (not torch.allclose(moved, velocity, atol=1e-4)) == (getattr(options, "dropout", 0.0) > 0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_neither_output_nor_gradients(kind, seed):
    options = random_options(kind, seed)
    network = new_network(kind, options).train()
    t, x, condition = inputs(options)
    found, counts, calls = [], [], []
    for module in network.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    for use in (False, True):
        network.options = replace(options, use_grad_checkpointing=use)
        network.zero_grad()
        torch.manual_seed(1)  # seeds the dropout
        calls.clear()
        velocity = network(t, x, condition)
        velocity.square().mean().backward()
        counts.append(len(calls))
        found.append([velocity.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert counts[1] > 1.3 * counts[0]  # the recomputed operations
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_labels_mean_the_null_class(kind):
    options = {
        "DiT": DiTOptions(num_classes=3, label_dropout=0.1),
        "unet": PlainUNetOptions(num_classes=3, label_dropout=0.1),
        ORIGIN_ADM: GuidedUNetOptions(nf=32, ch_mult=(1,), num_classes=3, label_dropout=0.1),
    }.get(kind, EdmUNetOptions(nf=32, ch_mult=(1,), label_dim=3))
    network = new_network(kind, options)
    t, x, _ = inputs(options)
    with torch.no_grad():
        assert torch.equal(network(t, x), network(t, x, Condition(torch.full((3,), 3))))
        assert not torch.equal(network(t, x), network(t, x, Condition(torch.zeros(3, dtype=torch.long))))


def test_labels_are_required_without_a_null_class():
    options = GuidedUNetOptions(nf=32, ch_mult=(1,), num_classes=3)
    t, x, _ = inputs(options)
    with pytest.raises(UsageError, match="this network needs labels"):
        new_network(ORIGIN_ADM, options)(t, x)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_run_and_invalid_ones_are_refused(kind):
    unet = {"nf": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1}
    options = {"DiT": DiTOptions(), "unet": PlainUNetOptions()}.get(kind) or NETWORKS[kind].options(**unet)
    network = new_network(kind, options)
    with torch.no_grad():
        for height, width in [(8, 12), (16, 4), (12, 12)]:
            t, x, condition = inputs(options, 2, height, width)
            velocity = network(t, x, condition)
            assert velocity.shape == x.shape
            assert torch.isfinite(velocity).all()
        t, x, condition = inputs(options, 2, 8, 7 if kind == "DiT" else 10)
        with pytest.raises(UsageError, match=f"latents of side {x.shape[3]} cannot be"):
            network(t, x, condition)


def test_positions_are_rebuilt_for_another_grid(capsys):
    small, large = new_network("DiT", DiTOptions()), build("DiT", DiTOptions(), size=12).eval()
    large.load_state_dict({**small.state_dict(), "pos_embed": large.pos_embed})
    t, x, _ = inputs(DiTOptions(), 2, 12, 12)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(small(t, x), large(t, x))
        assert capsys.readouterr().err.count("position table recomputed for 6 x 6 patches") == 1  # reported once
        # A token's position encodes its row and column, so each row of a wider grid starts with the square grid's row.
        wide = small._tables.table(small.pos_embed, 4, 6)
        square = small.pos_embed.view(4, 4, -1)
        assert torch.equal(wide.view(4, 6, -1)[:, :4], square)
        assert torch.equal(small._tables.table(small.pos_embed, 6, 4).view(6, 4, -1)[:4], square)


def test_attention_of_a_single_token_is_its_value():
    """Both orders of queries, keys and values select the same value channels for any number of heads."""
    torch.manual_seed(0)
    channels, heads = 64, 4
    for new_order in (False, True):
        block = AttentionBlock(channels, heads, new_order)
        torch.nn.init.normal_(block.proj_out.weight)
        x = torch.randn(2, channels, 1, 1)
        qkv = block.qkv(block.norm(x.flatten(2)))
        if new_order:  # [q, k, v][head][channel]
            value = qkv[:, 2 * channels :]
        else:  # [head][q, k, v][channel]
            value = qkv.view(2, heads, 3, channels // heads, 1)[:, :, 2].reshape(2, channels, 1)
        torch.testing.assert_close(block(x), x + block.proj_out(value).view_as(x))


def test_resampling_without_convolution_has_no_weights():
    plain = GuidedUNetOptions(nf=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resamp_with_conv=False)
    names = [
        set(build(ORIGIN_ADM, replace(plain, resamp_with_conv=convolve)).state_dict()) for convolve in (False, True)
    ]
    assert names[1] - names[0] == {
        f"{place}.{kind}" for place in ("input_blocks.2.0.op", "output_blocks.1.1.conv") for kind in ("weight", "bias")
    }
    assert names[0] < names[1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adm", EdmUNetOptions(nf=36, ch_mult=(4,)), "cannot divide a layer of 144 channels into 32 groups"),
        ("adm", EdmUNetOptions(nf=224, ch_mult=(1,)), "224 channels cannot be divided among 3 attention heads"),
        (ORIGIN_ADM, GuidedUNetOptions(nf=48, ch_mult=(1,)), "cannot divide a layer of 48 channels into 32 groups"),
        (ORIGIN_ADM, GuidedUNetOptions(nf=32, ch_mult=(1,), num_heads=5), "32 channels cannot be divided among 5"),
        (
            ORIGIN_ADM,
            GuidedUNetOptions(nf=32, ch_mult=(1,), num_head_channels=64),
            "32 channels cannot be divided among 0",
        ),
        ("ddpm++", EdmUNetOptions(nf=32, ch_mult=(1,) * 5), "latents of side 8 cannot be halved 4 times"),
    ],
)
def test_impossible_networks_are_refused_by_name(kind, options, message):
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        build(kind, options)


@pytest.mark.parametrize(
    ("kind", "width", "multiples"), [("adm", 16, (2, 4)), ("ncsn++", 24, (1, 2)), (ORIGIN_ADM, 16, (2, 4))]
)
def test_narrow_networks_that_group_norm_can_divide_are_built(kind, width, multiples):
    options = NETWORKS[kind].options(nf=width, ch_mult=multiples, num_res_blocks=1, attn_resolutions=(4,))
    t, x, condition = inputs(options)
    assert torch.isfinite(new_network(kind, options)(t, x, condition)).all()


def test_a_copy_keeps_its_other_grids():
    network = new_network("DiT", DiTOptions())
    t, x, _ = inputs(DiTOptions(), 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(network)(t, x), network(t, x))
