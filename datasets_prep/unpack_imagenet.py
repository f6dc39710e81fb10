"""Unpack the official archives of ImageNet (ILSVRC 2012) into train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

    python -m datasets_prep.unpack_imagenet --datadir DIR

DIR holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which lists the classes of the
validation images. The archives' folder names are ignored, so no file can escape DIR. A folder gets its final name once it is
complete, so an interrupted command can be repeated to resume.
"""

import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import scipy.io

from command_line import parse_options
from datasets_prep.folder_layout.entries import subfolders
from exits import exit_cleanly
from options import UsageError, option
from runtime.files import replace_folder
from runtime.messages import show
from runtime.outputs import check_folder, warn_of_space
from runtime.progress import progress_bar

__all__ = ["UnpackOptions", "main", "unpack_train", "unpack_validation"]

TRAIN, VALIDATION, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
IMAGE = re.compile(r"\w+\.JPEG")
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class UnpackOptions:
    """Unpacking."""

    datadir: str = option("./data", "folder of the archives; train/ and val/ are created in it")


def unpack_train(datadir: Path) -> None:
    """Unpack `train/` from the training archive, which holds one archive per class. Existing classes are skipped.

    Raises:
        UsageError: the archive is missing or damaged.
    """
    with _archive(datadir / TRAIN) as (archive, _), _named_when_complete(datadir / "train") as folder:
        for leftover in folder.glob("*.tmp-*"):
            shutil.rmtree(leftover)  # from a killed process
        for name, member in _members(archive, CLASS_ARCHIVE, "train", "class"):
            target = folder / name.group(1)
            if target.exists():
                continue
            with replace_folder(target) as temporary, tarfile.open(fileobj=member) as images:
                for image, content in _members(images, IMAGE, None, "image"):
                    (temporary / image.group()).write_bytes(content.read())


def unpack_validation(datadir: Path) -> None:
    """Unpack `val/` from the validation archive, with the classes listed in the development kit.

    Raises:
        UsageError: an archive is missing or damaged, or the two do not match.
    """
    classes = _validation_classes(datadir / DEVKIT)
    with _archive(datadir / VALIDATION) as (archive, path), _named_when_complete(datadir / "val") as folder:
        for name, content in _members(archive, VALIDATION_IMAGE, "val", "image"):
            number = int(name.group(1))
            if not 1 <= number <= len(classes):
                raise UsageError(f"{path} has {name.group()}, but {DEVKIT} lists classes of only {len(classes)} images")
            target = folder / classes[number - 1]
            target.mkdir(exist_ok=True)
            (target / name.group()).write_bytes(content.read())


def main() -> None:
    """Parse the flags and unpack the missing splits."""
    datadir = Path(parse_options(str(__doc__).splitlines()[0], [UnpackOptions])[UnpackOptions].datadir)
    for name, archive, unpack in (("train", TRAIN, unpack_train), ("val", VALIDATION, unpack_validation)):
        if not (datadir / name).exists():
            check_folder(datadir, "--datadir")
            if (datadir / archive).is_file() and not (datadir / f"{name}.unfinished").exists():
                warn_of_space(datadir, (datadir / archive).stat().st_size, f"{name}/")
            unpack(datadir)
        show(f"{datadir / name}: {len(subfolders(datadir / name))} classes")


def _validation_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in order."""
    with _archive(devkit) as (archive, path):
        kept = {}
        for name, content in _members(
            archive, re.compile(r"meta\.mat|ILSVRC2012_validation_ground_truth\.txt"), None, ""
        ):
            kept[name.group()] = content.read()
        if len(kept) != 2:
            raise UsageError(f"{path} lacks meta.mat or ILSVRC2012_validation_ground_truth.txt: download it again")
        synsets = scipy.io.loadmat(io.BytesIO(kept["meta.mat"]), squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnid_of[int(number)] for number in kept["ILSVRC2012_validation_ground_truth.txt"].split()]


def _members(
    archive: tarfile.TarFile, pattern: re.Pattern[str], description: str | None, unit: str
) -> Iterator[tuple[re.Match[str], IO[bytes]]]:
    """Yield the archive's files whose name, without folders, matches `pattern`."""
    for member in progress_bar(archive, desc=description, unit=unit, disable=description is None):
        name = pattern.fullmatch(PurePosixPath(member.name).name)
        content = archive.extractfile(member) if name and member.isfile() else None
        if name and content:
            yield name, content


@contextmanager
def _named_when_complete(folder: Path) -> Iterator[Path]:
    """Yield a folder with a temporary name, and rename it to `folder` at the end. After an error, it keeps its files."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    if not any(unfinished.iterdir()):
        raise UsageError(f"the archive has no images for {folder}: check that it is the right one")
    unfinished.rename(folder)


@contextmanager
def _archive(path: Path) -> Iterator[tuple[tarfile.TarFile, Path]]:
    if not path.is_file():
        raise UsageError(f"{path} does not exist: download it from image-net.org (requires an account)")
    try:
        with tarfile.open(path) as archive:
            yield archive, path
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot unpack {path}: {error}; if it is damaged, download it again") from error


if __name__ == "__main__":
    exit_cleanly(main)
