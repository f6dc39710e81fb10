"""Networks with a dense condition: state dict names, outputs compared with the inner network's, and wrappers."""

import copy

import pytest
import torch
from torch import nn

from checkpoints.files import load_model, read_weights, save_weights
from checkpoints.state_dicts import load_weights, suggest_flags
from models.conditions import Condition, DenseConditioned, DenseInput, null_condition
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import NETWORKS, Architecture, build_network
from options import UsageError
from tests.headers import header_of
from training.ema import Ema
from training.optimizers import OptimizerOptions, make_optimizers

SIDE = 8
MASKED, MAPPED = DenseInput(5), DenseInput(4, classes=6)
UNET = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "num_out_channels": 4}
FAMILIES = {
    "DiT-Mi/2": DiTOptions(num_classes=3, label_dropout=0.1),
    "adm": EdmUNetOptions(**UNET, label_dim=3),
    "ncsn++": EdmUNetOptions(**UNET),
    "origin_adm": GuidedUNetOptions(**UNET),
}
BOTH = pytest.mark.parametrize("dense", [MASKED, MAPPED], ids=["masked", "mapped"])


def architecture(name, dense):
    options = FAMILIES[name]
    return Architecture(name, SIDE, type(options)(**{**vars(options), "num_in_channels": 4 + dense.channels}), dense)


