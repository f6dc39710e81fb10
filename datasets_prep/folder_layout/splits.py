"""Which folders hold the training and the held-out images, and which folder holds the class folders.

A folder may be a split if its name contains one word of TRAINING or HELD_OUT in any capitals, alone or decorated
(`train2017`, `test_set`, `seg_train`). Splits come in pairs of a training and a held-out folder with the same decoration.
"""

import itertools
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from datasets_prep.folder_layout.entries import FolderTree, Parts, holds_files, read_tree, subfolders

__all__ = [
    "TRAINING",
    "NamedSplits",
    "SplitFolders",
    "class_base",
    "find_splits",
    "name_splits",
    "split_names",
    "suspicious_classes",
]

TRAINING = ("train", "training")
HELD_OUT = ("validation", "val", "valid", "dev", "test", "testing", "eval", "evaluation")  # in order of preference
DECORATIONS = frozenset(
    "data dataset files folder image images img imgs jpeg jpg photos pictures png set split".split()
)
TOKEN = re.compile(r"[^\W\d_]+|\d+")
Rank = tuple[int, bool, bool, str]


class SplitFolders(NamedTuple):
    """The folders of both splits, with their files, and the other folders of splits in `root` that hold files."""

    root: Path
    train: FolderTree
    held_out: FolderTree
    unused: list[str]


class NamedSplits(NamedTuple):
    """The split folders in a folder, the preferred ones first."""

    train: list[str]
    held_out: list[str]


def find_splits(root: Path, suffixes: Collection[str]) -> SplitFolders | None:
    """Find the folders of the splits in `root`; None if it lacks one of them, or if all held-out folders are empty.

    The training folder is the first one with files. If all are empty, it is the first one.
    """
    for named in name_splits(subfolders(root)):
        train = _first_with_files(root, named.train, suffixes)
        held_out = _first_with_files(root, named.held_out, suffixes)
        if len(held_out):
            chosen = {train.root.name, held_out.root.name}
            others = [name for name in (*named.train, *named.held_out) if name not in chosen]
            return SplitFolders(root, train, held_out, [name for name in others if holds_files(root / name, suffixes)])
    return None


def name_splits(names: Iterable[str]) -> list[NamedSplits]:
    """The pairs of splits among folders of these names, the least decorated first.

    Numbers count as decoration (`train`, `test1`) only if no pair is found without them.
    """
    names = list(names)
    return _pairs(names, digits=True) or _pairs(names, digits=False)


def _pairs(names: list[str], digits: bool) -> list[NamedSplits]:
    groups: dict[Parts, tuple[list[Rank], list[Rank]]] = {}
    for name in names:
        for role, words in enumerate((TRAINING, HELD_OUT)):
            if (found := _split_word(name, words)) is not None:
                word, rest = found
                decoration = rest if digits else tuple(token for token in rest if not token.isdecimal())
                rank = words.index(word), name.lower() != word, name != name.lower(), name
                groups.setdefault(decoration, ([], []))[role].append(rank)
    pairs = sorted((len(decoration), decoration, *group) for decoration, group in groups.items() if all(group))
    return [
        NamedSplits([rank[-1] for rank in sorted(train)], [rank[-1] for rank in sorted(held_out)])
        for _, _, train, held_out in pairs
    ]


def split_names(names: Iterable[str]) -> NamedSplits:
    """Sort names of files by the word of a split in them: `train-00000-of-00002`, `val_0001`.

    If no name says "train", files without such a word are training files. If none are left, all files are training files.
    Of several words for held-out files, the first in HELD_OUT counts.
    """
    by_word: dict[str, list[str]] = {}
    for name in sorted(names):
        tokens = [_undecorated(token) for token in TOKEN.findall(name.lower())]
        word = next((token for token in tokens if token in (*TRAINING, *HELD_OUT)), "")
        by_word.setdefault("train" if word in TRAINING else word, []).append(name)
    train = by_word.get("train") or by_word.get("") or []
    held_out = next((by_word[word] for word in HELD_OUT if word in by_word), [])
    return NamedSplits(train, held_out) if train else NamedSplits(sorted(itertools.chain(*by_word.values())), [])


def suspicious_classes(names: list[str]) -> list[str]:
    """The class folders that are probably splits: those named like held-out images, or all if all have a split's name."""
    held_out = [name for name in names if name.lower() in HELD_OUT]
    if not held_out and len(names) > 1 and all(_contains_split_word(name) for name in names):
        return names
    return held_out


def class_base(tree: FolderTree, base: Parts = ()) -> Parts:
    """The folder that holds the class folders: `base`, or the one inside folders that only wrap it.

    A folder named like the training split is always entered. Another single folder is entered if several folders with files,
    and no files, lie in it or in a further single folder.
    """
    inner = base
    while not tree.has_files_in(inner) and len(children := tree.children(inner)) == 1:
        inner = (*inner, children[0])
        if children[0].lower() in TRAINING:
            base = inner
    return base if tree.has_files_in(inner) else inner


def _first_with_files(root: Path, names: list[str], suffixes: Collection[str]) -> FolderTree:
    """The first of the folders with files, or the first folder."""
    first = None
    for name in names:
        tree = read_tree(root / name, suffixes)
        if len(tree):
            return tree
        first = first or tree
    assert first is not None
    return first


def _split_word(name: str, words: tuple[str, ...]) -> tuple[str, Parts] | None:
    """The word of a split in a folder's name, and the rest of the name without DECORATIONS; None without one of `words`."""
    tokens = [_undecorated(token) for token in TOKEN.findall(name.lower())]
    found = [token for token in tokens if token in (*TRAINING, *HELD_OUT)]
    if len(found) != 1 or found[0] not in words:
        return None
    return found[0], tuple(token for token in tokens if token not in (*found, *DECORATIONS))


def _contains_split_word(name: str) -> bool:
    """Whether a folder's name contains a split's name, such as `trainA`."""
    tokens = TOKEN.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return any(_undecorated(token) in (*TRAINING, *HELD_OUT) for token in tokens)


def _undecorated(token: str) -> str:
    """`trainset` without `set`."""
    return shorter if (shorter := token.removesuffix("set")) in (*TRAINING, *HELD_OUT) else token
