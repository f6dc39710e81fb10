"""Sampling for held-out images, such as completions of masked images. Samples are written and scored against the images.

The results folder holds a contact sheet, and PNG files with matching names in subfolders:
    originals                      the images
    masks and masked, or maps      the conditions
    completions or samples         the samples; further samples of each image are in completions_1, ...
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from datasets_prep.image_dataset import shown_side
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import choose_features
from evaluation.pair_comparison import Pair, check_pairs, score_pairs
from evaluation.sources import dataset_source
from models.autoencoders.pixels import DECODING
from runtime.distributed import Processes
from runtime.files import atomic_path
from runtime.outputs import check_folder, record_failure, warn_of_space
from runtime.pictures import save_sheet, side_by_side
from runtime.progress import progress_bar
from sampling.loading import LoadedSampler
from sampling.request import note_unused
from sampling.results import write_result
from sampling.sampler import GeneratedBatch, Sampler, first_images, generate
from sampling.tally import Tally, describe_evaluations
from sampling.writer import SampleWriter, read_or_draw
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_request import ConditionedRequest
from tasks.pair_scores import PairScore

__all__ = ["Draw", "SamplingPlan", "sample_for_images"]

SCORING_FLAGS = (
    "metrics",
    "error_bar",
    "image_format",
    "lpips",
    "lpips_weights",
    "segmentation_weights",
    "feature_weights",
)
SHEET_IMAGES = 24  # images on the contact sheet

# draw(sampler, indices) yields samples for the images `indices`.
Draw = Callable[[Sampler, Sequence[int]], Iterator[GeneratedBatch]]


@dataclass(frozen=True)
class SamplingPlan:
    """How a task samples for its images.

    Args:
        conditioned: the images and their conditions.
        name: describes the conditions in the results folder's name.
        settings: all settings of the samples that the sampler's settings do not include.
        output: folder of the samples, such as "completions".
        inputs: further folders of PNG files. Each function maps image indices [B] to images uint8 [B, C, H, W].
        finish: turns samples uint8 [B, C, H, W] and image indices [B] into the images that are written and scored.
        pair_scores: the task's own scores.
        draw: how to draw samples; None: `generate` with the conditions.
        facts: further entries of the result.
    """

    conditioned: ConditionedImages
    name: str
    settings: Mapping[str, Any]
    output: str
    inputs: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    finish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda samples, image_indices: samples
    pair_scores: Sequence[PairScore] = field(default_factory=tuple)
    draw: Draw | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def sample_for_images(
    request: ConditionedRequest,
    loaded: LoadedSampler,
    make_plan: Callable[[FeatureNetwork | None], SamplingPlan],
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Draw, write and score samples for images, and save a contact sheet.

    Args:
        request: number of samples, results folder, and scores.
        loaded: the sampler.
        make_plan: creates the task's plan from the feature network, or from None if samples are not scored.
        processes: the batches are sharded over them.

    Returns:
        The result, in every process. It is also written as JSON.

    Raises:
        UsageError: the folder holds samples with other settings or cannot be written, or more than a few samples are not
            finite.
    """
    started = time.perf_counter()
    features = _choose_features(request, loaded, processes)
    run = _Run(request, loaded, make_plan(features), processes)
    if features is not None:
        images = run.plan.conditioned.images
        check_pairs(request.pairs, request.scores, len(images), shown_side(images.facts))
    if processes.is_main:
        _check_output(run)
    processes.barrier()
    writers = [run.writer(number) for number in range(request.conditioned.num_completions)]
    _write_inputs(run.plan, run.folder, processes)
    score, pictures, tallies = _draw_all(run, writers, features)
    sheet = run.folder / "contact_sheet.png"
    warnings = list(dict.fromkeys([text for tally in tallies for text in tally.warnings(processes)]))
    result = {
        **loaded.describe(),
        **run.plan.settings,
        "use_labels": request.conditioned.use_labels,
        **run.plan.facts,
        **score,
        **({"warnings": [*warnings, *score.get("warnings", [])]} if warnings else {}),
        "samples": len(run.plan.conditioned.images),
        "completions": request.conditioned.num_completions,
        **describe_evaluations(*tallies[0].counts(processes)),
        "decoding": DECODING,
        "batch_size": request.conditioned.batch_size,
        "processes": processes.count,
        "seconds": round(time.perf_counter() - started, 1),
        "folder": str(run.folder),
        "sheet": str(sheet),
    }
    for writer in writers:
        with record_failure(result):
            writer.close()
    if processes.is_main:
        with record_failure(result):
            _save_contact_sheet(run.plan.conditioned, pictures, sheet)
        write_result(request.conditioned.output_json, run.folder / "result.json", result)
    return result


