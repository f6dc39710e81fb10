"""Settings of samples given from Python: keyword arguments for option dataclasses, and class labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from checkpoints.header import Header
from options import UsageError, make_options

__all__ = ["class_ids", "split_settings"]


def split_settings(values: Mapping[str, Any], *groups: type) -> list[Any]:
    """Create an instance of each dataclass from the values for its fields.

    Raises:
        UsageError: a name is not an option of any dataclass, or a value is invalid.
    """
    names = {group: [field.name for field in dataclasses.fields(group)] for group in groups}
    if unknown := sorted(set(values) - {name for known in names.values() for name in known}):
        known = ", ".join(name for fields in names.values() for name in fields)
        raise UsageError(f"unknown keyword {', '.join(unknown)}: expected an argument of the method or one of {known}")
    return [make_options(group, {name: values[name] for name in names[group] if name in values}) for group in groups]


def class_ids(labels: Sequence[int | str] | torch.Tensor, header: Header) -> torch.Tensor:
    """Check class labels, and return their ids int64 [N] on the CPU.

    Args:
        labels: ids [N], where K (the number of classes) is the null class of a network that has one, or names of classes.
        header: the checkpoint's.

    Raises:
        UsageError: a label is neither an id of the network nor a name in its header.
    """
    names: dict[int | str, int | str] = {name: index for index, name in enumerate(header.dataset.class_names)}
    try:
        listed = labels if isinstance(labels, torch.Tensor) else [names.get(label, label) for label in labels]
        ids = torch.as_tensor(listed).long().cpu()
    except (TypeError, ValueError) as error:
        known = f" or names of {', '.join(map(str, names))}" if names else ""
        raise UsageError(f"expected integer class ids{known}, but got {labels!r}") from error
    largest = header.num_classes - (0 if header.drops_labels else 1)
    if ids.ndim != 1 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= largest):
        raise UsageError(f"expected class ids [N] in 0..{largest}, but got {ids.tolist()}")
    return ids
