"""Build the LMDBs of CelebA-HQ or FFHQ from a folder of images.

    python -m datasets_prep.build_lmdb --source IMAGES --datadir DIR --image_size 256

The command writes `train.lmdb` and `validation.lmdb` into DIR. The images have the keys "0", "1", ... in natural order of
their file names (2.jpg before 10.jpg). By default, the last tenth is held out: 3,000 of CelebA-HQ's images 0.jpg to 29999.jpg.

The command may be interrupted at any moment; repeat it to resume. Each LMDB grows under a temporary name. Its key
"progress" is updated in the same transaction as the images and deleted in the last one, so a finished LMDB holds only images.
"""

import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
from PIL import Image

from command_line import parse_options
from datasets_prep.folders import list_files, state_of_files
from datasets_prep.images import IMAGE_SUFFIXES, LARGEST_SIZE, MOST_READERS, BadImageError, read_image
from datasets_prep.lmdb_file import open_lmdb_file
from datasets_prep.lmdb_images import HELD_OUT_SHARE
from exits import exit_cleanly
from options import UsageError, option
from runtime.files import free_bytes, read_json, write_json
from runtime.locks import locked
from runtime.messages import note, show, warn
from runtime.outputs import check_folder, warn_of_space
from runtime.progress import progress_bar

__all__ = ["BuildLmdbOptions", "build_lmdb", "list_in_order", "main", "split_files"]

IMAGES_PER_COMMIT = 256
PROGRESS = b"progress"
FIRST_MAP_BYTES = 1 << 30  # doubled when full; the unused part of the map takes no disk space
IDENTITY = "build.json"
LISTED_BAD_IMAGES = 10


def _encode(format: str, **settings: Any) -> Callable[[Image.Image], bytes]:
    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **settings)
        return buffer.getvalue()

    return encode


ENCODERS: dict[str, Callable[[Image.Image], bytes]] = {
    "png": _encode("PNG"),
    "raw": Image.Image.tobytes,
    "jpg": _encode("JPEG", quality=95, subsampling=0),
}


@dataclass(frozen=True)
class BuildLmdbOptions:
    """LMDB creation."""

    source: str = option("", "folder of images, searched recursively")
    datadir: str = option("", "folder for train.lmdb and validation.lmdb")
    image_size: int = option(
        256, "side of the square images in pixels; resized and cropped as in ADM", minimum=1, maximum=LARGEST_SIZE
    )
    validation: str = option(
        "",
        "held-out images: their number, taken from the end, or a file with one name per line; default: the last tenth",
    )
    format: str = option("png", "storage format: lossless (png, raw) or lossy (jpg)", choices=ENCODERS)
    skip_bad_images: bool = option(False, "leave out unreadable images and report them, instead of stopping")
    num_workers: int = option(4, "threads that read and encode images", minimum=1, maximum=MOST_READERS)


def build_lmdb(target: Path, paths: list[Path], root: Path, options: BuildLmdbOptions) -> int:
    """Write the images `paths` below `root` to the LMDB `target`. An interrupted build resumes.

    Returns:
        The number of images in the LMDB.

    Raises:
        UsageError: `target` was built or started with other images or options, an image cannot be read, the LMDB cannot be
            written, or another process is building it.
    """
    with locked(target.with_name(f"{target.name}.lock"), f"is building {target.name} in this folder"):
        return _build(target, paths, root, options)


def _build(target: Path, paths: list[Path], root: Path, options: BuildLmdbOptions) -> int:
    identity = {
        "files": len(paths),
        "files_sha256": state_of_files(paths, root, times=False),
        "image_size": options.image_size,
        "format": options.format,
    }
    unfinished = target.with_name(f"{target.name}.unfinished")
    if target.exists():
        _check_same(target, identity)
        return len(open_lmdb_file(target))
    if (unfinished / IDENTITY).exists():
        _check_same(unfinished, identity)
    else:
        write_json(unfinished / IDENTITY, identity)
    try:
        with _open_for_writing(unfinished) as environment:
            _fill(environment, paths, options, target.name)
            count = environment.stat()["entries"]
    except lmdb.Error as error:
        raise UsageError(f"cannot write the LMDB {unfinished} ({error}){_advice(error, unfinished)}") from error
    unfinished.rename(target)
    return count


def list_in_order(root: Path) -> list[Path]:
    """List the images below `root` in natural order: 2.jpg before 10.jpg.

    Raises:
        UsageError: there are none.
    """

    def words_and_numbers(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"([0-9]+)", path.relative_to(root).as_posix())
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(list_files(root, IMAGE_SUFFIXES), key=words_and_numbers)


def split_files(paths: list[Path], root: Path, validation: str) -> dict[str, list[Path]]:
    """Divide `paths` into the training and validation splits.

    Args:
        paths: images below `root`, in order.
        root: folder of the images.
        validation: number of images to hold out from the end, or a file that lists their names; "": the last tenth.

    Raises:
        UsageError: the file lists an unknown image, or a split is empty.
    """
    if validation and not validation.isdecimal():
        listed = _read_names(Path(validation))
        known = {name for path in paths for name in (path.name, path.relative_to(root).as_posix())}
        if unknown := sorted(listed - known):
            raise UsageError(f"--validation {validation} names {unknown[0]!r}, which is not in {root}")
        chosen = [path for path in paths if {path.name, path.relative_to(root).as_posix()} & listed]
    else:
        held_out = int(validation) if validation else len(paths) // HELD_OUT_SHARE
        chosen = paths[max(0, len(paths) - held_out) :]
    held = set(chosen)
    splits = {"train": [path for path in paths if path not in held], "validation": chosen}
    for split, files in splits.items():
        if not files:
            raise UsageError(
                f"the {split} split of the {len(paths)} images in {root} is empty: choose the held-out images with "
                "--validation"
            )
    return splits


