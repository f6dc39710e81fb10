"""The facts about a folder that are reported before any work, and warnings about surprising ones."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets_prep.folder_layout.entries import DERIVED, examples
from datasets_prep.folder_layout.labeling import Labeling
from datasets_prep.folder_layout.layout import Layout
from datasets_prep.folder_layout.splits import name_splits, suspicious_classes

__all__ = ["Survey", "survey_of"]

SMALLEST_SHARE = 1000  # training images per held-out image


@dataclass(frozen=True)
class Survey:
    """The contents of a folder of images or latents, and their use.

    Args:
        root: the folder.
        classes: all class names, by label; empty without classes.
        source: where the labels are from, such as "from class folders".
        no_classes: the reason if no classes were found, else empty.
        held_out: how the held-out images are chosen.
        left_out: what is not read and why, one phrase per reason.
        warnings: what the user should look at, with paths.
    """

    root: Path
    classes: tuple[str, ...]
    source: str
    no_classes: str
    held_out: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def survey_of(layout: Layout, labeling: Labeling, held_out: str, remarks: Iterable[str]) -> Survey:
    """Sum up how a folder is read. `held_out` says how the held-out images are chosen; `remarks` are further warnings."""
    root = layout.root
    unused = [f"{examples([_inside(root, path) + '/' for path in layout.unused])} (not used)"] if layout.unused else []
    left_out = [*layout.left_out.describe(), *unused, *labeling.ignored]
    warnings = [*labeling.remarks, *remarks, *_split_warnings(layout), *_class_warnings(layout, labeling)]
    return Survey(
        root,
        tuple(labeling.classes),
        labeling.source if labeling.classes else "",
        labeling.no_classes,
        held_out,
        tuple(left_out),
        (*warnings, *_left_out_warnings(layout)),
    )


def _inside(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _split_warnings(layout: Layout) -> list[str]:
    if layout.held_out is None:
        return []
    train, held_out, warnings = layout.train, layout.held_out, list[str]()
    if layout.strays:
        strays = examples([str(path) for path in layout.strays])
        warnings.append(
            f"entries next to {train.root} and {held_out.root} that are not used: {len(layout.strays):,} ({strays})"
        )
    if os.path.realpath(train.root) == os.path.realpath(held_out.root):
        warnings.append(f"{train.root} and {held_out.root} are the same folder")
    elif len(held_out) > len(train):
        warnings.append(f"{held_out.root} has {len(held_out):,} images, more than the {len(train):,} in {train.root}")
    elif len(train) > SMALLEST_SHARE * len(held_out):
        warnings.append(f"{held_out.root} has only {len(held_out):,} images, but {train.root} has {len(train):,}")
    return warnings


def _class_warnings(layout: Layout, labeling: Labeling) -> list[str]:
    tree, base = layout.train, layout.base
    folder, warnings = tree.root.joinpath(*base), list[str]()
    directly, below = len(tree.names.get(base, ())), tree.counts(base)
    if labeling.by_path is None and 0 < directly < sum(below.values()):
        warnings.append(
            f"the folders {examples(list(below))} in {folder} are no classes, because files lie next to them: {directly:,} "
            f"({examples(sorted(tree.names[base]))})"
        )
    empty = [
        str(tree.root.joinpath(*parts))
        for parts in tree.empty
        if parts and parts[:-1] == base[: len(parts) - 1] and parts[-1] not in DERIVED
    ]
    if empty:
        warnings.append(f"empty folders: {len(empty):,} ({examples(empty)})")
    counts = _class_counts(layout, labeling)
    if none := [name for name in labeling.classes if not counts.get(name)]:
        warnings.append(f"classes {labeling.source} without images: {len(none):,} ({examples(none)})")
    if single := [name for name in labeling.classes if counts.get(name) == 1 and len(counts) > 1]:
        warnings.append(f"classes with a single image in {folder}: {len(single):,} ({examples(single)})")
    if labeling.by_path is None:
        warnings += [*_name_warnings(layout, labeling, folder), *_order_warnings(labeling.classes, folder)]
    return warnings


def _class_counts(layout: Layout, labeling: Labeling) -> dict[str, int]:
    """Files per class, before any are held out."""
    if labeling.by_path is None:
        return layout.train.counts(layout.base) if labeling.classes else {}
    labels = Counter(labeling.by_path[str(path)] for path in layout.train.paths)
    return {name: labels[number] for number, name in enumerate(labeling.classes)}


def _name_warnings(layout: Layout, labeling: Labeling, folder: Path) -> list[str]:
    warnings = []
    if suspicious := suspicious_classes(labeling.classes):
        warnings.append(
            f"the class folders {examples(suspicious)} in {folder} look like splits: expected a folder train and a folder "
            "validation, val, valid or test"
        )
    depth, inside = len(layout.base), dict[str, set[str]]()
    for parts in layout.train.names:
        if len(parts) > depth + 1 and parts[:depth] == layout.base:
            inside.setdefault(parts[depth], set()).add(parts[depth + 1])
    if inner := [name for name in labeling.classes if name_splits(inside.get(name, ()))]:
        warnings.append(f"the class folders {examples(inner)} in {folder} contain splits, which are read as one set")
    spellings = Counter(name.strip().casefold() for name in labeling.classes)
    if alike := [name for name in labeling.classes if spellings[name.strip().casefold()] > 1]:
        warnings.append(f"class folders in {folder} whose names differ only in capitals or spaces: {examples(alike)}")
    return warnings


def _order_warnings(classes: list[str], folder: Path) -> list[str]:
    """Class folders are sorted as text, so of 0 to 11 the folder 10 has the label 2."""
    if not all(name.isdecimal() for name in classes) or classes == (numeric := sorted(classes, key=int)):
        return []
    label = next(label for label, name in enumerate(classes) if name != numeric[label])
    padded = numeric[label].zfill(len(classes[label]))
    return [
        f"the class folders in {folder} are sorted as text, so the label {label} is the folder {classes[label]}, not "
        f"{numeric[label]}; longer names such as {padded} would keep the order of numbers"
    ]


def _left_out_warnings(layout: Layout) -> list[str]:
    found, warnings = layout.left_out, []
    for reason, paths in (("broken links", found.broken_links), ("folders that cannot be read", found.unreadable)):
        if paths:
            warnings.append(f"{reason} in {layout.root}: {len(paths):,} ({examples(sorted(paths))})")
    if pictures := found.unread_pictures():
        warnings.append(
            f"pictures in {layout.root} in formats that are not read: {sum(pictures.values()):,} ({examples(list(pictures))}); "
            "convert them to PNG or JPEG"
        )
    return warnings
