"""Question: which few-step objective makes the best samples in 1, 2, 4 and 8 evaluations, at equal cost of training?

    python -m benchmarks.few_steps [--budget 1800] [--seeds 0] [--methods NAME ...] [flags of test_flow_latent.py]

The teacher is the default experiment, trained with the same seed. Every method starts from its weights and takes as many steps
as cost what `--budget` plain steps cost, by the relative costs in METHODS (from benchmarks.few_step_cost). Pairs for reflow are
built with the teacher; their cost is not counted. Flow maps are sampled by `--method flow_map`, and the teacher by Euler, Heun
and DPM-Solver++ with its guidance, where an evaluation is one of the guided velocity (two of the network inside the guidance
interval).

The plot is written to OUTPUT.png, and the same samples of --shown and of the teacher to OUTPUT_samples.png. Runs and sample
features are stored in --keep, so that an interrupted benchmark resumes, and methods and seeds can be added.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._runs import ROOT, run_default
from benchmarks._samples import Bench, BenchmarkRequest, request_benchmark, varied
from benchmarks._timing import markdown_table
from benchmarks.fd_against_nfe import fixed
from benchmarks.recipe import is_finished
from checkpoints.experiments import newest_model
from exits import exit_cleanly
from flow.solvers import SolverOptions
from options import UsageError, option
from runtime.files import write_json
from runtime.pictures import save_sheet, side_by_side
from runtime.plots import figure_file, require_plots
from sampling.loading import LoadedSampler
from sampling.sampler import generate

EVALUATIONS = (1, 2, 4, 8)
TEACHERS = ("euler", "heun", "dpm")
TEACHER_SHIFT = 2.0  # of the default experiment's sampling
SHOWN_SAMPLES = 10
PAIRS = 20000
COMMON = "--muon_lr 0.005 --lr 3e-4 --cfg_scale 1 --method flow_map --num_steps 2"
GUIDED = "--target_kappa 0.6 --target_interval 0 0.7"
DECOUPLED = "--until_embedding decoupled"


class Method(NamedTuple):
    """A few-step method.

    Args:
        flags: of training.
        cost: of a step, relative to a plain step.
        inputs: of sampling.
    """

    flags: str
    cost: float
    sampling: str = ""


METHODS = {
    "decoupled_mean_flow": Method(f"{DECOUPLED} --log_variance_head {GUIDED}", 2.43),
    "mean_flow": Method(f"{DECOUPLED} {GUIDED}", 2.04),
    "improved_mean_flow": Method(f"{DECOUPLED} {GUIDED}", 2.57),
    "alpha_flow": Method(f"{DECOUPLED} {GUIDED}", 1.9),
    "shortcut": Method(f"{DECOUPLED} {GUIDED}", 1.81),
    "split_mean_flow": Method(f"{DECOUPLED} {GUIDED}", 1.9),
    "consistency": Method(DECOUPLED, 1.35, "--reinject_noise 1"),
    "reflow": Method("--time_sampling u_shaped", 1.0, "--method euler"),
}


@dataclass(frozen=True)
class FewStepBenchmarkOptions:
    """Benchmark."""

    keep: str = option("saved_info/benchmarks/few_steps", "folder for runs and sample features", common=True)
    output: str = option("docs/few_steps", "path of the PNG to write, without suffix", common=True)
    methods: tuple[str, ...] = option(
        tuple(METHODS), f"objectives: {', '.join(METHODS)}", common=True, shown="all objectives"
    )
    shown: str = option("decoupled_mean_flow", "objective whose samples are drawn", common=True)
    budget: int = option(1800, "cost of each training, in plain steps", minimum=10, common=True)
    seeds: tuple[int, ...] = option((0,), "training seeds", minimum=0, common=True)
    samples: int = option(5000, "samples for each FD", minimum=16, common=True)
    teacher_steps: int = option(3600, "training steps of the teacher", minimum=1, common=True)


class Setting(NamedTuple):
    """A row of the table: a trained network and its samplers by number of evaluations."""

    name: str
    bench: Bench
    samplers: dict[int, LoadedSampler]


Request = BenchmarkRequest[FewStepBenchmarkOptions]


def trained(request: Request, name: str, steps: int, *flags: str) -> Path:
    """Train the default experiment with further flags, or reuse the run. Returns its newest checkpoint."""
    root = Path(request.own.keep).resolve()
    run = root / "latent_flow" / "fashion_mnist" / name
    if not is_finished(run, steps):
        datadir = str(Path(request.data.datadir).resolve())
        run_default(str(root), name, "--max_steps", str(steps), "--datadir", datadir, *flags)
    return newest_model(run, None)


def pairs_of(request: Request, teacher: Path, seed: int) -> str:
    """The folder of reflow's pairs, which the teacher draws as the default experiment samples."""
    folder = str(Path(request.own.keep).resolve() / f"pairs_{seed}")
    flags = [
        "--checkpoint",
        str(teacher),
        "--pairs",
        folder,
        "--n_pairs",
        str(PAIRS),
        "--method",
        "heun",
        "--num_steps",
        "16",
    ]
    flags += ["--cfg_scale", "2.5", "--cfg_interval", "0.2", "0.7"]
    command = [sys.executable, "-m", "datasets_prep.build_pairs", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def bench_of(request: Request, checkpoint: Path, *flags: str) -> Bench:
    """A bench for a checkpoint."""
    parsed = request_benchmark("", FewStepBenchmarkOptions, "--checkpoint", str(checkpoint), *flags)
    return Bench(parsed, f"{request.own.keep}/features")


def settings_of(request: Request, seed: int) -> Iterable[Setting]:
    """Train the teacher and every method, and list what they are sampled with."""
    teacher = trained(request, f"teacher_{seed}", request.own.teacher_steps, "--seed", str(seed))
    bench = bench_of(request, teacher)
    for solver in TEACHERS:
        options, samplers = SolverOptions(solver, time_shift=TEACHER_SHIFT), {}
        for count in EVALUATIONS:
            for setting in fixed(solver, count, options, bench.loaded.sampler.guidance):
                samplers[count] = varied(bench.loaded, setting.solver)
        yield Setting(f"teacher, {solver}", bench, samplers)
    for name in request.own.methods:
        method = METHODS[name]
        steps = round(request.own.budget / method.cost)
        flags = ["--objective", name, "--init_from", str(teacher), "--seed", str(seed), *shlex.split(COMMON)]
        flags += shlex.split(method.flags)
        if name == "reflow":
            flags += ["--pairs", pairs_of(request, teacher, seed), "--method", "euler"]
        checkpoint = trained(request, f"{name}_{steps}_{seed}", steps, *flags)
        fixed_flags = ["--method", "flow_map", "--cfg_scale", "1", "--time_shift", "1", *shlex.split(method.sampling)]
        own = bench_of(request, checkpoint, *fixed_flags)
        options = own.loaded.sampler.solver
        yield Setting(name, own, {n: varied(own.loaded, replace(options, num_steps=n)) for n in EVALUATIONS})


def images_of(loaded: LoadedSampler) -> torch.Tensor:
    """The first samples, one per class, uint8 [N, C, H, W]."""
    (batch,) = generate(loaded.sampler, range(SHOWN_SAMPLES), batch_size=SHOWN_SAMPLES)
    return batch.images


def draw_samples(settings: Iterable[Setting], shown: str, path: Path) -> None:
    """Save a picture: a row per sample, with columns for 1, 2, 4 and 8 evaluations of `shown` and of the teacher's Heun.

    A column is empty where the solver cannot use so few evaluations.
    """
    groups = []
    for name in (shown, "teacher, heun"):
        (setting,) = (each for each in settings if each.name == name)
        for count in EVALUATIONS:
            drawn = images_of(setting.samplers.get(count, setting.samplers[max(EVALUATIONS)]))
            groups.append(drawn if count in setting.samplers else torch.full_like(drawn, 255))
    save_sheet(side_by_side(groups).images, path, len(groups))


def draw_plot(rows: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Draw FD against evaluations; dashed lines are the teacher's."""
    with figure_file(path) as (axis,):
        for name, distances in rows.items():
            means = [statistics.mean(values) for values in distances.values()]
            axis.plot(list(distances), means, "o--" if name.startswith("teacher") else "o-", label=name)
        axis.set(xlabel="evaluations", ylabel="FD", xscale="log", yscale="log")
        axis.set_xticks(EVALUATIONS, [str(count) for count in EVALUATIONS])
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)


def cell(values: Sequence[float] | None) -> str:
    """Mean FD over the seeds, with its standard error if there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    """Train and sample all methods seed by seed, and print the table after each seed."""
    request = request_benchmark(str(__doc__), FewStepBenchmarkOptions)
    own = request.own
    require_plots()
    if unknown := [name for name in (*own.methods, own.shown) if name not in METHODS]:
        raise UsageError(f"unknown methods {', '.join(unknown)}: expected {', '.join(METHODS)}")
    rows: dict[str, dict[int, list[float]]] = {}
    for number, seed in enumerate(own.seeds):
        settings = []
        for setting in settings_of(request, seed):
            settings.append(setting)
            distances = rows.setdefault(setting.name, {})
            for count, loaded in setting.samplers.items():
                features = setting.bench.sample(loaded, own.samples).features
                distances.setdefault(count, []).append(setting.bench.distance(features))
            print(
                f"seed {seed}, {setting.name}: {json.dumps({n: round(v[-1], 4) for n, v in distances.items()})}",
                flush=True,
            )
        if number == 0 and own.shown in own.methods:
            draw_samples(settings, own.shown, Path(f"{own.output}_samples.png"))
        table = [[name, *(cell(found.get(count)) for count in EVALUATIONS)] for name, found in rows.items()]
        print(f"\n{own.samples} samples, {number + 1} seeds, {own.budget} plain steps\n")
        print(markdown_table(["FD by evaluations", *map(str, EVALUATIONS)], table), flush=True)
        write_json(Path(own.keep) / f"{Path(own.output).name}.json", {"rows": rows, "samples": own.samples})
        draw_plot(rows, Path(f"{own.output}.png"))


if __name__ == "__main__":
    exit_cleanly(main)
