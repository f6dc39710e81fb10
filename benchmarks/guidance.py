"""How much guidance, when, and away from what? FD against the scale for plain, interval and autoguidance.

    python -m benchmarks.guidance [--output docs/guidance] [flags of test_flow_latent.py]

Network, solver and noises are those of run_test.sh (--args_file chooses another file). Plain guidance acts at all times,
interval guidance at some; autoguidance, at all times, leads away from --guide_checkpoint, by default the embedded default
trained for --guide_steps, which serves only where that is guided. All draw the first --screened samples, and the best two
of every family go on to --finalists. Draws OUTPUT.png; rows and features are kept in --keep, so that an interrupted run goes
on.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._draws import Bench, DrawOptions, request_benchmark, varied
from benchmarks._runs import run_default
from benchmarks._timing import markdown_table
from checkpoints.experiments import newest_model
from datasets_prep.datasets import DatasetOptions
from flow.guidance import GuidanceOptions
from options import exit_cleanly, option
from runtime.files import write_json
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import SourceOptions

ALWAYS = (0.0, 1.0)
PLAIN, INTERVAL, AUTO = "plain", "interval", "autoguidance"
HEADER = ["guidance", "scale", "evaluations", "of networks", "FD", "seconds"]


@dataclass(frozen=True)
class GuidanceBenchOptions(DrawOptions):
    """Benchmark."""

    output: str = option("docs/guidance", "path, without suffix, of the PNG to write")
    finalists: int = option(5000, "samples of the best two of every family", minimum=16)
    guide_steps: int = option(400, "steps of the guide that is trained where no --guide_checkpoint is given", minimum=1)
    plain_scales: tuple[float, ...] = option((1.0, 1.25, 1.5, 2.0, 3.0), "scales of plain guidance; 1 is none")
    interval_scales: tuple[float, ...] = option((2.0, 4.0, 6.0), "scales of interval guidance")
    intervals: tuple[str, ...] = option(("0.2-0.7", "0.1-0.5", "0.4-0.9"), "its intervals, LOW-HIGH")
    auto_scales: tuple[float, ...] = option((1.5, 2.0, 3.0, 4.0), "scales of autoguidance")


class Setting(NamedTuple):
    """A row of the table; settings of one family compete, those of one line are joined in the plot."""

    family: str
    line: str
    loaded: LoadedSampler


def settings_of(bench: Bench, guided: LoadedSampler, own: GuidanceBenchOptions) -> list[Setting]:
    """All settings; `guided` is the sampler with the guide."""
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
    """The embedded default after a few steps of training, or the checkpoint that an earlier start has trained."""
    root, datadir = (str(Path(path).resolve()) for path in (source.save_root, data.datadir))
    run = run_default(root, f"{source.exp}_{steps}_steps", "--max_steps", str(steps), "--datadir", datadir)
    return newest_model(run, None)


def measure(bench: Bench, setting: Setting, count: int) -> dict[str, Any]:
    """A finished row."""
    draws, guidance = bench.draw(setting.loaded, count), setting.loaded.sampler.guidance
    return {
        "family": setting.family,
        "line": setting.line,
        "scale": guidance.cfg_scale,
        "interval": guidance.cfg_interval,
        "samples": count,
        "fd": bench.distance(draws.features),
        "error": bench.error_of_difference(draws),
        **draws.costs(),
    }


def cells(row: dict[str, Any]) -> list[str]:
    costs = [f"{row['nfe']:g}", f"{row['network_evaluations']:g}"]
    return [row["line"], f"{row['scale']:g}", *costs, f"{row['fd']:.4f} ± {row['error']:.4f}", f"{row['seconds']:.1f}"]


def draw_picture(rows: list[dict[str, Any]], path: str) -> None:
    """FD over the scale."""
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
    """Screen, draw on the best, print the tables as they grow."""
    request = request_benchmark(str(__doc__), GuidanceBenchOptions)
    own, source = request.own, request.sampler.source
    guide = source.guide_checkpoint or str(trained_guide(source, request.data, own.guide_steps))
    alone, with_guide = (
        dataclasses.replace(request.sampler, source=dataclasses.replace(source, guide_checkpoint=g))
        for g in ("", guide)
    )
    bench = Bench(dataclasses.replace(request, sampler=alone), own.keep)
    settings = settings_of(bench, load_sampler(with_guide), own)
    print(f"{own.screened} samples of {bench.loaded.path}; autoguidance by {guide}\n\n{markdown_table(HEADER, [])}")
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
