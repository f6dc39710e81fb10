"""Question: which guidance, at which scale? Plots FD against the guidance scale for plain, interval and autoguidance.

    python -m benchmarks.guidance [--output docs/guidance] [flags of test_flow_latent.py]

The network, solver and noise come from run_test.sh's arguments file (--args_file chooses another). Plain guidance is active
at all times, interval guidance only within an interval. Autoguidance is active at all times and guides away from
--guide_checkpoint. By default, this is the default experiment (train_args/fashion_mnist_dit.txt) trained for --guide_steps.
To sample another network, pass its own --guide_checkpoint.

Every setting generates the first --screened samples; the best two of each family continue to --finalists. The plot is
written to OUTPUT.png. Results and sample features are stored in --keep, so that an interrupted run resumes.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._runs import run_default
from benchmarks._samples import Bench, BenchmarkOptions, request_benchmark, varied
from benchmarks._timing import markdown_table
from checkpoints.experiments import newest_model
from datasets_prep.datasets import DatasetOptions
from exits import exit_cleanly
from flow.guidance import GuidanceOptions
from options import option
from runtime.files import write_json
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import SourceOptions

ALWAYS = (0.0, 1.0)
PLAIN, INTERVAL, AUTO = "plain", "interval", "autoguidance"
HEADER = ["guidance", "scale", "evaluations", "network evaluations", "FD", "seconds"]


@dataclass(frozen=True)
class GuidanceBenchOptions(BenchmarkOptions):
    """Benchmark."""

    output: str = option("docs/guidance", "path of the PNG to write, without suffix")
    finalists: int = option(5000, "samples for the best two settings of each family", minimum=16)
    guide_steps: int = option(400, "training steps of the guide if --guide_checkpoint is not given", minimum=1)
    plain_scales: tuple[float, ...] = option((1.0, 1.25, 1.5, 2.0, 3.0), "scales for plain guidance; 1 turns it off")
    interval_scales: tuple[float, ...] = option((2.0, 4.0, 6.0), "scales for interval guidance")
    intervals: tuple[str, ...] = option(("0.2-0.7", "0.1-0.5", "0.4-0.9"), "intervals for interval guidance, LOW-HIGH")
    auto_scales: tuple[float, ...] = option((1.5, 2.0, 3.0, 4.0), "scales for autoguidance")


class Setting(NamedTuple):
    """A row of the table. Settings compete within their `family`; `line` names their line in the plot."""

    family: str
    line: str
    loaded: LoadedSampler


def settings_of(bench: Bench, guided: LoadedSampler, own: GuidanceBenchOptions) -> list[Setting]:
    """All settings. `guided` is the sampler with the guide loaded, for autoguidance."""
    found = [settings_at(PLAIN, PLAIN, bench.loaded, ALWAYS, own.plain_scales)]
    for text in own.intervals:
        low, high = map(float, text.split("-"))
        found.append(settings_at(INTERVAL, f"{INTERVAL} {text}", bench.loaded, (low, high), own.interval_scales))
    found.append(settings_at(AUTO, AUTO, guided, ALWAYS, own.auto_scales))
    return [setting for settings in found for setting in settings]


def settings_at(
    family: str, line: str, loaded: LoadedSampler, interval: tuple[float, float], scales: Iterable[float]
) -> list[Setting]:
    return [
        Setting(
            family,
            line,
            varied(loaded, guidance=GuidanceOptions(scale, interval, loaded.sampler.guidance.cfg_channels)),
        )
        for scale in scales
    ]


def trained_guide(source: SourceOptions, data: DatasetOptions, steps: int) -> Path:
    """Train the default experiment for a few steps, or reuse the run if it exists. Returns its checkpoint."""
    root, datadir = (str(Path(path).resolve()) for path in (source.save_root, data.datadir))
    run = run_default(root, f"{source.exp}_{steps}_steps", "--max_steps", str(steps), "--datadir", datadir)
    return newest_model(run, None)


def measure(bench: Bench, setting: Setting, count: int) -> dict[str, Any]:
    """Sample a setting; return its row of results."""
    samples, guidance = bench.sample(setting.loaded, count), setting.loaded.sampler.guidance
    return {
        "family": setting.family,
        "line": setting.line,
        "scale": guidance.cfg_scale,
        "interval": guidance.cfg_interval,
        "samples": count,
        "fd": bench.distance(samples.features),
        "error": bench.error_of_difference(samples),
        **samples.costs(),
    }


def cells(row: dict[str, Any]) -> list[str]:
    costs = [f"{row['nfe']:g}", f"{row['network_evaluations']:g}"]
    return [row["line"], f"{row['scale']:g}", *costs, f"{row['fd']:.4f} ± {row['error']:.4f}", f"{row['seconds']:.1f}"]


def draw_picture(rows: list[dict[str, Any]], path: str) -> None:
    """Plot FD against the guidance scale."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for marker, line in zip("os^vDX*", dict.fromkeys(row["line"] for row in rows), strict=False):
        chosen = [row for row in rows if row["line"] == line]
        values = ([row[key] for row in chosen] for key in ("scale", "fd", "error"))
        axis.errorbar(*values, marker=marker, markersize=5, capsize=3, label=line)
    axis.set(xlabel="scale", ylabel=f"FD of {rows[0]['samples']} samples", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Screen all settings, sample the finalists, and print tables along the way."""
    request = request_benchmark(str(__doc__), GuidanceBenchOptions)
    own, source = request.own, request.sampler.source
    guide = source.guide_checkpoint or str(trained_guide(source, request.data, own.guide_steps))
    alone, with_guide = (
        dataclasses.replace(request.sampler, source=dataclasses.replace(source, guide_checkpoint=g))
        for g in ("", guide)
    )
    bench = Bench(dataclasses.replace(request, sampler=alone), own.keep)
    settings = settings_of(bench, load_sampler(with_guide), own)
    print(f"{own.screened} samples from {bench.loaded.path}; autoguidance with {guide}\n\n{markdown_table(HEADER, [])}")
    rows: list[dict[str, Any]] = []
    for setting in settings:
        rows.append(measure(bench, setting, own.screened))
        print(markdown_table(cells(rows[-1]), []).splitlines()[0], flush=True)
        save(bench, own.output, guide, rows, [])
    final = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = sorted((row["fd"], number) for number, row in enumerate(rows) if row["family"] == family)
        final += [measure(bench, settings[number], own.finalists) for _, number in mine[:2]]
    final.sort(key=lambda row: row["fd"])
    print(f"\n{own.finalists} samples\n\n{markdown_table(HEADER, [cells(row) for row in final])}")
    save(bench, own.output, guide, rows, final)
    draw_picture(rows, f"{own.output}.png")


def save(bench: Bench, output: str, guide: str, rows: list[dict[str, Any]], final: list[dict[str, Any]]) -> None:
    content = {**bench.loaded.describe(), "guide": guide, "screening": rows, "final": final}
    write_json(bench.folder / f"{Path(output).name}.json", content)


if __name__ == "__main__":
    exit_cleanly(main)
