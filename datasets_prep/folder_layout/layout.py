"""How a folder is read as a dataset: which folders are the splits, and where the class folders lie."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from datasets_prep.folder_layout.entries import (
    DERIVED,
    FolderTree,
    LeftOut,
    Parts,
    holds_files,
    read_tree,
    subfolders,
)
from datasets_prep.folder_layout.splits import SplitFolders, class_base, find_splits

__all__ = ["Layout", "find_layout", "held_out_base"]


@dataclass
class Layout:
    """The folders of a dataset.

    Args:
        root: the whole folder.
        train: the training files, or all files if `held_out` is None.
        base: the folder of the class folders, relative to the root of `train`.
        held_out: the held-out files; None if some of the training files are to be held out.
        label_files: files that may hold labels.
        left_out: entries that are not read.
        unused: folders of splits that are not used.
        strays: files and folders next to the folders of the splits.
    """

    root: Path
    train: FolderTree
    base: Parts
    held_out: FolderTree | None
    label_files: list[Path]
    left_out: LeftOut
    unused: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)

    @property
    def class_folders(self) -> list[str]:
        """The names of the class folders, sorted; empty if a file lies next to them."""
        return [] if self.train.has_files_in(self.base) else self.train.children(self.base)


def find_layout(root: Path, suffixes: Collection[str]) -> Layout:
    """Find the splits in the folder `root`, or in the only folder with files inside it.

    Only files that end in one of `suffixes` count.
    """
    splits = find_splits(root, suffixes)
    if splits is not None:
        return _layout_of_splits(root, splits, suffixes)
    tree = read_tree(root, suffixes)
    base = class_base(tree)
    if base and (splits := find_splits(root.joinpath(*base), suffixes)) is not None:
        return _layout_of_splits(root, splits, suffixes)
    return Layout(root, tree, base, None, tree.label_files, tree.left_out)


def held_out_base(tree: FolderTree, classes: Collection[str]) -> Parts:
    """The folder in held-out files whose subfolders are `classes`: the root, or one inside folders that only wrap it."""
    base: Parts = ()
    while not tree.has_files_in(base) and len(children := tree.children(base)) == 1 and children[0] not in classes:
        base = (*base, children[0])
    return () if set(tree.children(base)).isdisjoint(classes) else base


def _layout_of_splits(root: Path, splits: SplitFolders, suffixes: Collection[str]) -> Layout:
    inside = splits.root
    used = {splits.train.root.name, splits.held_out.root.name, *splits.unused, *DERIVED}
    others = [inside / name for name in subfolders(inside) if name not in used]
    layout = Layout(
        root,
        splits.train,
        class_base(splits.train),
        splits.held_out,
        label_files=[],
        left_out=LeftOut(),
        unused=[inside / name for name in splits.unused],
        strays=[folder for folder in others if holds_files(folder, suffixes)],
    )
    above = [
        root.joinpath(*inside.relative_to(root).parts[:depth])
        for depth in range(len(inside.parts) - len(root.parts) + 1)
    ]
    for tree in (*(read_tree(folder, suffixes, deep=False) for folder in above), splits.train, splits.held_out):
        layout.left_out.merge(tree.left_out, "/".join(tree.root.relative_to(root).parts))
        layout.label_files += tree.label_files
    layout.strays += read_tree(inside, suffixes, deep=False).paths
    return layout
