"""The flags of the downstream test scripts, the request that they amount to, and the held-out images that it names."""

from dataclasses import dataclass, replace

from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.image_dataset import shown_side
from evaluation.features.registry import FeatureOptions
from evaluation.pair_comparison import PairOptions
from evaluation.score import ScoreOptions
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.loading import AutoencoderOptions
from models.registry import NetworkOptions, network_groups
from options import UsageError, option
from runtime.precision import MachineOptions
from sampling.loading import LoadedSampler
from sampling.request import IGNORED_SAMPLING_FLAGS, SamplerRequest, SourceOptions
from tasks.task import TrainingTask

__all__ = [
    "IGNORED_FLAGS",
    "ConditionedOptions",
    "ConditionedRequest",
    "conditioned_groups",
    "open_held_out",
    "set_labels",
]


@dataclass(frozen=True)
class ConditionedOptions:
    """Sampling for held-out images."""

    n_sample: int = option(50000, "held-out images to sample for, at most, from the first on", minimum=1)
    num_completions: int = option(1, "samples of each image, drawn with the seeds seed, seed + 1, ...", minimum=1)
    batch_size: int = option(200, "samples drawn at a time; only torchdiffeq's adaptive solvers see it", minimum=1)
    use_labels: bool = option(
        True, "tell a class-conditional network the images' classes; off: the null class, which it must know"
    )
    compute_fid: bool = option(False, "score the samples (the first of each image) against the images")
    output_dir: str = option("", "folder for the results; default: in samples/ beside the checkpoint")
    output_json: str = option("", "file for the result; default: result.json in that folder")
    output_log: str = option("", "also append the result's line to this file")


def conditioned_groups() -> tuple[type, ...]:
    """The option dataclasses that all downstream test scripts have, in the order of `--help`."""
    return (
        SourceOptions,
        ConditionedOptions,
        SolverOptions,
        GuidanceOptions,
        ScoreOptions,
        PairOptions,
        FeatureOptions,
        DatasetOptions,
        AutoencoderOptions,
        NetworkOptions,
        *network_groups(),
        MachineOptions,
    )


# Published flags without an effect, there or here.
IGNORED_FLAGS = {
    **IGNORED_SAMPLING_FLAGS,
    "compute_nfe": "every result tells the evaluations",
    "measure_time": "every result tells the seconds, and test_flow_latent.py measures them in detail",
    "real_img_dir": "samples are scored against the images that they stand for; see pytorch_fid/fid_score.py for others",
}


@dataclass(frozen=True)
class ConditionedRequest:
    """Samples for held-out images, and their scores.

    Args:
        sampler: the network, solver and guidance; its `given` are all flags that the user gave.
        conditioned: number of images and samples, labels, and the folder of results.
        data: the images.
        scores: metrics of the samples as a set.
        pairs: metrics of samples paired with their images.
        features: the feature network.
    """

    sampler: SamplerRequest
    conditioned: ConditionedOptions
    data: DatasetOptions
    scores: ScoreOptions
    pairs: PairOptions
    features: FeatureOptions


def open_held_out(request: ConditionedRequest, loaded: LoadedSampler, task: TrainingTask) -> ImageDataset:
    """Open the validation images of --dataset, or of the network's own dataset if the flag was not given.

    Raises:
        UsageError: the images differ from the network's in channels or size.
    """
    stored = loaded.header.dataset
    name = request.data.dataset if "dataset" in request.sampler.given else stored.name
    dataset = task.open(replace(request.data, dataset=name, image_size=stored.image_size), "validation")
    theirs = dataset.facts.channels, shown_side(dataset.facts)
    ours = stored.channels, shown_side(stored)
    if theirs != ours:
        raise UsageError(
            f"--dataset {name} does not suit {loaded.path}: its images have {theirs[0]} channels and {theirs[1]} pixels "
            f"a side, those of {stored.name}, which it was trained on, {ours[0]} and {ours[1]}"
        )
    return dataset


def set_labels(dataset: ImageDataset, loaded: LoadedSampler, use_labels: bool) -> None:
    """Set the labels that the network is given for the images: their classes, or the null class without `use_labels`.

    An unconditional network gets label 0.

    Raises:
        UsageError: the network was not trained with the null class that is asked for.
    """
    classes = loaded.header.num_classes
    if classes == 1:
        dataset.labels.zero_()
    elif not use_labels:
        if not loaded.sampler.drops_labels:
            raise UsageError("--no-use_labels needs a network with a null class (trained with --label_dropout above 0)")
        dataset.labels.fill_(classes)
