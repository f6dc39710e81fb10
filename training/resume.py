"""Resume a run from content.pth: exactly from this project's file, or as far as possible from LFM's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.header import Header
from checkpoints.lfm_files import (
    ALLOWED_CLASSES,
    PublishedFile,
    is_published_content,
    newest_condition_stage,
    parse_published,
)
from checkpoints.state_dicts import load_weights
from options import UsageError
from runtime.distributed import Processes
from runtime.processes.parallel import is_sharded
from runtime.torch_files import read_torch_file
from runtime.weights import check_finite
from training.optimizers import load_optimizer_state
from training.state import POSTHOC_EMA, TrainingState
from training.state_file import read_newest

__all__ = ["of_training_state", "resume_run"]

ENTRIES = frozenset(("step", "seconds", "best", "best_of", "sums", "network", "ema", "optimizers"))
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def resume_run(
    state: TrainingState,
    path: Path,
    per_epoch: int,
    header: Header,
    processes: Processes = Processes(),  # noqa: B008
) -> str:
    """Restore a new `state` from content.pth; returns a description of the restored file.

    Args:
        state: a new training state.
        path: path of content.pth. If it is damaged, content.previous.pth is used.
        per_epoch: steps per epoch, because LFM's published code counts epochs.
        header: header of the run's checkpoints, which helps to explain a mismatch of weights.
        processes: the run's processes.

    Raises:
        UsageError: the file is unreadable, belongs to another network or has weights that are not finite, or it is LFM's and
            the network is sharded.
    """
    sharded = is_sharded(state.network)
    device = "cpu" if sharded else state.machine.device

    def read(file: Path) -> dict[str, Any]:
        content = read_torch_file(file, device, ALLOWED_CLASSES, mmap=sharded)
        if not is_published_content(content) and not (isinstance(content, dict) and content.keys() >= ENTRIES):
            raise UsageError(f"{file} is not a training state: expected the entries {', '.join(sorted(ENTRIES))}")
        if not is_published_content(content) and not sharded:
            with of_training_state(file):
                averages = (content["ema"], *content.get(POSTHOC_EMA, {}).values())
                for part in (content["network"], *(average["weights"] for average in averages)):
                    check_finite(part, file, state.network.state_dict())
        return content

    path, content = read_newest(path, read, processes)
    if is_published_content(content):
        if sharded:
            raise UsageError(
                f"{path} was saved by LFM's published code and cannot be resumed with --fsdp: leave out --fsdp, or start "
                "from the file's weights with --init_from"
            )
        return _restore_published(state, parse_published(content, path), path, per_epoch, header)
    with of_training_state(path):
        state.restore(content, processes)
    return path.name


@contextmanager
def of_training_state(path: Path) -> Iterator[None]:
    """Explain errors of a block that reads the entries of a training state, which a damaged file may lack.

    Raises:
        UsageError: an entry is missing or has another type.
    """
    try:
        yield
    except UsageError:  # a ValueError, too
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is not a complete training state ({type(error).__name__}: {error}). Start over with --overwrite (the old "
            "run is moved aside), and keep its last weights with --init_from one of its checkpoints"
        ) from error


def _restore_published(
    state: TrainingState, published: PublishedFile, path: Path, per_epoch: int, header: Header
) -> str:
    """Restore weights, EMA, AdamW's state and the epoch; returns a description."""
    if len(state.optimizers) > 1:
        raise UsageError(f"{path} has optimizer state only for AdamW: resume with --optimizer adamw")
    if published.epoch is None:
        raise UsageError(
            f"{path} does not record its epoch, so the run cannot resume: start from its weights with --init_from"
        )
    architecture = header.architecture
    stage = newest_condition_stage(path.parent)  # LFM stores these weights in a separate file
    load_weights(state.network, published.weights | stage, str(path), architecture)
    load_weights(state.ema.network, published.sampled | stage, str(path), architecture)
    entries = state.network.state_dict(keep_vars=True)
    names = [name for name, entry in entries.items() if isinstance(entry, nn.Parameter) and entry.requires_grad]
    adam_states = {
        index: {key: torch.as_tensor(published.states[name][key]) for key in ADAM_STATE}
        for index, name in enumerate(names)
        if published.states.get(name, {}).keys() >= set(ADAM_STATE)
    }
    load_optimizer_state(state.optimizers[0], adam_states)
    state.step = published.epoch * per_epoch
    # LFM's EMA has no warmup, so it must not restart for a young run.
    state.ema.updates.fill_(max(state.step, state.ema.warmup_updates if published.averages else 0))
    ema = (
        f"{len(published.averages)} EMA weights"
        if published.averages
        else "no EMA weights (so the EMA starts from the weights)"
    )
    return (
        f"{path.name} of LFM's published code: {len(published.weights)} weights, {ema}, optimizer state of "
        f"{len(adam_states)} of {len(names)} trained parameters, and epoch {published.epoch}. The learning rate follows "
        "from the step"
    )
