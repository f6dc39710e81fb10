"""DiT against the golden cases of the published network, and the facts of its initial state."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flow.guidance import guided_velocity
from flow.solvers import SolverOptions, solve
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.registry import NETWORKS, build_network
from options import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"


def _fill_weight(name, shape):
    spec = importlib.util.spec_from_file_location("fill_weights", GOLDEN / "fill_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch.from_numpy(module.fill_weight(name, tuple(shape)))


def _golden(case):
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items() if key not in ("cfg_scale",)}
        header["cfg_scale"] = file.metadata()["cfg_scale"]
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _network(header):
    arguments = header["arguments"]
    names = DiTOptions.__dataclass_fields__
    options = DiTOptions(**{key: value for key, value in arguments.items() if key in names and value is not None})
    side = arguments["image_size"] // arguments["f"]
    sizes = (arguments[key] for key in ("patch_size", "hidden_size", "depth", "num_heads"))
    network = DiT(side, *sizes, options).eval()
    constant = set(header["constant_weights"])
    for (name, shape), (own_name, own) in zip(header["weights"], network.state_dict().items(), strict=True):
        assert (name, tuple(shape)) == (own_name, tuple(own.shape))
        if name not in constant:
            own.copy_(_fill_weight(name, shape))
    return network


CASES = ("dit_unconditional", "dit_class_conditional", "dit_null_class")


@pytest.mark.parametrize("case", CASES)
def test_names_order_and_velocity_are_the_published_ones(case):
    header, tensors = _golden(case)
    network = _network(header)
    condition = Condition(tensors.get("in.y"))
    with torch.no_grad():
        velocity = network(tensors["in.t"], tensors["in.x"], condition)
    torch.testing.assert_close(velocity, tensors["out.velocity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_guided_velocity_and_sample_are_the_published_ones(case):
    header, tensors = _golden(case)
    network = _network(header)
    condition = Condition(tensors.get("in.y"))
    if "out.velocity_cfg" in tensors:
        null = Condition(torch.full_like(tensors["in.y"], header["arguments"]["num_classes"]))
        with torch.no_grad():
            guided = guided_velocity(network, condition, null, float(header["cfg_scale"]))
            velocity = guided(tensors["in.t_cfg"][0], tensors["in.x"])
        torch.testing.assert_close(velocity, tensors["out.velocity_cfg"], atol=2e-5, rtol=0)
    if "out.sample_dopri5" in tensors:
        plain = guided_velocity(network, condition, condition, 1.0)
        sample = solve(plain, tensors["in.x"], SolverOptions(method="dopri5")).x
        torch.testing.assert_close(sample, tensors["out.sample_dopri5"], atol=1e-3, rtol=0)


def test_published_parameter_counts():
    counts = {}
    for name, options in (("DiT-L/2", DiTOptions()), ("DiT-B/2", DiTOptions(num_classes=1000, label_dropout=0.1))):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in build_network(name, 32, options).parameters())
    assert round(counts["DiT-L/2"] / 1e6, 1) == 457.1
    assert round(counts["DiT-B/2"] / 1e6, 1) == 130.5


def test_a_fresh_network_has_velocity_zero_whatever_the_condition():
    network = build_network("DiT-Mi/2", 8, DiTOptions(num_classes=3, label_dropout=0.1))
    velocity = network(torch.rand(2), torch.randn(2, 4, 8, 8), Condition(torch.tensor([0, 3])))
    assert torch.equal(velocity, torch.zeros(2, 4, 8, 8))


def test_scalar_time_holds_for_the_whole_batch_and_no_labels_mean_the_null_class():
    header, tensors = _golden("dit_class_conditional")
    network, x = _network(header), tensors["in.x"]
    with torch.no_grad():
        scalar, vector = network(torch.tensor(0.3), x), network(torch.full((len(x),), 0.3), x)
    torch.testing.assert_close(scalar, vector, atol=1e-6, rtol=0)
    assert scalar.abs().max() > 0.1


def test_gradient_checkpointing_changes_nothing():
    header, tensors = _golden("dit_unconditional")
    network = _network(header).train()
    gradients = []
    for use in (False, True):
        network.options = DiTOptions(use_grad_checkpointing=use)
        network.zero_grad()
        network(tensors["in.t"], tensors["in.x"]).square().mean().backward()
        gradients.append(network.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_patch_that_does_not_divide_the_latents_is_refused():
    with pytest.raises(UsageError, match="latents of side 6"):
        build_network("DiT-Mi/4", 6, DiTOptions())
    assert "DiT-XL/8" in NETWORKS
