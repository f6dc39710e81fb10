"""What the downstream test scripts sample for: their options, the held-out images, and the labels that the network is told."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.image_dataset import shown_side
from evaluation.features.registry import FeatureOptions
from evaluation.pair_comparison import PairOptions
from evaluation.score import ScoreOptions
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.loading import AutoencoderOptions
from models.registry import FAMILY_OPTIONS, IGNORED_NETWORK_FLAGS, NetworkOptions
from options import Options, UsageError, option
from runtime.precision import MachineOptions
from sampling.setup import Opened, SourceOptions
from tasks.task import TrainingTask

__all__ = [
    "CONDITIONED_GROUPS",
    "IGNORED_FLAGS",
    "ConditionedOptions",
    "images_to_sample_for",
    "note_unused",
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


CONDITIONED_GROUPS = (
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
    *FAMILY_OPTIONS,
    MachineOptions,
)
# Published flags without an effect, here or there.
IGNORED_FLAGS = {
    **IGNORED_NETWORK_FLAGS,
    "use_karras_samplers": "see --time_grid edm",
    "perturb": "it changed nothing that is sampled here",
    "compute_nfe": "every result tells the evaluations",
    "measure_time": "every result tells the seconds, and test_flow_latent.py measures them in detail",
    "real_img_dir": "samples are scored against the images that they stand for; see pytorch_fid/fid_score.py for others",
}


def images_to_sample_for(opened: Opened, task: TrainingTask, options: Options) -> ImageDataset:
    """The validation images of --dataset, by default that of training, as a task has them.

    Raises:
        UsageError: images of another kind than the network's.
    """
    data, stored = options[DatasetOptions], opened.header.dataset
    name = data.dataset if "dataset" in options.explicit else stored.name
    dataset = task.open(replace(data, dataset=name, image_size=stored.image_size), "validation")
    theirs, ours = (
        (dataset.facts.channels, shown_side(dataset.facts)),
        (stored.channels, shown_side(opened.sampler.facts)),
    )
    if theirs != ours:
        raise UsageError(
            f"--dataset {name} does not suit {opened.path}: its images have {theirs[0]} channels and {theirs[1]} pixels "
            f"a side, those of {stored.name}, which it was trained on, {ours[0]} and {ours[1]}"
        )
    return dataset


def set_labels(dataset: ImageDataset, opened: Opened, options: Options) -> None:
    """Let the images' labels be what the network is told: their classes, the null class, or the only one there is.

    Raises:
        UsageError: the null class is asked of a network that does not know it.
    """
    classes = opened.header.num_classes
    if classes == 1:
        dataset.labels.zero_()
    elif not options[ConditionedOptions].use_labels:
        if not opened.sampler.drops_labels:
            raise UsageError("--no-use_labels needs a network with a null class (trained with --label_dropout above 0)")
        dataset.labels.fill_(classes)


def note_unused(options: Options, names: Iterable[str], reason: str) -> None:
    """Say which of the flags `names` were given although they have no effect."""
    given = [f"--{name}" for name in names if name in options.explicit]
    if given:
        print(f"note: {', '.join(given)} has no effect {reason}")
