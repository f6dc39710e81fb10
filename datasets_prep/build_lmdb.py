"""Make the LMDBs of CelebA-HQ or FFHQ from a folder of images.

    python -m datasets_prep.build_lmdb --source IMAGES --datadir DIR --image_size 256

writes `train.lmdb` and `validation.lmdb` below DIR, images under the keys "0", "1", ... in the order of the files' names, with
numbers in them taken as numbers: CelebA-HQ's are 0.jpg to 29999.jpg, and the last 3,000 of these are held out. Each LMDB
grows under a temporary name; its last key, "progress", moves on in the same transaction as the images do, and is deleted in
the last one. So the command continues after it was ended at any moment, and a finished LMDB holds nothing but images.
"""

import io
import json
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
from datasets_prep.images import IMAGE_SUFFIXES, BadImageError, center_crop, open_rgb
from datasets_prep.lmdb_file import open_lmdb_file
from datasets_prep.lmdb_images import HELD_OUT_SHARE
from options import UsageError, exit_cleanly, option
from runtime.files import read_json, write_json
from runtime.progress import progress_bar

__all__ = ["BuildLmdbOptions", "build_lmdb", "list_in_order", "main", "split_files"]

IMAGES_PER_COMMIT = 256
PROGRESS = b"progress"
FIRST_MAP_BYTES = 1 << 30  # doubled whenever it is full; an LMDB takes no more disk than its images
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
    """Making LMDBs."""

    source: str = option("", "folder of images, searched with all folders below it")
    datadir: str = option("", "folder for train.lmdb and validation.lmdb")
    image_size: int = option(256, "side of the square images in pixels: resized and cropped as ADM does", minimum=1)
    validation: str = option(
        "", "how many of the last images to hold out, or a file with one name per line; default: the last tenth"
    )
    format: str = option("png", "how images are stored: losslessly (png, raw) or not (jpg)", choices=ENCODERS)
    skip_bad_images: bool = option(False, "leave unreadable images out, with a count, instead of stopping")
    num_workers: int = option(4, "threads that read and encode images", minimum=1)


def build_lmdb(target: Path, paths: list[Path], root: Path, options: BuildLmdbOptions) -> int:
    """Write the images of `paths` (below `root`) to the LMDB `target`, or what is missing of it; returns their number.

    Raises:
        UsageError: `target` is there, or was begun, with other images or options; or an image cannot be read.
    """
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
    with _opened(unfinished) as environment:
        _fill(environment, paths, options, target.name)
        count = environment.stat()["entries"]
    unfinished.rename(target)
    return count


def list_in_order(root: Path) -> list[Path]:
    """The images below `root`, 2.jpg before 10.jpg.

    Raises:
        UsageError: there are none.
    """

    def words_and_numbers(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"([0-9]+)", path.relative_to(root).as_posix())
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(list_files(root, IMAGE_SUFFIXES), key=words_and_numbers)


def split_files(paths: list[Path], root: Path, validation: str) -> dict[str, list[Path]]:
    """The files of each split: `validation` names those to hold out, or says how many of the last; "" is a tenth.

    Raises:
        UsageError: a file that names an unknown image, or a split without an image.
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
                f"{len(paths)} images in {root}: none is left for {split}; say with --validation which to hold out"
            )
    return splits


def main() -> None:
    """Parse the flags and make both LMDBs."""
    options = parse_options(str(__doc__).splitlines()[0], [BuildLmdbOptions])[BuildLmdbOptions]
    for flag in ("source", "datadir"):
        if not getattr(options, flag):
            raise UsageError(f"--{flag} is missing: expected --source IMAGES --datadir DIR (see --help)")
    root, datadir = Path(options.source), Path(options.datadir)
    if not root.is_dir():
        raise UsageError(f"--source {root} is no directory: name the folder that holds the images")
    splits = split_files(list_in_order(root), root, options.validation)
    for split, paths in splits.items():
        count = build_lmdb(datadir / f"{split}.lmdb", paths, root, options)
        print(
            f"{datadir / split}.lmdb: {count} images of {options.image_size} x {options.image_size} ({options.format})"
        )


def _fill(environment: lmdb.Environment, paths: list[Path], options: BuildLmdbOptions, name: str) -> None:
    """Add the images from where the progress stands; at the end there is none any more."""
    with environment.begin() as transaction:
        stored = transaction.get(PROGRESS)
    if stored is None and environment.stat()["entries"]:
        return  # all are there; only the new name was missing
    position, bad = json.loads(stored) if stored else (0, [])
    with progress_bar(total=len(paths), initial=position, desc=name, unit="image") as bar:
        for values, unreadable in _encoded(paths[position:], options):
            first = position - len(bad)
            position, bad = position + len(values) + len(unreadable), [*bad, *unreadable]
            if len(bad) == len(paths):
                raise UsageError(f"none of the {len(paths)} images can be read, the first is {bad[0]}")
            _commit(environment, first, values, json.dumps([position, bad]) if position < len(paths) else None)
            bar.update(len(values) + len(unreadable))
    if bad:
        more = ", ..." if len(bad) > LISTED_BAD_IMAGES else ""
        listed = ", ".join(bad[:LISTED_BAD_IMAGES])
        print(f"--skip_bad_images: left out {len(bad)} of {len(paths)} images: {listed}{more}")


def _encoded(paths: list[Path], options: BuildLmdbOptions) -> Iterator[tuple[list[bytes], list[str]]]:
    """Batches of values, with the names of the images among them that cannot be read."""
    encode = ENCODERS[options.format]

    def value(path: Path) -> bytes | BadImageError:
        try:
            return encode(Image.fromarray(center_crop(open_rgb(path, str(path)), options.image_size)))
        except BadImageError as error:
            if options.skip_bad_images:
                return error
            raise

    with ThreadPoolExecutor(options.num_workers) as workers:
        for start in range(0, len(paths), IMAGES_PER_COMMIT):
            found = list(workers.map(value, paths[start : start + IMAGES_PER_COMMIT]))
            yield (
                [item for item in found if isinstance(item, bytes)],
                [item.image for item in found if isinstance(item, BadImageError)],
            )


def _commit(environment: lmdb.Environment, first: int, values: list[bytes], progress: str | None) -> None:
    """Images under the keys `first`, `first` + 1, ... and the progress (None: at the end), all or nothing."""
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


def _opened(folder: Path) -> lmdb.Environment:
    try:
        return lmdb.open(str(folder), map_size=FIRST_MAP_BYTES)
    except lmdb.Error as error:
        raise UsageError(f"cannot open the LMDB {folder}: {error}") from error


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    if not (folder / IDENTITY).exists():
        raise UsageError(f"{folder} exists, and was not made by this command: remove it, or name another --datadir")
    begun = read_json(folder / IDENTITY)
    for key, expected in identity.items():
        if begun.get(key) != expected:
            raise UsageError(
                f"{folder} was begun with another {key}: it has {begun.get(key)}, this command {expected}. "
                "Repeat the first command, remove it, or name another --datadir"
            )


def _read_names(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--validation {path}: expected a number or a file of names: {error}") from error
    return {line.strip() for line in lines if line.strip()}


if __name__ == "__main__":
    exit_cleanly(main)
