"""The run folder: its path, its configuration, and whether training there starts or resumes.

<save_root>/latent_flow/<dataset>/<exp>/  config.json  model_<epoch>.safetensors  best.safetensors
content.pth  content.previous.pth  metrics.jsonl  report.html  tensorboard/  samples/  posthoc_ema/
run.lock (during training)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from checkpoints.experiments import experiment_folder, newest_model
from checkpoints.files import read_header, read_weights
from checkpoints.tasks import Task
from models.autoencoders.protocol import AutoencoderFacts
from options import OnResume, UsageError, as_json, option
from runtime.distributed import Processes, launch_id, restarts
from runtime.files import move_aside, read_json, remove_leftovers, write_json
from runtime.locks import locked
from runtime.messages import note, warn
from runtime.outputs import check_folder
from runtime.provenance import provenance
from training.averages.snapshots import FOLDER as SNAPSHOT_FOLDER
from training.budget import BUDGET
from training.state_file import has_state
from training.tracking.trackers import TRACKERS

__all__ = [
    "IMAGES",
    "MACHINE",
    "RECONSTRUCTIONS",
    "STATE_OF_IMAGES",
    "STATE_OF_LABELS",
    "STATE_OF_PAIRS",
    "Configuration",
    "ExperimentOptions",
    "begun_by_this_launch",
    "check_run_folder",
    "has_ended",
    "only_run_in",
    "open_experiment",
    "recorded_autoencoder",
    "run_folder",
    "will_resume",
]

LOCK = "run.lock"
SUBFOLDERS = ("samples", "tensorboard", SNAPSHOT_FOLDER)
RECONSTRUCTIONS = "samples/reconstructions.json"
# Entries of config.json next to the options: the number of training images, and hashes that change with the images and with
# the labels that a conditional network gets.
IMAGES, STATE_OF_IMAGES = "number of training images", "state of the training images"
STATE_OF_LABELS = "labels of the training images"
STATE_OF_PAIRS = "state of the training pairs"  # a hash, in runs that train on pairs of noise and samples
MACHINE = "machine"  # entry of config.json: the device that the run started on, for the record
LAUNCH = "launch"  # entry of config.json: identifies the launch that started the run
TAKES_OVER = "takes_over"  # entry of config.json: whether the run started from a content.pth of LFM's published code
# Resume policies of entries of config.json that are not options. Copying the images may change their hash.
ENTRY_POLICIES: dict[str, OnResume] = {
    IMAGES: "on_request",
    STATE_OF_IMAGES: "rounding",
    STATE_OF_LABELS: "on_request",
    STATE_OF_PAIRS: "on_request",
    MACHINE: "freely",
    "processes": "rounding",
    "threads": "rounding",
}


@dataclass(frozen=True)
class ExperimentOptions:
    """Run."""

    exp: str = option("experiment", "name of the experiment and of its folder", on_resume="freely", common=True)
    save_root: str = option("saved_info", "folder of all experiments", on_resume="freely", common=True)
    resume: bool = option(
        False,
        "also resume after changing the length, learning rate or number of images, or from LFM's content.pth",
        on_resume="freely",
        common=True,
    )
    overwrite: bool = option(
        False, "start over; an existing run of this name is moved aside", on_resume="freely", common=True
    )
    init_from: str = option(
        "",
        "initialize from this checkpoint, this project's or LFM's (.pth): loads all weights that fit and lists the rest",
        flags=("--model_ckpt",),
        common=True,
    )
    save_content: bool = option(
        True, "save the training state content.pth, which an exact resume needs", on_resume="freely"
    )
    save_content_every: int = option(10, "epochs between saves of content.pth", minimum=1, on_resume="freely")
    save_content_every_steps: int = option(
        0, "steps between saves of content.pth; 0: save_content_every applies", minimum=0, on_resume="freely"
    )
    save_content_every_minutes: float = option(
        0.0, "also save content.pth after this many minutes without a save; 0: off", minimum=0, on_resume="freely"
    )
    keep_last: int = option(
        0, "number of newest checkpoints model_<epoch> to keep; 0: all", minimum=0, on_resume="freely", common=True
    )
    save_ckpt_every: int = option(25, "epochs between checkpoints model_<epoch>", minimum=1, on_resume="freely")
    save_ckpt_every_minutes: float = option(
        0.0, "minutes between checkpoints model_<epoch>; 0: save_ckpt_every applies", minimum=0, on_resume="freely"
    )
    plot_every: int = option(5, "epochs between sample grids", minimum=1, on_resume="freely")
    plot_every_minutes: float = option(
        0.0, "minutes between sample grids; 0: plot_every applies", minimum=0, on_resume="freely"
    )
    eval_every: int = option(
        5, "epochs between validations on held-out images", minimum=1, on_resume="freely", common=True
    )
    eval_every_minutes: float = option(
        0.0, "minutes between validations; 0: eval_every applies", minimum=0, on_resume="freely"
    )
    eval_samples: int = option(
        0, "samples to score at every validation; 0: validation loss only", minimum=0, on_resume="freely", common=True
    )
    validate_excess: int = option(
        0,
        "points at which every validation measures the excess loss over training images (docs/theory.md); 0: none",
        minimum=0,
        on_resume="freely",
    )
    preview_autoencoder: str = option(
        "",
        "draw sample grids with this autoencoder, a small twin of the run's such as madebyollin/taesd; default: the run's own",
        on_resume="freely",
    )
    log_every: int = option(50, "steps between lines of metrics.jsonl", minimum=1, on_resume="freely")
    tracker: str = option(
        "tensorboard",
        "where to show the metrics, next to metrics.jsonl; wandb and trackio need their packages (docs/report.md)",
        choices=TRACKERS,
        on_resume="freely",
    )


class Restart(Protocol):
    """Options that say whether an existing run may resume with changes, or is moved aside."""

    @property
    def resume(self) -> bool: ...

    @property
    def overwrite(self) -> bool: ...


@dataclass(frozen=True)
class Configuration:
    """A run's options and other facts, as config.json records them.

    Args:
        values: values by name; "auto" and other placeholders are resolved.
        policies: resume policies of the options.
        defaults: defaults of the options. They stand for options that did not exist when the run started.
    """

    values: Mapping[str, Any]
    policies: Mapping[str, OnResume]
    defaults: Mapping[str, Any]


def run_folder(experiment: ExperimentOptions, dataset: str, task: Task) -> Path:
    """The folder of a run.

    Raises:
        UsageError: --exp is not a plain name.
    """
    return experiment_folder(experiment.save_root, dataset, experiment.exp, task.runs)


def check_run_folder(folder: Path) -> None:
    """Check that a run's folder and its subfolders can be written.

    Raises:
        UsageError: they cannot.
    """
    for part in (folder, *(folder / name for name in SUBFOLDERS if (folder / name).exists())):
        check_folder(part, "--save_root or --exp")


@contextmanager
def only_run_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Lock `folder` during the block, and remove unfinished files of killed processes.

    Raises:
        UsageError: another process is training in the folder.
    """
    with locked(folder / LOCK, "is training in this folder") if processes.is_main else nullcontext():
        folders = (folder, folder / SNAPSHOT_FOLDER) if processes.is_main else ()
        left = [path for each in folders for path in remove_leftovers(each)]
        if left:
            note(f"removed unfinished files of a killed process: {', '.join(path.name for path in left)}")
        yield


