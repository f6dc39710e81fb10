"""The labels of a folder's files: from label files if these label them, else from class folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets_prep.folder_layout.entries import FolderTree, Parts
from datasets_prep.folder_layout.label_files import UNLABELED, FileLabels, number_labels, read_labels
from datasets_prep.folder_layout.layout import Layout, held_out_base

__all__ = ["Labeling", "choose_labels", "label_held_out"]


@dataclass
class Labeling:
    """How files get their labels.

    Args:
        classes: class names, by label; empty without classes.
        source: where the labels are from, such as "from class folders".
        no_classes: the reason if no classes were found.
        by_path: labels by path, if label files give them.
        remarks: surprising things about label files.
        ignored: label files that give no labels.
    """

    classes: list[str]
    source: str = "from class folders"
    no_classes: str = ""
    by_path: dict[str, int] | None = None
    remarks: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def number(self, paths: Sequence[Path], root: Path, base: Parts) -> np.ndarray:
        """The labels int64 [N] of files below `root`, whose class folders lie in `base`. UNLABELED: not of these classes."""
        if not self.classes:
            return np.zeros(len(paths), np.int64)
        if self.by_path is not None:
            return np.array([self.by_path[str(path)] for path in paths], np.int64)
        number_of = {name: number for number, name in enumerate(self.classes)}
        position = len(root.parts) + len(base)
        return np.array([number_of.get(path.parts[position], UNLABELED) for path in paths], np.int64)


def choose_labels(layout: Layout) -> Labeling:
    """Find the labels of a layout's files.

    Label files that label only some of the training files give no classes.
    """
    found = FileLabels({}, "", [], [])
    if layout.label_files:
        training = layout.train.paths
        held_out = [] if layout.held_out is None else layout.held_out.paths
        found = read_labels(layout.label_files, [*training, *held_out])
    if not found.source:
        labeling = Labeling(layout.class_folders, remarks=found.remarks, ignored=found.ignored)
        if not labeling.classes:
            labeling.no_classes = f"files lie directly in {layout.train.root.joinpath(*layout.base)}"
        return labeling
    numbers, names = number_labels(found, training)
    missing = [path for path in training if numbers[str(path)] == UNLABELED]
    if missing:
        reason = f"{found.source} has no label for {len(missing):,} of {len(training):,} images, such as {missing[0]}"
        return Labeling([], "", reason, None, [*found.remarks, reason], found.ignored)
    return Labeling(names, f"from {found.source}", "", numbers, found.remarks, found.ignored)


def label_held_out(labeling: Labeling, tree: FolderTree) -> tuple[list[Path], np.ndarray]:
    """The held-out files in order, and their labels; UNLABELED for files of no training class."""
    paths = tree.paths
    return paths, labeling.number(paths, tree.root, held_out_base(tree, labeling.classes))