@dataclass(frozen=True)
class _Run:
    """One call of `sample_for_images`. Sample `number` of every image has the seed `seed + number`."""

    request: ConditionedRequest
    loaded: LoadedSampler
    plan: SamplingPlan
    processes: Processes

    @property
    def folder(self) -> Path:
        """The results folder."""
        chosen = self.request.conditioned.output_dir
        default = self.loaded.output_folder() / f"{self.loaded.stem}_{self.plan.name}"
        return Path(chosen) if chosen else default

    def writer(self, number: int) -> SampleWriter:
        """The writer of sample `number` of every image. It rejects a folder that holds samples with other settings."""
        settings = {
            **self.loaded.settings,
            **self.plan.settings,
            "use_labels": self.request.conditioned.use_labels,
            "seed": self.loaded.sampler.seed + number,
        }
        name = f"{self.plan.output}_{number}" if number else self.plan.output
        return SampleWriter(self.folder / name, "png", settings, self.processes)

    def batches(self, number: int, writer: SampleWriter) -> Iterator[GeneratedBatch]:
        """Yield this process's share of sample `number` of every image, after `finish`. Existing samples are read."""
        batch_size, images = self.request.conditioned.batch_size, self.plan.conditioned
        sampler = replace(self.loaded.sampler, seed=self.loaded.sampler.seed + number)

        def draw(indices: Sequence[int]) -> Iterator[GeneratedBatch]:
            for batch in self._draw(sampler, indices):
                yield batch._replace(images=self.plan.finish(batch.images, torch.tensor(batch.indices)))

        yield from read_or_draw(range(len(images.images)), draw, writer, batch_size, self.processes)

    def _draw(self, sampler: Sampler, indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        batch_size, images = self.request.conditioned.batch_size, self.plan.conditioned
        if self.plan.draw is None:
            labels, dense = images.labels(), images.dense(sampler)
            return generate(
                sampler, indices, batch_size=batch_size, labels=labels, dense=dense, processes=self.processes
            )
        chunks = self.processes.share([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
        draw = self.plan.draw
        return (batch for chunk in chunks for batch in draw(sampler, chunk))


def _choose_features(request: ConditionedRequest, loaded: LoadedSampler, processes: Processes) -> FeatureNetwork | None:
    """Load the feature network; None without --compute_fid."""
    if not request.conditioned.compute_fid:
        note_unused(request.sampler.given, SCORING_FLAGS, "without --compute_fid")
        return None
    with processes.main_first():
        return choose_features(request.features, loaded.header.dataset.name, loaded.sampler.machine)


def _draw_all(
    run: _Run, writers: Sequence[SampleWriter], features: FeatureNetwork | None
) -> tuple[dict[str, Any], list[torch.Tensor], list[Tally]]:
    """Draw all samples.

    Returns:
        The score of the first sample of each image, and for each sample number the contact sheet's images and the tally.
    """
    score: dict[str, Any] = {}
    pictures, tallies = [], []
    labels = run.loaded.header.num_classes + 1  # including the null class
    for number, writer in enumerate(writers):
        tally = Tally(SHEET_IMAGES, labels, len(run.plan.conditioned.images))
        batches = tally.watch(run.batches(number, writer))
        if number == 0 and features is not None:
            score = _score(run, batches, features)
        deque(batches, maxlen=0)
        pictures.append(first_images(tally.batches, SHEET_IMAGES, run.processes))
        tallies.append(tally)
    return score, pictures, tallies


def _check_output(run: _Run) -> None:
    """Check that the results can be written, and that there is room for the images and the samples of each.

    Raises:
        UsageError: the folder cannot be written.
    """
    check_folder(run.folder, "--output_dir")
    images = run.plan.conditioned.images
    pictures = 1 + len(run.plan.inputs) + run.request.conditioned.num_completions
    size = pictures * len(images) * images.facts.channels * shown_side(images.facts) ** 2
    if not any(run.folder.glob("*/samples*.npz")):
        warn_of_space(run.folder, size, "images and samples")


def _score(run: _Run, batches: Iterable[GeneratedBatch], features: FeatureNetwork) -> dict[str, Any]:
    """Score samples against their images, including the task's own scores."""
    images, pair_scores = run.plan.conditioned, run.plan.pair_scores

    def pairs() -> Iterator[Pair]:
        for batch in batches:
            image_indices = torch.tensor(batch.indices)
            originals = images.originals(image_indices)
            for pair_score in pair_scores:
                pair_score.update(batch.images, originals, image_indices)
            yield Pair(batch.images, originals, batch.indices)

    meta, device = dataset_source(images.images).meta, run.loaded.sampler.machine.device
    scores, pairing = run.request.scores, run.request.pairs
    result = score_pairs(pairs(), meta, features, scores, pairing, device, run.processes)
    extra: dict[str, Any] = {}
    for pair_score in pair_scores:
        extra |= pair_score.result(run.processes.sum(pair_score.totals()))
    return result | extra | {"extra_scores": list(extra)}


def _save_contact_sheet(images: ConditionedImages, pictures: Sequence[torch.Tensor], path: Path) -> None:
    """Save the images, their conditions and their samples side by side."""
    image_indices = torch.arange(len(pictures[0]))
    arranged = side_by_side([images.originals(image_indices), images.shown(image_indices), *pictures])
    save_sheet(arranged.images, path, arranged.columns)


def _write_inputs(plan: SamplingPlan, folder: Path, processes: Processes) -> None:
    """Write the images and their conditions. Each process writes its share."""
    folders = {"originals": plan.conditioned.originals, **plan.inputs}
    mine = processes.share(range(len(plan.conditioned.images)))
    for index in progress_bar(mine, desc="writing the images", unit="image", leave=False):
        for name, images_of in folders.items():
            path = folder / name / f"{index:06d}.png"
            if not path.exists():
                with atomic_path(path, durable=False) as temporary:
                    to_pil_image(images_of(torch.tensor([index]))[0]).save(temporary, format="PNG")
    processes.barrier()
