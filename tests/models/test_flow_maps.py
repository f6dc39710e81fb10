"""Networks that predict average velocities: what `until`, guidance and the log-variance do, and what they leave unchanged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SolverOptions, solve
from models.conditions import Condition, DenseConditioned, DenseInput
from models.dit import DiT, DiTOptions
from models.flow_maps import LogVariance, VelocityWithVariance
from models.taps import weights_for_sampling
from options import UsageError

WIDTH, DEPTH, HEADS = 32, 4, 4
BLOCKS = {"norm": "rms_affine", "mlp": "swiglu", "qk_norm": True, "rope": True, "value_residual": True}
VARIANTS = {
    "plain": {},
    "context": {"class_tokens": 2, "time_tokens": 1, "shared_adaln": True},
    "fine": {**BLOCKS, "fine_blocks": 2, "time_embedding": "fourier"},
    "ddt": {**BLOCKS, "ddt_blocks": 1, "ddt_width": 48, "shared_adaln": True},
}
WAYS = ("interval", "decoupled")
each_way = pytest.mark.parametrize("way", WAYS)
each_variant = pytest.mark.parametrize("name", VARIANTS)


def build(**options):
    torch.manual_seed(0)
    return DiT(8, 2, WIDTH, DEPTH, HEADS, DiTOptions(num_classes=3, label_dropout=0.1, **options))


def randomize(network, scale=0.1):
    """The network in eval mode with nonzero weights."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn_like(parameter))
    return network.eval()


def inputs(dtype=torch.float32):
    torch.manual_seed(3)
    t, until = torch.tensor([0.4, 0.9], dtype=dtype), torch.tensor([0.1, 0.0], dtype=dtype)
    return t, until, torch.randn(2, 4, 8, 8, dtype=dtype), Condition(torch.tensor([0, 2]))


@each_way
@each_variant
@torch.no_grad()
def test_until_t_gives_the_velocity_bit_for_bit_and_others_do_not(way, name):
    network = randomize(build(until_embedding=way, **VARIANTS[name]))
    t, until, x, condition = inputs()
    velocity = network(t, x, condition)
    assert torch.equal(network(t, x, condition, until=t), velocity)
    average = network(t, x, condition, until=until)
    assert ((average - velocity).flatten(1).norm(dim=1) > 1e-3 * velocity.flatten(1).norm(dim=1)).all()
    together = network(t[0], x, condition, until=until[0])
    torch.testing.assert_close(together[0], average[0], atol=1e-5, rtol=1e-4)  # numbers and tensors of times agree


@each_variant
@torch.no_grad()
def test_a_velocity_networks_weights_give_its_velocity(name):
    """Decoupled networks have no other weights; the interval's embedding starts at zero, and so does the guidance's."""
    plain, (t, until, x, condition) = randomize(build(**VARIANTS[name])), inputs()
    velocity = plain(t, x, condition)
    decoupled = build(until_embedding="decoupled", **VARIANTS[name]).eval()
    decoupled.load_state_dict(plain.state_dict())
    assert torch.equal(decoupled(t, x, condition), velocity)
    interval = build(until_embedding="interval", guidance_embedding=True, **VARIANTS[name]).eval()
    missing, unexpected = interval.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {entry.split(".")[0] for entry in missing} == {"r_embedder", "guidance_embedder"}
    guidance = torch.tensor([2.0, 5.0])
    assert torch.equal(interval(t, x, condition, until=until, guidance=guidance), velocity)


def make_identity(blocks):
    """Blocks that change no tokens, whatever their condition."""
    for layer in (layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)):
        layer.weight.zero_()
        layer.bias.zero_()


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, 3),
        ({"decoupled_blocks": 3}, 1),
        ({"decoupled_blocks": 2, "shared_adaln": True}, 2),
        ({"decoupled_blocks": 1, "ddt_blocks": 1}, 3),
        ({"decoupled_blocks": 3, "ddt_blocks": 1}, 1),
        ({"decoupled_blocks": 2, "fine_blocks": 1}, 2),
    ],
)
@torch.no_grad()
def test_the_last_blocks_see_only_until_and_the_first_only_t(options, start):
    network, other = (randomize(build(until_embedding="decoupled", **options)) for _ in range(2))
    t, until, x, condition = inputs()
    make_identity(network.blocks[:start])
    found = network(t, x, condition, until=until)
    assert torch.equal(found, network(t / 2 + 0.5, x, condition, until=until))
    torch.testing.assert_close(found, network(until, x, condition))
    make_identity(other.blocks[start - 1 : start])
    found = other(t, x, condition, until=until)
    changed = not torch.equal(found, other(t / 2 + 0.5, x, condition, until=until))
    assert changed == (start > 1)  # block start - 1 was the last one that saw t


