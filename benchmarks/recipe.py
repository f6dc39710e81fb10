"""Question: which switches of the training recipe help the default experiment, and at which cost?

    python -m benchmarks.recipe [--variants NAME ...] [--steps 1000] [--seeds 0 1 2] [flags of test_flow_latent.py]

Every variant is trained with the same seeds, so that all see the same images, noise and times. A variant is a name that
--variants lists, or "NAME: TRAINING FLAGS | SAMPLING FLAGS", where the bar and the flags after it may be missing. The first
variant is the baseline. Each run reports its validation loss by quarter of t, its speed, and the FD of --samples images without
guidance and at every guidance scale of --scales; the scale with the lowest mean FD counts, because a better network often
needs another one. Differences to the baseline are means over the seeds with standard errors; with one seed, the errors of FD
are for the number of samples alone.

The plot is written to OUTPUT.png. Runs, sample features and results are stored in --keep, so that an interrupted benchmark
resumes, and variants, seeds and scales can be added. Sampling is in the precision that --precision chooses.
"""

import json
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._runs import records_of, run_default
from benchmarks._samples import Bench, BenchmarkRequest, request_benchmark, varied
from benchmarks._timing import markdown_table
from checkpoints.experiments import newest_model
from exits import exit_cleanly
from options import UsageError, option
from runtime.files import write_json
from runtime.plots import figure_file, require_plots

QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
HEADER = ["variant", "validation loss", "quarters of t", "FD, unguided", "FD, guided", "scale", "images/s"]

# Training flags, and after a bar, sampling flags.
VARIANTS = {
    "default": "",
    "time x10": "--time_scale_factor 10",
    "time x100": "--time_scale_factor 100",
    "time x1000": "--time_scale_factor 1000",
    "fourier": "--time_embedding fourier",
    "GELU": "--mlp gelu",
    "RoPE": "--rope",
    "RMSNorm": "--norm rms_affine",
    "QK-norm": "--qk_norm",
    "LightningDiT's blocks": "--norm rms_affine --qk_norm --rope",
    "value residual": "--value_residual",
    "shared adaLN": "--shared_adaln",
    "4 class tokens": "--class_tokens 4",
    "patch 1, fine blocks": "--model_type DiT-Mi/1 --fine_blocks 2",
    "velocity head": "--tap_block 2 --auxiliary_velocity 0.5",
    "internal guidance 1.4": "--tap_block 2 --auxiliary_velocity 0.5 | --internal_guidance 1.4",
    "align latents": "--tap_block 2 --align_latents 1",
    "dispersive": "--tap_block 2 --dispersive 0.5",
    "velocity direction": "--velocity_direction 1",
    "contrastive": "--contrastive_weight 0.05",
    "data prediction": "--prediction data",
    "min-SNR weights": "--loss_weighting min_snr",
    "optimal transport": "--coupling optimal_transport",
    "times towards data": "--time_location -0.5",
    "times towards noise": "--time_location 0.5",
    "adaLN by AdamW": "--muon_matrices attention_mlp",
}


