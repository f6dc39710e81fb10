"""The work of the test scripts: find a checkpoint, draw samples, show, keep and score them, and say how."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from datasets_prep.datasets import DatasetFacts, DatasetOptions, open_dataset
from evaluation.features import FeatureOptions, choose_features
from evaluation.generate import GeneratedBatch, check_guidance, first_images, generate
from evaluation.pictures import grid_count, save_grid
from evaluation.published import open_published
from evaluation.reference import summary_at
from evaluation.score import ScoreOptions, needs_of, reference_statistics, score_samples
from evaluation.writer import FORMATS, SampleWriter
from flow.guidance import GuidanceOptions
from flow.solvers import ADAPTIVE, SolverOptions
from models.autoencoder import AutoencoderOptions
from models.registry import FAMILY_OPTIONS, NetworkOptions
from options import Options, UsageError, as_json, option
from runtime.checkpoints import LoadedModel, experiment_folder, find_checkpoint, load_model, newest_model
from runtime.distributed import Processes
from runtime.files import write_json
from runtime.precision import Machine, MachineOptions, choose_machine
from runtime.progress import progress_bar
from runtime.randomness import NOISE_SOURCES
from runtime.torch_files import is_torch_file

__all__ = ["SAMPLING_GROUPS", "SamplingOptions", "sample_and_score"]


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling."""

    checkpoint: str = option(
        "", "checkpoint, ours or a published .pth; default: the newest of the experiment", flags=("--model_ckpt",)
    )
    exp: str = option("experiment", "name of the experiment")
    save_root: str = option("saved_info", "folder of all experiments")
    epoch_id: int | None = option(None, "epoch of the experiment's checkpoint; default: the newest")
    n_sample: int = option(50000, "number of samples", minimum=1)
    batch_size: int = option(200, "samples drawn at a time; only torchdiffeq's adaptive solvers see it", minimum=1)
    seed: int = option(42, "seed of the noise; sample i depends on (seed, i) alone", minimum=0)
    generator: str = option(
        "determ-indiv",
        "source of the noise: a stream per sample (determ, determ-indiv), or torch's global generator (dummy)",
        choices=tuple(NOISE_SOURCES),
    )
    compute_fid: bool = option(False, "score the samples against the dataset's training images")
    real_img_dir: str = option("", "score against these images, or this statistics file (.npz, .npy), instead")
    output_dir: str = option(
        "", "folder for samples (and the grid, unless they are png or jpg); default: samples/ beside the checkpoint"
    )
    save_images: str | None = option(None, "also write every sample, in this format", choices=FORMATS)
    output_json: str = option("", "file for the result; default: beside the grid")
    output_log: str = option("", "also append the result's line to this file")