@torch.no_grad()
def test_the_interval_is_embedded_by_its_length():
    network, seen = randomize(build(until_embedding="interval")), []
    t, until, x, condition = inputs()
    network.r_embedder.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    network(t, x, condition)
    network(t, x, condition, until=until)
    assert torch.equal(torch.stack(seen), torch.stack([torch.zeros(2), t - until]))


@torch.no_grad()
def test_guidance_is_an_input_and_absent_means_one():
    network = randomize(build(guidance_embedding=True, until_embedding="decoupled"))
    t, until, x, condition = inputs()
    seen = []
    network.guidance_embedder.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    plain = network(t, x, condition)
    assert torch.equal(network(t, x, condition, guidance=torch.ones(2)), plain)
    guided = network(t, x, condition, until=until, guidance=torch.tensor([2.0, 4.0]))
    assert [each.tolist() for each in seen] == [[0, 0], [0, 0], [0.5, 0.75], [0.5, 0.75]]
    assert (guided - network(t, x, condition, until=until)).abs().max() > 1e-4
    assert torch.equal(
        network(t, x, condition, guidance=torch.tensor(3.0)), network(t, x, condition, guidance=torch.full((2,), 3.0))
    )


def test_the_log_variance_starts_at_zero_changes_no_velocity_and_is_dropped_for_sampling():
    network = build(log_variance_head=True, until_embedding="decoupled", tap_block=2, auxiliary_velocity=0.5)
    t, until, x, condition = inputs()
    assert network(t, x, condition, log_variance=True).log_variance.tolist() == [0, 0]
    randomize(network)
    velocity, log_variance = network(t, x, condition, until=until, log_variance=True)
    assert torch.equal(velocity, network(t, x, condition, until=until))
    assert torch.equal(log_variance, network.log_variance_head(t, until))
    assert not torch.equal(log_variance, network.log_variance_head(t, t))
    result, tapped = network(t, x, condition, until=until, log_variance=True, tapped=True)
    assert isinstance(result, VelocityWithVariance)
    assert torch.equal(result.velocity, velocity)
    assert torch.equal(tapped.velocity, network(t, x, condition, until=until, tapped=True).tapped.velocity)
    options = network.options.for_sampling()
    assert options == replace(network.options, log_variance_head=False)
    kept = weights_for_sampling(network.state_dict())
    assert [n for n in network.state_dict() if n not in kept] == ["log_variance_head.weight", "log_variance_head.bias"]
    DiT(8, 2, WIDTH, DEPTH, HEADS, options).load_state_dict(kept)


def test_the_log_variance_stays_in_float32():
    head = LogVariance()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert head(torch.rand(3), torch.rand(3)).dtype == torch.float32


