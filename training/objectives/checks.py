"""Checks that an objective's options, the network and the way of training fit together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flow.flow_maps.alpha_flow import AlphaFlowOptions
from flow.flow_maps.consistency import ConsistencyOptions
from flow.flow_maps.options import ALWAYS, FewStepOptions
from flow.flow_maps.split_mean_flow import SplitMeanFlowOptions
from flow.losses.options import check_losses
from flow.objectives import OBJECTIVES, objective_groups
from flow.paths import PathOptions
from flow.times import with_time_shift
from models.conditions import DenseInput
from models.family import FamilyOptions
from models.flow_maps import FlowMapOptions
from models.registry import Architecture
from options import UsageError
from runtime.messages import fact, note
from runtime.precision import Machine

__all__ = ["settle_options"]

COARSE_ALPHA = 0.05  # below it, the rounding of bfloat16 exceeds the difference that alpha-Flow divides by alpha


def settle_options(
    name: str,
    options: PathOptions,
    architecture: Architecture,
    machine: Machine,
    given: Mapping[str, Any],
    *,
    global_batch: int,
    fsdp: bool,
    auxiliary: bool,
) -> PathOptions:
    """The objective's options, checked, with the time shift for the latents if it is `auto`.

    Args:
        name: key of OBJECTIVES.
        options: the objective's.
        architecture: of the network.
        machine: its precision causes a note if it is too low for the objective.
        given: values of the options that the user gave, by name.
        global_batch: samples per step.
        fsdp: whether the weights are sharded.
        auxiliary: whether there are auxiliary losses or routed tokens.

    Raises:
        UsageError: they do not fit the network, the data or the way of training.
    """
    network, size = architecture.options, architecture.latent_size
    _check_other_objectives(name, given)
    _check_training(name, network, fsdp, auxiliary)
    if isinstance(options, FewStepOptions):
        _check_inputs(name, options, network, architecture.dense)
    elif network.takes_guidance or _has_variance(network):
        _refuse_untrained(name, network)
    if isinstance(options, AlphaFlowOptions) and options.alpha_min < COARSE_ALPHA and machine.precision != "fp32":
        note(
            f"alpha_flow divides differences of velocities by alpha, and --alpha_min {options.alpha_min:g} magnifies the "
            f"rounding of {machine.precision}: --precision fp32 or --alpha_min {COARSE_ALPHA:g} is more precise"
        )
    if isinstance(options, SplitMeanFlowOptions) and options.adaptive_power:
        note(
            "split_mean_flow compares the network with itself, and adaptive weights let these small errors outweigh the data: "
            "--adaptive_power 0 is safer"
        )
    channels = network.num_out_channels
    check_losses(options, channels, global_batch, dense=architecture.dense is not None)
    settled = with_time_shift(options, channels * size**2)
    if settled != options:
        fact("time shift", f"{settled.training_time_shift:.4g} (auto, for latents of {channels * size**2:,} numbers)")
    return settled


def _check_training(name: str, network: FamilyOptions, fsdp: bool, auxiliary: bool) -> None:
    """Check that the network and the way of training allow what the objective does in a step."""
    family = OBJECTIVES[name]
    if family.trains_averages and not network.takes_until:
        raise UsageError(
            f"--objective {name} trains average velocities over intervals of times, so the network needs the interval's end: "
            "choose a DiT with --until_embedding interval or decoupled"
        )
    if family.differentiates and fsdp:
        raise UsageError(
            f"--objective {name} differentiates the network in forward mode, which needs all weights in each process, but "
            "--fsdp shards them: leave out --fsdp, or choose --objective alpha_flow, shortcut or split_mean_flow"
        )
    if family.needs_pairs and auxiliary:
        raise UsageError(
            f"--objective {name} trains on pairs of noise and samples, for which auxiliary losses and token routing are not "
            "defined: leave out the options of --tap_block and --route_rate"
        )
    if family.trains_averages and auxiliary:
        raise UsageError(
            f"--objective {name} evaluates the network several times in a step, but auxiliary losses and token routing need a "
            "single evaluation: leave out the options of --tap_block and --route_rate"
        )


def _check_other_objectives(name: str, given: Mapping[str, Any]) -> None:
    """Check that no option of another objective was given."""
    own = {field.name for field in fields(OBJECTIVES[name].options)}
    others = {field.name: field for group in objective_groups() for field in fields(group) if field.name not in own}
    for field in others.values():
        if given.get(field.name, field.default) != field.default:
            takers = [
                key for key, family in OBJECTIVES.items() if field.name in {f.name for f in fields(family.options)}
            ]
            raise UsageError(
                f"--{field.name} has no effect on --objective {name}: leave it out, or choose --objective "
                f"{' or '.join(takers)}"
            )


def _check_inputs(name: str, options: FewStepOptions, network: FamilyOptions, dense: DenseInput | None) -> None:
    """Check that the network has the inputs and outputs that the options need, and no others that stay untrained."""
    if options.flow_share == 0 and OBJECTIVES[name].needs_flow_steps:
        raise UsageError(
            f"--flow_share 0: all other steps of --objective {name} compare the network with itself, so it would never learn "
            "from the data: choose a share above 0"
        )
    if options.guides and isinstance(options, ConsistencyOptions):
        raise UsageError(
            f"--objective {name} computes its targets without the velocity that --target_omega and --target_kappa guide: leave "
            "them out, or choose another objective"
        )
    if tuple(options.target_interval) != ALWAYS and not options.guides:
        raise UsageError(
            "--target_interval has no effect without guidance inside the target: leave it out, or choose --target_omega or "
            "--target_kappa"
        )
    if options.guides and not network.label_dropout and not (dense and dense.dropout):
        how = "--label_dropout" if dense is None else "--label_dropout or --condition_dropout"
        raise UsageError(f"guidance inside the target of --objective {name} needs a null condition: set {how} above 0")
    if options.takes_guidance and not network.takes_guidance:
        raise UsageError("--largest_guidance gives the network a guidance scale: add --guidance_embedding")
    if options.learns_variance and not _has_variance(network):
        raise UsageError(
            f"--objective {name} weights its loss by the network's log-variance: add --log_variance_head, or "
            "--no-learned_variance for constant weights"
        )
    if (network.takes_guidance and not options.takes_guidance) or (
        _has_variance(network) and not options.learns_variance
    ):
        _refuse_untrained(name, network)


def _has_variance(network: FamilyOptions) -> bool:
    return isinstance(network, FlowMapOptions) and network.log_variance_head


def _refuse_untrained(name: str, network: FamilyOptions) -> None:
    """Raise UsageError: the network has weights that the objective does not train."""
    part, trainer = "log_variance_head", "choose --objective decoupled_mean_flow"
    if network.takes_guidance:
        chosen = name == "improved_mean_flow"
        part = "guidance_embedding"
        trainer = "add --largest_guidance 8" if chosen else "choose --objective improved_mean_flow --largest_guidance 8"
    raise UsageError(f"--objective {name} does not train --{part} with these options: leave it out, or {trainer}")