SAMPLING_GROUPS = (
    SamplingOptions,
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
        UsageError: no such checkpoint, or flags that contradict it.
    """
    sampling, solver, guidance = options[SamplingOptions], options[SolverOptions], options[GuidanceOptions]
    machine = choose_machine(options[MachineOptions], processes)
    path = _checkpoint_path(sampling, options[DatasetOptions].dataset)
    model = _load(path, options, machine, processes)
    _note_unused(options)
    stem = f"{path.stem}_{solver.method}_cfg{guidance.cfg_scale:g}_seed{sampling.seed}"
    folder, samples_folder = _output_folders(sampling, path, stem)
    writer = SampleWriter(samples_folder, sampling.save_images, processes) if sampling.save_images else None
    keeper = _Keeper(grid_count(model.header["num_classes"]), writer)
    started = time.perf_counter()
    batches = keeper.watch(_batches(model, options, machine, processes))
    if sampling.compute_fid:
        score = _score(batches, options, model, machine, processes)
    else:
        score = {}
        deque(batches, maxlen=0)
    evaluations = processes.sum(torch.tensor(keeper.evaluations)).item()
    seconds = time.perf_counter() - started
    if writer is not None:
        writer.close()
    grid = folder / f"{stem}.png"
    first = first_images(keeper.batches, grid_count(model.header["num_classes"]), processes)
    if processes.is_main:
        save_grid(first, grid, model.header["num_classes"])
    result = {
        "checkpoint": str(path),
        "weights_sha256": model.header["weights_sha256"],
        "step": model.header["step"],
        **score,
        "samples": sampling.n_sample,
        "nfe": evaluations / sampling.n_sample,
        "guided_evaluations": guidance.cfg_scale != 1,
        "seed": sampling.seed,
        "generator": sampling.generator,
        "solver": as_json(solver),
        "cfg_scale": guidance.cfg_scale,
        "precision": machine.precision,
        "batch_size": sampling.batch_size,
        "processes": processes.count,
        "seconds": round(seconds, 1),
        "grid": str(grid),
    }
    if processes.is_main:
        write_json(sampling.output_json or folder / f"{stem}.json", result)
    return result


def _note_unused(options: Options) -> None:
    method, sampling = options[SolverOptions].method, options[SamplingOptions]
    if method in ADAPTIVE and "num_steps" in options.explicit:
        print(f"note: --num_steps has no effect on the adaptive solver {method}, which follows --atol and --rtol")
    if sampling.real_img_dir and not sampling.compute_fid:
        print("note: --real_img_dir has no effect without --compute_fid")


def _load(path: Path, options: Options, machine: Machine, processes: Processes) -> LoadedModel:
    """The checkpoint's model, which the flags must fit."""
    moved = "pretrained_autoencoder_ckpt" in options.given(AutoencoderOptions)
    with processes.main_first():  # the others find the autoencoder that it may have downloaded
        if is_torch_file(path):
            model = open_published(path, options, machine.device)
        else:
            model = load_model(path, machine.device, options[AutoencoderOptions] if moved else None)
            _refuse_contradictions(options, model.header, path)
    check_guidance(model.header["network"], options[GuidanceOptions].cfg_scale)
    return model


class _Keeper:
    """Watches a stream of batches: keeps those with samples of the grid, counts evaluations, writes files."""

    def __init__(self, count: int, writer: SampleWriter | None) -> None:
        self.evaluations = 0
        self.batches: list[GeneratedBatch] = []
        self._count = count
        self._writer = writer

    def watch(self, batches: Iterable[GeneratedBatch]) -> Iterator[GeneratedBatch]:
        """The same batches."""
        for batch in batches:
            self.evaluations += batch.evaluations * len(batch.indices)
            if batch.indices[0] < self._count:
                self.batches.append(batch)
            if self._writer is not None:
                self._writer.add(batch)
            yield batch


def _batches(model: LoadedModel, options: Options, machine: Machine, processes: Processes) -> Iterator[GeneratedBatch]:
    sampling, header = options[SamplingOptions], model.header
    stored = header["dataset"]
    network = torch.compile(model.network) if options[MachineOptions].compile else model.network
    stream = generate(
        network,
        model.autoencoder,
        DatasetFacts(**stored | {"class_names": tuple(stored["class_names"])}),
        (header["latent_channels"], header["latent_size"], header["latent_size"]),
        header["num_classes"],
        range(sampling.n_sample),
        options[SolverOptions],
        machine,
        seed=sampling.seed,
        cfg_scale=options[GuidanceOptions].cfg_scale,
        batch_size=sampling.batch_size,
        generator=sampling.generator,
        processes=processes,
    )
    with progress_bar(total=sampling.n_sample // processes.count, desc="sampling", unit="image") as bar:
        for batch in stream:
            bar.update(len(batch.indices))
            yield batch


def _score(
    batches: Iterable[GeneratedBatch], options: Options, model: LoadedModel, machine: Machine, processes: Processes
) -> dict[str, Any]:
    sampling, stored = options[SamplingOptions], model.header["dataset"]
    data = replace(options[DatasetOptions], dataset=stored["name"], image_size=stored["image_size"])
    scoring, real = options[ScoreOptions], sampling.real_img_dir
    with processes.main_first():
        features = choose_features(options[FeatureOptions], data.dataset, machine)
        dataset = None if real else open_dataset(data, "train")
    if dataset is None:
        needs = needs_of(scoring.metrics, reference=True) or {"moments"}
        reference = summary_at(real, features, needs, sampling.batch_size, processes)
    else:
        reference = reference_statistics(dataset, features, data.datadir, scoring.metrics, processes)
    names = stored["class_names"] if model.header["num_classes"] == len(stored["class_names"]) else ()
    return score_samples(batches, features, reference, names, scoring, processes)


def _output_folders(sampling: SamplingOptions, checkpoint: Path, stem: str) -> tuple[Path, Path]:
    """Where the grid and the samples go: never together where samples are image files, which get scored as a folder."""
    beside = checkpoint.parent / "samples"
    if not sampling.output_dir:
        return beside, beside / stem
    chosen = Path(sampling.output_dir)
    return (beside if sampling.save_images in ("png", "jpg") else chosen), chosen


def _checkpoint_path(sampling: SamplingOptions, dataset: str) -> Path:
    folder = experiment_folder(sampling.save_root, dataset, sampling.exp)
    if sampling.checkpoint:
        return find_checkpoint(sampling.checkpoint, folder)
    return newest_model(folder, sampling.epoch_id)


def _refuse_contradictions(options: Options, header: Mapping[str, Any], path: Path) -> None:
    """An explicitly given flag must say what the checkpoint says."""
    image_size = header["dataset"]["image_size"]
    stored = {"dataset": header["dataset"]["name"], "image_size": image_size, **header["network"]}
    stored |= {"f": image_size // header["latent_size"], "scale_factor": _scale_factor(header["autoencoder"])}
    given = {name: as_json(options.values[name]) for name in options.explicit if name in stored}
    if "model_type" in options.explicit or options[NetworkOptions].use_origin_adm:
        stored["model_type"], given["model_type"] = header["model_type"], options[NetworkOptions].resolve()
    for name, value in given.items():
        if value != stored[name]:
            raise UsageError(
                f"--{name} {value} contradicts the checkpoint {path}, which says {stored[name]}: "
                "leave the flag out, or choose another checkpoint"
            )


def _scale_factor(autoencoder: Mapping[str, Any]) -> float | None:
    """The factor that an autoencoder's statistics amount to; None where one number does not tell."""
    means, stds = autoencoder.get("latents_mean", ()), autoencoder.get("latents_std", ())
    return round(1 / stds[0], 6) if not any(means) and len(set(stds)) == 1 else None
