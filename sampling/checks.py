"""Checks, before the work, that a network has what solvers and guidance need, and was trained for it."""

from checkpoints.header import Header
from flow.flow_maps.consistency import ConsistencyOptions
from flow.flow_maps.improved_mean_flow import ImprovedMeanFlowOptions
from flow.guidance import GuidanceOptions
from flow.objectives import OBJECTIVES
from flow.solvers import SOLVERS, SolverOptions
from models.conditions import DenseInput
from models.family import FamilyOptions
from options import UsageError
from runtime.messages import warn

__all__ = ["check_average_velocity", "check_guidance", "check_network", "warn_of_untrained"]


def check_guidance(label_dropout: float, dense: DenseInput | None, scale: float) -> None:
    """Check that the network supports the guidance scale: guidance needs a null class or a null map.

    Args:
        label_dropout: probability of dropping a label in training.
        dense: the network's dense condition, if any.
        scale: the guidance scale; 1 means no guidance.

    Raises:
        UsageError: the scale is not 1, and the network was trained with neither.
    """
    if scale != 1 and not label_dropout and not (dense and dense.dropout):
        how = "--label_dropout" if dense is None else "--label_dropout or --condition_dropout"
        raise UsageError(
            f"--cfg_scale {scale} needs a network with a null class (trained with {how} above 0); "
            "this one has none: use --cfg_scale 1"
        )


def check_network(network: FamilyOptions, solver: SolverOptions, guidance: GuidanceOptions) -> None:
    """Check that the network has the inputs and heads that the solver and guidance need.

    Raises:
        UsageError: it lacks the auxiliary head of internal guidance, the input of embedded guidance, or average velocities; or
            internal guidance was asked for with average velocities.
    """
    check_average_velocity(network, solver)
    internal, embedded = guidance.internal_guidance, guidance.embedded_guidance
    if internal != 1 and not network.has_auxiliary_velocity:
        raise UsageError(
            f"--internal_guidance {internal} needs a network with an auxiliary velocity head (trained with --tap_block K "
            "--auxiliary_velocity 0.5, for example); this one has none: use --internal_guidance 1"
        )
    if internal != 1 and SOLVERS[solver.method].averages:
        raise UsageError(
            f"--internal_guidance {internal} needs a solver that uses velocities, because the auxiliary head does not predict "
            f"average velocities: use --internal_guidance 1 with --method {solver.method}"
        )
    if embedded != 1 and not network.takes_guidance:
        raise UsageError(
            f"--embedded_guidance {embedded} needs a network that takes a guidance scale as an input (trained with "
            "--guidance_embedding); this one does not: use --embedded_guidance 1, or --cfg_scale"
        )


def check_average_velocity(network: FamilyOptions, solver: SolverOptions, subject: str = "this one") -> None:
    """Check that the network predicts average velocities if the solver needs them.

    Args:
        network: the network's options.
        solver: the solver.
        subject: names the network in the message.

    Raises:
        UsageError: it does not.
    """
    if SOLVERS[solver.method].averages and not network.takes_until:
        raise UsageError(
            f"--method {solver.method} needs a network that predicts average velocities (trained with --until_embedding "
            f"interval or decoupled), but {subject} predicts velocities only: choose another --method, such as dpm"
        )


def warn_of_untrained(header: Header, solver: SolverOptions, guidance: GuidanceOptions) -> None:
    """Warn if the solver or guidance uses what the network can compute, but the objective did not train.

    Args:
        header: the checkpoint's, or the run's. A file converted from other projects' does not record its objective.
        solver: the solver.
        guidance: the guidance.
    """
    path, method = header.path, solver.method
    averages = SOLVERS[method].averages
    trained = f"this network's --objective {header.objective} trains"
    if averages and not OBJECTIVES[header.objective].trains_averages and header.published_file is None:
        takers = ", ".join(name for name, family in OBJECTIVES.items() if family.trains_averages)
        warn(
            f"{trained} velocities only, but --method {method} uses average velocities: choose another --method, or train the "
            f"network with one of the objectives {takers}"
        )
    if isinstance(path, ConsistencyOptions):
        advice = "use --method flow_map --num_steps 1, or more steps with --reinject_noise 1"
        if averages and solver.steps > 1 and solver.reinject_noise < 1:
            warn(f"{trained} steps that end at data only, but some of these {solver.steps} steps end before: {advice}")
        elif not averages and not path.flow_share:
            warn(f"{trained} steps that end at data only, but --method {method} integrates the velocity: {advice}")
    if isinstance(path, ImprovedMeanFlowOptions) and guidance.embedded_guidance > path.largest_guidance:
        warn(
            f"{trained} guidance scales up to --largest_guidance {path.largest_guidance:g}, but --embedded_guidance "
            f"{guidance.embedded_guidance:g} is larger"
        )
