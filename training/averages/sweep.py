"""Rebuild power averages of several widths, and score samples of each at several guidance scales.

The best width depends on the guidance scale, so both are searched together (arXiv 2312.02696, section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.tasks import GENERATE, INPAINT, SEMANTIC
from datasets_prep.datasets import DatasetOptions
from datasets_prep.masks import MaskSetOptions
from evaluation.features.registry import FeatureOptions
from evaluation.score import ScoreOptions, result_line
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.files import move_aside, write_json
from runtime.messages import fact, labeled, note, show_result
from runtime.outputs import check_file, check_folder, warn_of_space
from runtime.pictures import GridOptions
from runtime.plots import figure_file, require_plots
from sampling.loading import load_sampler
from sampling.request import SamplingOptions, sampler_request, sampling_groups
from sampling.sample_and_score import sample_and_score
from tasks.conditioned_request import conditioned_groups
from tasks.inpainting import InpaintingOptions, inpaint
from tasks.script import sample_conditioned
from tasks.semantic_synthesis import SegmentationOptions, synthesise
from training.averages.power import LARGEST_WIDTH, SMALLEST_WIDTH
from training.averages.reconstruction import choose_step, rebuild_file
from training.averages.snapshots import FOLDER, Snapshot

__all__ = ["SCORERS", "RebuildOptions", "Scorer", "describe", "plot", "rebuild_and_score"]


@dataclass(frozen=True)
class RebuildOptions:
    """Post-hoc EMA."""

    sigma_rel: tuple[float, ...] = option(
        (), "relative widths to rebuild", minimum=SMALLEST_WIDTH, maximum=LARGEST_WIDTH, common=True
    )
    step: int | None = option(
        None, "average up to this step, which needs a snapshot; default: the last one", minimum=1, common=True
    )
    checkpoint_dir: str = option("", "folder of the rebuilt checkpoints; default: RUN", common=True)
    cfg_scales: tuple[float, ...] = option(
        (), "with --compute_fid: score every width at each of these guidance scales, instead of --cfg_scale", minimum=0,
        common=True,
    )  # fmt: skip


class Scorer(NamedTuple):
    """How samples of a task are drawn and scored.

    Args:
        sample: sample(options, processes) draws samples with the checkpoint --checkpoint; returns the result.
        groups: the option dataclasses that it takes.
    """

    sample: Callable[[Options, Processes], dict[str, Any]]
    groups: tuple[type, ...]


def _generate(options: Options, processes: Processes) -> dict[str, Any]:
    sampling = options[SamplingOptions]
    batches = sampling.n_sample / sampling.batch_size / processes.count
    loaded = load_sampler(sampler_request(options), processes, batches=batches)
    grid, scores = options[GridOptions], options[ScoreOptions]
    return sample_and_score(loaded, sampling, grid, scores, options[FeatureOptions], options[DatasetOptions], processes)


def _conditioned(sample: Callable[..., dict[str, Any]], *groups: type) -> Scorer:
    return Scorer(partial(sample_conditioned, sample, groups), (*conditioned_groups(), *groups))


# Keys are names of tasks.
SCORERS = {
    GENERATE.name: Scorer(_generate, sampling_groups()),
    INPAINT.name: _conditioned(inpaint, MaskSetOptions, InpaintingOptions),
    SEMANTIC.name: _conditioned(synthesise, SegmentationOptions),
}


def rebuild_and_score(
    run: Path,
    snapshots: Sequence[Snapshot],
    options: Options,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Rebuild each width as a checkpoint. With --compute_fid, also sample and score it, print a table, write it, and plot it.

    Args:
        run: the run's folder.
        snapshots: its snapshots, by step.
        options: of `RebuildOptions` and of the task's `Scorer`.
        processes: the main process rebuilds, and all of them sample.

    Returns:
        The result, with one row per width and guidance scale.

    Raises:
        UsageError: no width was given, there is no snapshot at --step, a snapshot is unreadable, or sampling fails.
    """
    own, values = options[RebuildOptions], options.values
    if not own.sigma_rel:
        raise UsageError("expected the relative widths to rebuild, for example --sigma_rel 0.05 0.075 0.10 0.15")
    used = choose_step(snapshots, own.step)
    folder = Path(own.checkpoint_dir or run)
    target = Path(values["output_json"] or folder / "samples" / f"{FOLDER}.json")
    scored, widths = values["compute_fid"], sorted(set(own.sigma_rel))
    if scored:
        require_plots()
    if processes.is_main:
        _check_outputs(folder, target if scored else None, used, len(widths))
    suffix = "" if own.step is None else f"_step_{own.step}"
    paths = {width: folder / f"{FOLDER}_{width}{suffix}.safetensors" for width in widths}
    errors = {width: rebuild_file(used, width, path) for width, path in paths.items()} if processes.is_main else {}
    errors = processes.from_main(errors)
    result: dict[str, Any] = {"run": str(run), "step": used[-1].header.step, "snapshots": len(used), "rows": []}
    for width, path in paths.items():
        for scale in sorted(set(own.cfg_scales or (values["cfg_scale"],))) if scored else (None,):
            row = {"sigma_rel": width, "profile_error": errors[width], "checkpoint": str(path)}
            if scale is not None:
                changed = _settings_of(path, scale, values)
                sample = SCORERS[used[-1].header.task].sample
                row |= {"cfg_scale": scale, **sample(replace(options, values={**values, **changed}), processes)}
                fact("score", f"sigma_rel {width:g}, scale {scale:g}: {result_line(row)}")
            result["rows"].append(row)
    if scored and processes.is_main:
        _write(result, target)
    return result


