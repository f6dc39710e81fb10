#!/usr/bin/env python
"""Check networks against golden cases: `python tests/golden_check.py FILE...`.

A case's header alone builds the network; its weights are filled by the rule of tests/golden/fill_weights.py. Prints the
largest absolute error of velocity, guided velocity and dopri5 sample per file; exits with 1 past 1e-5, 2e-5 or 1e-3.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flow.guidance import guided_velocity  # noqa: E402
from flow.solvers import SolverOptions, solve  # noqa: E402
from models.conditions import Condition  # noqa: E402
from models.dit import DiT, DiTOptions  # noqa: E402
from models.registry import NETWORKS, NetworkOptions, build_network  # noqa: E402

LIMITS = {"velocity": 1e-5, "velocity_cfg": 2e-5, "sample_dopri5": 1e-3}


class GoldenCase(NamedTuple):
    """A case's arguments, its weights' names and shapes in order, the constructed ones, guidance scale and tensors."""

    arguments: dict[str, Any]
    weights: list[tuple[str, list[int]]]
    constant_weights: set[str]
    cfg_scale: float | None
    tensors: dict[str, torch.Tensor]


def read_case(path: str | Path) -> GoldenCase:
    """Read a golden case."""
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scale = None if header["cfg_scale"] == "None" else float(header["cfg_scale"])
    weights, constant = json.loads(header["weights"]), set(json.loads(header["constant_weights"]))
    return GoldenCase(json.loads(header["arguments"]), weights, constant, scale, tensors)


def build_case(case: GoldenCase) -> nn.Module:
    """The network of a case with its weights filled in.

    Raises:
        ValueError: names, shapes or order of the state dict are not the published ones.
    """
    arguments = case.arguments
    side = arguments["image_size"] // arguments["f"]
    if arguments["model_type"] == "DiT":
        sizes = [arguments[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")]
        network: nn.Module = DiT(side, *sizes, _options(DiTOptions, arguments))
    else:
        name = NetworkOptions(arguments["model_type"], arguments["use_origin_adm"]).resolve()
        network = build_network(name, side, _options(NETWORKS[name].options, arguments))
    own = {name: list(value.shape) for name, value in network.state_dict().items()}
    if list(own.items()) != [tuple(entry) for entry in case.weights]:
        differing = [pair for pair in zip(own.items(), case.weights, strict=False) if list(pair[0]) != list(pair[1])]
        raise ValueError(
            f"the state dict differs: {len(own)} against {len(case.weights)} entries, first {differing[:1]}"
        )
    for name, value in network.state_dict().items():
        if name not in case.constant_weights:
            value.copy_(torch.from_numpy(_fill_weight(name, tuple(value.shape))))
    return network.eval()


@torch.no_grad()
def check_case(path: str | Path) -> dict[str, float]:
    """Largest absolute error of each output that the case has."""
    case = read_case(path)
    network, tensors = build_case(case), case.tensors
    condition = Condition(tensors.get("in.y"))
    results = {"velocity": network(tensors["in.t"], tensors["in.x"], condition)}
    if "out.velocity_cfg" in tensors and case.cfg_scale is not None:
        null = Condition(torch.full_like(tensors["in.y"], network.options.classes))  # type: ignore[union-attr]
        guided = guided_velocity(network, condition, null, case.cfg_scale)
        results["velocity_cfg"] = guided(tensors["in.t_cfg"][0], tensors["in.x"])
    if "out.sample_dopri5" in tensors:
        plain = guided_velocity(network, condition, condition, 1.0)
        results["sample_dopri5"] = solve(plain, tensors["in.x"], SolverOptions(method="dopri5")).x
    return {name: (value - tensors[f"out.{name}"]).abs().max().item() for name, value in results.items()}


def main(paths: list[str]) -> int:
    """Check all files and print a line for each."""
    failed = False
    for path in paths:
        errors = check_case(path)
        good = all(error <= LIMITS[name] for name, error in errors.items())
        failed |= not good
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"{'ok  ' if good else 'FAIL'} {Path(path).stem}: {listed}")
    return int(failed)


def _options(kind: type, arguments: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items() if k in names})


def _fill_weight(name: str, shape: tuple[int, ...]) -> Any:
    spec = importlib.util.spec_from_file_location("fill_weights", ROOT / "tests" / "golden" / "fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill_weight(name, shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
