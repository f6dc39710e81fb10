"""Question: which solver, at how many evaluations? Plots every solver's FD against its evaluations of the velocity (NFE).

    python -m benchmarks.fd_against_nfe [--output docs/fd_against_nfe] [flags of test_flow_latent.py]

The network, guidance and noise come from run_test.sh's arguments file (--args_file chooses another). The reference is dopri5
at tolerance 1e-5.

1. Every setting generates the first --screened samples.
2. The finalists have at most 16 evaluations: the best three, plus the cheapest whose FD is at most 3 % above the
   reference's. They continue to --finalists samples and are timed in alternation with the reference.
3. The choice is the best finalist, provided its FD is at most 3 % above the reference's. If several are within 3 % of the
   best, the one with the fewest network evaluations is chosen.

The plot is written to OUTPUT.png. Results and sample features are stored in --keep, so that an interrupted run resumes and
further --evaluations can be added.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._samples import Bench, BenchmarkOptions, request_benchmark, varied
from benchmarks._timing import compare, markdown_table
from exits import exit_cleanly
from flow.grids import GRIDS
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SOLVERS, SolverOptions, solve
from models.conditions import Condition
from options import option
from runtime.files import write_json

REFERENCE = SolverOptions("dopri5", atol=1e-5, rtol=1e-5)
DUPLICATES = ("multistep", "torchdiffeq_dopri5")  # an alias of ab2, and a dopri5 whose samples depend on their batch
TOLERANCES = {
    "dopri5": (1e-1, 1e-2, 1e-3),
    "adaptive_heun": (1e-1, 1e-2),
    "bosh3": (1e-1, 1e-2),
    "dopri8": (1e-1,),
}
ON_GRIDS = ("euler", "heun", "ab2", "dpm")
SHIFTS = (0.5, 2.0)
FEW, CLOSE = 16, 1.03  # limits for a choice: evaluations, and FD relative to the reference's
HEADER = ["solver", "evaluations", "network evaluations", "FD", "relative to dopri5 at 1e-5", "seconds"]


@dataclass(frozen=True)
class FrontierOptions(BenchmarkOptions):
    """Benchmark."""

    output: str = option("docs/fd_against_nfe", "path of the PNG to write, without suffix")
    finalists: int = option(10000, "samples per finalist", minimum=16)
    timed: int = option(100, "samples per timing of a finalist; each is timed three times", minimum=1)
    evaluations: tuple[int, ...] = option((4, 8, 16, 32, 64), "NFE limits to try with fixed-step solvers", minimum=1)
    grid_evaluations: tuple[int, ...] = option((8,), "NFE limits to try with non-uniform time grids", minimum=1)


class Setting(NamedTuple):
    """A solver setting: one row of the table, one point on a line of the plot."""

    line: str
    name: str
    solver: SolverOptions


def settings_of(options: FrontierOptions, guidance: GuidanceOptions) -> list[Setting]:
    """All settings: the reference, fixed-step solvers at every NFE limit and on other time grids, and adaptive solvers."""
    found = [Setting("dopri5", "dopri5, 1e-05", REFERENCE)]
    for nfe in options.evaluations:
        for method in (name for name, kind in SOLVERS.items() if not kind.adaptive and name not in DUPLICATES):
            found += fixed(method, nfe, SolverOptions(method), guidance)
    for nfe in options.grid_evaluations:
        for method in ON_GRIDS:
            for grid in list(GRIDS)[1:]:
                found += fixed(f"{method}, {grid}", nfe, SolverOptions(method, time_grid=grid), guidance)
            for shift in SHIFTS:
                found += fixed(f"{method}, shift {shift:g}", nfe, SolverOptions(method, time_shift=shift), guidance)
    for method, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            solver = SolverOptions(method, atol=tolerance, rtol=tolerance)
            found.append(Setting(method, f"{method}, {tolerance:g}", solver))
    return list(dict.fromkeys(found))


def fixed(line: str, nfe: int, solver: SolverOptions, guidance: GuidanceOptions) -> list[Setting]:
    """The setting with the most steps within `nfe` evaluations; an empty list if a single step exceeds them."""
    trials = [replace(solver, num_steps=steps) for steps in range(1, nfe + 1)]
    within = [trial for trial in trials if evaluations_of(trial, guidance) <= nfe]
    return [Setting(line, f"{line}, {within[-1].num_steps} steps", within[-1])] if within else []


def evaluations_of(solver: SolverOptions, guidance: GuidanceOptions) -> int:
    """Evaluations that a fixed-step solver takes, counted in a trial run. Some start afresh at the interval's ends."""
    nothing, condition = torch.zeros(1, 1), Condition(torch.zeros(1))
    velocity = GuidedVelocity(lambda t, x, condition: x, condition, condition, guidance)
    return int(solve(velocity, nothing, solver, draw=lambda step: nothing).evaluations)


def measure(bench: Bench, setting: Setting, count: int) -> dict[str, Any]:
    """Sample a setting and the reference; return the setting's row of results."""
    samples = bench.sample(varied(bench.loaded, setting.solver), count)
    theirs = bench.sample(varied(bench.loaded, REFERENCE), count)
    fd, reference = bench.distance(samples.features), bench.distance(theirs.features)
    return {
        "line": setting.line,
        "name": setting.name,
        "solver": setting.solver,
        "samples": count,
        "fd": fd,
        "ratio": fd / reference,
        "ratio_error": bench.error_of_difference(samples, theirs) / reference,
        **samples.costs(),
    }


def cells_of(row: dict[str, Any]) -> list[str]:
    ratio = "1" if not row["ratio_error"] else f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
    costs = [f"{row['nfe']:.4g}", f"{row['network_evaluations']:.4g}"]
    return [row["name"], *costs, f"{row['fd']:.4f}", ratio, f"{row['seconds']:.1f}"]


