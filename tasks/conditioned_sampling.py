"""Samples for held-out images, such as completions of what masks hide: drawn, written, shown and scored in pairs.

The folder of results holds PNG files of matching names: `originals`, the conditions (`masks` and `masked`, or `maps`), and
`completions` or `samples` (further ones of each image in `completions_1`, ...), and a contact sheet.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.pair_comparison import Pair, PairOptions, score_pairs
from evaluation.score import ScoreOptions, result_line
from evaluation.sources import dataset_source
from models.autoencoders.pixels import DECODING
from options import Options
from runtime.distributed import Processes
from runtime.files import append_line, atomic_path, write_json
from runtime.pictures import save_sheet, side_by_side
from runtime.precision import DeviceOptions, choose_device
from runtime.progress import progress_bar
from sampling.sample_and_score import Tally, describe_evaluations
from sampling.sampler import GeneratedBatch, Sampler, first_images, generate
from sampling.setup import Opened
from sampling.writer import SampleWriter, held_or_drawn
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_setup import ConditionedOptions, note_unused
from tasks.pair_scores import PairScore

__all__ = [
    "Setting",
    "report",
    "sample_for_images",
]

OF_SCORES = (
    "metrics",
    "error_bar",
    "image_format",
    "lpips",
    "lpips_weights",
    "segmentation_weights",
    "feature_weights",
)
PICTURED = 24  # images on the contact sheet


Draw = Callable[[Sampler, Sequence[int]], Iterator[GeneratedBatch]]


@dataclass(frozen=True)
class Setting:
    """How the samples of a task are made for images.

    Args:
        conditioned: the images and what the network sees of them.
        name: tells the conditions apart in the folder's name.
        settings: what the samples depend on, besides the sampler's own settings.
        output: the folder of the samples.
        inputs: folders of PNG files and the images uint8 [B, C, H, W] that they hold, of numbers [B].
        finish: what becomes of samples uint8 [B, C, H, W] of numbers [B].
        pair_scores: scores besides those of all pairs.
        draw: another way of drawing than `generate` under the condition.
        facts: further entries of the result, about the images.
    """

    conditioned: ConditionedImages
    name: str
    settings: Mapping[str, Any]
    output: str
    inputs: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    finish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda samples, places: samples
    pair_scores: Sequence[PairScore] = field(default_factory=tuple)
    draw: Draw | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def sample_for_images(
    opened: Opened,
    make_setting: Callable[[FeatureNetwork | None], Setting],
    options: Options,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Draw, write, show and score; returns the result that is also written as JSON.

    Args:
        opened: the sampler.
        make_setting: given the feature network, if there is to be a score.
        options: of CONDITIONED_GROUPS.
        processes: they share the batches, and all get the result.

    Raises:
        UsageError: a folder with other samples.
    """
    wanted, started = options[ConditionedOptions], time.perf_counter()
    features = None
    if not wanted.compute_fid:
        note_unused(options, OF_SCORES, "without --compute_fid")
    else:
        with processes.main_first():
            dataset_name = opened.header.dataset.name
            features = choose_features(options[FeatureOptions], dataset_name, opened.sampler.machine)
    setting = make_setting(features)
    folder = Path(wanted.output_dir or opened.path.parent / "samples" / f"{opened.stem}_{setting.name}")
    writers = [_writer(opened, setting, number, folder, options, processes) for number in range(wanted.num_completions)]
    _write_inputs(setting, folder, processes)

    tally = Tally(PICTURED, opened.header.num_classes + 1)  # the null class among them
    score, pictures = _draw_all(opened, setting, writers, tally, features, options, processes)
    sheet = folder / "contact_sheet.png"
    if processes.is_main:
        _save_contact_sheet(setting.conditioned, pictures, sheet)
    result = {
        **opened.result(),
        **setting.settings,
        "use_labels": wanted.use_labels,
        **setting.facts,
        **score,
        "samples": len(setting.conditioned.images),
        "completions": wanted.num_completions,
        **describe_evaluations(*tally.counts(processes)),
        "decoding": DECODING,
        "batch_size": wanted.batch_size,
        "processes": processes.count,
        "seconds": round(time.perf_counter() - started, 1),
        "folder": str(folder),
        "sheet": str(sheet),
    }
    if processes.is_main:
        write_json(wanted.output_json or folder / "result.json", result)
    return result


