"""Names of weights without wrappers' prefixes, matching with a network's names, and values that are not finite."""

import math

import pytest
import torch

from options import UsageError
from runtime.weights import check_finite, find_mismatch, list_names, match_names, split_averages

NAMES = ("stem.weight", "blocks.0.bias", "blocks.1.bias")


def numbered(prefix="", start=0, names=NAMES):
    return {prefix + name: torch.tensor([float(start + i)]) for i, name in enumerate(names)}


def values(weights):
    return {name: value.item() for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "ema.",
        "first_stage_model.",
        "module._orig_mod.",
        "_orig_mod.module.ema.",
        "ema.module.module.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    ],
)
def test_wrappers_are_removed_in_any_nesting(prefix):
    assert values(split_averages(numbered(prefix), "file")[0]) == values(numbered())
    assert values(match_names(numbered(prefix), numbered())) == values(numbered())


def test_wrapped_parts_are_read_too():
    stored = {name.replace("blocks.", "blocks._orig_mod."): value for name, value in numbered("module.").items()}
    assert "module.blocks._orig_mod.0.bias" in stored
    assert values(split_averages(stored, "file")[0]) == values(numbered())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module."])
def test_ema_weights_are_separated_from_raw_ones(prefix):
    raw, averages = split_averages(numbered(prefix) | numbered("ema.module.", 10), "file")
    assert values(raw) == values(numbered())
    assert values(averages) == values(numbered(start=10))


def test_two_entries_of_one_name_are_refused():
    with pytest.raises(
        UsageError, match=r"^model.pth: some names appear both with and without .* such as module.stem.w"
    ):
        split_averages(numbered() | numbered("module."), "model.pth")


@pytest.mark.parametrize("prefix", ["model.", "state.net.", "model.module."])
def test_a_prefix_of_all_names_is_cut(prefix):
    assert values(match_names(numbered(prefix), numbered())) == values(numbered())


def test_a_prefix_of_all_names_but_the_known_ones_is_cut():
    """As for a label-map embedding, which LFM stores in a file of its own."""
    stored = numbered(names=NAMES[:1]) | numbered("model.", 1, NAMES[1:])
    assert values(match_names(stored, numbered())) == values(numbered())


def test_a_networks_own_names_are_kept():
    own = numbered("module.") | numbered("ema.net.")
    assert match_names(own, own) is own
    plain = {name.removeprefix("module."): value for name, value in numbered("module.").items()}
    assert list(match_names(plain, numbered("module."))) == list(numbered("module."))


@pytest.mark.parametrize(
    "stored",
    [
        numbered(names=("blocks.2.bias", "blocks.3.bias")),  # a shared prefix that is not a wrapper's
        numbered(names=("other.weight",)),
        numbered() | numbered("extra."),  # ambiguous
        numbered() | {"module.stem.weight": torch.zeros(1)},
    ],
)
def test_other_names_are_left_alone(stored):
    assert match_names(stored, numbered()) is stored


def test_mismatch_lists_names_and_shapes():
    mismatch = find_mismatch(
        numbered(), {"stem.weight": torch.zeros(2, 3), "blocks.0.bias": torch.zeros(1), "x": torch.zeros(())}
    )
    assert str(mismatch) == (
        "missing: blocks.1.bias; unexpected: x; wrong shape: stem.weight (2x3 in the file, 1 in the network)"
    )
    assert list_names(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value, dtype):
    bad = torch.zeros(3, 4)
    bad[1, 2] = bad[0, 0] = value
    with pytest.raises(UsageError, match=r"^model.pth has weights that are not finite .*: head.weight \(2 of 12\)\. "):
        check_finite({"stem": torch.ones(2), "head.weight": bad.to(dtype)}, "model.pth")


def test_large_values_and_integers_are_finite():
    check_finite(
        {"huge": torch.full((10,), 3e38), "half": torch.full((10,), 6e4).half(), "count": torch.arange(3)}, "x"
    )


def test_infinite_values_that_the_network_has_itself_are_accepted():
    mask = torch.full((2, 2), -math.inf).triu(1)
    check_finite({"mask": mask}, "x", own={"mask": mask})
    with pytest.raises(UsageError, match="mask"):
        check_finite({"mask": mask}, "x", own={"mask": torch.zeros(2, 2)})
