"""The mode `sample` of test_flow_latent.py: draws samples, saves a grid, and optionally writes and scores the samples."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets_prep.datasets import DatasetOptions
from datasets_prep.image_dataset import shown_side
from evaluation.checks import check_reference, resolution
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.metrics import check_counts
from evaluation.reference import open_set, summarise_set
from evaluation.score import (
    ScoreOptions,
    check_metrics,
    needs_of,
    reference_statistics,
    result_line,
    score_images,
)
from evaluation.sources import resized
from evaluation.summary import Summary
from models.autoencoders.pixels import DECODING
from runtime.distributed import Processes
from runtime.messages import labeled, note
from runtime.outputs import check_folder, record_failure, warn_of_space, write_error
from runtime.pictures import GridOptions, save_sheet
from sampling.labels import choose_labels, label_rule
from sampling.loading import LoadedSampler
from sampling.request import SamplingOptions
from sampling.results import write_result
from sampling.sampler import GeneratedBatch, Labels, Sampler, first_images, generate
from sampling.tally import Tally, describe_evaluations
from sampling.writer import SampleWriter, read_or_draw

__all__ = ["sample_and_score", "summary_of_samples"]


@dataclass(frozen=True)
class _Reference:
    """The metrics, and the real images to compare with.

    Args:
        scores: metrics, error bars, and the format of the samples.
        features: the feature network.
        data: the location of the dataset.
        other: folder of images or statistics file to use instead of the dataset's training images; empty: none.
    """

    scores: ScoreOptions
    features: FeatureOptions
    data: DatasetOptions
    other: str


def sample_and_score(
    loaded: LoadedSampler,
    sampling: SamplingOptions,
    grid: GridOptions,
    scores: ScoreOptions,
    features: FeatureOptions,
    data: DatasetOptions,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Draw samples and save their grid. Write and score them if `sampling` asks for it.

    Returns:
        The result, in every process. The main process also writes it as JSON.

    Raises:
        UsageError: the folder holds samples with other settings, or the reference is missing.
    """
    if sampling.real_img_dir and not sampling.compute_fid:
        note("--real_img_dir has no effect without --compute_fid")
    reference = _Reference(scores, features, data, sampling.real_img_dir) if sampling.compute_fid else None
    _check_samples(reference, sampling.n_sample)
    sampler, num_classes = loaded.sampler, loaded.header.num_classes
    labels = choose_labels(sampling.labels, sampler.seed, num_classes, sampling.n_sample)
    rule = label_rule(sampling.labels)
    grid_folder, samples_folder = _output_folders(sampling, loaded, processes)
    settings, kind = {**loaded.settings, "labels": rule}, sampling.save_images
    writer = SampleWriter(samples_folder, kind, settings, processes) if kind else None
    tally = Tally(grid.count(num_classes), num_classes, sampling.n_sample)
    started = time.perf_counter()
    batches = tally.watch(_batches(sampler, labels, sampling, writer, processes))
    score = _score(batches, loaded, reference, sampling.n_sample, sampling.batch_size, processes)
    seconds = time.perf_counter() - started
    picture = grid_folder / f"{loaded.stem}.png"
    result = {
        **loaded.describe(),
        **score,
        **_warnings(score, tally, processes),
        "samples": sampling.n_sample,
        **describe_evaluations(*tally.counts(processes)),
        "decoding": DECODING,
        "label_rule": rule,
        "label_counts": processes.sum(tally.label_counts).tolist(),
        "batch_size": sampling.batch_size,
        "processes": processes.count,
        "seconds": round(seconds, 1),
        "grid": str(picture),
    }
    if writer is not None:
        result["files"] = str(samples_folder)
        with record_failure(result):
            writer.close()
    first = first_images(tally.batches, grid.count(num_classes), processes)
    if processes.is_main:
        with record_failure(result):
            save_sheet(first, picture, grid.columns(num_classes))
        write_result(sampling.output_json, picture.with_suffix(".json"), result)
    return result


def summary_of_samples(result: dict[str, Any]) -> str:
    """The score, if there is one, the cost, the folder of the samples, if they are kept, and the picture, one line each."""
    lines = []
    if "value" in result:
        recognized = f", {100 * result['recognised']:.1f} % recognized as their class" if "recognised" in result else ""
        lines.append(labeled("score", result_line(result) + recognized))
    lines.append(labeled("samples", f"{result['samples']} in {result['seconds']:g} s, NFE {result['nfe']:g}"))
    if "files" in result:
        lines.append(labeled("files", f"in {result['files']}"))
    lines.append(labeled("picture", result["grid"]))
    return "\n".join(lines)