def _draw_all(
    opened: Opened,
    setting: Setting,
    writers: Sequence[SampleWriter],
    tally: Tally,
    features: FeatureNetwork | None,
    options: Options,
    processes: Processes,
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Draw the samples of all numbers; the score of the first ones, and of each number the samples for the sheet."""
    score: dict[str, Any] = {}
    pictures = []
    for number, writer in enumerate(writers):
        batches = _batches(opened, setting, number, writer, options, processes)
        if number == 0:
            batches = tally.watch(batches)
            if features is not None:
                score = _score(batches, setting, features, options, processes)
            deque(batches, maxlen=0)
            batches = iter(tally.batches)
        pictures.append(first_images(batches, PICTURED, processes))
    return score, pictures


def _save_contact_sheet(images: ConditionedImages, pictures: Sequence[torch.Tensor], path: Path) -> None:
    """The images, their conditions, and the samples of each number, side by side."""
    places = torch.arange(len(pictures[0]))
    arranged = side_by_side([images.originals(places), images.shown(places), *pictures])
    save_sheet(arranged.images, path, arranged.columns)


def _writer(
    opened: Opened, setting: Setting, number: int, folder: Path, options: Options, processes: Processes
) -> SampleWriter:
    """The writer of the samples number `number` of all images; refuses a folder with others."""
    used = {"use_labels": options[ConditionedOptions].use_labels}
    settings = {**opened.settings, **setting.settings, **used, "seed": opened.sampler.seed + number}
    name = f"{setting.output}_{number}" if number else setting.output
    return SampleWriter(folder / name, "png", settings, processes)


def _batches(
    opened: Opened, setting: Setting, number: int, writer: SampleWriter, options: Options, processes: Processes
) -> Iterator[GeneratedBatch]:
    """This process's share of the samples number `number` of all images, finished; those in the folder as they are."""
    batch_size, images = options[ConditionedOptions].batch_size, setting.conditioned
    sampler = replace(opened.sampler, seed=opened.sampler.seed + number)

    def draw(indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        if setting.draw is None:
            drawn = generate(
                sampler,
                indices,
                batch_size=batch_size,
                labels=images.labels(),
                dense=images.dense(sampler),
                processes=processes,
            )
        else:
            parts = processes.share([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
            drawn = (batch for part in parts for batch in setting.draw(sampler, part))
        for batch in drawn:
            yield batch._replace(images=setting.finish(batch.images, torch.tensor(batch.indices)))

    yield from held_or_drawn(range(len(images.images)), draw, writer, batch_size, processes)
    writer.close()


def _score(
    batches: Iterable[GeneratedBatch],
    setting: Setting,
    features: FeatureNetwork,
    options: Options,
    processes: Processes,
) -> dict[str, Any]:
    images, pair_scores = setting.conditioned, setting.pair_scores

    def pairs() -> Iterator[Pair]:
        for batch in batches:
            places = torch.tensor(batch.indices)
            originals = images.originals(places)
            for pair_score in pair_scores:
                pair_score.update(batch.images, originals, places)
            yield Pair(batch.images, originals, batch.indices)

    device, meta = choose_device(options[DeviceOptions], processes), dataset_source(images.images).meta
    result = score_pairs(pairs(), meta, features, options[ScoreOptions], options[PairOptions], device, processes)
    extra: dict[str, Any] = {}
    for pair_score in pair_scores:
        extra |= pair_score.result(processes.sum(pair_score.totals()))
    return result | extra | {"extra_scores": list(extra)}


def _write_inputs(setting: Setting, folder: Path, processes: Processes) -> None:
    """The images that samples are made for and their conditions; each process writes its share."""
    folders = {"originals": setting.conditioned.originals, **setting.inputs}
    mine = processes.share(range(len(setting.conditioned.images)))
    for place in progress_bar(mine, desc="writing the images", unit="image", leave=False):
        for name, images_of in folders.items():
            path = folder / name / f"{place:06d}.png"
            if not path.exists():
                with atomic_path(path, durable=False) as temporary:
                    to_pil_image(images_of(torch.tensor([place]))[0]).save(temporary, format="PNG")
    processes.barrier()


def summary_of_pairs(result: dict[str, Any]) -> str:
    """One line about samples for images and their scores."""
    score = f", {result_line(result)}" if "value" in result else ""
    holes = f", mean hole ratio {result['hole_ratio']:.3f}" if "hole_ratio" in result else ""
    extra = "".join(f", {name} {result[name]:.4g}" for name in result.get("extra_scores", ()))
    return (
        f"{result['sheet']}: {result['samples']} images, {result['nfe']:g} evaluations each, {result['seconds']:g} s"
        f"{holes}{extra}{score}"
    )


def report(result: dict[str, Any], options: Options, processes: Processes) -> None:
    """Print the result's line, and append it to --output_log."""
    line, log = summary_of_pairs(result), options[ConditionedOptions].output_log
    print(line)
    if log and processes.is_main:
        append_line(log, line)