def open_experiment(folder: Path, configuration: Configuration, options: Restart, name: str = "--exp") -> bool:
    """Prepare the run folder and write config.json; returns whether training resumes. The option `name` names the run.

    Raises:
        UsageError: the folder holds a run with other options (the message names them), or a content.pth of LFM's published
            code, and --resume was not given.
    """
    config_path, saved = folder / "config.json", has_state(folder)
    current = as_json(configuration.values)
    if options.overwrite and (config_path.exists() or saved):
        moved, saved = move_aside(folder, stays=LOCK), False
        note(f"--overwrite moved the existing run to {moved}")
    config = _read_config(config_path, options.resume)
    begun = (saved and not config.get(TAKES_OVER)) or (folder / "metrics.jsonl").exists()
    if not begun:  # a start that failed before its first step does not count
        return _start(config_path, current, saved, options.resume)
    previous = config.get("options")
    if not isinstance(previous, dict):
        _accept_unknown_options(config_path, options.resume)
        write_json(config_path, {"options": current, **provenance()})
        return True
    policies = ENTRY_POLICIES | dict(configuration.policies)
    changed = _changed(previous, current, as_json(configuration.defaults), policies)
    allowed = ("rounding", "on_request") if options.resume else ("rounding",)
    refused = {name: pair for name, pair in changed.items() if policies.get(name) not in allowed}
    if refused:
        flags = {name: name if " " in name else f"--{name}" for name in refused}
        listed = ", ".join(f"{flags[key]} was {old}, now {new}" for key, (old, new) in sorted(refused.items()))
        on_request = all(policies.get(key) == "on_request" for key in refused)
        with_resume = "--resume to resume with this change, " if on_request else ""
        raise UsageError(
            f"{folder} holds a run with other options: {listed}. Choose {with_resume}another {name}, "
            "or --overwrite to start over (the old run is moved aside)"
        )
    if changed:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()))
        exact = " and will not be bit-identical" if all(policies.get(name) == "rounding" for name in changed) else ""
        note(f"the run resumes with changed options{exact}: {listed}")
    if changed or not {IMAGES, STATE_OF_LABELS} <= previous.keys():
        write_json(config_path, {"options": current, **provenance()})
    return True


