"""The bytes of image files that Pillow cannot read: PNGs with damaged metadata, and files that hold something else.

Metadata says nothing about the pixels of a PNG: its text, color profile or density may be damaged, or too large for Pillow's
limits, while every viewer shows the image. PNG calls such chunks ancillary; a decoder may ignore them (PNG specification,
section 5.4).
"""

import zlib
from pathlib import Path
from typing import BinaryIO

__all__ = ["describe_content", "picture_of_png", "read_bytes"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANCILLARY = 0x20  # the bit of a chunk name's first byte
TRANSPARENCY, EXIF = b"tRNS", b"eXIf"  # the ancillary chunks that decide what is shown
HEAD = 512  # bytes that suffice to recognize CONTENTS

CONTENTS = (  # contents of files that are named like images, by how they begin
    (b"version https://git-lfs", "a Git LFS pointer in place of the image; run git lfs pull"),
    (b"\xff\x0a", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"%PDF", "a PDF document"),
    (b"\0\x05\x16\x07", "metadata of macOS"),
    (b"<!doctype html", "a web page; download the image again"),
    (b"<html", "a web page; download the image again"),
    (b"<svg", "an SVG drawing; convert it to PNG"),
    (b"<?xml", "an XML document"),
)
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))


def picture_of_png(data: bytes) -> bytes | None:
    """The PNG `data` without its metadata, except transparency and a sound EXIF block.

    Returns None if `data` is not a PNG, ends within a chunk, or has no metadata.
    """
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        name, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4])
        if end > len(data) or not name.isalpha():
            return None
        chunk = data[start:end]
        if not name[0] & ANCILLARY or name == TRANSPARENCY or (name == EXIF and _is_sound(chunk)):
            kept.append(chunk)
        start = end
        if name == b"IEND":
            break
    picture = b"".join(kept)
    return picture if len(picture) < start else None


def describe_content(head: bytes) -> str:
    """Say what a file that Pillow does not know is, from its first HEAD bytes."""
    if not head:
        return "it is empty"
    if not head.strip(b"\0"):
        return "it holds only zero bytes"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return "it holds a HEIF (HEIC) image; convert it to PNG or JPEG"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, content in CONTENTS:
        if head.startswith(beginning) or text.startswith(beginning):
            return f"it holds {content}"
    return "it is not in a known image format"


def read_bytes(source: str | Path | BinaryIO, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return file.read(count)
    source.seek(0)
    return source.read(count)


def _is_sound(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
