"""The classes that are asked for: in turn, at random, or as a file says; label i depends on the sample's index alone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from options import UsageError
from runtime.randomness import generator_for
from sampling.sampler import Labels, balanced_labels

__all__ = ["choose_labels"]


def choose_labels(rule: str, seed: int, num_classes: int, count: int) -> Labels:
    """The labels that `--labels` names.

    Args:
        rule: "balanced", "random", or a file of one class id per line, line i + 1 for sample i.
        seed: of the random labels.
        num_classes: K.
        count: how many samples will be drawn.

    Raises:
        UsageError: an unreadable file, one with fewer lines than samples, or an id out of range.
    """
    if rule == "balanced":
        return balanced_labels
    if rule == "random":
        return lambda indices, classes: torch.cat(
            [torch.randint(classes, (1,), generator=generator_for(seed, "label", index)) for index in indices]
        )
    return _labels_of_file(Path(rule), num_classes, count)


def _labels_of_file(path: Path, num_classes: int, count: int) -> Labels:
    try:
        ids = torch.tensor([int(line) for line in path.read_text(encoding="utf-8").split()], dtype=torch.long)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--labels {path}: expected balanced, random, or a file of one class id per line ({error})"
        ) from error
    if len(ids) < count:
        raise UsageError(f"--labels {path}: {count} samples need as many lines, but the file has {len(ids)}")
    if not ((ids >= 0) & (ids < num_classes)).all():
        raise UsageError(f"--labels {path}: class ids must lie in 0..{num_classes - 1}")

    def labels(indices: Sequence[int], classes: int) -> torch.Tensor:
        return ids[list(indices)]

    return labels
