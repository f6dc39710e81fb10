"""Unpack the official archives of ImageNet (ILSVRC 2012) into train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

    python -m datasets_prep.unpack_imagenet --datadir DIR

DIR holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which knows the classes of the
validation images. Only plain file names are taken from an archive. A folder gets its name once it is whole; the command
continues after an interruption.
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
from options import UsageError, exit_cleanly, option
from runtime.files import replace_folder
from runtime.progress import progress_bar

__all__ = ["UnpackOptions", "main", "unpack_train", "unpack_validation"]

TRAIN, VALIDATION, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
IMAGE = re.compile(r"\w+\.JPEG")
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class UnpackOptions:
    """Unpacking."""

    datadir: str = option("./data", "folder of the archives; train/ and val/ are made in it")


def unpack_train(datadir: Path) -> None:
    """Make `train/` from the archive of archives, one for each class; classes that are there already are passed over.

    Raises:
        UsageError: the archive is missing or damaged.
    """
    with _archive(datadir / TRAIN) as (archive, _), _finished(datadir / "train") as folder:
        for left in folder.glob("*.tmp-*"):
            shutil.rmtree(left)  # by a process that was killed
        for name, member in _members(archive, CLASS_ARCHIVE, "train", "class"):
            target = folder / name.group(1)
            if target.exists():
                continue
            with replace_folder(target) as temporary, tarfile.open(fileobj=member) as images:
                for image, content in _members(images, IMAGE, None, "image"):
                    (temporary / image.group()).write_bytes(content.read())


def unpack_validation(datadir: Path) -> None:
    """Make `val/` from the archive of images and the development kit's list of their classes.

    Raises:
        UsageError: an archive is missing or damaged, or they do not belong together.
    """
    classes = _validation_classes(datadir / DEVKIT)
    with _archive(datadir / VALIDATION) as (archive, path), _finished(datadir / "val") as folder:
        for name, content in _members(archive, VALIDATION_IMAGE, "val", "image"):
            number = int(name.group(1))
            if not 1 <= number <= len(classes):
                raise UsageError(f"{path} has {name.group()}, but {DEVKIT} tells the classes of {len(classes)} images")
            target = folder / classes[number - 1]
            target.mkdir(exist_ok=True)
            (target / name.group()).write_bytes(content.read())


def main() -> None:
    """Parse the flags, and unpack what is not there yet."""
    datadir = Path(parse_options(str(__doc__).splitlines()[0], [UnpackOptions])[UnpackOptions].datadir)
    for name, unpack in (("train", unpack_train), ("val", unpack_validation)):
        if not (datadir / name).exists():
            unpack(datadir)
        print(f"{datadir / name}: {sum(1 for _ in (datadir / name).iterdir())} classes")


def _validation_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in order."""
    with _archive(devkit) as (archive, path):
        kept = {}
        for name, content in _members(
            archive, re.compile(r"meta\.mat|ILSVRC2012_validation_ground_truth\.txt"), None, ""
        ):
            kept[name.group()] = content.read()
        if len(kept) != 2:
            raise UsageError(f"{path} lacks meta.mat or ILSVRC2012_validation_ground_truth.txt: fetch it again")
        synsets = scipy.io.loadmat(io.BytesIO(kept["meta.mat"]), squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnid_of[int(number)] for number in kept["ILSVRC2012_validation_ground_truth.txt"].split()]


def _members(
    archive: tarfile.TarFile, pattern: re.Pattern[str], description: str | None, unit: str
) -> Iterator[tuple[re.Match[str], IO[bytes]]]:
    """The files whose name, without folders, `pattern` describes."""
    for member in progress_bar(archive, desc=description, unit=unit, disable=description is None):
        name = pattern.fullmatch(PurePosixPath(member.name).name)
        content = archive.extractfile(member) if name and member.isfile() else None
        if name and content:
            yield name, content


@contextmanager
def _finished(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end; what an earlier start wrote is in it."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    if not any(unfinished.iterdir()):
        raise UsageError(f"there is nothing for {folder} in the archive: is it another one?")
    unfinished.rename(folder)


@contextmanager
def _archive(path: Path) -> Iterator[tuple[tarfile.TarFile, Path]]:
    if not path.is_file():
        raise UsageError(f"there is no {path}: download it from image-net.org (an account is needed)")
    try:
        with tarfile.open(path) as archive:
            yield archive, path
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot unpack {path}: {error} (damaged? fetch it again)") from error


if __name__ == "__main__":
    exit_cleanly(main)