def network_of(name, dense, seed=0):
    """A network with random nonzero weights."""
    network = build_network(*architecture(name, dense)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs_of(dense, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, dense.classes or dense.channels, SIDE, SIDE)
    return torch.rand(2, generator=generator), torch.randn(2, 4, SIDE, SIDE, generator=generator), torch.rand(
        shape, generator=generator
    )  # fmt: skip


def mapped(network, dense_map):
    """The network's input after concatenation, computed by a plain sum over classes."""
    if isinstance(network.channel_mapper, nn.Identity):
        return dense_map
    return torch.einsum("ck,bkhw->bchw", network.channel_mapper.weight[:, :, 0, 0], dense_map)


@pytest.mark.parametrize("name", FAMILIES)
@BOTH
@torch.no_grad()
def test_state_dict_has_the_inner_networks_names_and_the_stages(name, dense):
    network = network_of(name, dense)
    plain = NETWORKS[name].build(SIDE, architecture(name, dense).options)
    own = network.state_dict()
    stage = ["channel_mapper.weight"] if dense.classes else []
    assert list(own) == [*plain.state_dict(), *stage]
    assert [key.removeprefix("network.") for key, _ in network.named_parameters()] == [
        *(key for key, _ in plain.named_parameters()),
        *stage,
    ]
    if stage:
        assert own["channel_mapper.weight"].shape == (4, 6, 1, 1)
        assert network.channel_mapper.bias is None

    # Loading the same weights makes the plain network identical.
    plain.load_state_dict({key: value for key, value in own.items() if key not in stage})
    t, x, dense_map = inputs_of(dense)
    condition = Condition(torch.tensor([0, 2]), dense_map)
    expected = plain.eval()(t, torch.cat([x, mapped(network, dense_map)], dim=1), Condition(condition.labels))
    size = expected.abs().max()
    assert (network(t, x, condition) - expected).abs().max() < 1e-4 * size
    other = network(t, x, Condition(condition.labels, torch.zeros_like(dense_map)))
    assert (other - expected).abs().max() > 1e-3 * size  # the map matters


def test_a_missing_map_is_refused():
    network = network_of("DiT-Mi/2", MASKED)
    with pytest.raises(ValueError, match=r"needs a dense map \[B, K, h, w\]"):
        network(torch.rand(2), torch.randn(2, 4, SIDE, SIDE), Condition(torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("name", FAMILIES)
@BOTH
def test_a_state_dict_loads_and_differences_are_named(name, dense):
    source, target = network_of(name, dense), network_of(name, dense, seed=5)
    weights = source.state_dict()
    before = list(weights)
    target.load_state_dict(weights)
    assert list(weights) == before  # the caller's dictionary is unchanged
    assert all(torch.equal(value, weights[key]) for key, value in target.state_dict().items())

    first, last = before[0], before[-1]
    damaged = {key: value for key, value in weights.items() if key != first} | {"foreign": torch.zeros(1)}
    damaged[last] = damaged[last][None]
    with pytest.raises(UsageError) as error:
        load_weights(target, damaged, "file", architecture(name, dense))
    message = str(error.value)
    assert f"missing: {first}; unexpected: foreign; wrong shape: {last} (" in message
    assert "network." not in message
    with pytest.raises(RuntimeError, match="foreign"):
        target.load_state_dict(damaged | {last: weights[last]})
    assert target.load_state_dict(damaged | {last: weights[last]}, strict=False).missing_keys


def test_another_width_gives_a_suggestion_of_flags():
    """The label map stage does not prevent the file from being recognized."""
    weights = network_of("origin_adm", MAPPED).state_dict()
    wider = architecture("origin_adm", MAPPED)
    wider = wider._replace(options=type(wider.options)(**{**vars(wider.options), "nf": 64}))
    assert suggest_flags(weights, wider) == {"nf": 32}
    with pytest.raises(UsageError, match="only a label-map embedding: pass the model_<epoch>.pth in the same folder"):
        load_weights(network_of("origin_adm", MAPPED), {"channel_mapper.weight": torch.zeros(4, 6, 1, 1)}, "x", wider)


@BOTH
@torch.no_grad()
def test_copies_and_wrappers_keep_the_names_under_their_prefix(dense):
    network = network_of("DiT-Mi/2", dense)
    names = list(network.state_dict())
    twin = copy.deepcopy(network)
    network.network.final_layer.linear.weight.add_(1)
    assert not torch.equal(*(n.state_dict()["final_layer.linear.weight"] for n in (network, twin)))
    assert list(twin.state_dict()) == names
    twin.load_state_dict(network.state_dict())  # uses the copy's hooks rather than the original's
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in twin.state_dict().items())

    class Parallel(nn.Module):
        """Wraps a network like DistributedDataParallel does."""

        def __init__(self, module):
            super().__init__()
            self.before, self.module = nn.Linear(1, 1, bias=False), module

    outer, other = Parallel(network), Parallel(network_of("DiT-Mi/2", dense, seed=9))
    assert list(outer.state_dict()) == ["before.weight", *(f"module.{name}" for name in names)]
    other.load_state_dict(outer.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(value, outer.state_dict()[key]), key
    assert list(network.state_dict(prefix="a.")) == [f"a.{name}" for name in names]
    entries = network.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in network.parameters()}
    assert all(id(entries[name]) in parameters for name in names)


def test_a_checkpoint_describes_the_condition(tmp_path):
    network = network_of("DiT-Mi/2", MAPPED)
    chosen = architecture("DiT-Mi/2", DenseInput(4, classes=6, dropout=0.2))
    header = header_of(chosen.options, chosen.model_type, SIDE, task="semantic", dense=chosen.dense, step=1)
    save_weights(tmp_path / "m.safetensors", network.state_dict(), header)
    assert read_weights(tmp_path / "m.safetensors")[1].dense == DenseInput(4, classes=6, dropout=0.2)
    loaded = load_model(tmp_path / "m.safetensors").network
    assert isinstance(loaded, DenseConditioned)
    t, x, dense_map = inputs_of(MAPPED)
    condition = Condition(torch.tensor([0, 1]), dense_map)
    assert torch.equal(loaded(t, x, condition), network(t, x, condition))


def test_muon_trains_the_inner_matrices_and_adamw_the_stage():
    network = network_of("DiT-Mi/2", MAPPED)
    adamw, muon = make_optimizers(
        network, OptimizerOptions(optimizer="muon"), hidden_matrices=NETWORKS["DiT-Mi/2"].hidden_matrices(network)
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    of_muon, of_adamw = ({names[id(p)] for p in optimizer.param_groups[0]["params"]} for optimizer in (muon, adamw))
    assert "network.blocks.0.attn.qkv.weight" in of_muon
    assert all(name.startswith("network.blocks.") and name.endswith(".weight") for name in of_muon)
    assert "channel_mapper.weight" in of_adamw
    assert of_muon | of_adamw == {name for name, p in network.named_parameters() if p.requires_grad}


def test_the_ema_includes_the_stage():
    network = network_of("DiT-Mi/2", MAPPED)
    ema = Ema(network, 0.9999)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    ema.update(network)
    for name, value in network.state_dict().items():  # the first update's weight is 9/11
        torch.testing.assert_close(ema.weights[name], start[name] * 2 / 11 + value * 9 / 11)
    assert list(ema.weights) == list(start)


def test_gradients_reach_the_stage():
    network = network_of("DiT-Mi/2", MAPPED)
    t, x, dense_map = inputs_of(MAPPED)
    dense_map[:, 2] = 0  # a class that no image has
    network(t, x, Condition(torch.tensor([0, 1]), dense_map)).square().mean().backward()
    slope = network.channel_mapper.weight.grad[:, :, 0, 0]
    assert (slope[:, [0, 1, 3, 4, 5]] != 0).all()
    assert (slope[:, 2] == 0).all()


def test_the_null_condition_drops_what_training_drops():
    labels, maps = torch.tensor([0, 2]), torch.ones(2, 1, 4, 4)
    both = null_condition(labels, maps, 0.1, 0.2, num_classes=3)
    assert both.labels.tolist() == [3, 3]
    assert both.dense.count_nonzero() == 0
    neither = null_condition(labels, maps, 0.0, 0.0, num_classes=3)
    assert neither == (labels, maps, None)
    assert null_condition(labels, None, 0.1, 0.0, num_classes=3).dense is None