def _settings_of(path: Path, scale: float, values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options of one row. Each row has its own folder, and only the table goes to --output_json."""
    chosen = values["output_dir"]
    folder = str(Path(chosen, f"{path.stem}_cfg{scale:g}")) if chosen else ""
    return {"checkpoint": str(path), "cfg_scale": scale, "output_dir": folder, "output_json": ""}


def _check_outputs(folder: Path, table: Path | None, snapshots: Sequence[Snapshot], widths: int) -> None:
    check_folder(folder, "--checkpoint_dir")
    check_file(table, "--output_json")
    needed = 2 * widths * snapshots[-1].path.stat().st_size  # float32 instead of float16
    warn_of_space(folder, needed, "the rebuilt checkpoints")


def _write(result: dict[str, Any], target: Path) -> None:
    """Print the table, and write it as JSON with a plot; an older table is kept under another name."""
    show_result(describe(result))
    picture = target.with_suffix(".png")
    for path in (target, picture):
        if path.is_file():
            note(f"{path} is now {move_aside(path)}")
    write_json(target, result)
    plot(result, picture)
    fact("table", str(target))
    fact("plot", str(picture))


def describe(result: Mapping[str, Any]) -> str:
    """The scores as a table: a line for each width, and a column for each guidance scale."""
    rows = result["rows"]
    scales = sorted({row["cfg_scale"] for row in rows})
    scores = {(row["sigma_rel"], row["cfg_scale"]): _score(row) for row in rows}
    columns = "".join(f"  {f'scale {scale:g}':<18}" for scale in scales)
    lines = [labeled("sigma_rel", columns.rstrip())]
    for width in sorted({row["sigma_rel"] for row in rows}):
        cells = "".join(f"  {scores[width, scale]:<18}" for scale in scales)
        lines.append(labeled(f"{width:g}", cells.rstrip()))
    best = min(rows, key=lambda row: row["value"])
    lines.append(labeled("best", f"sigma_rel {best['sigma_rel']:g}, scale {best['cfg_scale']:g}: {result_line(best)}"))
    return "\n".join(lines)


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.4g}" + ("" if row["error"] is None else f" ± {row['error']:.2g}")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot the first metric over the width, with a curve for each guidance scale."""
    with figure_file(path) as (axis,):
        for scale in sorted({row["cfg_scale"] for row in result["rows"]}):
            rows = [row for row in result["rows"] if row["cfg_scale"] == scale]
            widths, values = ([row[name] for row in rows] for name in ("sigma_rel", "value"))
            errors = [row["error"] or 0 for row in rows]
            axis.errorbar(widths, values, errors, marker="o", capsize=2, label=f"guidance scale {scale:g}")
        axis.set(title=f"step {result['step']}", xlabel="relative width of the EMA", ylabel=result["rows"][0]["metric"])
        axis.legend()
        axis.grid(alpha=0.3)
