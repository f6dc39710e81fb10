"""Infers flags from the golden cases' names and shapes, and detects wrong flags."""

import dataclasses
from pathlib import Path

import pytest
import torch

from checkpoints.recognition import recognise
from checkpoints.state_dicts import load_weights, suggest_flags
from models.guided_unet import GuidedUNetOptions
from models.registry import NETWORKS, ORIGIN_ADM, Architecture, build_network
from options import UsageError
from runtime.weights import find_mismatch

CASES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


def stems(path):
    return path.stem


def listed(case):
    """Tensors with the names and shapes in a case's list, without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in case.weights}


def architecture_of(case):
    arguments = case.arguments
    named = {"DiT": "DiT-Golden/2"}.get(arguments["model_type"], arguments["model_type"])
    model_type = ORIGIN_ADM if arguments["use_origin_adm"] else named
    kind = NETWORKS[model_type].options
    values = {f.name: arguments[f.name] for f in dataclasses.fields(kind) if f.name in arguments}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Architecture(model_type, arguments["image_size"] // arguments["f"], kind(**values))


@pytest.mark.parametrize("path", CASES, ids=stems)
def test_flags_are_inferred_from_a_golden_cases_names(path, golden):
    case = golden.read_case(path)
    model_type, size, options, _ = architecture_of(case)
    found = recognise(listed(case))
    assert found.pop("model_type") == model_type
    assert found.pop("latent_size", size) == size
    assert found.pop("label_rows", None) == getattr(options, "label_rows", None)
    if path.stem == "adm_narrow_attention":  # too few channels for a head, so num_head_channels leaves no trace
        assert found.pop("attn_resolutions") == (2,)
    assert len(found) >= 2
    assert found == {name: getattr(options, name) for name in found}


OTHER_VALUES = {
    "nf": 64,
    "ch_mult": (2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (1, 8),
    "num_in_channels": 5,
    "num_out_channels": 6,
    "label_dim": 3,
    "num_classes": 7,
    "use_scale_shift_norm": None,  # the opposite value
    "resblock_updown": None,
    "resamp_with_conv": None,
}


@pytest.mark.parametrize("path", CASES, ids=stems)
def test_a_wrong_flag_is_detected(path, golden):
    case = golden.read_case(path)
    weights, (model_type, size, options, _) = listed(case), architecture_of(case)
    tried = 0
    for name, other in OTHER_VALUES.items():
        if not hasattr(options, name):
            continue
        true = getattr(options, name)
        wrong = dataclasses.replace(options, **{name: not true if other is None else other})
        with torch.device("meta"):
            built = build_network(model_type, size, wrong).state_dict()
        if not any(find_mismatch(built, weights)):  # with resblock_updown, resamp_with_conv has no effect
            assert (name, options.resblock_updown) == ("resamp_with_conv", True)
            continue
        expected = true
        if name == "attn_resolutions" and path.stem == "adm_narrow_attention":
            expected = (2,)
        if name == "num_classes" and true is None and model_type.startswith("DiT"):
            expected = 1
        assert suggest_flags(weights, Architecture(model_type, size, wrong)) == {name: expected}, name
        tried += 1
    assert tried >= 3


def guided(**values):
    options = GuidedUNetOptions(**{"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (2,)} | values)
    with torch.device("meta"):
        return build_network(ORIGIN_ADM, 8, options).state_dict()


def test_wrong_family_and_wrong_size_are_detected(golden):
    cases = {path.stem: golden.read_case(path) for path in CASES}
    dit, adm = architecture_of(cases["dit_unconditional"]), architecture_of(cases["adm_unconditional"])
    assert suggest_flags(listed(cases["adm_unconditional"]), dit)["model_type"] == "adm"
    assert suggest_flags(listed(cases["dit_unconditional"]), adm) == {"model_type": "DiT-Golden/2"}
    assert suggest_flags(guided(), adm) == {"model_type": ORIGIN_ADM, "attn_resolutions": (2,)}
    assert suggest_flags(listed(cases["adm_unconditional"]), adm._replace(latent_size=16)) == {"latent_size": 8}
    larger = adm._replace(latent_size=16, options=dataclasses.replace(adm.options, nf=64, label_dim=2))
    assert suggest_flags(listed(cases["adm_unconditional"]), larger) == {"latent_size": 8, "nf": 32, "label_dim": 0}


@pytest.mark.parametrize(
    "values",
    [
        {"resamp_with_conv": False},
        {"resamp_with_conv": False, "ch_mult": (1, 1, 2), "num_res_blocks": 2, "attn_resolutions": (1, 4)},
        {"resblock_updown": True, "ch_mult": (1, 1, 2), "num_res_blocks": 3, "attn_resolutions": (1, 2)},
        {"ch_mult": (2,), "num_res_blocks": 3, "attn_resolutions": ()},
        {"num_classes": 10, "label_dropout": 0.1, "use_scale_shift_norm": False},
    ],
)
def test_guided_networks_of_other_shapes(values):
    found = recognise(guided(**values))
    rows = found.pop("label_rows")
    assert rows == values.get("num_classes", -1) + 1
    expected = {"num_res_blocks": 1, "nf": 32} | {k: v for k, v in values.items() if k in found}
    assert found | expected == found
    wrong = Architecture(ORIGIN_ADM, 8, GuidedUNetOptions(nf=32, ch_mult=(1, 2), attn_resolutions=(), num_res_blocks=1))
    suggested = suggest_flags(guided(**values), wrong)
    with torch.device("meta"):
        fitting = build_network(ORIGIN_ADM, 8, dataclasses.replace(wrong.options, **suggested)).state_dict()
    assert not any(find_mismatch(fitting, guided(**values)))


@pytest.mark.parametrize(
    ("rows", "given", "suggested"),
    [
        (11, {}, {"num_classes": 10, "label_dropout": 0.1}),
        (1001, {"num_classes": 1000}, {"label_dropout": 0.1}),
        (1000, {}, {"num_classes": 1000}),
        (8, {"num_classes": 9, "label_dropout": 0.2}, {"num_classes": 7}),
        (8, {"num_classes": 7}, {"label_dropout": 0.1}),
        (1, {"num_classes": 10, "label_dropout": 0.1}, {"num_classes": 1, "label_dropout": 0.0}),
    ],
)
def test_classes_are_inferred_from_the_rows_of_the_label_table(rows, given, suggested):
    kind = NETWORKS["DiT-Mi/2"].options
    with torch.device("meta"):
        weights = build_network("DiT-Mi/2", 8, kind(num_classes=rows)).state_dict()
    assert suggest_flags(weights, Architecture("DiT-Mi/2", 8, kind(**given))) == suggested


def test_tensors_that_are_not_a_network():
    assert recognise({}) == {}
    assert recognise({"a.weight": torch.empty(2)}) == {}
    for mark in ("x_embedder.proj.weight", "map_layer0.weight", "time_embed.0.weight"):
        assert recognise({mark: torch.empty(8, 2)}) == {}  # part of a network


def test_a_mismatch_lists_at_most_ten_names_of_each_kind(golden):
    case = golden.read_case(next(path for path in CASES if path.stem == "guided_diffusion_unconditional"))
    architecture = architecture_of(case)
    wrong = architecture._replace(options=dataclasses.replace(architecture.options, ch_mult=(2, 2, 2)))
    with pytest.raises(UsageError) as raised:
        load_weights(build_network(*wrong), listed(case), "file.pth", wrong)
    message = str(raised.value)
    missing, unexpected, misshapen, advice = message.split("; ", 1)[1].split("; ")
    mismatch = find_mismatch(build_network(*wrong).state_dict(), listed(case))
    assert missing == "missing: " + ", ".join(mismatch.missing[:10]) + f" and {len(mismatch.missing) - 10} more"
    assert unexpected.startswith("unexpected: ")
    assert unexpected.count(",") <= 9
    assert misshapen.count("in the network)") == 10
    assert "(32x4x3x3 in the file, 64x4x3x3 in the network)" in misshapen
    assert advice == "the file would fit with --ch_mult 1 2"


def test_no_suggestion_if_no_flag_explains_the_mismatch():
    architecture = Architecture("DiT-Mi/2", 8, NETWORKS["DiT-Mi/2"].options())
    network = build_network(*architecture)
    weights = dict(network.state_dict())
    weights.pop("blocks.3.attn.qkv.bias")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UsageError, match=r"missing: blocks\.3\.attn\.qkv\.bias; no flags were found"):
        load_weights(network, weights, "file.pth", architecture)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(UsageError, match=r"only a label-map embedding.*model_<epoch>\.pth"):
        load_weights(network, {"channel_mapper.weight": torch.zeros(4, 19, 1, 1)}, "file.pth", architecture)


def test_positions_of_another_grid_are_replaced_with_a_note(capsys):
    kind = NETWORKS["DiT-Mi/2"].options
    small, large = (Architecture("DiT-Mi/2", size, kind()) for size in (4, 8))
    source, target = build_network(*small), build_network(*large)
    for parameter in source.parameters():
        parameter.data.normal_()
    own = target.pos_embed.clone()
    load_weights(target, source.state_dict(), "file.pth", large)
    assert "position table recomputed" in capsys.readouterr().err
    assert torch.equal(target.pos_embed, own)
    assert torch.equal(target.final_layer.linear.weight, source.final_layer.linear.weight)
    load_weights(build_network(*small), source.state_dict(), "file.pth", small)
    assert capsys.readouterr().err == ""


def test_the_inputs_of_flow_maps_are_inferred():
    kind = NETWORKS["DiT-Mi/2"].options
    flow_map = Architecture("DiT-Mi/2", 8, kind(until_embedding="interval", guidance_embedding=True))
    with torch.device("meta"):
        weights = build_network(*flow_map).state_dict()
    suggested = suggest_flags(weights, Architecture("DiT-Mi/2", 8, kind()))
    assert suggested == {"until_embedding": "interval", "guidance_embedding": True}
