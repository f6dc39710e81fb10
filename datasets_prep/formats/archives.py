"""A folder or a zip file of many small files, read by name from any number of threads and processes."""

import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from datasets_prep.folder_layout.entries import is_junk
from datasets_prep.formats.shards import FileBytes, fingerprint_of
from options import UsageError
from runtime.files import UNREADABLE

__all__ = ["Archive", "content_offset", "open_archive"]

LOCAL_HEADER = 30  # bytes before the name; the last four are the lengths of the name and of the extra field
RAW_DEFLATE = -15
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
OTHER_METHODS = {9: "Deflate64", zipfile.ZIP_BZIP2: "BZIP2", zipfile.ZIP_LZMA: "LZMA", 93: "Zstandard"}
SAMPLED_FILES = 100  # at least; their bytes are part of a folder's fingerprint


class Archive(Protocol):
    """Files by name. `path` is the folder or zip file."""

    path: Path

    def names(self) -> frozenset[str]:
        """The names of the files, relative to the archive, with slashes."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            UsageError: it cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes and some of their bytes. Arrays often have equal sizes.

        Raises:
            UsageError: a file cannot be read.
        """
        ...


def open_archive(path: Path) -> Archive:
    """Open a folder or a zip file, and list its files.

    Raises:
        UsageError: the zip file is damaged, or compressed by another method than Deflate.
    """
    return _Folder(path) if path.is_dir() else _Zip(path)


def content_offset(file: FileBytes, entry: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins in the zip file `file`: after its own header, name and extra field."""
    lengths = file.read(0, entry.header_offset, LOCAL_HEADER)[-4:]
    return entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", lengths))


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes = {
            (Path(place, file.name).relative_to(path)).as_posix(): file.stat().st_size
            for place, _, _ in os.walk(path)
            for file in os.scandir(place)
            if file.is_file() and not is_junk(file.name)
        }

    def names(self) -> frozenset[str]:
        return frozenset(self._sizes)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {self.path / name}: {error.strerror or error}") from error

    def fingerprint(self) -> str:
        names = sorted(self._sizes)
        state = "\n".join(f"{name} {self._sizes[name]}" for name in names)
        digest = hashlib.sha256(state.encode(errors="surrogateescape"))
        for name in names[:: max(1, len(names) // SAMPLED_FILES)]:
            digest.update(self.read(name))
        return digest.hexdigest()


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                entries = [entry for entry in file.infolist() if not entry.is_dir()]
            self._entries = {e.filename: e for e in entries if not any(map(is_junk, e.filename.split("/")))}
        except UNREADABLE as error:
            raise UsageError(f"cannot read the zip file {path}: {error}; download or pack it again") from error
        for name, entry in self._entries.items():
            if entry.compress_type not in METHODS:
                method = OTHER_METHODS.get(entry.compress_type, f"method {entry.compress_type}")
                raise UsageError(
                    f"{name} of {path} is compressed with {method}, but expected {' or '.join(METHODS.values())} files: "
                    "pack the zip file again"
                )
        self._bytes = FileBytes([path])

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def read(self, name: str) -> bytes:
        entry = self._entries[name]
        data = self._bytes.read(0, content_offset(self._bytes, entry), entry.compress_size)
        try:
            if entry.compress_type == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, RAW_DEFLATE)
        except zlib.error as error:
            raise UsageError(f"cannot read {name} of {self.path}: {error}; pack the zip file again") from error
        if zlib.crc32(data) != entry.CRC:
            raise UsageError(f"cannot read {name} of {self.path}: its checksum differs; pack the zip file again")
        return data

    def fingerprint(self) -> str:
        return fingerprint_of([self.path], self.path.parent)