def main() -> None:
    """Parse the flags and build both LMDBs."""
    options = parse_options(str(__doc__).splitlines()[0], [BuildLmdbOptions])[BuildLmdbOptions]
    for flag in ("source", "datadir"):
        if not getattr(options, flag):
            raise UsageError(f"--{flag} is missing: expected --source IMAGES --datadir DIR (see --help)")
    root, datadir = Path(options.source), Path(options.datadir)
    if not root.is_dir():
        raise UsageError(f"--source {root} is not a directory: name the folder that holds the images")
    check_folder(datadir, "--datadir")
    splits = split_files(list_in_order(root), root, options.validation)
    if not any(datadir.glob("*.lmdb*")):
        size = sum(map(len, splits.values())) * 3 * options.image_size**2
        warn_of_space(datadir, size / 4 if options.format == "jpg" else size, "the LMDBs")
    for split, paths in splits.items():
        count = build_lmdb(datadir / f"{split}.lmdb", paths, root, options)
        show(
            f"{datadir / split}.lmdb: {count} images of {options.image_size} x {options.image_size} ({options.format})"
        )


def _fill(environment: lmdb.Environment, paths: list[Path], options: BuildLmdbOptions, name: str) -> None:
    """Add the images that are still missing according to the stored progress, and delete the progress at the end."""
    with environment.begin() as transaction:
        stored = transaction.get(PROGRESS)
    if stored is None and environment.stat()["entries"]:
        return  # complete: the build was interrupted just before the rename
    position, bad = json.loads(stored) if stored else (0, [])
    with progress_bar(total=len(paths), initial=position, desc=name, unit="image") as bar:
        for values, unreadable in _encode_batches(paths[position:], options):
            first = position - len(bad)
            position, bad = position + len(values) + len(unreadable), [*bad, *unreadable]
            if len(bad) == len(paths):
                raise UsageError(f"none of the {len(paths)} images can be read; the first is {bad[0]}")
            _commit(environment, first, values, json.dumps([position, bad]) if position < len(paths) else None)
            bar.update(len(values) + len(unreadable))
    if bad:
        more = ", ..." if len(bad) > LISTED_BAD_IMAGES else ""
        listed = ", ".join(bad[:LISTED_BAD_IMAGES])
        warn(f"--skip_bad_images: left out {len(bad)} of {len(paths)} images: {listed}{more}")


def _encode_batches(paths: list[Path], options: BuildLmdbOptions) -> Iterator[tuple[list[bytes], list[str]]]:
    """Yield batches of encoded images, with the names of the batch's unreadable images."""
    encode = ENCODERS[options.format]

    def encode_file(path: Path) -> bytes | BadImageError:
        try:
            return encode(Image.fromarray(read_image(path, options.image_size).permute(1, 2, 0).numpy()))
        except BadImageError as error:
            if options.skip_bad_images:
                return error
            raise

    with ThreadPoolExecutor(options.num_workers) as workers:
        for start in range(0, len(paths), IMAGES_PER_COMMIT):
            results = list(workers.map(encode_file, paths[start : start + IMAGES_PER_COMMIT]))
            yield (
                [result for result in results if isinstance(result, bytes)],
                [result.image for result in results if isinstance(result, BadImageError)],
            )


def _commit(environment: lmdb.Environment, first: int, values: list[bytes], progress: str | None) -> None:
    """Write images under the keys `first`, `first` + 1, ... and the progress in one transaction; None deletes the progress."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for number, value in enumerate(values, start=first):
                    transaction.put(str(number).encode(), value)
                if progress is None:
                    transaction.delete(PROGRESS)
                else:
                    transaction.put(PROGRESS, progress.encode())
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _open_for_writing(folder: Path) -> lmdb.Environment:
    try:
        return lmdb.open(str(folder), map_size=FIRST_MAP_BYTES)
    except lmdb.Error as error:
        if os.strerror(errno.ENOLCK) not in str(error):
            raise
    note(f"the file system of {folder} has no locks: do not run this command twice at the same time")
    return lmdb.open(str(folder), map_size=FIRST_MAP_BYTES, lock=False)


def _advice(error: lmdb.Error, folder: Path) -> str:
    if os.strerror(errno.ENODEV) in str(error):
        return ": its file system cannot map files into memory; choose a --datadir on a local disk, then copy the LMDB"
    free = free_bytes(folder)
    room = f", {free / 1e6:.0f} MB are free" if free is not None else ""
    return f"{room}: check the disk, or choose another --datadir; the same command continues where this one stopped"


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    if not (folder / IDENTITY).exists():
        raise UsageError(f"{folder} exists, but this command did not build it: remove it, or choose another --datadir")
    stored = read_json(folder / IDENTITY)
    for key, expected in identity.items():
        if stored.get(key) != expected:
            raise UsageError(
                f"{folder} was started with another {key}: expected {expected}, but found {stored.get(key)}. "
                "Repeat the original command, remove the folder, or choose another --datadir"
            )


def _read_names(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--validation {path}: expected a number or a file that lists names ({error})") from error
    return {line.strip() for line in lines if line.strip()}


if __name__ == "__main__":
    exit_cleanly(main)