class Variant(NamedTuple):
    """A recipe: the flags added to the default experiment's arguments files for training and for sampling."""

    name: str
    training: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read a name in VARIANTS, or "NAME: TRAINING FLAGS | SAMPLING FLAGS".

        Raises:
            UsageError: neither.
        """
        name, separator, flags = text.partition(":")
        if not separator and name not in VARIANTS:
            raise UsageError(f"--variants {name}: expected 'NAME: FLAGS', or one of {', '.join(VARIANTS)}")
        training, _, sampling = (flags if separator else VARIANTS[name]).partition("|")
        return cls(name.strip(), tuple(shlex.split(training)), tuple(shlex.split(sampling)))


@dataclass(frozen=True)
class RecipeOptions:
    """Benchmark."""

    keep: str = option(
        "saved_info/benchmarks/recipe", "folder for runs, sample features and the results as JSON", common=True
    )
    output: str = option("docs/recipe", "path of the PNG to write, without suffix", common=True)
    variants: tuple[str, ...] = option(
        tuple(VARIANTS),
        f"variants; the first is the baseline; names: {'; '.join(VARIANTS)}",
        common=True,
        shown="all names",
    )
    steps: int = option(1000, "training steps of every run", minimum=100, common=True)
    seeds: tuple[int, ...] = option((0, 1, 2), "training seeds", minimum=0, common=True)
    scales: tuple[float, ...] = option((2.0, 3.0, 4.0), "guidance scales, above 1", common=True)
    samples: int = option(5000, "samples for each FD", minimum=16, common=True)


class Result(NamedTuple):
    """The measurements of one run.

    Args:
        losses: validation loss, and its parts by quarter of t.
        rate: training images per second.
        distances: FD by guidance scale.
        errors: standard errors of FD for the finite number of samples.
    """

    losses: dict[str, float]
    rate: float
    distances: dict[float, float]
    errors: dict[float, float]


def train(own: RecipeOptions, datadir: str, variant: Variant, seed: int) -> Path:
    """Train a variant, or resume or reuse its run. Returns the run folder."""
    root, name = Path(own.keep).resolve(), f"{slug(variant.training)}_{own.steps}_steps_seed{seed}"
    run = root / "latent_flow" / "fashion_mnist" / name
    if not is_finished(run, own.steps):
        flags = ["--seed", str(seed), "--max_steps", str(own.steps), "--datadir", str(Path(datadir).resolve())]
        run_default(str(root), name, *flags, *variant.training)
    return run


def measure(request: BenchmarkRequest[RecipeOptions], variant: Variant, seed: int) -> Result:
    """Train and score one run."""
    own = request.own
    run = train(own, request.data.datadir, variant, seed)
    checkpoint = str(newest_model(run, None))
    bench = Bench(
        request_benchmark("", RecipeOptions, "--checkpoint", checkpoint, *variant.sampling), f"{own.keep}/features"
    )
    distances, errors = {}, {}
    for scale in (1.0, *own.scales):
        samples = bench.sample(varied(bench.loaded, scale=scale), own.samples)
        distances[scale], errors[scale] = bench.distance(samples.features), bench.error_of_difference(samples)
    last = records_of(run, "validation")[-1]
    rates = [entry["images_per_s"] for entry in records_of(run, "train")]
    return Result({name: last[name] for name in ("loss", *QUARTERS)}, statistics.median(rates), distances, errors)


def best_scale(results: Sequence[Result]) -> float:
    """The guidance scale with the lowest mean FD over the seeds."""
    return min(
        (scale for scale in results[0].distances if scale != 1),
        key=lambda scale: statistics.mean(result.distances[scale] for result in results),
    )


def summarize(variant: Variant, results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, Any]:
    """A row of the results: means over the seeds, and paired differences to the baseline with standard errors.

    With one seed, the errors of FD are for the finite number of samples alone.
    """
    scale, reference = best_scale(results), best_scale(baseline)
    values: dict[str, tuple[Callable[[Result], float], Callable[[Result], float]]] = {
        "unguided": (lambda result: result.distances[1.0],) * 2,
        "guided": (lambda result: result.distances[scale], lambda result: result.distances[reference]),
    }
    for name in ("loss", *QUARTERS):
        values[name] = (lambda result, name=name: result.losses[name],) * 2  # type: ignore[misc]
    row: dict[str, Any] = {"variant": variant.name, "scale": scale, "seeds": len(results)}
    row |= {"training": list(variant.training), "sampling": list(variant.sampling)}
    for name, (of, of_baseline) in values.items():
        ours, theirs = [of(result) for result in results], [of_baseline(result) for result in baseline]
        differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
        row[name] = {
            "mean": statistics.mean(ours),
            "difference": statistics.mean(differences),
            "error": _error(differences),
        }
        row[name]["spread"] = _error(ours)
    if len(results) == 1:
        for name, ours, theirs in (("unguided", 1.0, 1.0), ("guided", scale, reference)):
            own, other = results[0].errors[ours], baseline[0].errors[theirs]
            row[name] |= {"error": math.hypot(own, other), "spread": own}
    rates = [result.rate / other.rate for result, other in zip(results, baseline, strict=True)]
    row["rate"] = {"mean": statistics.mean(result.rate for result in results), "relative": statistics.median(rates)}
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    is_baseline = not any(row[name]["difference"] for name in ("loss", "unguided", "guided"))

    def cell(name: str) -> str:
        entry = row[name]
        if is_baseline:
            return f"{entry['mean']:.4f}{_plus_minus(entry['spread'])}"
        return f"{entry['mean']:.4f} ({entry['difference']:+.4f}{_plus_minus(entry['error'])})"

    quarters = " ".join(f"{row[name]['mean' if is_baseline else 'difference']:+.4f}" for name in QUARTERS)
    rate = f"{row['rate']['mean']:.0f} ({row['rate']['relative']:.2f})"
    return [row["variant"], cell("loss"), quarters, cell("unguided"), cell("guided"), f"{row['scale']:g}", rate]


def draw_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw FD by variant, with the standard errors of the paired differences."""
    with figure_file(path, columns=2) as axes:
        for axis, name in zip(axes, ("unguided", "guided"), strict=True):
            entries = [row[name] for row in rows]
            errors = [entry["error"] or 0.0 for entry in entries]
            axis.errorbar([entry["mean"] for entry in entries], range(len(rows)), xerr=errors, fmt="o", capsize=3)
            axis.axvline(entries[0]["mean"], color="gray", linewidth=1)
            axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
            axis.invert_yaxis()
            axis.set_xlabel(f"FD, {name}")
            axis.grid(alpha=0.3)