def _batches(
    sampler: Sampler, labels: Labels, sampling: SamplingOptions, writer: SampleWriter | None, processes: Processes
) -> Iterator[GeneratedBatch]:
    """This process's share of the samples; samples in the writer's folder are read instead of drawn."""

    def draw(indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        return generate(sampler, indices, batch_size=sampling.batch_size, labels=labels, processes=processes)

    reread = not (sampling.save_images == "jpg" and sampling.compute_fid)  # JPEG is lossy, which would change scores
    return read_or_draw(range(sampling.n_sample), draw, writer, sampling.batch_size, processes, reread)


def _check_samples(reference: _Reference | None, samples: int) -> None:
    """Check that there are enough samples for the metrics, before a feature network is loaded or downloaded."""
    if reference is not None:
        check_metrics(reference.scores.metrics)
        check_counts(reference.scores.metrics, samples, None)


def _score(
    batches: Iterable[GeneratedBatch],
    loaded: LoadedSampler,
    reference: _Reference | None,
    samples: int,
    batch_size: int,
    processes: Processes,
) -> dict[str, Any]:
    """Consume the batches, and score them against the real images of `reference`; None: no score."""
    if reference is None:
        deque(batches, maxlen=0)
        return {}
    stored, scores = loaded.header.dataset, reference.scores
    with processes.main_first():
        features = choose_features(reference.features, stored.name, loaded.sampler.machine)
        dataset = None if reference.other else loaded.real_images(reference.data, "train")
    if dataset is None:
        real = _summarize_other(reference, features, shown_side(stored), batch_size, processes)
    else:
        check_counts(scores.metrics, None, len(dataset))
        real = reference_statistics(dataset, features, reference.data.derived, scores.metrics, processes)
    check_reference(real, features, scores.metrics, samples, stored)
    names = stored.class_names if loaded.header.num_classes == len(stored.class_names) else ()
    return score_images(batches, features, real, names, scores, processes)


def _summarize_other(
    reference: _Reference, features: FeatureNetwork, side: int, batch_size: int, processes: Processes
) -> Summary:
    """Summarize `reference.other`; its images are brought to `side` x `side` pixels, as the training images are."""
    needs = needs_of(reference.scores.metrics, reference=True)
    stored = open_set(reference.other, needs)
    check_counts(reference.scores.metrics, None, stored.count)
    if stored.source is not None:
        if (found := resolution(stored.source)) != [side, side] and processes.is_main:
            sizes = "mixed sizes" if isinstance(found, str) else f"{found[1]} x {found[0]} pixels"
            note(
                f"--real_img_dir {reference.other}: the images have {sizes}; they are resized and cropped to {side} x {side} "
                "pixels, like training images"
            )
        stored = replace(stored, source=resized(stored.source, side))
    return summarise_set(stored, features, needs, None, batch_size, processes)


def _warnings(score: dict[str, Any], tally: Tally, processes: Processes) -> dict[str, list[str]]:
    """The entry "warnings" of a result, about the score and the samples; empty if there is nothing to warn of."""
    warnings = [*tally.warnings(processes), *score.get("warnings", [])]
    return {"warnings": warnings} if warnings or "warnings" in score else {}


def _output_folders(sampling: SamplingOptions, loaded: LoadedSampler, processes: Processes) -> tuple[Path, Path]:
    """The folders of the grid and of the samples. Image files get a separate one, because tools score a whole folder.

    Raises:
        UsageError: they cannot be written.
    """
    grid = default = loaded.output_folder()
    samples = default / loaded.stem
    if sampling.output_dir:
        samples = Path(sampling.output_dir)
        grid = default if sampling.save_images in ("png", "jpg") else samples
    if not processes.is_main:
        return processes.from_main((grid, samples))
    check_folder(samples if sampling.save_images else grid, "--output_dir")
    if grid is default and samples.parent != default and (error := write_error(default)) is not None:
        grid = samples.with_name(f"{samples.name}_grid")
        note(f"cannot write into {default} ({error}), so the picture and the result are in {grid}")
        check_folder(grid, "--output_dir")
    if sampling.save_images and not any(samples.glob("samples*.npz")):
        facts = loaded.header.dataset
        size = sampling.n_sample * facts.channels * shown_side(facts) ** 2
        warn_of_space(samples, size / 4 if sampling.save_images == "jpg" else size, "the samples")
    return processes.from_main((grid, samples))