@each_way
@each_variant
def test_every_weight_learns_with_all_inputs(way, name):
    """DistributedDataParallel refuses weights that no loss depends on."""
    options = {"guidance_embedding": True, "log_variance_head": True, **VARIANTS[name]}
    network, gradients = randomize(build(until_embedding=way, **options)).train(), []
    t, until, x, condition = inputs()
    for use in (False, True):
        network.options = replace(network.options, use_grad_checkpointing=use)
        network.zero_grad()
        output = network(t, x, condition, until=until, guidance=torch.tensor([2.0, 3.0]), log_variance=True)
        (output.velocity.square().mean() + output.log_variance.mean()).backward()
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
        gradients.append([p.grad for p in trained.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


@each_way
def test_jvp_along_the_flow_is_the_finite_difference(way):
    network = randomize(build(until_embedding=way, qk_norm=True)).double().requires_grad_(False)
    t, until, x, condition = inputs(torch.float64)
    tangents = torch.randn_like(x), torch.ones_like(t)
    step = 1e-6
    with sdpa_kernel([SDPBackend.MATH]):
        average, slope = torch.func.jvp(lambda x, t: network(t, x, condition, until=until), (x, t), tangents)
        after, before = (network(t + s, x + s * tangents[0], condition, until=until) for s in (step, -step))
    difference = (after - before) / (2 * step)
    assert average.shape == x.shape
    assert (slope - difference).norm() < 1e-6 * difference.norm()


@each_way
@torch.no_grad()
def test_tokens_may_skip_blocks_before_and_after_the_change(way):
    """Tokens that waited get the condition that those which did not wait have by then."""
    options = {"route_blocks": (1, 4), "route_rate": 0.5, "until_embedding": way, "shared_adaln": True}
    network = randomize(build(**options, decoupled_blocks=2 if way == "decoupled" else None))
    t, until, x, condition = inputs()
    routing = torch.rand(2, 8, 8)
    routed = network(t, x, condition, until=until, routing=routing)
    assert torch.equal(network(t, x, condition, until=t, routing=routing), network(t, x, condition, routing=routing))
    assert not torch.allclose(routed, network(t, x, condition, routing=routing), atol=1e-4)
    make_identity(network.blocks)  # so that the tokens' routes do not matter
    torch.testing.assert_close(
        network(t, x, condition, until=until, routing=routing), network(t, x, condition, until=until)
    )


@each_way
@torch.no_grad()
def test_a_dense_condition_passes_all_inputs_on(way):
    inner = randomize(build(until_embedding=way, guidance_embedding=True, num_in_channels=6))
    network, (t, until, x, condition) = DenseConditioned(inner, DenseInput(2)), inputs()
    dense = torch.rand(2, 2, 8, 8)
    others = {"until": until, "guidance": torch.tensor([2.0, 3.0])}
    found = network(t, x, condition._replace(dense=dense), **others)
    assert torch.equal(found, inner(t, torch.cat([x, dense], dim=1), condition, **others))


def test_a_compiler_traces_one_graph():
    network, graphs = randomize(build(until_embedding="decoupled")).requires_grad_(False), []
    t, until, x, condition = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for end in (until, until + 0.05):
        torch.testing.assert_close(compiled(t, x, condition, until=end), network(t, x, condition, until=end))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"until": torch.zeros(2)}, "predicts velocities, not average velocities .*--until_embedding"),
        ({}, {"guidance": torch.ones(2)}, "takes no guidance scale as an input: .*--guidance_embedding"),
        ({"until_embedding": "interval"}, {"log_variance": True}, "predicts no log-variance: .*--log_variance_head"),
    ],
)
def test_inputs_that_the_network_lacks_are_refused(options, given, message):
    t, _, x, condition = inputs()
    with pytest.raises(UsageError, match=message):
        build(**options)(t, x, condition, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoupled_blocks": 2}, "--decoupled_blocks has no effect without --until_embedding decoupled"),
        ({"until_embedding": "decoupled", "decoupled_blocks": 4}, "--decoupled_blocks 4: .* expected at most 3"),
        ({"until_embedding": "decoupled", "ddt_blocks": 2}, "only 1 would: use --decoupled_blocks 2 or more"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)


@torch.no_grad()
def test_the_published_network_of_meanflow(golden):
    """Names, order, velocity, average velocity, and samples of one and two steps equal the recorded ones."""
    case = golden.read_case(Path(__file__).parents[1] / "golden" / "published" / "meanflow_sit.safetensors")
    arguments, tensors = case.arguments, case.tensors
    sizes = [arguments[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")]
    side = arguments["image_size"] // arguments["f"]
    network = DiT(side, *sizes, DiTOptions(num_classes=10, label_dropout=0.1, until_embedding="interval")).eval()
    assert [(name, list(value.shape)) for name, value in network.state_dict().items()] == case.weights
    for name, value in network.state_dict().items():
        if name not in case.constant_weights:
            value.copy_(torch.from_numpy(golden._fill_weight(name, tuple(value.shape))))
    t, until, x = tensors["in.t"], tensors["in.r"], tensors["in.x"]
    condition = Condition(tensors["in.y"].long())
    assert (network(t, x, condition) - tensors["out.velocity"]).abs().max() < 1e-5
    assert (network(t, x, condition, until=until) - tensors["out.average_velocity"]).abs().max() < 1e-5
    for steps in (1, 2):
        velocity = GuidedVelocity(network, condition, condition, GuidanceOptions())
        sample = solve(velocity, x, SolverOptions("flow_map", steps)).x
        assert (sample - tensors[f"out.sample_{steps}"]).abs().max() < 1e-5