def _read_config(config_path: Path, resume: bool) -> dict[str, Any]:
    """The contents of config.json; without options if it is unreadable and may be replaced because of --resume."""
    if not config_path.exists():
        return {TAKES_OVER: True}
    try:
        return read_json(config_path)
    except UsageError as error:
        if not resume:
            raise UsageError(
                f"{error}; restore the file, or choose --resume to resume with the options of this command"
            ) from error
        return {}


def _accept_unknown_options(config_path: Path, resume: bool) -> None:
    """Accept a run whose first options are unknown, if --resume was given.

    Raises:
        UsageError: it was not.
    """
    problem = f"{config_path} does not record the options of the run in this folder"
    if not resume:
        raise UsageError(
            f"{problem}: restore the file, choose --resume to resume with the options of this command, another --exp, or "
            "--overwrite to start over (the old run is moved aside)"
        )
    warn(f"{problem}: it resumes with the options of this command, which cannot be compared with those it began with")


def _start(config_path: Path, current: Mapping[str, Any], takes_over: bool, resume: bool) -> bool:
    """Start a run, from an existing content.pth of LFM's published code if `takes_over`; returns `takes_over`."""
    if takes_over and not resume:
        raise UsageError(
            f"{config_path.parent} holds a content.pth that no run of this project wrote: choose --resume to resume from it "
            "(LFM's files work), another --exp, or --overwrite to start over (the old folder is moved aside)"
        )
    (config_path.parent / BUDGET).unlink(missing_ok=True)  # of a start that failed, perhaps with other options
    write_json(config_path, {"options": current, **provenance(), TAKES_OVER: takes_over, LAUNCH: launch_id()})
    return takes_over


def begun_by_this_launch(folder: Path) -> bool:
    """Whether the launcher has restarted the processes that began the run in `folder`."""
    path = folder / "config.json"
    return restarts() > 0 and path.exists() and read_json(path).get(LAUNCH) == launch_id()


def will_resume(folder: Path, options: ExperimentOptions) -> bool:
    """Whether training resumes from a content.pth in `folder`, which replaces all initial weights."""
    return not options.overwrite and has_state(folder)


def recorded_autoencoder(folder: Path) -> AutoencoderFacts | None:
    """The autoencoder that a run was begun with, from a checkpoint or the first reconstructions; None without a record."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(UsageError):  # a damaged file does not prevent resuming
            return read_header(path).autoencoder
    with suppress(UsageError, KeyError, TypeError):
        return AutoencoderFacts.from_json(read_json(folder / RECONSTRUCTIONS)["autoencoder"])
    return None


def has_ended(folder: Path, last_step: int) -> bool:
    """Whether a run without content.pth is complete, according to its newest checkpoint.

    Raises:
        UsageError: it is complete, but with fewer than `last_step` steps.
    """
    if not any(folder.glob("model_*.safetensors")):
        return False
    newest = newest_model(folder)
    header = read_weights(newest)[1]
    if (
        header.ended
        and (header.step or 0) < last_step
        and not any(map(header.training.get, ("minutes", "max_minutes")))
    ):
        raise UsageError(
            f"{folder} ended at step {header.step} without a content.pth to resume from: use --init_from {newest} "
            "with another --exp, or --overwrite to start over (the old run is moved aside)"
        )
    return header.ended


def _changed(
    previous: Mapping[str, Any],
    current: Mapping[str, Any],
    defaults: Mapping[str, Any],
    policies: Mapping[str, OnResume],
) -> dict[str, tuple[Any, Any]]:
    """Old and new values of the options that differ. Instead of `batch_size`, the global batch size is compared.

    An option that did not exist when the run started counts as having its default. Labels change with the number of images.
    """
    unknown = (IMAGES, STATE_OF_IMAGES, STATE_OF_LABELS, STATE_OF_PAIRS)  # in runs from before they were recorded
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
    return changed | ({"global batch size": (batches[0], batches[1])} if batches[0] != batches[1] else {})
