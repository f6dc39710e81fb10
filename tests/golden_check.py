#!/usr/bin/env python
"""Check networks against golden cases: `python tests/golden_check.py FILE...`.

Each network is built from its case's header and filled with weights by tests/golden/fill_weights.py. For each file, prints
the largest absolute errors of the velocity, guided velocity and samples, and of the average velocity if there is one. Cases are
LFM's networks, and those of other projects (checkpoints/projects), whose names and order are checked too.

Exit codes:
- 0: all errors are within 1e-5 (velocities), 2e-5 (guided ones, or more for large scales) and 1e-3 (samples).
- 1: an error is larger, or a state dict has different names, shapes or order.
- 2: a file is not a golden case.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoints.projects.registry import PROJECTS  # noqa: E402
from flow.guidance import GuidanceOptions, GuidedVelocity  # noqa: E402
from flow.solvers import SolverOptions, solve  # noqa: E402
from models.conditions import Condition  # noqa: E402
from models.dit import DiT, DiTOptions  # noqa: E402
from models.registry import NETWORKS, NetworkOptions, build_network, published_options  # noqa: E402
from options import UsageError  # noqa: E402

LIMITS = {
    "velocity": 1e-5,
    "velocity_cfg": 2e-5,
    "average_velocity": 1e-5,
    "sample_dopri5": 1e-3,
    "sample_1": 1e-3,
    "sample_2": 1e-3,
}
GUIDED_LIMIT = 5e-6  # per unit of 2 scale - 1, where that is above LIMITS
GOOD, DIFFERS, NOT_A_CASE = 0, 1, 2  # exit codes
# Other projects' names of options: our name, and our value for theirs.
SPELLINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "use_qknorm": ("qk_norm", bool),
    "use_swiglu": ("mlp", {True: "swiglu", False: "gelu"}.__getitem__),
    "use_rope": ("rope", bool),
    "use_rmsnorm": ("norm", {True: "rms_affine", False: "layer"}.__getitem__),
    "wo_shift": ("adaln_shift", lambda value: not value),
    "use_pos_embed": ("pos_embed", bool),
}


class GoldenCase(NamedTuple):
    """A golden case.

    Attributes:
        arguments: LFM's arguments for the network.
        weights: names and shapes of the state dict's entries, in order.
        constant_weights: names of entries that keep the values given by the constructor.
        cfg_scale: guidance scale, or None.
        tensors: inputs and expected outputs.
    """

    arguments: dict[str, Any]
    weights: list[tuple[str, list[int]]]
    constant_weights: set[str]
    cfg_scale: float | None
    tensors: dict[str, torch.Tensor]


def read_case(path: str | Path) -> GoldenCase:
    """Read a golden case.

    Raises:
        UsageError: the file cannot be read or lacks an entry.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scale = None if header["cfg_scale"] == "None" else float(header["cfg_scale"])
        weights, constant = json.loads(header["weights"]), set(json.loads(header["constant_weights"]))
        case = GoldenCase(json.loads(header["arguments"]), [(n, list(s)) for n, s in weights], constant, scale, tensors)
        for name in ("in.x", "in.t", "out.velocity"):
            tensors[name]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UsageError(f"cannot be read: {error}") from error
    except KeyError as error:
        raise UsageError(f"is not a golden case: it has no {error}") from error
    return case


