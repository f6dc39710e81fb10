"""Which entries of a folder count: the one rule for training, scoring, LMDBs, masks and label maps.

Hidden entries and what operating systems, archives, file servers and notebooks leave behind are passed over. Symbolic links
are followed. A folder is read once, so links cannot form an endless loop.
"""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from datasets_prep.folder_layout.label_files import LABEL_FILES

__all__ = [
    "DERIVED",
    "FolderTree",
    "LeftOut",
    "Parts",
    "examples",
    "holds_files",
    "is_junk",
    "printable",
    "read_tree",
    "subfolders",
]

# Names in lower case. Everything that begins with a dot (.DS_Store, ._image.jpg, .ipynb_checkpoints) is passed over too.
JUNK = frozenset((
    "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS
    "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information", "found.000",  # Windows
    "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",  # Synology, QNAP
    "lost+found", "__pycache__",
))  # fmt: skip
# Picture formats that are not read, so that a folder of them deserves a warning.
UNREAD_PICTURES = frozenset((
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jfif", ".jpe", ".pnm", ".pbm", ".tga", ".exr", ".hdr", ".psd", ".svg",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".dcm", ".ico", ".apng",
))  # fmt: skip
DERIVED = frozenset(  # folders that this project writes into --datadir
    ("autoencoders", "latent_cache", "statistics", "lightningdit")
)
RUN_ENDING = ".training"  # of a run's folder in DERIVED, whose pictures are not images of the data
EXAMPLES = 3  # named in a message
PROBED_ENTRIES = 1000

Kind = Literal["folder", "linked folder", "file", "broken link", "special file"]
Parts = tuple[str, ...]


@dataclass
class LeftOut:
    """Entries that were not read, as paths relative to the root, by reason."""

    junk: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    repeated_links: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    other_types: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "LeftOut", place: str) -> None:
        """Add the entries of the folder `place`, relative to this root."""
        for name in ("junk", "broken_links", "repeated_links", "unreadable", "special"):
            getattr(self, name).extend(_joined(place, path) for path in getattr(other, name))
        self.other_types.update(other.other_types)

    def describe(self) -> list[str]:
        """One phrase per reason, each with a count and examples."""
        reasons = [
            ("hidden or system entries", self.junk),
            ("broken links", self.broken_links),
            ("links to folders that are read already", self.repeated_links),
            ("unreadable folders", self.unreadable),
            ("special files", self.special),
        ]
        phrases = [f"{reason}: {len(paths):,} ({examples(sorted(paths))})" for reason, paths in reasons if paths]
        if self.other_types:
            types = [suffix for suffix, _ in self.other_types.most_common()]
            phrases.append(f"files of other types: {self.other_types.total():,} ({examples(types)})")
        return phrases

    def unread_pictures(self) -> dict[str, int]:
        """Counts of pictures in formats that are not read, by suffix."""
        return {suffix: count for suffix, count in self.other_types.items() if suffix in UNREAD_PICTURES}


@dataclass
class FolderTree:
    """The files below a folder.

    Args:
        root: the folder.
        names: names of the files by their folder, whose path relative to the root is split into parts.
        label_files: files that may hold labels.
        empty: folders without any entry that counts, relative to the root.
        left_out: the other entries.
    """

    root: Path
    names: dict[Parts, list[str]] = field(default_factory=dict)
    label_files: list[Path] = field(default_factory=list)
    empty: list[Parts] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def has_files_in(self, base: Parts) -> bool:
        """Whether files lie directly in the folder `base`."""
        return base in self.names

    def children(self, base: Parts) -> list[str]:
        """The names of the folders in `base` with files anywhere below, sorted."""
        return list(self.counts(base))

    def counts(self, base: Parts) -> dict[str, int]:
        """The number of files below each of the folders `children(base)`."""
        depth, counts = len(base), Counter[str]()
        for parts, names in self.names.items():
            if len(parts) > depth and parts[:depth] == base:
                counts[parts[depth]] += len(names)
        return dict(sorted(counts.items()))

    @cached_property
    def paths(self) -> list[Path]:
        """All files, sorted as paths are. Making them takes a second for 100,000 files, so it is done once."""
        files = sorted((*parts, name) for parts, names in self.names.items() for name in names)
        return [Path(os.path.join(self.root, *file)) for file in files]  # noqa: PTH118 - pathlib is slow for a million files


class _Place(NamedTuple):
    """A folder to read: its path, its parts relative to the root, its path without links, and whether it is a link."""

    path: str
    parts: Parts
    real: str
    linked: bool = False


