#!/usr/bin/env python
"""Check networks against golden cases: `python tests/golden_check.py FILE...`.

Each network is built from its case's header and filled with weights by tests/golden/fill_weights.py. For each file, prints
the largest absolute errors of the velocity, guided velocity and dopri5 sample.

Exit codes:
- 0: all errors are within 1e-5, 2e-5 and 1e-3, respectively.
- 1: an error is larger, or a state dict has different names, shapes or order.
- 2: a file is not a golden case.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flow.guidance import GuidanceOptions, GuidedVelocity  # noqa: E402
from flow.solvers import SolverOptions, solve  # noqa: E402
from models.conditions import Condition  # noqa: E402
from models.dit import DiT, DiTOptions  # noqa: E402
from models.registry import NETWORKS, NetworkOptions, build_network  # noqa: E402
from options import UsageError  # noqa: E402

LIMITS = {"velocity": 1e-5, "velocity_cfg": 2e-5, "sample_dopri5": 1e-3}
GOOD, DIFFERS, NOT_A_CASE = 0, 1, 2  # exit codes


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
    side = arguments["image_size"] // arguments["f"]
    if arguments["model_type"] == "DiT":
        sizes = [arguments[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")]
        network: nn.Module = DiT(side, *sizes, _options(DiTOptions, arguments))
    else:
        name = NetworkOptions(arguments["model_type"], arguments.get("use_origin_adm", False)).resolve()
        network = build_network(name, side, _options(NETWORKS[name].options, arguments))
    found = [(name, list(value.shape)) for name, value in network.state_dict().items()]
    if found != case.weights:
        ours, theirs = next(
            ((a, b) for a, b in zip(found, case.weights, strict=False) if a != b), (found[-1], case.weights[-1])
        )
        raise ValueError(
            f"expected a state dict of {len(case.weights)} entries, but found {len(found)}; first difference: "
            f"expected {theirs}, but found {ours}"
        )
    for name, value in network.state_dict().items():
        if name not in case.constant_weights:
            value.copy_(torch.from_numpy(_fill_weight(name, tuple(value.shape))))
    return network.eval()


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
    return {name: _error(value, tensors[f"out.{name}"]) for name, value in results.items()}


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
    good = all(error <= LIMITS[name] for name, error in errors.items())
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
