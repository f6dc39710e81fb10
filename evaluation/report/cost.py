"""The cost of runs: time, network evaluations, and an estimate of the energy."""

from collections.abc import Sequence

from evaluation.report.markup import card, duration, table
from evaluation.report.run_record import RunRecord, is_number

__all__ = ["costs"]

WATTS_PER_THREAD = 10.0  # of a server's CPU under load, with memory and power supply
WATTS_PER_ACCELERATOR = 500.0  # under load, with its share of the host
IMAGES = "number of training images"
JOULES_PER_WH = 3600.0


def costs(runs: Sequence[RunRecord], watts: float) -> str:
    """A table with one row per quantity.

    Args:
        runs: the runs.
        watts: power of the machine; 0: assume one.
    """
    columns = [_costs_of(run, watts) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "not recorded") for column in columns)] for name in names]
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "This run"]
    note = (
        '<p class="soft">Time counts training with its validations and sample grids, not the encoding of the images. '
        "A training image costs one evaluation forward and backward in flow matching; few-step objectives need more. "
        "Energy is an estimate, the time multiplied by the power in the table. It ignores idle machines and cooling.</p>"
    )
    return card(note + table(head, rows, stacked=True))


def _costs_of(run: RunRecord, watts: float) -> dict[str, str]:
    options, found = run.options, dict[str, str]()
    seconds = next((value for _, value in reversed(run.series("train", "seconds"))), None)
    batch, processes = options.get("batch_size"), options.get("processes", 1)
    machine = options.get("machine")
    found["Machine"] = str(machine) if machine else "not recorded"
    power, source = (watts, "given by --watts") if watts else _assumed_power(run)
    if seconds is not None:
        found["Training time"] = duration(seconds)
    if is_number(batch) and is_number(processes):
        images = run.last_step * batch * processes
        found["Training images seen"] = f"{images:,}"
        count = options.get(IMAGES)
        if is_number(count) and count > 0:
            found["Training images seen"] += f" ({images / count:.3g} epochs of {count:,})"
    sampling = 0.0
    results = {score.source: score.result for score in run.scores}.values()
    evaluations = [
        result["network_evaluations"] * result["samples"]
        for result in results
        if is_number(result.get("network_evaluations")) and is_number(result.get("samples"))
    ]
    if evaluations:
        found["Evaluations of scored samples"] = f"{sum(evaluations):,.0f}"
    times = [result["seconds"] for result in results if is_number(result.get("seconds"))]
    if times:
        sampling = sum(times)
        found["Time of scored samples"] = duration(sampling)
    if seconds is not None or times:
        energy = power * ((seconds or 0.0) + sampling) / JOULES_PER_WH
        found["Power, assumed" if not watts else "Power"] = f"{power:,.0f} W ({source})"
        found["Energy, estimated"] = f"{energy / 1000:.3g} kWh" if energy >= 1000 else f"{energy:.3g} Wh"
    return found


def _assumed_power(run: RunRecord) -> tuple[float, str]:
    """Power in watts, and the assumption behind it."""
    options = run.options
    processes = options["processes"] if is_number(options.get("processes")) else 1
    machine, device = str(options.get("machine") or ""), str(options.get("device") or "")
    if machine and not machine.startswith("cpu"):
        return WATTS_PER_ACCELERATOR * processes, f"{WATTS_PER_ACCELERATOR:.0f} W for each process's accelerator"
    threads = options["threads"] if is_number(options.get("threads")) else 1
    doubt = "" if machine or device == "cpu" else "; if it ran on an accelerator, give --watts"
    return WATTS_PER_THREAD * threads * processes, f"{WATTS_PER_THREAD:.0f} W for each thread of the CPU{doubt}"
