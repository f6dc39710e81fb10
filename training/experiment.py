"""The folder of a run: where it lies, whether a start continues it, and what it keeps.

<save_root>/latent_flow/<dataset>/<exp>/  config.json  model_<epoch>.safetensors  best.safetensors
content.pth  content.previous.pth  metrics.jsonl  tensorboard/  samples/  run.lock (while it runs)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.experiments import experiment_folder, newest_model
from checkpoints.files import read_weights
from checkpoints.tasks import Task
from options import OnResume, UsageError, as_json, option
from runtime.distributed import Processes, launch_id, restarts
from runtime.files import move_aside, read_json, remove_leftovers, write_json
from runtime.locks import locked
from runtime.messages import note
from runtime.provenance import provenance
from training.state_file import has_state

__all__ = [
    "IMAGES",
    "STATE_OF_IMAGES",
    "STATE_OF_LABELS",
    "Configuration",
    "ExperimentOptions",
    "begun_by_this_launch",
    "has_ended",
    "only_run_in",
    "open_experiment",
    "run_folder",
    "will_continue",
]

LOCK = "run.lock"
# Entries of config.json next to the options: the number of training images, and hashes that change with the images and with
# the labels that a conditional network gets.
IMAGES, STATE_OF_IMAGES = "number of training images", "state of the training images"
STATE_OF_LABELS = "labels of the training images"
LAUNCH = "launch"  # entry of config.json: what started the run
TAKES_OVER = "takes_over"  # entry of config.json: the run began with a content.pth of the published code
# Entries of config.json that are no options, and whether a run may resume with other values of them. The images' state may
# change by copying them.
RESOLVED: dict[str, OnResume] = {
    IMAGES: "on_request",
    STATE_OF_IMAGES: "rounding",
    STATE_OF_LABELS: "on_request",
    "processes": "rounding",
    "threads": "rounding",
}


@dataclass(frozen=True)
class ExperimentOptions:
    """Run."""

    exp: str = option("experiment", "name of the experiment, its folder's name", common=True)
    save_root: str = option("saved_info", "folder of all experiments", on_resume="freely", common=True)
    resume: bool = option(
        False,
        "continue even if length, learning rate or images were changed, or from a content.pth of the published code",
        on_resume="freely",
        common=True,
    )
    overwrite: bool = option(
        False, "start anew; an existing run of this name is moved aside", on_resume="freely", common=True
    )
    init_from: str = option(
        "",
        "start from the weights of this checkpoint, ours or a published .pth (what fits is loaded, the rest is listed)",
        flags=("--model_ckpt",),
        common=True,
    )
    save_content: bool = option(True, "keep content.pth, all that an exact resume needs", on_resume="freely")
    save_content_every: int = option(10, "epochs between savings of content.pth", minimum=1, on_resume="freely")
    save_content_every_steps: int = option(
        0, "steps between savings of content.pth; 0: by epochs", minimum=0, on_resume="freely"
    )
    save_content_every_minutes: float = option(
        0.0, "and after so many minutes without a saving; 0: not by the clock", minimum=0, on_resume="freely"
    )
    keep_last: int = option(
        0, "checkpoints model_<epoch> to keep, of the last epochs; 0: all", minimum=0, on_resume="freely", common=True
    )
    save_ckpt_every: int = option(
        25, "epochs between checkpoints model_<epoch>", minimum=1, on_resume="freely", common=True
    )
    plot_every: int = option(5, "epochs between sample grids", minimum=1, on_resume="freely", common=True)
    eval_every: int = option(
        5, "epochs between validations on held-out images", minimum=1, on_resume="freely", common=True
    )
    eval_samples: int = option(
        0, "samples scored at every validation; 0: validation loss only", minimum=0, on_resume="freely", common=True
    )
    log_every: int = option(50, "steps between lines of metrics.jsonl", minimum=1, on_resume="freely")


@dataclass(frozen=True)
class Configuration:
    """All that config.json records of a run's options.

    Args:
        values: by name, those that were resolved ("auto" and the like) as they came out.
        policies: whether a run may resume with other values.
        defaults: values of options that a run from before they existed had.
    """

    values: Mapping[str, Any]
    policies: Mapping[str, OnResume]
    defaults: Mapping[str, Any]


def run_folder(experiment: ExperimentOptions, dataset: str, task: Task) -> Path:
    """The folder of a run.

    Raises:
        UsageError: --exp is no plain name.
    """
    return experiment_folder(experiment.save_root, dataset, experiment.exp, task.runs)


@contextmanager
def only_run_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Nobody else trains in `folder` during the block; what a killed process left half-written there is removed.

    Raises:
        UsageError: somebody does.
    """
    with locked(folder / LOCK, "is training in this folder") if processes.is_main else nullcontext():
        left = remove_leftovers(folder) if processes.is_main else []
        if left:
            note(f"removed unfinished files of a killed process: {', '.join(path.name for path in left)}")
        yield