def print_row(row: list[str]) -> None:
    print("| " + " | ".join(row) + " |", flush=True)


def finalists_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best three settings with few evaluations, and the cheapest of those close to the reference."""
    few = sorted((row for row in rows if row["nfe"] <= FEW), key=lambda row: row["fd"])
    cheap = [row for row in few if row["ratio"] <= CLOSE]
    return few[:3] + [row for row in sorted(cheap, key=cost)[:1] if row not in few[:3]]


def cost(row: dict[str, Any]) -> tuple[float, float]:
    return row["network_evaluations"], row["fd"]


def run_final(bench: Bench, settings: list[Setting], options: FrontierOptions) -> list[dict[str, Any]]:
    """Rows of the finalists at --finalists samples; "seconds" is the time for `timed` samples, measured in alternation."""
    timed = min(options.timed, options.finalists)
    seconds = compare(
        {setting.name: bench.call(varied(bench.loaded, setting.solver), timed) for setting in settings}, 3
    )
    rows = [measure(bench, setting, options.finalists) for setting in settings]
    return [{**row, "timed": timed, "seconds": seconds[row["name"]]} for row in rows]


def summary_table(rows: list[dict[str, Any]], budgets: Sequence[int]) -> str:
    """Table of the fixed-step solvers' FD, one column per NFE limit."""
    table: dict[str, dict[int, str]] = {}
    for row in rows:
        if not SOLVERS[row["solver"].method].adaptive:
            budget = min(budget for budget in budgets if row["nfe"] <= budget)
            table.setdefault(row["line"], {})[budget] = f"{row['fd']:.4f}"
    body = [[line, *(cells.get(budget, "") for budget in budgets)] for line, cells in table.items()]
    return markdown_table(["FD in at most", *map(str, budgets)], body)


def draw_picture(rows: list[dict[str, Any]], path: str) -> None:
    """Plot FD against evaluations for all solvers, and FD against time grids for some."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained", sharey=True)
    plain = dict.fromkeys(row["line"] for row in rows if ", " not in row["line"])
    for number, line in enumerate(plain):
        points = sorted((row["nfe"], row["fd"]) for row in rows if row["line"] == line)
        style = {"marker": "osv^Dd<>Px"[number % 10], "linestyle": "-" if number < 10 else "--"}
        left.loglog(*zip(*points, strict=True), markersize=5, label=line, **style)
    few = min(row["nfe"] for row in rows if ", " in row["line"])
    grids = ["uniform", *list(GRIDS)[1:], *(f"shift {shift:g}" for shift in SHIFTS)]
    found = {row["line"]: row["fd"] for row in rows if row["nfe"] == few}
    for marker, method in zip("osv^", ON_GRIDS, strict=True):
        values = [found[method if grid == "uniform" else f"{method}, {grid}"] for grid in grids]
        right.semilogy(grids, values, marker=marker, markersize=7, linestyle=":", label=method)
    reference = rows[0]["fd"]
    for axis in (left, right):
        axis.axhline(reference, color="grey", linewidth=1, label="dopri5 at 1e-5")
        axis.axhspan(reference / CLOSE, reference * CLOSE, color="grey", alpha=0.2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=2)
        axis.set_yticks(ticks := [0.06, 0.07, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4], ticks)
        axis.minorticks_off()
    left.set(
        title="all solvers, uniform grid",
        xlabel="evaluations of the velocity per sample",
        ylabel="FD",
        ylim=(0.07, 0.4),
    )
    left.set_xticks(ticks := [4, 8, 16, 32, 64, 128, 256], ticks)
    right.set(title=f"time grids, {few:g} evaluations")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Screen all settings, sample the finalists, print tables along the way, and print the choice."""
    request = request_benchmark(str(__doc__), FrontierOptions)
    own, bench = request.own, Bench(request, request.own.keep)
    print(f"{own.screened} samples of {bench.loaded.path}\n")
    print(markdown_table(HEADER, []))
    rows = []
    settings = {setting.name: setting for setting in settings_of(own, bench.loaded.sampler.guidance)}
    for setting in settings.values():
        rows.append(measure(bench, setting, own.screened))
        print_row(cells_of(rows[-1]))
        save(bench, own.output, rows, [])
    print(f"\n{summary_table(rows, sorted({*own.evaluations, *own.grid_evaluations}))}")
    chosen = [settings[row["name"]] for row in [*finalists_of(rows[1:]), rows[0]]]
    final = run_final(bench, chosen, own)
    print(f"\n{own.finalists} samples; seconds for {final[0]['timed']}\n")
    print(markdown_table(HEADER, [cells_of(row) for row in final]))
    save(bench, own.output, rows, final)
    draw_picture(rows, f"{own.output}.png")
    print(f"\n{verdict(final)}")


def save(bench: Bench, output: str, rows: list[dict[str, Any]], final: list[dict[str, Any]]) -> None:
    content = {**bench.loaded.describe(), "screening": rows, "final": final}
    write_json(bench.folder / f"{Path(output).name}.json", content)


def verdict(final: list[dict[str, Any]]) -> str:
    """Apply the rule in the module's docstring and state the choice."""
    *candidates, reference = final
    least = min(row["fd"] for row in candidates)
    if least > CLOSE * reference["fd"]:
        return "no finalist is within 3 % of the reference"
    best = min((row for row in candidates if row["fd"] <= CLOSE * least), key=cost)
    faster = reference["seconds"] / best["seconds"]
    return f"choice: {best['name']}, FD {best['ratio']:.3f} of the reference's, {faster:.1f} times as fast"


if __name__ == "__main__":
    exit_cleanly(main)