def build_case(case: GoldenCase) -> nn.Module:
    """Build a case's network and fill in its weights.

    Raises:
        ValueError: the state dict differs from LFM's in names, shapes or order.
    """
    arguments = case.arguments
    side, kind = arguments["image_size"] // arguments["f"], arguments["model_type"]
    if kind in PROJECTS:
        network: nn.Module = build_network(f"DiT/{arguments['patch_size']}", side, project_options(arguments))
    elif kind == "DiT":
        sizes = [arguments[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")]
        network = DiT(side, *sizes, _options(DiTOptions, arguments))
    else:
        name = NetworkOptions(kind, arguments.get("use_origin_adm", False)).resolve()
        network = build_network(name, side, _options(NETWORKS[name].options, arguments))
    own = network.state_dict()
    names = PROJECTS[kind].names(own) if kind in PROJECTS else {name: name for name in own}
    found = [(name, list(own[mine].shape)) for name, mine in names.items()]
    if found != case.weights:
        ours, theirs = next(
            ((a, b) for a, b in zip(found, case.weights, strict=False) if a != b), (found[-1], case.weights[-1])
        )
        raise ValueError(
            f"expected a state dict of {len(case.weights)} entries, but found {len(found)}; first difference: "
            f"expected {theirs}, but found {ours}"
        )
    for name, mine in names.items():
        if name not in case.constant_weights:
            own[mine].copy_(torch.from_numpy(_fill_weight(name, tuple(own[mine].shape))))
    return network.eval()


def project_options(arguments: dict[str, Any]) -> DiTOptions:
    """The options of DiT for the arguments of a case of another project, under that project's names."""
    kind = arguments["model_type"]
    given = {field.name: arguments[field.name] for field in dataclasses.fields(DiTOptions) if field.name in arguments}
    width, depth, heads = (arguments[name] for name in ("hidden_size", "depth", "num_heads"))
    values = published_options(kind) | {"learn_sigma": False} | given
    values |= {ours: value(arguments[name]) for name, (ours, value) in SPELLINGS.items() if name in arguments}
    if kind == "DiTDH":
        (width, head_width), (depth, head_depth), (heads, head_heads) = width, depth, heads
        values |= {"ddt_blocks": head_depth, "ddt_width": head_width, "ddt_heads": head_heads}
        depth += head_depth
    if widths := arguments.get("repa_dims"):
        values |= {"align_features": 0.5, "align_width": widths[0], "unused_projectors": tuple(widths[1:])}
        values |= {"align_hidden": arguments["projector_dim"], "tap_block": arguments["repa_depth"]}
    return DiTOptions(**values | {"model_width": width, "model_depth": depth, "model_heads": heads})


@torch.no_grad()
def check_case(path: str | Path, device: torch.device | str = "cpu") -> dict[str, float]:
    """Largest absolute error of each output in the case, computed on `device`; infinity if the shapes differ."""
    case = read_case(path)
    network, tensors = build_case(case).to(device), {name: value.to(device) for name, value in case.tensors.items()}
    condition = Condition(tensors["in.y"].long() if "in.y" in tensors else None)
    results = {"velocity": network(tensors["in.t"], tensors["in.x"], condition)}
    if "out.velocity_cfg" in tensors and case.cfg_scale is not None:
        null = Condition(torch.full_like(tensors["in.y"].long(), network.options.classes))  # type: ignore[union-attr]
        guided = GuidedVelocity(network, condition, null, GuidanceOptions(case.cfg_scale))
        results["velocity_cfg"] = guided(tensors["in.t_cfg"].flatten()[0], tensors["in.x"])
    if "out.sample_dopri5" in tensors:
        plain = GuidedVelocity(network, condition, condition, GuidanceOptions())
        results["sample_dopri5"] = solve(plain, tensors["in.x"], SolverOptions(method="torchdiffeq_dopri5")).x
    if "out.average_velocity" in tensors:
        results["average_velocity"] = network(tensors["in.t"], tensors["in.x"], condition, until=tensors["in.r"])
        plain = GuidedVelocity(network, condition, condition, GuidanceOptions())
        for steps in (1, 2):
            results[f"sample_{steps}"] = solve(plain, tensors["in.x"], SolverOptions("flow_map", num_steps=steps)).x
    return {name: _error(value, tensors[f"out.{name}"]) for name, value in results.items()}


def limit(name: str, cfg_scale: float | None) -> float:
    """The largest allowed error of an output. Guidance with a large scale amplifies rounding errors."""
    amplified = GUIDED_LIMIT * (2 * cfg_scale - 1) if name == "velocity_cfg" and cfg_scale is not None else 0.0
    return max(LIMITS[name], amplified)


def main(paths: list[str]) -> int:
    """Check all files and print a line for each. Returns the exit code."""
    if not paths:
        print("error: expected golden cases: python tests/golden_check.py FILE...", file=sys.stderr)
        return NOT_A_CASE
    codes = set()
    for path in paths:
        code, text = _check_file(path)
        codes.add(code)
        print(f"{'ok  ' if code == GOOD else 'FAIL'} {Path(path).stem}: {text}", flush=True)
    return max(codes)


def _check_file(path: str) -> tuple[int, str]:
    try:
        errors = check_case(path)
    except UsageError as error:
        return NOT_A_CASE, str(error)
    except (KeyError, ValueError, RuntimeError) as error:
        return DIFFERS, f"{type(error).__name__}: {error}"
    scale = read_case(path).cfg_scale
    good = all(error <= limit(name, scale) for name, error in errors.items())
    return GOOD if good else DIFFERS, ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return (value - expected).abs().max().item() if value.shape == expected.shape else float("inf")


def _options(options_class: type, arguments: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(options_class)}
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items() if k in names})


def _fill_weight(name: str, shape: tuple[int, ...]) -> Any:
    spec = importlib.util.spec_from_file_location("fill_weights", ROOT / "tests" / "golden" / "fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill_weight(name, shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
