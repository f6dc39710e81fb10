"""Class labels of samples: in turn, random, or from a file. A label depends only on the index of its sample."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from options import UsageError
from runtime.randomness import generator_for
from sampling.sampler import Labels, balanced_labels

__all__ = ["choose_labels", "label_rule"]

RULES = ("balanced", "random")


def choose_labels(rule: str, seed: int, num_classes: int, count: int) -> Labels:
    """Return the function from sample indices to labels that `--labels` specifies.

    Args:
        rule: "balanced", "random", or a file with one class id per line; line i + 1 belongs to sample i.
        seed: seed of random labels.
        num_classes: number of classes K.
        count: number of samples that will be drawn.

    Raises:
        UsageError: the file is unreadable, has fewer lines than samples, or holds an id outside 0..K-1.
    """
    if rule == "balanced":
        return balanced_labels
    if rule == "random":
        return lambda indices, classes: torch.cat(
            [torch.randint(classes, (1,), generator=generator_for(seed, "label", index)) for index in indices]
        )
    return _labels_from_file(Path(rule), num_classes, count)


def label_rule(rule: str) -> str:
    """The rule as recorded in results: its name, or the SHA-256 of the file."""
    return rule if rule in RULES else f"sha256 {hashlib.sha256(Path(rule).read_bytes()).hexdigest()}"


def _labels_from_file(path: Path, num_classes: int, count: int) -> Labels:
    try:
        ids = torch.tensor([int(line) for line in path.read_text(encoding="utf-8").split()], dtype=torch.long)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--labels {path}: expected balanced, random, or a file with one class id per line ({error})"
        ) from error
    if len(ids) < count:
        raise UsageError(f"--labels {path}: expected a class id for each of {count} samples, but found {len(ids)}")
    if not ((ids >= 0) & (ids < num_classes)).all():
        raise UsageError(f"--labels {path}: class ids must lie in 0..{num_classes - 1}")

    def labels(indices: Sequence[int], classes: int) -> torch.Tensor:
        return ids[list(indices)]

    return labels
