"""A run goes on where content.pth says: exactly, if it is ours, or with all that one of the published code holds."""

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
from runtime.parallel import is_sharded
from runtime.torch_files import read_torch_file
from training.optimizers import load_optimizer_state
from training.state import TrainingState
from training.state_file import read_newest

__all__ = ["resume_run"]

PARTS = frozenset(("step", "seconds", "best", "best_of", "sums", "network", "ema", "optimizers"))  # of ours
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


def resume_run(
    state: TrainingState,
    path: Path,
    per_epoch: int,
    header: Header,
    processes: Processes = Processes(),  # noqa: B008
) -> str:
    """Bring `state` to where a content.pth stands; returns a line that says what was taken over.

    Args:
        state: a fresh one.
        path: the file; where it is damaged, the run goes on from the one before it.
        per_epoch: steps in an epoch, since the published code counts in epochs.
        header: of the run's checkpoints, whose architecture explains a mismatch.
        processes: those of the run.

    Raises:
        UsageError: an unreadable file, one of another network, or a published one for weights that are shared out.
    """
    shared_out = is_sharded(state.network)
    device = "cpu" if shared_out else state.machine.device

    def read(file: Path) -> dict[str, Any]:
        content = read_torch_file(file, device, ALLOWED_CLASSES, mmap=shared_out)
        if not is_published_content(content) and not (isinstance(content, dict) and content.keys() >= PARTS):
            raise UsageError(f"{file} is no content.pth: expected {', '.join(sorted(PARTS))} in it")
        return content

    path, content = read_newest(path, read, processes)
    if is_published_content(content):
        if shared_out:
            raise UsageError(
                f"{path} is of the published code, and continues without --fsdp only; --init_from takes its weights"
            )
        return _take_over(state, parse_published(content, path), path, per_epoch, header)
    state.restore(content, processes)
    return path.name


def _take_over(state: TrainingState, published: PublishedFile, path: Path, per_epoch: int, header: Header) -> str:
    if len(state.optimizers) > 1:
        raise UsageError(f"{path} has the moments of AdamW alone: continue it with --optimizer adamw")
    if published.epoch is None:
        raise UsageError(
            f"{path} does not say its epoch, so the run cannot go on; start from its weights with --init_from"
        )
    architecture = header.architecture
    stage = newest_condition_stage(path.parent)  # content.pth is without it
    load_weights(state.network, published.weights | stage, str(path), architecture)
    load_weights(state.ema.network, published.sampled | stage, str(path), architecture)
    entries = state.network.state_dict(keep_vars=True)
    names = [name for name, entry in entries.items() if isinstance(entry, nn.Parameter) and entry.requires_grad]
    moments = {
        index: {key: torch.as_tensor(published.states[name][key]) for key in MOMENTS}
        for index, name in enumerate(names)
        if published.states.get(name, {}).keys() >= set(MOMENTS)
    }
    load_optimizer_state(state.optimizers[0], moments)
    state.step = published.epoch * per_epoch
    state.ema.updates.fill_(state.step)  # its warm-up is over
    averages = (
        f"{len(published.averages)} moving averages" if published.averages else "no moving average (it begins anew)"
    )
    return (
        f"{path.name} of LFM's published code: {len(published.weights)} weights, {averages}, the optimizer state of "
        f"{len(moments)} of {len(names)} trained parameters, and epoch {published.epoch}. The learning rate follows from "
        "the step"
    )