def main() -> None:
    """Train and score all variants seed by seed, and print the table after each seed."""
    request = request_benchmark(str(__doc__), RecipeOptions)
    own, output = request.own, Path(f"{request.own.output}.png")
    require_plots()
    variants = [Variant.parse(text) for text in own.variants]
    results: dict[str, list[Result]] = {variant.name: [] for variant in variants}
    if not variants or len(results) < len(variants):
        raise UsageError(
            f"--variants: expected different names, but {[variant.name for variant in variants]} were given"
        )
    if not own.scales or any(scale <= 1 for scale in own.scales):
        raise UsageError(f"--scales {own.scales}: expected scales above 1; samples without guidance are always scored")
    for seed in own.seeds:
        for variant in variants:
            results[variant.name].append(measure(request, variant, seed))
            distances = {f"{scale:g}": round(value, 4) for scale, value in results[variant.name][-1].distances.items()}
            print(f"seed {seed}, {variant.name}: FD by guidance scale {json.dumps(distances)}", flush=True)
        baseline = results[variants[0].name]
        rows = [summarize(variant, results[variant.name], baseline) for variant in variants]
        print(f"\n{own.steps} steps, {own.samples} samples, seeds up to {seed}; differences to {variants[0].name}\n")
        print(markdown_table(HEADER, [cells(row) for row in rows]), flush=True)
        write_json(Path(own.keep) / f"{output.stem}_{own.steps}_steps.json", {"rows": rows, "samples": own.samples})
        draw_plot(rows, output)


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def slug(flags: Sequence[str]) -> str:
    """Name of a run: its flags, in characters that every file system takes. Minus signs of numbers stay."""
    return "_".join(word.removeprefix("--").replace("/", "-").replace(".", "p") for word in flags) or "default"


def is_finished(run: Path, steps: int) -> bool:
    """Whether a run folder holds a run of this many steps with its last validation."""
    if not (run / "metrics.jsonl").exists():
        return False
    validations = records_of(run, "validation")
    return bool(validations) and validations[-1]["step"] == steps


if __name__ == "__main__":
    exit_cleanly(main)
