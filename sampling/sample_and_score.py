"""The work of the test scripts: draw samples, show, keep and score them, and say how they were made."""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets_prep.datasets import DatasetOptions
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.reference import summary_at
from evaluation.score import ScoreOptions, needs_of, reference_statistics, score_images
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.pixels import DECODING
from models.registry import FAMILY_OPTIONS, NetworkOptions
from options import Options, option
from runtime.distributed import Processes
from runtime.files import write_json
from runtime.pictures import GridOptions, save_sheet
from runtime.precision import MachineOptions
from sampling.labels import choose_labels
from sampling.sampler import GeneratedBatch, Labels, Sampler, first_images, generate
from sampling.setup import Opened, SourceOptions, open_sampler
from sampling.writer import FORMATS, SampleWriter, held_or_drawn

__all__ = [
    "SAMPLING_GROUPS",
    "SamplingOptions",
    "Tally",
    "describe_evaluations",
    "labels_of",
    "output_folder",
    "sample_and_score",
]


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling."""

    n_sample: int = option(50000, "number of samples", minimum=1)
    batch_size: int = option(200, "samples drawn at a time; only torchdiffeq's adaptive solvers see it", minimum=1)
    labels: str = option("balanced", "classes asked for: balanced (in turn), random, or a file of one class id a line")
    compute_fid: bool = option(False, "score the samples against the dataset's training images")
    real_img_dir: str = option("", "score against these images, or this statistics file (.npz, .npy), instead")
    output_dir: str = option(
        "", "folder for samples (and the grid, unless they are png or jpg); default: samples/ beside the checkpoint"
    )
    save_images: str | None = option(
        None,
        "also write every sample, in this format; samples that the folder holds are not drawn again",
        choices=FORMATS,
    )
    output_json: str = option("", "file for the result; default: beside the grid")
    output_log: str = option("", "also append the result's line to this file")


SAMPLING_GROUPS = (
    SourceOptions,
    SamplingOptions,
    GridOptions,
    SolverOptions,
    GuidanceOptions,
    ScoreOptions,
    FeatureOptions,
    DatasetOptions,
    AutoencoderOptions,
    NetworkOptions,
    *FAMILY_OPTIONS,
    MachineOptions,
)


def sample_and_score(options: Options, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
    """Draw the samples that the options describe; returns the result that is also written as JSON.

    Several processes share the batches; the main one writes the grid and the result, which all return.

    Raises:
        UsageError: no such checkpoint, flags that contradict it, or a folder with other samples.
    """
    sampling = options[SamplingOptions]
    opened = open_sampler(options, processes, batches=sampling.n_sample / sampling.batch_size / processes.count)
    if sampling.real_img_dir and not sampling.compute_fid:
        print("note: --real_img_dir has no effect without --compute_fid")
    labels, label_rule = labels_of(sampling, opened.sampler)
    num_classes, shape = opened.header.num_classes, options[GridOptions]
    grid_folder, samples_folder = _output_folders(sampling, opened)
    writer = None
    if sampling.save_images:
        settings = {**opened.settings, "labels": label_rule}
        writer = SampleWriter(samples_folder, sampling.save_images, settings, processes)
    tally = Tally(shape.count(num_classes), num_classes)
    started = time.perf_counter()
    batches = tally.watch(_batches(opened.sampler, labels, sampling, writer, processes))
    if sampling.compute_fid:
        score = _score(batches, options, opened, processes)
    else:
        score = {}
        deque(batches, maxlen=0)
    seconds = time.perf_counter() - started
    if writer is not None:
        writer.close()
    grid = grid_folder / f"{opened.stem}.png"
    first = first_images(tally.batches, shape.count(num_classes), processes)
    if processes.is_main:
        save_sheet(first, grid, shape.columns(num_classes))
    result = {
        **opened.result(),
        **score,
        "samples": sampling.n_sample,
        **describe_evaluations(*tally.counts(processes)),
        "decoding": DECODING,
        "label_rule": label_rule,
        "label_counts": processes.sum(tally.label_counts).tolist(),
        "batch_size": sampling.batch_size,
        "processes": processes.count,
        "seconds": round(seconds, 1),
        "grid": str(grid),
    }
    if processes.is_main:
        write_json(sampling.output_json or grid.with_suffix(".json"), result)
    return result


def labels_of(sampling: SamplingOptions, sampler: Sampler) -> tuple[Labels, str]:
    """The labels of the samples, and their rule: the option's word, or the SHA-256 of its file."""
    labels = choose_labels(sampling.labels, sampler.seed, sampler.num_classes, sampling.n_sample)
    path = Path(sampling.labels)
    named = sampling.labels in ("balanced", "random")
    return labels, sampling.labels if named else f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def describe_evaluations(evaluations: torch.Tensor, network_evaluations: torch.Tensor) -> dict[str, Any]:
    """Velocity evaluations per sample (mean, smallest, largest), and those of networks, where guidance counts two."""
    return {
        "nfe": evaluations.double().mean().item(),
        "nfe_range": [int(evaluations.min()), int(evaluations.max())],
        "network_evaluations": network_evaluations.double().mean().item(),
    }