def is_junk(name: str) -> bool:
    """Whether an entry of this name never counts, such as `.DS_Store`, `@eaDir` or `Thumbs.db`."""
    return name.startswith(".") or name.lower() in JUNK


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in `folder` that count, links included, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not is_junk(e.name) and _kind(e) in ("folder", "linked folder"))


def holds_files(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether one of the first PROBED_ENTRIES entries below `folder` is a file that ends in one of `suffixes`."""
    seen, folders = 0, [folder]
    while folders and seen < PROBED_ENTRIES:
        for entry, kind in _entries(str(folders.pop()), LeftOut(), folder.name):
            seen += 1
            if kind == "file" and _suffix(entry.name) in suffixes:
                return True
            if kind == "folder":
                folders.append(Path(entry.path))
    return False


def read_tree(root: Path, suffixes: Collection[str], *, deep: bool = True) -> FolderTree:
    """Find all files below `root` that end in one of `suffixes`, in upper or lower case.

    Without `deep`, subfolders are not read. Real folders are read before links. A link to a folder that is read already, or
    that lies above `root`, is left out.
    """
    tree = FolderTree(root)
    real = os.path.realpath(root)
    seen = {real, *map(str, Path(real).parents)}
    folders, links = [_Place(str(root), (), real)], list[_Place]()
    while folders or links:
        if not folders:
            links.sort(key=lambda place: (len(place.parts), place.parts), reverse=True)
            link = links.pop()
            if link.real in seen:
                tree.left_out.repeated_links.append("/".join(link.parts))
                continue
            seen.add(link.real)
            folders.append(link)
        for found in _read_folder(tree, folders.pop(), suffixes):
            if not deep:
                continue
            if found.linked:
                links.append(found)
            elif found.real not in seen:
                seen.add(found.real)
                folders.append(found)
    return tree


def _read_folder(tree: FolderTree, place: _Place, suffixes: Collection[str]) -> Iterator[_Place]:
    """Add the files of one folder to `tree`, and yield its subfolders and links to folders."""
    within = "/".join(place.parts)
    names, empty = list[str](), True
    own = place.parts[:1] and place.parts[0] in DERIVED
    for entry, kind in _entries(place.path, tree.left_out, within):
        empty = False
        if own and entry.name.endswith(RUN_ENDING):
            continue
        if kind == "folder":
            yield _Place(entry.path, (*place.parts, entry.name), f"{place.real.rstrip(os.sep)}{os.sep}{entry.name}")
        elif kind == "linked folder":
            yield _Place(entry.path, (*place.parts, entry.name), os.path.realpath(entry.path), linked=True)
        elif kind == "special file":
            tree.left_out.special.append(_joined(within, entry.name))
        elif _suffix(entry.name) in suffixes:
            names.append(entry.name)
        elif entry.name.lower() in LABEL_FILES:
            tree.label_files.append(Path(entry.path))
        elif not own:
            tree.left_out.other_types[_suffix(entry.name) or "no suffix"] += 1
    if names:
        tree.names[place.parts] = names
    if empty:
        tree.empty.append(place.parts)


def _entries(folder: str, left_out: LeftOut, within: str) -> Iterator[tuple[os.DirEntry, Kind]]:
    """The entries of a folder that count, with their kinds. The others are recorded in `left_out`."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    left_out.junk.append(_joined(within, entry.name))
                elif (kind := _kind(entry)) == "broken link":
                    left_out.broken_links.append(_joined(within, entry.name))
                else:
                    yield entry, kind
    except OSError as error:
        if not within:
            raise
        left_out.unreadable.append(f"{within}: {error.strerror}")


def _kind(entry: os.DirEntry) -> Kind:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if not entry.is_symlink():
        return "file" if entry.is_file(follow_symlinks=False) else "special file"
    try:
        mode = entry.stat().st_mode
    except OSError:  # the target is missing, or the link points to itself
        return "broken link"
    if stat.S_ISDIR(mode):
        return "linked folder"
    return "file" if stat.S_ISREG(mode) else "special file"


def examples(names: Collection[str]) -> str:
    """The first EXAMPLES of `names`, and whether there are more."""
    more = ", ..." if len(names) > EXAMPLES else ""
    return ", ".join(printable(name) for name in list(names)[:EXAMPLES]) + more


def printable(name: str) -> str:
    """A file's name on one line, with escapes for everything that cannot be printed."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - pathlib is slow for a million files


def _joined(within: str, name: str) -> str:
    return f"{within}/{name}" if within else name
