"""The contents of a run's config.json."""

import hashlib
from typing import Any

import torch

from datasets_prep.datasets import ImageDataset
from datasets_prep.pairs.pair_cache import PairCache
from flow.paths import PathOptions
from options import Options
from runtime.distributed import Processes
from runtime.precision import Machine
from training.experiment import (
    IMAGES,
    STATE_OF_IMAGES,
    STATE_OF_LABELS,
    STATE_OF_PAIRS,
    Configuration,
)

__all__ = ["configuration_of"]


def configuration_of(
    options: Options, machine: Machine, processes: Processes, dataset: ImageDataset, pairs: PairCache | None = None
) -> Configuration:
    """The contents of config.json: all options, resolved, and other facts that the results depend on."""
    resolved: dict[str, Any] = {"precision": machine.precision, "compile": machine.compile}
    resolved |= {"processes": processes.count, "threads": torch.get_num_threads()}
    state = dataset.fingerprint + getattr(dataset, "maps_fingerprint", "")
    images = {
        IMAGES: len(dataset),
        STATE_OF_IMAGES: hashlib.sha256(state.encode()).hexdigest()[:12],
        STATE_OF_LABELS: hashlib.sha256(dataset.labels.numpy().tobytes()).hexdigest()[:12],
        **({STATE_OF_PAIRS: pairs.fingerprint} if pairs else {}),
    }
    policies = options.policies()
    if options[PathOptions].coupling != "independent":
        policies["processes"] = "on_request"  # because noise is exchanged within each process's batch
    return Configuration({**options.values, **resolved, **images}, policies, options.defaults())
