"""Options of the inpainting and semantic synthesis test scripts, and the held-out images that they select."""

from dataclasses import dataclass, replace

from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.image_dataset import shown_side
from evaluation.features.registry import FeatureOptions
from evaluation.pair_comparison import PairOptions
from evaluation.score import ScoreOptions
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from options import UsageError, option
from runtime.precision import MachineOptions
from sampling.loading import LoadedSampler
from sampling.request import IGNORED_SAMPLING_FLAGS, SamplerRequest, SourceOptions, checkpoint_groups
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

    n_sample: int = option(
        50000, "maximum number of held-out images to sample for, starting with the first", minimum=1, common=True
    )
    num_completions: int = option(1, "samples per image, with the seeds seed, seed + 1, ...", minimum=1, common=True)
    batch_size: int = option(
        200, "samples per batch; changes results only with torchdiffeq's adaptive solvers", minimum=1, common=True
    )
    use_labels: bool = option(
        True, "condition a class-conditional network on the images' classes; off: on its null class, which it must have"
    )
    compute_fid: bool = option(False, "score the samples (the first of each image) against the images", common=True)
    output_dir: str = option("", "folder for the results; default: in samples/ next to the checkpoint", common=True)
    output_json: str = option("", "file for the result; default: result.json in that folder")
    output_log: str = option("", "file to which a one-line summary of the result is appended")


def conditioned_groups() -> tuple[type, ...]:
    """The option dataclasses common to these test scripts, in the order of `--help`."""
    return (
        SourceOptions,
        ConditionedOptions,
        SolverOptions,
        GuidanceOptions,
        ScoreOptions,
        PairOptions,
        FeatureOptions,
        DatasetOptions,
        *checkpoint_groups(),
        MachineOptions,
    )


# Flags of LFM's published code that have no effect here.
IGNORED_FLAGS = {
    **IGNORED_SAMPLING_FLAGS,
    "compute_nfe": "every result reports its network evaluations",
    "measure_time": "every result reports its seconds, and test_flow_latent.py measures them in detail",
    "real_img_dir": "samples are scored against their own images; pytorch_fid/fid_score.py compares with other images",
}


@dataclass(frozen=True)
class ConditionedRequest:
    """A request to sample for held-out images and to score the samples.

    Args:
        sampler: the network, solver and guidance; its `given` holds all flags that the user gave.
        conditioned: number of images and samples, labels, and the results folder.
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
    """Open the validation images of --dataset, or of the network's training dataset if the flag was not given.

    Raises:
        UsageError: the images differ from the network's in channels or size.
    """
    stored = loaded.header.dataset
    name = request.data.dataset if "dataset" in request.sampler.given else stored.name
    dataset = task.open(replace(request.data, dataset=name, image_size=stored.image_size), "validation")
    expected = stored.channels, shown_side(stored)
    found = dataset.facts.channels, shown_side(dataset.facts)
    if found != expected:
        raise UsageError(
            f"--dataset {name} does not fit {loaded.path}: expected images like {stored.name}'s, with {expected[0]} channels "
            f"and a side of {expected[1]} pixels, but found {found[0]} channels and a side of {found[1]} pixels"
        )
    return dataset


def set_labels(dataset: ImageDataset, loaded: LoadedSampler, use_labels: bool) -> None:
    """Set the images' labels to the network's condition: their classes, or the null class without `use_labels`.

    The labels for an unconditional network are 0.

    Raises:
        UsageError: the null class is requested, but the network was trained without it.
    """
    classes = loaded.header.num_classes
    if classes == 1:
        dataset.labels.zero_()
    elif not use_labels:
        if not loaded.sampler.drops_labels:
            raise UsageError("--no-use_labels needs a network with a null class (trained with --label_dropout above 0)")
        dataset.labels.fill_(classes)