def open_experiment(folder: Path, configuration: Configuration, options: ExperimentOptions) -> bool:
    """Prepare the folder and write config.json; returns whether an existing run is continued.

    Raises:
        UsageError: the folder holds a run with other options (the message names them), or one of the published code
            that --resume was not given for.
    """
    config_path, saved = folder / "config.json", has_state(folder)
    current = as_json(configuration.values)
    if options.overwrite and (config_path.exists() or saved):
        moved, saved = move_aside(folder), False
        note(f"--overwrite moved the existing run to {moved}")
        if (moved / LOCK).exists():
            folder.mkdir()
            (moved / LOCK).rename(folder / LOCK)
    config: dict[str, Any] = read_json(config_path) if config_path.exists() else {TAKES_OVER: True}
    begun = (saved and not config.get(TAKES_OVER)) or (folder / "metrics.jsonl").exists()
    if not begun:  # a start that failed before its first step does not count
        return _begin(config_path, current, saved, options.resume)
    previous = config.get("options", {})
    policies = RESOLVED | dict(configuration.policies)
    changed = _changed(previous, current, as_json(configuration.defaults), policies)
    admitted = ("rounding", "on_request") if options.resume else ("rounding",)
    refused = {name: pair for name, pair in changed.items() if policies.get(name) not in admitted}
    if refused:
        flags = {name: name if " " in name else f"--{name}" for name in refused}
        listed = ", ".join(f"{flags[name]} was {old}, now {new}" for name, (old, new) in sorted(refused.items()))
        on_request = all(policies.get(name) == "on_request" for name in refused)
        way_out = "--resume to go on with the change, " if on_request else ""
        raise UsageError(
            f"{folder} holds a run with other options: {listed}. Choose {way_out}another --exp, "
            "or --overwrite to start anew (the old run is moved aside)"
        )
    if changed:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()))
        exact = " and will not be bit-identical" if all(policies.get(name) == "rounding" for name in changed) else ""
        note(f"the run resumes with changed options{exact}: {listed}")
    if changed or not {IMAGES, STATE_OF_LABELS} <= previous.keys():
        write_json(config_path, {"options": current, **provenance()})
    return True


def _begin(config_path: Path, current: Mapping[str, Any], published: bool, resume: bool) -> bool:
    """A first start; `published`: from a content.pth that is not ours. Returns whether that is continued."""
    if published and not resume:
        raise UsageError(
            f"{config_path.parent} holds a content.pth that no run here has written: choose --resume to continue it (files of "
            "the published code serve), another --exp, or --overwrite to start anew (the old folder is moved aside)"
        )
    write_json(config_path, {"options": current, **provenance(), TAKES_OVER: published, LAUNCH: launch_id()})
    return published


def begun_by_this_launch(folder: Path) -> bool:
    """Whether the launcher's processes began the run in `folder`, died, and were started again."""
    path = folder / "config.json"
    return restarts() > 0 and path.exists() and read_json(path).get(LAUNCH) == launch_id()


def will_continue(folder: Path, options: ExperimentOptions) -> bool:
    """Whether a start goes on from the folder's content.pth, which replaces whatever the weights are before."""
    return not options.overwrite and has_state(folder)


def has_ended(folder: Path, last_step: int) -> bool:
    """Whether a run without content.pth was trained to its end, as its newest checkpoint says.

    Raises:
        UsageError: to an end that is no longer the run's.
    """
    if not any(folder.glob("model_*.safetensors")):
        return False
    newest = newest_model(folder)
    header = read_weights(newest)[1]
    if header.ended and (header.step or 0) < last_step and not header.training.get("max_minutes"):
        raise UsageError(
            f"{folder} ended at step {header.step} and kept no content.pth to go on from: use --init_from {newest} "
            "with another --exp, or --overwrite to start anew (the old run is moved aside)"
        )
    return header.ended


def _changed(
    previous: Mapping[str, Any],
    current: Mapping[str, Any],
    defaults: Mapping[str, Any],
    policies: Mapping[str, OnResume],
) -> dict[str, tuple[Any, Any]]:
    """Old and new values of the options that matter; another batch per process does not if the global one is the same.

    A run from before an option existed had its default. Labels change with the number of images.
    """
    unknown = (IMAGES, STATE_OF_IMAGES, STATE_OF_LABELS)  # in runs from before they were recorded
    batches = [values.get("batch_size", 0) * values.get("processes", 1) for values in (previous, current)]
    changed = {
        name: (previous.get(name), value)
        for name, value in current.items()
        if policies.get(name) != "freely"
        and previous.get(name, value if name in unknown else defaults.get(name)) != value
    }
    changed.pop("batch_size", None)
    if IMAGES in changed:
        changed.pop(STATE_OF_LABELS, None)
    return changed | ({"batch_size times processes": (batches[0], batches[1])} if batches[0] != batches[1] else {})