def output_folder(sampling: SamplingOptions, opened: Opened) -> Path:
    """Where pictures and results go: --output_dir, or samples/ beside the checkpoint."""
    return Path(sampling.output_dir) if sampling.output_dir else opened.path.parent / "samples"


class Tally:
    """Watches a stream of batches: keeps those with samples of the grid, and counts evaluations and labels."""

    def __init__(self, count: int, num_classes: int) -> None:
        self.batches: list[GeneratedBatch] = []
        self.label_counts = torch.zeros(num_classes, dtype=torch.long)
        self._count = count
        self._counts: list[torch.Tensor] = []

    def watch(self, batches: Iterable[GeneratedBatch]) -> Iterator[GeneratedBatch]:
        """The same batches."""
        for batch in batches:
            self._counts.append(torch.stack([batch.evaluations, batch.network_evaluations]))
            self.label_counts += torch.bincount(batch.labels, minlength=len(self.label_counts))
            if min(batch.indices) < self._count:
                self.batches.append(batch)
            yield batch

    def counts(self, processes: Processes) -> torch.Tensor:
        """Evaluations of the velocity and of networks, int64 [2, N], of the samples of all processes."""
        parts = [part for counts in processes.gather(self._counts) for part in counts]
        return processes.from_main(torch.cat(parts, dim=1) if parts else torch.empty(2, 0))


def _batches(
    sampler: Sampler, labels: Labels, sampling: SamplingOptions, writer: SampleWriter | None, processes: Processes
) -> Iterator[GeneratedBatch]:
    """This process's share of the samples, those in the writer's folder as they are."""

    def draw(indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        return generate(sampler, indices, batch_size=sampling.batch_size, labels=labels, processes=processes)

    exact = not (sampling.save_images == "jpg" and sampling.compute_fid)  # what was drawn is not what the jpg holds
    return held_or_drawn(range(sampling.n_sample), draw, writer, sampling.batch_size, processes, reread=exact)


def _score(batches: Iterable[GeneratedBatch], options: Options, opened: Opened, processes: Processes) -> dict[str, Any]:
    sampling, scoring, stored = options[SamplingOptions], options[ScoreOptions], opened.header.dataset
    real = sampling.real_img_dir
    with processes.main_first():
        features = choose_features(options[FeatureOptions], stored.name, opened.sampler.machine)
        dataset = None if real else opened.real_images(options[DatasetOptions], "train")
    if dataset is None:
        needs = needs_of(scoring.metrics, reference=True)
        reference = summary_at(real, features, needs, sampling.batch_size, processes)
    else:
        reference = reference_statistics(dataset, features, options[DatasetOptions].derived, scoring.metrics, processes)
    names = stored.class_names if opened.header.num_classes == len(stored.class_names) else ()
    return score_images(batches, features, reference, names, scoring, processes)


def _output_folders(sampling: SamplingOptions, opened: Opened) -> tuple[Path, Path]:
    """Where the grid and the samples go: never together where samples are image files, which get scored as a folder."""
    beside = opened.path.parent / "samples"
    if not sampling.output_dir:
        return beside, beside / opened.stem
    chosen = Path(sampling.output_dir)
    return (beside if sampling.save_images in ("png", "jpg") else chosen), chosen
